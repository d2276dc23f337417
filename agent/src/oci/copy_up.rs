//! The mount option `tmpcopyup`: a new tmpfs starts with what the image has at its mount point.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, fchmod, fchown, fstat, makedev,
    mkdirat, mknodat, openat, readlinkat, statat, symlinkat,
};
use rustix::io::Errno;

/// How deep a tree we follow. The tmpfs bounds its size.
const DEPTH_MAX: usize = 64;

/// Copies a directory's contents; and, unless the options of the tmpfs say otherwise, its owner and mode. Extended attributes and times are not
/// copied. The source is a stranger's, but nobody changes it meanwhile who could not have made it so at once, and no link in it is followed.
///
/// # Errors
///
/// A file cannot be read, or the tmpfs is full (`ENOSPC`).
pub fn copy(source: &OwnedFd, target: &OwnedFd, says: impl Fn(&str) -> bool) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let (source, target) =
        (openat(source, ".", flags, Mode::empty())?, openat(target, ".", flags, Mode::empty())?);
    copy_contents(&source, &target, 0)?;
    let stat = fstat(&source)?;
    let uid = (!says("uid")).then(|| Uid::from_raw(stat.st_uid));
    let gid = (!says("gid")).then(|| Gid::from_raw(stat.st_gid));
    fchown(&target, uid, gid)?;
    if says("mode") { Ok(()) } else { Ok(fchmod(&target, Mode::from_raw_mode(stat.st_mode))?) }
}

fn copy_contents(source: &OwnedFd, target: &OwnedFd, depth: usize) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(Errno::NAMETOOLONG.into());
    }
    for entry in Dir::read_from(source)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(target, name, Mode::RWXU)?;
                let flags = flags | OFlags::DIRECTORY;
                let (from, to) = (
                    openat(source, name, flags, Mode::empty())?,
                    openat(target, name, flags, Mode::empty())?,
                );
                copy_contents(&from, &to, depth + 1)?;
            }
            FileType::RegularFile => {
                let mut from = File::from(openat(source, name, flags, Mode::empty())?);
                let create =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut to = File::from(openat(target, name, create, Mode::RWXU)?);
                io::copy(&mut from, &mut to)?;
            }
            FileType::Symlink => symlinkat(readlinkat(source, name, Vec::new())?, target, name)?,
            kind => {
                let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
                mknodat(target, name, kind, mode, makedev(major, minor))?;
            }
        }
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        chownat(target, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        // After the owner, whose change clears the set-ID bits.
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            chmodat(target, name, mode, AtFlags::empty())?;
        }
    }
    Ok(())
}
