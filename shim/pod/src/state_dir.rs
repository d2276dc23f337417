//! Where the engine keeps what it knows of a container: one directory for each, named by its ID.
//!
//! Whoever holds the lock (flock(2)) on the directory owns the container, and alone writes its [`Record`]. The lock goes with the process;
//! the directory stays until the container is deleted ([`ContainerDir::take_over`]). One without a record, or whose record
//! belongs to nobody, is what a crash left: whoever claims the ID next cleans up and goes on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, fstat, mkdirat, openat, statat, unlinkat};
use rustix::io::Errno;

use crate::cgroup;
use crate::container_id::ContainerId;
use crate::record::{self, Record};

/// Where state directories are unless the caller says otherwise.
pub const DEFAULT_ROOT: &str = "/run/kvrun";
/// Where the shims of containerd have those of their pods, one directory for each namespace of containerd.
pub const CONTAINERD_ROOT: &str = "/run/kvrun/containerd";
/// Where the share is mounted.
const SHARE: &str = "share";
/// The cgroup directories made for the container, one path per line, to be removed in reverse order.
const CGROUPS: &str = "cgroups";
/// The socket of the process that serves the container.
pub const SOCKET: &str = "monitor.sock";
/// The socket on which a machine can be looked at ([`crate::observe`]).
pub const POD_SOCKET: &str = "pod.sock";
/// The socket on which programs are run in a guest ([`crate::debug`]).
pub const DEBUG_SOCKET: &str = "debug.sock";
/// The most that is read from a file of ours.
const MAX_FILE: u64 = 64 * 1024;
/// How often a directory that is removed while we open it is made again.
const ATTEMPTS: u32 = 100;

