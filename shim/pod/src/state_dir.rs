//! Where the engine keeps what it knows of a container: one directory for each, named by its ID.
//!
//! Whoever holds the lock (flock(2)) on the directory owns the container. The lock goes with the process, so after a crash the directory is
//! there but not locked: whoever claims the ID next cleans up what is left, and goes on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, fstat, mkdirat, openat, statat, unlinkat};
use rustix::io::Errno;

use crate::container_id::ContainerId;

/// Where state directories are unless the caller says otherwise.
pub const DEFAULT_ROOT: &str = "/run/kvrun";
/// Where the share is mounted.
const SHARE: &str = "share";
/// The cgroup directories made for the container, one path per line, to be removed in reverse order.
const CGROUPS: &str = "cgroups";
/// The most that is read from a file of ours.
const MAX_FILE: u64 = 64 * 1024;
/// How often a directory that is removed while we open it is made again.
const ATTEMPTS: u32 = 100;

/// What can go wrong with a state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The container is there.
    #[error("container ID {id} is in use: choose another one, or end that container first")]
    InUse {
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

/// The state directory of a container that is ours. Dropping it removes it.
#[derive(Debug)]
pub struct ContainerDir {
    id: ContainerId,
    root: OwnedFd,
    /// Locked.
    dir: OwnedFd,
    path: PathBuf,
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl ContainerDir {
    /// Makes the ID ours: nobody else can claim it until this is dropped. `root` is made if it is missing.
    ///
    /// # Errors
    /// [`StateError::InUse`] while another process has the ID.
    pub fn claim(root_path: &Path, id: &ContainerId) -> Result<Self, StateError> {
        let path = root_path.join(id.as_str());
        let io =
            |step, path: &Path, e: Errno| StateError::Io { step, path: path.to_owned(), source: e.into() };
        let root = open_root(root_path).map_err(|e| io("open the state directory", root_path, e))?;
        for _ in 0..ATTEMPTS {
            match mkdirat(&root, id.as_str(), Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(io("make the state directory", &path, e)),
            }
            let dir = match openat(&root, id.as_str(), DIRECTORY, Mode::empty()) {
                Ok(dir) => dir,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(io("open the state directory", &path, e)),
            };
            match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::AGAIN) => return Err(StateError::InUse { id: id.clone() }),
                Err(e) => return Err(io("lock the state directory", &path, e)),
            }
            // Its last owner may have removed it after we opened it; then the lock is on nothing.
            if is_entry(&root, id, &dir) {
                let claimed = Self { id: id.clone(), root, dir, path };
                claimed.clean();
                return Ok(claimed);
            }
        }
        Err(io("make the state directory", &path, Errno::BUSY))
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
                match rustix::fs::rmdir(&cgroup) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => tracing::warn!(cgroup = %cgroup.display(), %error, "remove the cgroup"),
                }
            }
        }
        for (name, flags) in [(CGROUPS, AtFlags::empty()), (SHARE, AtFlags::REMOVEDIR)] {
            match unlinkat(&self.dir, name, flags) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => tracing::warn!(path = %self.path.join(name).display(), %error, "clean up"),
            }
        }
    }
}

impl Drop for ContainerDir {
    fn drop(&mut self) {
        self.clean();
        // While we hold the lock: nobody can have claimed it.
        if let Err(error) = unlinkat(&self.root, self.id.as_str(), AtFlags::REMOVEDIR) {
            tracing::warn!(path = %self.path.display(), %error, "remove the state directory");
        }
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
        drop(first);
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
    fn symbolic_link_in_place_of_the_directory_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), root.path().join("c1")).unwrap();
        assert!(matches!(ContainerDir::claim(root.path(), &id()), Err(StateError::Io { .. })));
    }
}
