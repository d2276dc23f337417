//! The jail: what this process can still reach once it runs a guest.
//!
//! The pod engine starts the process as root, as process 1 of a PID namespace, with three or four descriptors. [`enter`] does the
//! rest, one step per function, before anything else is looked at:
//!
//! 1. every descriptor but those is closed;
//! 2. new user, mount, network, IPC, UTS and cgroup namespaces ([`namespaces`]);
//! 3. a root that is an empty, read-only tmpfs, with the share in it as a slave mount ([`root`]);
//! 4. capabilities: those that a file server needs, inside the user namespace, if there is a share; else none ([`privileges`]);
//! 5. no new privileges, not dumpable, resource limits;
//! 6. Landlock, where the kernel has it ([`landlock`]).
//!
//! System call filters are the other half and belong to threads: [`crate::thread`].
//!
//! Nothing of the host's file systems stays reachable: the directories that are still open - the share, the process's own entry of
//! a procfs that knows no other process - lead nowhere else, not by `..` either.

mod landlock;
mod namespaces;
mod privileges;
mod root;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use ::landlock::RulesetError;
use kvrun_vmm_api::{CONTROL_FD, SHARE_FD};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

/// The jail could not be built. There is no machine without one.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The process shares its PID namespace, so it is not where the engine puts it.
    #[error("kvrun-vmm must be process 1 of a PID namespace, as kvrun starts it")]
    NotProcessOne,
    /// A step failed.
    #[error("cannot build the jail: {step}")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Identities of the outer user namespace are in no order known to us.
    #[error("cannot build the jail: the user namespace around it has the strange map {0:?}")]
    IdMap(String),
    /// The kernel has Landlock, but not for this process.
    #[error("cannot build the jail: confine the process by Landlock")]
    Landlock(#[from] RulesetError),
}

fn failed(step: &'static str) -> impl Fn(Errno) -> JailError {
    move |source| JailError::Step { step, source }
}

/// Proof that the process is jailed, and what it has in there.
#[derive(Debug)]
pub struct Jail {
    share: Option<Share>,
}

/// The directory that file system devices may serve, and what a file server needs beside it.
#[derive(Debug)]
pub struct Share {
    directory: OwnedFd,
    proc_fds: OwnedFd,
}

/// Jails the process, with the share that `share` refers to, if there is one. To be called first of all, while there is one thread.
///
/// # Errors
/// [`JailError`]; the process then has lost what it has lost, and should end.
pub fn enter(share: Option<OwnedFd>) -> Result<Jail, JailError> {
    if !rustix::process::getpid().is_init() {
        return Err(JailError::NotProcessOne);
    }
    close_strangers()?;
    // The C library and rustix learn from /proc what the kernel told the program at its start; so let them do that while there is one.
    crate::monotonic_ns();
    let proc = root::own_proc()?;
    // It has to be on the way into the new mount namespace: the kernel translates the working directory, and no descriptor.
    match &share {
        Some(share) => rustix::process::fchdir(share),
        None => rustix::process::chdir("/"),
    }
    .map_err(failed("go to the share"))?;
    let has_share = share.is_some();
    drop(share);

    privileges::raise_limit_of_open_files()?;
    namespaces::enter(&proc)?;
    root::replace(has_share)?;
    let share = has_share.then(|| Share::open(&proc)).transpose().map_err(failed("open the share"))?;
    privileges::drop_all_but_those_for_files(has_share)?;
    landlock::restrict(share.as_ref().map(|share| &share.directory))?;
    Ok(Jail { share })
}

/// Closes whatever the engine did not mean to hand over.
fn close_strangers() -> Result<(), JailError> {
    const { assert!(SHARE_FD == CONTROL_FD + 1) };
    // SAFETY: nothing has been opened by this process yet, so no descriptor from here on is owned by anybody.
    let result = unsafe { libc::close_range(SHARE_FD.unsigned_abs() + 1, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(failed("close stray descriptors")(last_errno())) }
}

/// `errno` of the system call that has just failed.
fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

impl Jail {
    /// The share, if the engine gave one.
    pub fn share(&self) -> Option<&Share> {
        self.share.as_ref()
    }
}

impl Share {
    fn open(proc: &OwnedFd) -> Result<Self, Errno> {
        let path_only = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: rustix::fs::open(root::SHARE, path_only, Mode::empty())?,
            proc_fds: openat(proc, "1/fd", path_only, Mode::empty())?,
        })
    }

    /// Opens a directory of the share by its path from there, without following symbolic links.
    ///
    /// # Errors
    /// As `openat2(2)`; `EXDEV` or `ELOOP` where the path leaves the share or has a link in it.
    pub fn open_directory(&self, path: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(&self.directory, path, flags, Mode::empty(), resolve)?)
    }

    /// `/proc/self/fd` of a procfs in which this process is the only one.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn proc_fds(&self) -> io::Result<File> {
        Ok(self.proc_fds.try_clone()?.into())
    }

    /// A share without a jail around it, for tests of the file server.
    ///
    /// # Panics
    /// Without procfs.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn unjailed(directory: OwnedFd) -> Self {
        Self { directory, proc_fds: File::open("/proc/self/fd").expect("procfs").into() }
    }
}
