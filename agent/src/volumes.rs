//! Volumes of the host that somebody there changes, each as a directory of the guest's own, which the engine has us bring in step: a
//! process in the guest that watches it (inotify(7)) hears of a change as it would on the host.
//!
//! A kubelet changes a volume by one `rename` of the link `..data`, and programs rely on that: they see all of a change or nothing. So the order here is
//! its order (Kubernetes pkg/volume/util/atomic_writer.go, `Write`): what a link will lead to, the link, what nothing leads to any more. What is
//! the same is left alone, and not even opened, which would be heard, too.
//!
//! Each is a tmpfs, in which the volume is a directory, and beside that is one in which files and links are made before they are renamed into place. It is
//! a container's for reading, but one that may mount can change that; so no symbolic link in it is followed here, and nothing that is there is taken
//! for what we have put there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, PoisonError};

use kvrun_agent_api::agent::VolumeEntry;
use kvrun_agent_api::agent::volume_entry::Kind;
use kvrun_agent_api::{
    GUEST_VOLUMES_DIR, MAX_VOLUME_BYTES, MAX_VOLUME_DEPTH, MAX_VOLUME_ENTRIES, VOLUME_FILES,
};
use nix::mount::MntFlags;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, chmodat, chownat, fchmod, fchown, fstat, mkdirat,
    openat, openat2, readlinkat, renameat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen, move_mount,
};
use rustix::process::{Gid, Uid};

use crate::path::{PathError, RunPath, of_fd};

/// Where entries are made before they have their names.
const STAGE: &str = "new";
/// Its entry.
const STAGED: &str = "entry";
/// Two states of a volume, old and new, whose files have pages of their own.
const SIZE: &str = "5m";
const INODES: &str = "1k";
/// Linux include/uapi/linux/limits.h, `NAME_MAX`.
const NAME_MAX: usize = 255;

/// Why a volume is not in step.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The request itself is at fault.
    #[error("entry {path:?} of a volume {problem}")]
    Entry {
        /// Of the entry.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The request has more than we keep.
    #[error("a volume has more than {MAX_VOLUME_ENTRIES} entries or more than {MAX_VOLUME_BYTES} bytes")]
    Long,
    /// Where it is to be.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Its file system.
    #[error("cannot {step} the file system of volume {number}")]
    Mount {
        /// Whose.
        number: u64,
        /// Which step.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An entry.
    #[error("cannot change {path:?} of a volume")]
    Change {
        /// Of the entry.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// All volumes, by number.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<HashMap<u64, Volume>>);

impl Volumes {
    /// Makes a volume if it is not there, and brings it in step.
    ///
    /// # Errors
    ///
    /// [`VolumeError`]; of one that is new, nothing is left then.
    pub fn update(&self, number: u64, entries: &[VolumeEntry]) -> Result<(), VolumeError> {
        let entries = check(entries)?;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(volume) = all.get_mut(&number) {
            return volume.update(&entries);
        }
        let mut volume = Volume::mount(number)?;
        if let Err(error) = volume.update(&entries) {
            drop(volume);
            unmount(number)?;
            return Err(error);
        }
        all.insert(number, volume);
        Ok(())
    }

    /// Removes a volume if it is there.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Mount`], [`VolumeError::Path`].
    pub fn remove(&self, number: u64) -> Result<(), VolumeError> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.remove(&number) {
            Some(_) => unmount(number),
            None => Ok(()),
        }
    }
}

fn mount_point(number: u64) -> Result<RunPath, PathError> {
    RunPath::parse(&format!("{GUEST_VOLUMES_DIR}/{number}"))
}

fn unmount(number: u64) -> Result<(), VolumeError> {
    let mount_point = mount_point(number)?;
    let Some((parent, name)) = mount_point.open_parent()? else { return Ok(()) };
    // A process that has just ended may have a file of it a moment longer.
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    nix::mount::umount2(&of_fd(&parent).join(name), flags).map_err(|errno| VolumeError::Mount {
        number,
        step: "unmount",
        source: errno.into(),
    })?;
    let _ = unlinkat(&parent, name, AtFlags::REMOVEDIR);
    Ok(())
}

/// An entry that was checked.
#[derive(Debug)]
struct Entry<'e> {
    path: &'e str,
    mode: Mode,
    owner: (Uid, Gid),
    kind: Checked<'e>,
}

#[derive(Debug)]
enum Checked<'e> {
    Directory,
    File(&'e [u8]),
    Link(&'e [u8]),
}

/// Checks what is to be in a volume.
fn check(entries: &[VolumeEntry]) -> Result<Vec<Entry<'_>>, VolumeError> {
    if entries.len() > MAX_VOLUME_ENTRIES {
        return Err(VolumeError::Long);
    }
    let (mut directories, mut all, mut bytes) = (HashSet::new(), HashSet::new(), 0);
    let mut checked = Vec::with_capacity(entries.len());
    for entry in entries {
        let path = entry.path.as_str();
        let wrong = |problem| VolumeError::Entry { path: path.chars().take(256).collect(), problem };
        // The first is the volume itself, and no other.
        if path.is_empty() != checked.is_empty() {
            return Err(wrong("comes before the volume itself, or has no name"));
        }
        if !path.is_empty() {
            let mut parts = path.split('/');
            if parts.any(|part| matches!(part, "" | "." | "..") || part.len() > NAME_MAX)
                || path.contains('\0')
                || path.split('/').count() > MAX_VOLUME_DEPTH
            {
                return Err(wrong("is not a plain relative path"));
            }
            if !directories.contains(path.rsplit_once('/').map_or("", |(parent, _)| parent)) {
                return Err(wrong("is in no directory that came before"));
            }
        }
        if !all.insert(path) {
            return Err(wrong("is there twice"));
        }
        if entry.mode > 0o7777 || entry.uid == u32::MAX || entry.gid == u32::MAX {
            return Err(wrong("has permissions or an owner that there are not"));
        }
        let kind = match &entry.kind {
            Some(Kind::Directory(_)) => {
                directories.insert(path);
                Checked::Directory
            }
            Some(Kind::File(content)) => {
                bytes += content.len();
                Checked::File(content)
            }
            Some(Kind::Link(target)) => {
                if target.is_empty() || target.len() >= libc::PATH_MAX as usize || target.contains(&0) {
                    return Err(wrong("is a link to what is no path"));
                }
                Checked::Link(target)
            }
            // One of a later version.
            Some(_) | None => return Err(wrong("is of no known kind")),
        };
        checked.push(Entry {
            path,
            mode: Mode::from_raw_mode(entry.mode),
            owner: (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid)),
            kind,
        });
    }
    match checked.first().map(|entry| &entry.kind) {
        Some(Checked::Directory) if bytes <= MAX_VOLUME_BYTES => Ok(checked),
        Some(Checked::Directory) => Err(VolumeError::Long),
        _ => Err(VolumeError::Entry { path: String::new(), problem: "is no directory" }),
    }
}

