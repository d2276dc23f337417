//! One more wall, of another make: Landlock, where the kernel has it.
//!
//! It says again what the namespaces say: files are those of the share, there is no network, and no process but this. A hole in the one is
//! not a hole in the other.

use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest of its interfaces that is known here (Linux 6.12). An older kernel does what it can, one without it nothing.
const KNOWN: ABI = ABI::V6;

/// Confines the calling thread, and all it will start, to what is below `share`, and to itself; how much of that the kernel does. To be called
/// when there are no new privileges any more.
///
/// # Errors
/// When the kernel has it and refuses.
pub(super) fn restrict(share: Option<&OwnedFd>) -> Result<RulesetStatus, RulesetError> {
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
    Ok(rules.no_new_privs(false).restrict_self()?.ruleset)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::ErrorKind;
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    use std::path::Path;
    use std::process::{Child, Command};

    use rustix::io::Errno;
    use rustix::process::{Pid, test_kill_process};

    use super::*;

    /// Does something on a thread that is confined to `share`; what came of it, if the kernel has this version of the interface.
    fn confined<T: Send>(version: i64, share: Option<&Path>, deed: impl FnOnce() -> T + Send) -> Option<T> {
        // SAFETY: asks for the version, and passes no memory (landlock_create_ruleset(2)).
        let known = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
        if known < version {
            println!("skipped: this kernel has version {known} of Landlock, not {version}");
            return None;
        }
        let share = share.map(|share| OwnedFd::from(File::open(share).unwrap()));
        let thread = || {
            rustix::thread::set_no_new_privs(true).unwrap();
            let status = restrict(share.as_ref()).unwrap();
            let expected =
                if known < 6 { RulesetStatus::PartiallyEnforced } else { RulesetStatus::FullyEnforced };
            assert_eq!(status, expected);
            deed()
        };
        Some(std::thread::scope(|scope| scope.spawn(thread).join().unwrap()))
    }

    #[test]
    fn files_are_those_of_the_share() {
        let (share, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&share, &other] {
            fs::write(dir.path().join("file"), "content").unwrap();
        }
        confined(1, Some(share.path()), || {
            let file = share.path().join("file");
            assert_eq!(fs::read_to_string(&file).unwrap(), "content");
            fs::write(share.path().join("new"), "more").unwrap();
            fs::rename(file, share.path().join("moved")).unwrap();
            for outside in [other.path().join("file"), "/proc/self/status".into(), "/dev/kvm".into()] {
                let error = File::open(&outside).unwrap_err();
                let gone = outside.starts_with("/dev") && error.kind() == ErrorKind::NotFound;
                assert!(gone || error.kind() == ErrorKind::PermissionDenied, "{outside:?}: {error}");
            }
            let error = fs::write(other.path().join("new"), "").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
            let error = fs::hard_link(share.path().join("new"), other.path().join("link")).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::CrossesDevices),
                "{error}"
            );
        });
    }

    #[test]
    fn without_a_share_there_are_no_files() {
        let dir = tempfile::tempdir().unwrap();
        confined(1, None, || {
            assert_eq!(fs::read_dir(dir.path()).unwrap_err().kind(), ErrorKind::PermissionDenied);
        });
    }

    #[test]
    fn there_is_no_tcp() {
        confined(4, None, || {
            assert_eq!(TcpListener::bind("127.0.0.1:0").unwrap_err().kind(), ErrorKind::PermissionDenied);
        });
    }

    /// Ends with the test.
    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn there_is_no_other_process() {
        let other = Sleeper(Command::new("sleep").arg("1000").spawn().unwrap());
        let pid = Pid::from_child(&other.0);
        test_kill_process(pid).unwrap();
        let name = format!("kvrun-landlock-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let _listener = UnixListener::bind_addr(&address).unwrap();
        UnixStream::connect_addr(&address).unwrap();
        confined(6, None, || {
            assert_eq!(test_kill_process(pid), Err(Errno::PERM));
            let error = UnixStream::connect_addr(&address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        });
    }
}