/// What can go wrong with a state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The container is there.
    #[error("container ID {id} is in use: choose another one, or delete that container first")]
    InUse {
        /// Its ID.
        id: ContainerId,
    },
    /// The container is not there.
    #[error("container {id} does not exist")]
    Unknown {
        /// Its ID.
        id: ContainerId,
    },
    /// A step failed.
    #[error("{step} {}", path.display())]
    Io {
        /// Which.
        step: &'static str,
        /// Of what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The state directory of a container that is ours. Dropping it removes it, unless it is to be [kept](ContainerDir::keep).
#[derive(Debug)]
pub struct ContainerDir {
    id: ContainerId,
    root: OwnedFd,
    /// Locked.
    dir: OwnedFd,
    path: PathBuf,
    kept: AtomicBool,
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl ContainerDir {
    /// Makes the ID ours: nobody else can claim it until this is dropped. `root` is made if it is missing.
    ///
    /// # Errors
    /// [`StateError::InUse`] while there is a container of this ID, running or not.
    pub fn claim(root_path: &Path, id: &ContainerId) -> Result<Self, StateError> {
        let root = open_root(root_path).map_err(|e| io_error("open the state directory", root_path, e))?;
        let path = root_path.join(id.as_str());
        for _ in 0..ATTEMPTS {
            match mkdirat(&root, id.as_str(), Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(io_error("make the state directory", &path, e)),
            }
            let Some(dir) = open_dir(&root, id, &path)? else { continue };
            if !lock(&root, id, &dir, &path)? {
                continue;
            }
            // One that cannot be read is nobody's either.
            if Record::read(dir.as_fd()).is_ok_and(|record| record.is_some_and(|record| !record.transient)) {
                return Err(StateError::InUse { id: id.clone() });
            }
            let claimed = Self { id: id.clone(), root, dir, path, kept: AtomicBool::new(false) };
            claimed.clean();
            return Ok(claimed);
        }
        Err(io_error("make the state directory", &path, Errno::BUSY))
    }

    /// Makes a container ours whose process has ended, to delete it.
    ///
    /// # Errors
    /// [`StateError::Unknown`]; [`StateError::InUse`] while the process is there.
    pub fn take_over(root_path: &Path, id: &ContainerId) -> Result<Self, StateError> {
        let path = root_path.join(id.as_str());
        let unknown = || StateError::Unknown { id: id.clone() };
        let root = match rustix::fs::open(root_path, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Err(unknown()),
            other => other.map_err(|e| io_error("open the state directory", root_path, e))?,
        };
        let dir = open_dir(&root, id, &path)?.ok_or_else(unknown)?;
        if !lock(&root, id, &dir, &path)? {
            return Err(unknown());
        }
        Ok(Self { id: id.clone(), root, dir, path, kept: AtomicBool::new(false) })
    }

    /// Leaves the directory there when this is dropped, for [`ContainerDir::take_over`].
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Whether it is to be left there.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// The directory itself.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Another descriptor for the directory, without the lock: for whoever writes in it and does not own it.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn reopen(&self) -> Result<OwnedFd, StateError> {
        // Not a duplicate: that would have the lock in common (flock(2)).
        openat(&self.dir, ".", DIRECTORY, Mode::empty())
            .map_err(|e| io_error("open the state directory", &self.path, e))
    }

    /// The container.
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// Makes the directory at which the share is to be mounted.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn make_share_directory(&self) -> Result<PathBuf, StateError> {
        let path = self.path.join(SHARE);
        match mkdirat(&self.dir, SHARE, Mode::RWXU) {
            Ok(()) => Ok(path),
            Err(e) => Err(StateError::Io { step: "make", path, source: e.into() }),
        }
    }

    /// Remembers cgroup directories that are about to be made, outermost first, so that a crash does not leak them.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remember_cgroups(&self, directories: &[PathBuf]) -> Result<(), StateError> {
        use std::os::unix::ffi::OsStrExt;
        let bytes: Vec<u8> =
            directories.iter().flat_map(|d| [d.as_os_str().as_bytes(), b"\n"].concat()).collect();
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let written = openat(&self.dir, CGROUPS, flags, Mode::RUSR | Mode::WUSR)
            .map_err(io::Error::from)
            .and_then(|fd| io::Write::write_all(&mut std::fs::File::from(fd), &bytes));
        written.map_err(|source| StateError::Io { step: "write", path: self.path.join(CGROUPS), source })
    }

    /// Removes everything in the directory, and what a crash has left behind elsewhere.
    fn clean(&self) {
        use std::io::Read;
        use std::os::unix::ffi::OsStringExt;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if let Ok(file) = openat(&self.dir, CGROUPS, flags, Mode::empty()) {
            let mut bytes = Vec::new();
            let _ = std::fs::File::from(file).take(MAX_FILE).read_to_end(&mut bytes);
            for line in bytes.split(|b| *b == b'\n').rev().filter(|line| !line.is_empty()) {
                let cgroup = PathBuf::from(std::ffi::OsString::from_vec(line.to_vec()));
                match cgroup::remove_left_behind(&cgroup) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => tracing::warn!(cgroup = %cgroup.display(), %error, "remove the cgroup"),
                }
            }
        }
        let files = [CGROUPS, SOCKET, POD_SOCKET, DEBUG_SOCKET, record::NEW_FILE, record::FILE]
            .map(|name| (name, AtFlags::empty()));
        for (name, flags) in files.into_iter().chain([(SHARE, AtFlags::REMOVEDIR)]) {
            match unlinkat(&self.dir, name, flags) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => tracing::warn!(path = %self.path.join(name).display(), %error, "clean up"),
            }
        }
    }
}

impl Drop for ContainerDir {
    fn drop(&mut self) {
        if self.kept.load(Ordering::Relaxed) {
            return;
        }
        self.clean();
        // While we hold the lock: nobody can have claimed it.
        if let Err(error) = unlinkat(&self.root, self.id.as_str(), AtFlags::REMOVEDIR) {
            tracing::warn!(path = %self.path.display(), %error, "remove the state directory");
        }
    }
}

/// The path of a socket in a state directory that is open, for as long as it is. A path of a socket has at most 108 bytes; this one is short for every
/// directory.
pub fn socket_path(dir: BorrowedFd<'_>, name: &str) -> String {
    format!("/proc/self/fd/{}/{name}", dir.as_raw_fd())
}

/// The container's directory, for looking at it; `None` if there is none.
///
/// # Errors
/// [`StateError::Io`].
pub fn look(root_path: &Path, id: &ContainerId) -> Result<Option<OwnedFd>, StateError> {
    let path = root_path.join(id.as_str());
    match rustix::fs::open(&path, DIRECTORY, Mode::empty()) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(io_error("open the state directory", &path, e)),
    }
}

/// The IDs of all containers below a root, in order.
///
/// # Errors
/// [`StateError::Io`].
pub fn all(root_path: &Path) -> Result<Vec<ContainerId>, StateError> {
    let error = |source| StateError::Io { step: "list", path: root_path.to_owned(), source };
    let entries = match std::fs::read_dir(root_path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(error)?,
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(error)?.file_name();
        ids.extend(name.to_str().and_then(|name| name.parse::<ContainerId>().ok()));
    }
    ids.sort();
    Ok(ids)
}

