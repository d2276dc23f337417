//! Paths in a container's root file system, resolved within it: the root is a stranger's, and its symbolic links lead nowhere else.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How many symbolic links to nothing are followed (the kernel's `MAXSYMLINKS`).
const LINKS_MAX: usize = 40;

/// Opens a path as a path only.
///
/// # Errors
///
/// openat2(2).
pub fn open(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    open_with(root, path, OFlags::PATH, ResolveFlags::empty())
}

/// Opens a path that must not contain a symbolic link.
///
/// # Errors
///
/// openat2(2); `ELOOP`: it does.
pub fn open_without_links(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    open_with(root, path, OFlags::PATH, ResolveFlags::NO_SYMLINKS)
}

/// Opens a path as `flags` say.
///
/// # Errors
///
/// openat2(2).
pub fn open_with(
    root: impl AsFd,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Opens a path as a path only, and makes what is missing of it: directories, and a file at its end if `is_file`.
///
/// # Errors
///
/// openat2(2), mkdirat(2).
pub fn make(root: impl AsFd, path: &Path, is_file: bool) -> Result<OwnedFd, Errno> {
    let root = root.as_fd();
    let mut todo: VecDeque<OsString> = parts(path).collect();
    let mut done = PathBuf::from(".");
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        let parent = open(root, &done)?;
        let next = done.join(&name);
        match open(root, &next) {
            Ok(_) => done = next,
            Err(Errno::NOENT) => match rustix::fs::readlinkat(&parent, &*name, Vec::new()) {
                Ok(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(Errno::LOOP);
                    }
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    if target.is_absolute() {
                        done = PathBuf::from(".");
                    }
                    for part in parts(&target).collect::<Vec<_>>().into_iter().rev() {
                        todo.push_front(part);
                    }
                }
                Err(_) => {
                    make_one(&parent, &name, is_file && todo.is_empty())?;
                    done = next;
                }
            },
            Err(errno) => return Err(errno),
        }
    }
    open(root, &done)
}

fn make_one(parent: &OwnedFd, name: &OsStr, is_file: bool) -> Result<(), Errno> {
    if is_file {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        return rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop);
    }
    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn missing_parts_are_made_within_the_root() {
        let outer = std::env::temp_dir().join(format!("kvrun-in-root-{}", std::process::id()));
        let dir = outer.join("root");
        fs::create_dir_all(dir.join("real")).unwrap();
        symlink("/../../real", dir.join("link")).unwrap();
        symlink("/nowhere/yet", dir.join("dangling")).unwrap();
        symlink("../../../out", dir.join("real/up")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        let root = fs::File::open(&dir).unwrap();
        for (path, is_file, made) in [
            ("/a/b/c", false, "a/b/c"),
            ("/a/b/file", true, "a/b/file"),
            ("/link/x", false, "real/x"),
            ("/dangling/y", true, "nowhere/yet/y"),
            ("/real/up/z", false, "out/z"),
            ("/../../w", false, "w"),
        ] {
            make(&root, Path::new(path), is_file).unwrap();
            assert_eq!((dir.join(made).is_file(), dir.join(made).exists()), (is_file, true), "{path}");
        }
        assert_eq!(make(&root, Path::new("/loop/x"), false).unwrap_err(), Errno::LOOP);
        assert!(open_without_links(&root, Path::new("/link")).is_err());
        assert_eq!(fs::read_dir(&outer).unwrap().count(), 1);
        fs::remove_dir_all(outer).unwrap();
    }
}