/// What we have put somewhere.
#[derive(Debug, PartialEq, Eq)]
enum Known {
    Directory,
    /// With the hash of its content: a file is never written to, but replaced.
    File(u64),
    Link,
}

/// A volume that is mounted.
#[derive(Debug)]
struct Volume {
    files: OwnedFd,
    stage: OwnedFd,
    /// By path.
    known: BTreeMap<String, Known>,
    hashes: RandomState,
}

impl Volume {
    fn mount(number: u64) -> Result<Self, VolumeError> {
        let at = |step| move |errno: Errno| VolumeError::Mount { number, step, source: errno.into() };
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(at("open"))?;
        for (key, value) in
            [("source", "kvrun-volume"), ("mode", "0755"), ("size", SIZE), ("nr_inodes", INODES)]
        {
            fsconfig_set_string(&fs, key, value).map_err(at("configure"))?;
        }
        fsconfig_create(&fs).map_err(at("make"))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        let root = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(at("make"))?;
        let make = |name| {
            mkdirat(&root, name, Mode::RWXU)?;
            openat(&root, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        };
        let volume = Self {
            files: make(VOLUME_FILES).map_err(at("fill"))?,
            stage: make(STAGE).map_err(at("fill"))?,
            known: BTreeMap::new(),
            hashes: RandomState::new(),
        };
        let target = mount_point(number)?.open_or_create()?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&root, "", &target, "", flags).map_err(at("mount"))?;
        Ok(volume)
    }

