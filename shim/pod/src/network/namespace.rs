//! Network namespaces of the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, fstat, fstatfs, openat};

use super::{NetworkError, host};

/// The file system of namespaces (Linux include/uapi/linux/magic.h, `NSFS_MAGIC`).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A network namespace, kept alive by its descriptor.
#[derive(Debug)]
pub struct NetworkNamespace(OwnedFd);

/// Which namespace it is: the same for each descriptor of it, and nobody else's while one is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(u64, u64);

impl NetworkNamespace {
    /// The one of a path like `/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// As open(2); [`io::ErrorKind::InvalidInput`] if it is no namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        // As a path first: to open anything but a namespace may have effects, or take forever.
        let named = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        check(&named)?;
        let opened = File::open(format!("/proc/self/fd/{}", named.as_raw_fd()))?;
        Ok(Self(opened.into()))
    }

    /// The one of the calling thread.
    ///
    /// # Errors
    /// As open(2).
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Which it is.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn identity(&self) -> io::Result<Identity> {
        let stat = fstat(&self.0)?;
        Ok(Identity(stat.st_dev, stat.st_ino))
    }

    /// Checks that it, which is named `path`, is not that of the host: `home`, the one of this process at its start, or that of the first process.
    /// A guest must not take links over from there: the host would be off its network.
    ///
    /// # Errors
    /// [`NetworkError::OfHost`] if it is; [`NetworkError::Host`] as fstat(2).
    pub fn check(&self, path: &Path, home: &Self) -> Result<(), NetworkError> {
        let init = Self::open(Path::new("/proc/1/ns/net")).ok();
        for of_host in [Some(home), init.as_ref()].into_iter().flatten() {
            let same = of_host.identity().and_then(|of_host| Ok(of_host == self.identity()?));
            if same.map_err(host(|| "look at the network namespace".to_owned()))? {
                return Err(NetworkError::OfHost { path: path.to_owned() });
            }
        }
        Ok(())
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Puts the calling thread into it: of a process with one thread, the process.
    ///
    /// # Errors
    /// As setns(2).
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.0, CloneFlags::CLONE_NEWNET)?)
    }

    /// Does something in it, on a thread of its own: so no other code ever runs in a namespace it does not expect.
    ///
    /// # Errors
    /// As setns(2).
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
                self.enter()?;
                Ok(work())
            })?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// A descriptor of one.
impl TryFrom<OwnedFd> for NetworkNamespace {
    type Error = io::Error;

    fn try_from(descriptor: OwnedFd) -> io::Result<Self> {
        check(&descriptor)?;
        Ok(Self(descriptor))
    }
}

fn check(namespace: &OwnedFd) -> io::Result<()> {
    if fstatfs(namespace)?.f_type as u64 != NSFS_MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a namespace"));
    }
    Ok(())
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Puts the calling thread into a new one: of a process with one thread, the process.
///
/// # Errors
/// As unshare(2).
pub fn enter_new() -> io::Result<()> {
    Ok(unshare(CloneFlags::CLONE_NEWNET)?)
}
