//! What the process may still do as root of its user namespace, and how much of the host it may use.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::{JailError, failed};

/// What a file server needs to act for every user of the guest; in the user namespace, so for files of users that are mapped in it and for nothing
/// else. `CAP_MKNOD` and `CAP_DAC_READ_SEARCH` mean nothing there: device nodes and file handles are for root of the host.
const FOR_FILES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP);

/// Gives up every privilege, but for [`FOR_FILES`] if there are files to serve, and everything that could bring one back.
pub(super) fn drop_all_but_those_for_files(files: bool) -> Result<(), JailError> {
    // While there is CAP_SETGID.
    rustix::thread::set_thread_groups(&[]).map_err(failed("leave all groups"))?;

    // The kernel knows more capabilities from time to time, and says EINVAL to those it does not know.
    for number in 0..64 {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(e) => return Err(failed("bound capabilities")(e)),
        }
    }
    let kept = if files { FOR_FILES } else { CapabilitySet::empty() };
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("drop capabilities"))?;
    set_no_new_privs(true).map_err(failed("renounce new privileges"))?;
    // Whoever acts for a user of the guest makes the kernel set this to what the host has in fs.suid_dumpable (Linux 6.12 kernel/cred.c,
    // commit_creds()): 0, the same, unless its administrator says otherwise.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbid core dumps"))?;

    // A core dump would hold what the process knows of its guest, and queues of messages kernel memory. One byte, for a limit of none means
    // nothing where the host hands core dumps to a program, and one byte means that there is none there, either (fs/coredump.c, do_coredump()).
    for (resource, most) in [(Resource::Core, 1), (Resource::Msgqueue, 0)] {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(failed("limit resources"))?;
    }
    Ok(())
}

/// As many open files as Linux lets anybody have by default (`fs.nr_open`).
const OPEN_FILES: u64 = 1 << 20;

/// Raises the limit of open files: the file server holds one for each file the guest has open, and one for each inode in its caches. To be
/// called while the process is root of the host, who may go beyond the hard limit; others go up to it.
pub(super) fn raise_limit_of_open_files() -> Result<(), JailError> {
    let hard = getrlimit(Resource::Nofile).maximum;
    let beyond = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    if hard.is_some_and(|hard| hard < OPEN_FILES) && setrlimit(Resource::Nofile, beyond).is_ok() {
        return Ok(());
    }
    setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard })
        .map_err(failed("raise the limit of open files"))
}