fn io_error(step: &'static str, path: &Path, e: Errno) -> StateError {
    StateError::Io { step, path: path.to_owned(), source: e.into() }
}

fn open_dir(root: &OwnedFd, id: &ContainerId, path: &Path) -> Result<Option<OwnedFd>, StateError> {
    match openat(root, id.as_str(), DIRECTORY, Mode::empty()) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(io_error("open the state directory", path, e)),
    }
}

/// Locks it; false if its last owner has removed it after we opened it: then the lock is on nothing.
fn lock(root: &OwnedFd, id: &ContainerId, dir: &OwnedFd, path: &Path) -> Result<bool, StateError> {
    match flock(dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(is_entry(root, id, dir)),
        Err(Errno::AGAIN) => Err(StateError::InUse { id: id.clone() }),
        Err(e) => Err(io_error("lock the state directory", path, e)),
    }
}

fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    match rustix::fs::open(path, DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    }
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => rustix::fs::open(path, DIRECTORY, Mode::empty()),
        Err(e) => Err(e),
    }
}

fn is_entry(root: &OwnedFd, id: &ContainerId, dir: &OwnedFd) -> bool {
    let (Ok(entry), Ok(ours)) = (statat(root, id.as_str(), AtFlags::SYMLINK_NOFOLLOW), fstat(dir.as_fd()))
    else {
        return false;
    };
    (entry.st_dev, entry.st_ino) == (ours.st_dev, ours.st_ino)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn id() -> ContainerId {
        "c1".parse().unwrap()
    }

    #[test]
    fn id_belongs_to_one_until_it_is_dropped() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("made/on/demand");
        let first = ContainerDir::claim(&root, &id()).unwrap();
        assert!(matches!(ContainerDir::claim(&root, &id()), Err(StateError::InUse { .. })));
        let other = first.reopen().unwrap();
        drop(first);
        // Who has it open besides does not keep it.
        drop(ContainerDir::claim(&root, &id()).unwrap());
        drop(other);
        assert!(!root.join("c1").exists());
        ContainerDir::claim(&root, &id()).unwrap();
    }

    #[test]
    fn what_a_crash_left_is_cleaned_up() {
        let root = tempfile::tempdir().unwrap();
        let (outer, inner) = (root.path().join("cg"), root.path().join("cg/inner"));
        fs::create_dir_all(&inner).unwrap();
        let crashed = ContainerDir::claim(root.path(), &id()).unwrap();
        crashed.make_share_directory().unwrap();
        crashed.remember_cgroups(&[outer.clone(), inner]).unwrap();
        // As the kernel does when the process is killed: the lock goes, the files stay.
        flock(&crashed.dir, FlockOperation::Unlock).unwrap();
        std::mem::forget(crashed);

        let next = ContainerDir::claim(root.path(), &id()).unwrap();
        assert!(!outer.exists());
        next.make_share_directory().unwrap();
        drop(next);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn kept_directory_is_in_use_until_it_is_taken_over() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(ContainerDir::take_over(root.path(), &id()), Err(StateError::Unknown { .. })));
        let first = ContainerDir::claim(root.path(), &id()).unwrap();
        let process = crate::host_process::HostProcess::current().unwrap();
        let mut record = Record::creating(id(), process, String::new());
        record.write(first.as_fd()).unwrap();
        assert!(matches!(ContainerDir::take_over(root.path(), &id()), Err(StateError::InUse { .. })));
        first.keep();
        drop(first);
        assert!(matches!(ContainerDir::claim(root.path(), &id()), Err(StateError::InUse { .. })));
        assert_eq!(all(root.path()).unwrap(), [id()]);
        drop(ContainerDir::take_over(root.path(), &id()).unwrap());
        assert!(all(root.path()).unwrap().is_empty());

        let foreground = ContainerDir::claim(root.path(), &id()).unwrap();
        record.transient = true;
        record.write(foreground.as_fd()).unwrap();
        foreground.keep();
        drop(foreground);
        ContainerDir::claim(root.path(), &id()).unwrap();
    }

    #[test]
    fn symbolic_link_in_place_of_the_directory_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), root.path().join("c1")).unwrap();
        assert!(matches!(ContainerDir::claim(root.path(), &id()), Err(StateError::Io { .. })));
    }
}
