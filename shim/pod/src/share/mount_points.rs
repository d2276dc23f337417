//! What a runtime makes in a root file system before the container starts: a missing working directory, and missing mount points.
//!
//! The agent makes mount points, except in a root that is read-only: that one is read-only for the guest from the start, so they are
//! made on the host. The root file system is a stranger's: every path is resolved within it
//! (`openat2` with `RESOLVE_IN_ROOT`), symbolic links included.

use std::ffi::OsStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::bundle::Bundle;

/// A mount point or the working directory could not be made.
#[derive(Debug, thiserror::Error)]
#[error("make {} in the root file system", path.display())]
pub struct MountPointError {
    /// In the container.
    path: PathBuf,
    /// Why.
    #[source]
    source: Errno,
}

/// Makes the mount points of a bundle that are missing in `root`.
pub(super) fn make(root: BorrowedFd<'_>, bundle: &Bundle) -> Result<(), MountPointError> {
    let mounts = bundle.spec().mounts().as_deref().unwrap_or_default();
    for (index, mount) in mounts.iter().enumerate() {
        let is_file = bundle.binds().iter().any(|bind| bind.index() == index && !bind.is_directory());
        let covered =
            mounts[..index].iter().any(|earlier| is_below(mount.destination(), earlier.destination()));
        if !covered {
            let made = make_one(root, mount.destination(), is_file);
            made.map_err(|source| MountPointError { path: mount.destination().clone(), source })?;
        }
    }
    // Without a mount of the spec, the agent mounts one for the default devices.
    let dev = Path::new("/dev");
    make_one(root, dev, false).map_err(|source| MountPointError { path: dev.to_owned(), source })
}

/// Makes the working directory of a bundle if it is missing in `root`, as runc does, unless it is in another mount.
pub(super) fn make_working_directory(root: BorrowedFd<'_>, bundle: &Bundle) -> Result<(), MountPointError> {
    let mounts = bundle.spec().mounts().as_deref().unwrap_or_default();
    let Some(process) = bundle.spec().process() else { return Ok(()) };
    let cwd = process.cwd();
    if mounts.iter().any(|mount| cwd.starts_with(mount.destination())) {
        return Ok(());
    }
    make_one(root, cwd, false).map_err(|source| MountPointError { path: cwd.clone(), source })
}

/// Whether `path` is in a file system mounted at `mount_point`.
fn is_below(path: &Path, mount_point: &Path) -> bool {
    path != mount_point && path.starts_with(mount_point)
}

fn make_one(root: BorrowedFd<'_>, path: &Path, is_file: bool) -> Result<(), Errno> {
    let names: Vec<&OsStr> = path
        .components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name),
            // `..` is left out like `/..`, which is `/`: a mount point named with it is the spec author's riddle.
            _ => None,
        })
        .collect();
    let mut so_far = PathBuf::from(".");
    for (depth, name) in names.iter().enumerate() {
        let parent = open(root, &so_far)?;
        so_far.push(name);
        match open(root, &so_far) {
            Ok(_) => continue,
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
        if is_file && depth + 1 == names.len() {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&parent, *name, flags, Mode::from_raw_mode(0o644))?;
        } else {
            // A dangling symbolic link is EEXIST here, an error as it should be.
            rustix::fs::mkdirat(&parent, *name, Mode::from_raw_mode(0o755))?;
        }
    }
    Ok(())
}

fn open(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn missing_mount_points_are_made_within_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root_path = dir.path().join("root");
        fs::create_dir_all(root_path.join("real")).unwrap();
        symlink("/../../real", root_path.join("link")).unwrap();
        symlink(dir.path().join("outside"), root_path.join("dangling")).unwrap();
        let root = fs::File::open(&root_path).unwrap();

        make_one(root.as_fd(), Path::new("/a/b/c"), false).unwrap();
        assert!(root_path.join("a/b/c").is_dir());
        make_one(root.as_fd(), Path::new("/a/b/file"), true).unwrap();
        assert!(root_path.join("a/b/file").is_file());
        make_one(root.as_fd(), Path::new("/link/x"), false).unwrap();
        assert!(root_path.join("real/x").is_dir());
        assert_eq!(make_one(root.as_fd(), Path::new("/dangling/x"), false), Err(Errno::EXIST));
        assert!(!dir.path().join("outside").exists());
    }
}