    fn update(&mut self, entries: &[Entry<'_>]) -> Result<(), VolumeError> {
        let wanted: HashMap<&str, &Checked<'_>> =
            entries.iter().map(|entry| (entry.path, &entry.kind)).collect();
        let change = |path: &str| {
            let path = path.to_owned();
            move |errno: Errno| VolumeError::Change { path, source: errno.into() }
        };
        // A directory that is to be something else has no place to wait in until it can go.
        let has_turned =
            |path: &str| wanted.get(path).is_some_and(|kind| !matches!(kind, Checked::Directory));
        if self.known.iter().any(|(path, known)| *known == Known::Directory && has_turned(path)) {
            self.remove(|path, known| {
                !wanted.contains_key(path) || (*known == Known::Directory && has_turned(path))
            })?;
        }
        for entry in entries {
            match entry.kind {
                Checked::Directory => self.directory(entry),
                Checked::File(content) => self.file(entry, content),
                Checked::Link(_) => continue,
            }
            .map_err(change(entry.path))?;
        }
        // A new link may lead through one that now leads elsewhere.
        for with_new in [false, true] {
            for entry in entries {
                if let Checked::Link(target) = entry.kind {
                    self.link(entry, target, with_new).map_err(change(entry.path))?;
                }
            }
        }
        self.remove(|path, _| !wanted.contains_key(path))
    }

    fn directory(&mut self, entry: &Entry<'_>) -> Result<(), Errno> {
        if !entry.path.is_empty() {
            let (parent, name) = self.parent_of(entry.path)?;
            let there = look(&parent, name)?;
            if there.is_some_and(|there| there != FileType::Directory) {
                unlinkat(&parent, name, AtFlags::empty())?;
            }
            if there != Some(FileType::Directory) {
                mkdirat(&parent, name, Mode::RWXU)?;
            }
            self.known.insert(entry.path.to_owned(), Known::Directory);
        }
        self.give(entry)
    }

    fn file(&mut self, entry: &Entry<'_>, content: &[u8]) -> Result<(), Errno> {
        let hash = self.hashes.hash_one(content);
        let (parent, name) = self.parent_of(entry.path)?;
        let there = look(&parent, name)?;
        if there == Some(FileType::RegularFile)
            && self.known.get(entry.path).is_some_and(|known| *known == Known::File(hash))
        {
            return self.give(entry);
        }
        self.clear_stage()?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut file = File::from(openat(&self.stage, STAGED, flags, Mode::RUSR | Mode::WUSR)?);
        // What a file system in memory lacks is room.
        file.write_all(content).map_err(|err| Errno::from_io_error(&err).unwrap_or(Errno::NOSPC))?;
        fchown(&file, Some(entry.owner.0), Some(entry.owner.1))?;
        fchmod(&file, entry.mode)?;
        drop(file);
        renameat(&self.stage, STAGED, &parent, name)?;
        self.known.insert(entry.path.to_owned(), Known::File(hash));
        Ok(())
    }

    fn link(&mut self, entry: &Entry<'_>, target: &[u8], with_new: bool) -> Result<(), Errno> {
        let (parent, name) = self.parent_of(entry.path)?;
        let target = OsStr::from_bytes(target);
        match look(&parent, name)? {
            None if with_new => symlinkat(target, &parent, name)?,
            None => return Ok(()),
            Some(FileType::Symlink)
                if readlinkat(&parent, name, Vec::new())?.as_bytes() == target.as_bytes() => {}
            Some(_) => {
                self.clear_stage()?;
                symlinkat(target, &self.stage, STAGED)?;
                let owner = (Some(entry.owner.0), Some(entry.owner.1));
                chownat(&self.stage, STAGED, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
                renameat(&self.stage, STAGED, &parent, name)?;
            }
        }
        self.known.insert(entry.path.to_owned(), Known::Link);
        self.give(entry)
    }

    /// Gives an entry that is there its owner and permissions, unless it has them.
    fn give(&self, entry: &Entry<'_>) -> Result<(), Errno> {
        // As a path only: that it is opened is not heard then.
        let entry_fd = self.open(if entry.path.is_empty() { "." } else { entry.path }, OFlags::NOFOLLOW)?;
        let stat = fstat(&entry_fd)?;
        let (uid, gid) = entry.owner;
        let is_owned = (stat.st_uid, stat.st_gid) == (uid.as_raw(), gid.as_raw());
        if !is_owned {
            chownat(&entry_fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
        // A change of owner may take bits away (chown(2)).
        let is_link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
        if !is_link && (!is_owned || Mode::from_raw_mode(stat.st_mode & 0o7777) != entry.mode) {
            // The descriptor is of no link, so this follows none but that of /proc.
            chmodat(CWD, of_fd(&entry_fd), entry.mode, AtFlags::empty())?;
        }
        Ok(())
    }

    /// Removes what is known, if it is to go: directories last, and from below.
    fn remove(&mut self, goes: impl Fn(&str, &Known) -> bool) -> Result<(), VolumeError> {
        let going = self.known.iter().filter(|(path, known)| goes(path, known));
        let (directories, others): (Vec<_>, Vec<_>) = going
            .map(|(path, known)| (path.clone(), *known == Known::Directory))
            .partition(|(_, is_directory)| *is_directory);
        for (path, is_directory) in others.into_iter().chain(directories.into_iter().rev()) {
            let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            let removed = self.parent_of(&path).and_then(|(parent, name)| unlinkat(&parent, name, flags));
            match removed {
                // A directory that somebody in the guest has filled stays, until the volume goes.
                Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => self.known.remove(&path),
                Err(errno) => return Err(VolumeError::Change { path, source: errno.into() }),
            };
        }
        Ok(())
    }

    fn clear_stage(&self) -> Result<(), Errno> {
        match unlinkat(&self.stage, STAGED, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn parent_of<'p>(&self, path: &'p str) -> Result<(OwnedFd, &'p str), Errno> {
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        Ok((self.open(parent, OFlags::DIRECTORY)?, name))
    }

    fn open(&self, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        openat2(&self.files, path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
    }
}

/// What has a name, if anything.
fn look(parent: impl AsFd, name: &str) -> Result<Option<FileType>, Errno> {
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests;
