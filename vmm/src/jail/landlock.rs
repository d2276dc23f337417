//! One more wall, of another make: Landlock, where the kernel has it.
//!
//! It says again what the namespaces say: files are those of the share, and there is no network. A hole in the one is not a hole in the
//! other.

use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest of its interfaces that is known here (Linux 6.12); an older kernel does what it can.
const KNOWN: ABI = ABI::V6;

/// Confines the process, and all threads it will have, to what is below `share`, and to itself.
pub(super) fn restrict(share: Option<&OwnedFd>) {
    match try_restrict(share) {
        Ok(RulesetStatus::FullyEnforced) => log::debug!("Landlock confines this process"),
        Ok(RulesetStatus::PartiallyEnforced) => {
            log::debug!("Landlock confines this process in part: the kernel is older");
        }
        Ok(RulesetStatus::NotEnforced) => log::debug!("this kernel has no Landlock"),
        Err(error) => log::debug!("no Landlock: {error}"),
    }
}

fn try_restrict(share: Option<&OwnedFd>) -> Result<RulesetStatus, RulesetError> {
    let files = AccessFs::from_all(KNOWN);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(files)?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    if let Some(share) = share {
        rules = rules.add_rule(PathBeneath::new(share, files))?;
    }
    // That there are no new privileges has been said already.
    Ok(rules.no_new_privs(false).restrict_self()?.ruleset)
}
