//! File systems of attached devices.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use kvrun_agent_api::agent::mount_request::Kind;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, mkdirat, openat, statx, syncfs, unlinkat};

use crate::overlay::{Made, Overlay};
use crate::path::{PathError, RunPath, of_fd};

/// Why a mount or an unmount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The request names no kind this agent knows.
    #[error("mount of {0:?}: the kind of file system is not given or not known")]
    Kind(String),
    /// The source does not fit the kind.
    #[error("mount source {0:?} is not {1}")]
    Source(String, &'static str),
    /// Another mount of this agent is there.
    #[error("{0} is a mount point already")]
    Taken(RunPath),
    /// Nothing was mounted there by this agent.
    #[error("{0} is not a mount point")]
    NotMounted(RunPath),
    /// mount(2).
    #[error("cannot mount {source_name:?} ({fs_type}) on {mount_point}")]
    Mount {
        /// Tag or device.
        source_name: String,
        /// The file system's type.
        fs_type: &'static str,
        /// Where.
        mount_point: RunPath,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// The directories of an overlay that are changed cannot be made.
    #[error("cannot make the directories for what is changed in {0}")]
    Changes(RunPath, #[source] io::Error),
    /// What was written to it is not on its device.
    #[error("cannot write out what {mount_point} has in memory")]
    Sync {
        /// Where.
        mount_point: RunPath,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// umount(2).
    #[error("cannot unmount {mount_point}")]
    Unmount {
        /// Where.
        mount_point: RunPath,
        /// Why.
        #[source]
        errno: Errno,
    },
}

/// A checked request.
#[derive(Clone, Debug)]
pub struct Mount {
    fs_type: &'static str,
    source: String,
    mount_point: RunPath,
    flags: MsFlags,
    /// Options of the file system.
    data: Option<&'static str>,
    /// What an overlay is made of; that is in its options, too.
    overlay: Option<Overlay>,
}

impl Mount {
    /// Checks the parts of a request.
    ///
    /// # Errors
    ///
    /// [`MountError::Kind`], [`MountError::Source`], [`MountError::Path`].
    pub fn parse(
        kind: Option<Kind>,
        source: &str,
        mount_point: &str,
        read_only: bool,
        layers: &[String],
    ) -> Result<Self, MountError> {
        let bad_source = |what| MountError::Source(source.chars().take(64).collect(), what);
        let block_device = || {
            let name = source.strip_prefix("/dev/").unwrap_or_default();
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric()) {
                return Err(bad_source("/dev/NAME of a block device"));
            }
            Ok(())
        };
        let mut overlay = None;
        let fs_type = match kind {
            Some(Kind::VIRTIOFS) => {
                // virtio 1.3 section 5.11.4: the tag is up to 36 bytes.
                if source.is_empty() || source.len() > 36 || source.contains('\0') {
                    return Err(bad_source("a virtio-fs tag of 1 to 36 bytes"));
                }
                "virtiofs"
            }
            Some(Kind::EXT4) => {
                block_device()?;
                "ext4"
            }
            Some(Kind::EROFS) => {
                block_device()?;
                "erofs"
            }
            Some(Kind::OVERLAY) => {
                overlay = Some(Overlay::parse(source, layers)?);
                "overlay"
            }
            Some(Kind::KIND_UNSPECIFIED) | None => {
                return Err(MountError::Kind(source.chars().take(64).collect()));
            }
        };
        let read_only = read_only || fs_type == "erofs";
        let flags = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        // A file on pmem is the host's page cache. Without this it would be copied into the guest's.
        let dax = fs_type == "erofs" && source.starts_with("/dev/pmem");
        let data = dax.then_some("dax=always");
        Ok(Self {
            fs_type,
            source: if overlay.is_some() { fs_type } else { source }.to_owned(),
            mount_point: RunPath::parse(mount_point)?,
            flags,
            data,
            overlay,
        })
    }

    fn make(&self) -> Result<(), MountError> {
        let target = self.mount_point.open_or_create()?;
        let made = self.overlay.as_ref().map(Overlay::make).transpose()?;
        let data = made.as_ref().map(Made::options).or(self.data.map(str::to_owned));
        let (source, fs_type) = (Some(self.source.as_str()), Some(self.fs_type));
        nix::mount::mount(source, &of_fd(&target), fs_type, self.flags, data.as_deref()).map_err(|errno| {
            if let Some(made) = made {
                made.remove();
            }
            MountError::Mount {
                source_name: self.source.clone(),
                fs_type: self.fs_type,
                mount_point: self.mount_point.clone(),
                errno,
            }
        })
    }
}

/// Forgets what the kernel has cached of a path that the host has removed from a share: the names below it, and the mounts it has made
/// by itself where the host has other file systems (Linux 6.12 fs/fuse/dir.c, `fuse_dentry_automount`). One that is still there stays.
///
/// # Errors
///
/// [`MountError::Path`].
pub fn forget(path: &RunPath) -> Result<(), MountError> {
    let Some((parent, name)) = path.open_parent()? else { return Ok(()) };
    // Only for what is to be created does the kernel ask the host whatever its cache says (`fuse_dentry_revalidate`, LOOKUP_EXCL). The answer, that there is
    // no such name, empties the cache; then the host refuses the creation, because the share is read-only there.
    if mkdirat(&parent, name, Mode::from_raw_mode(0o755)).is_ok() {
        let _ = unlinkat(&parent, name, AtFlags::REMOVEDIR);
    }
    Ok(())
}

/// Asks the host what files of a share are like now, whatever the cache says: it may have been asked when somebody on the host had not
/// written them yet. A page cache of what has changed is dropped (Linux 6.12 fs/fuse/inode.c, `fuse_change_attributes`). May block for as long as
/// the device does.
pub fn look_again(files: &[PathBuf]) {
    for file in files {
        let flags = AtFlags::STATX_FORCE_SYNC | AtFlags::SYMLINK_NOFOLLOW;
        if let Err(err) = statx(CWD, file, flags, StatxFlags::BASIC_STATS) {
            // Whoever opens it is told the same.
            log::debug!("look again at {}: {err}", file.display());
        }
    }
}

/// What is mounted, in order.
#[derive(Debug, Default)]
pub struct Mounts {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    mounted: HashMap<RunPath, u64>,
}

impl Mounts {
    /// Mounts. May block for as long as the device does.
    ///
    /// # Errors
    ///
    /// [`MountError::Taken`], [`MountError::Mount`], [`MountError::Path`].
    pub fn mount(&self, mount: &Mount) -> Result<(), MountError> {
        {
            let mut table = self.table();
            if table.mounted.contains_key(&mount.mount_point) {
                return Err(MountError::Taken(mount.mount_point.clone()));
            }
            let mut layers = mount.overlay.iter().flat_map(Overlay::layers);
            if let Some(missing) = layers.find(|layer| !table.mounted.contains_key(layer)) {
                return Err(MountError::NotMounted(missing.clone()));
            }
            table.next += 1;
            let order = table.next;
            table.mounted.insert(mount.mount_point.clone(), order);
        }
        let result = mount.make();
        if result.is_err() {
            self.table().mounted.remove(&mount.mount_point);
        }
        result
    }

    /// Unmounts, and removes the mount point where that is an empty directory.
    ///
    /// # Errors
    ///
    /// [`MountError::NotMounted`], [`MountError::Unmount`] (`EBUSY`: in use), [`MountError::Path`].
    pub fn unmount(&self, mount_point: &RunPath) -> Result<(), MountError> {
        if !self.table().mounted.contains_key(mount_point) {
            return Err(MountError::NotMounted(mount_point.clone()));
        }
        // A mount namespace whose last process has just ended may have the file system a moment longer: then umount(2) writes nothing.
        sync(mount_point)?;
        self.unmount_with(mount_point, MntFlags::empty())?;
        self.table().mounted.remove(mount_point);
        Ok(())
    }

    /// Unmounts everything, last first; what is still in use is made read-only by the power going away after a sync.
    pub fn unmount_all(&self) {
        let mut mounted: Vec<_> = std::mem::take(&mut self.table().mounted).into_iter().collect();
        mounted.sort_by_key(|(_, order)| std::cmp::Reverse(*order));
        for (mount_point, _) in mounted {
            if let Err(err) = self.unmount_with(&mount_point, MntFlags::empty()) {
                log::warn!("{err}");
            }
        }
    }

    fn unmount_with(&self, mount_point: &RunPath, flags: MntFlags) -> Result<(), MountError> {
        let Some((parent, name)) = mount_point.open_parent()? else {
            return Err(MountError::NotMounted(mount_point.clone()));
        };
        nix::mount::umount2(&of_fd(&parent).join(name), flags | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| MountError::Unmount { mount_point: mount_point.clone(), errno })?;
        // A directory that somebody has filled meanwhile stays.
        let _ = unlinkat(&parent, name, AtFlags::REMOVEDIR);
        Ok(())
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sync(mount_point: &RunPath) -> Result<(), MountError> {
    let Some((parent, name)) = mount_point.open_parent()? else { return Ok(()) };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let synced = openat(&parent, name, flags, Mode::empty()).and_then(syncfs);
    synced.map_err(|source| MountError::Sync { mount_point: mount_point.clone(), source: source.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_checked_part_by_part() {
        let parse = |kind, source: &str| Mount::parse(kind, source, "/run/kvrun/m", false, &[]);
        assert_eq!(parse(Some(Kind::VIRTIOFS), "share").unwrap().fs_type, "virtiofs");
        assert!(parse(Some(Kind::EROFS), "/dev/vda").unwrap().flags.contains(MsFlags::MS_RDONLY));
        assert_eq!(parse(Some(Kind::EROFS), "/dev/vda").unwrap().data, None);
        assert_eq!(parse(Some(Kind::EROFS), "/dev/pmem0").unwrap().data, Some("dax=always"));
        for source in ["", "vda", "/dev/", "/dev/../etc", "/dev/mapper/x", "/dev/vda\0"] {
            assert!(matches!(parse(Some(Kind::EXT4), source), Err(MountError::Source(..))), "{source:?}");
        }
        assert!(matches!(parse(Some(Kind::VIRTIOFS), &"t".repeat(37)), Err(MountError::Source(..))));
        assert!(
            matches!(parse(Some(Kind::OVERLAY), "/run/kvrun/c"), Err(MountError::Source(..))),
            "no layers"
        );
        assert!(matches!(parse(None, "share"), Err(MountError::Kind(_))));
        assert!(matches!(parse(Some(Kind::KIND_UNSPECIFIED), "share"), Err(MountError::Kind(_))));
        let outside = Mount::parse(Some(Kind::VIRTIOFS), "share", "/etc", false, &[]);
        assert!(matches!(outside, Err(MountError::Path(_))));
    }

    #[test]
    fn mounts_come_and_go_and_each_mistake_has_its_error() {
        let _guard = crate::path::tests::FORK_OR_UNMOUNT.lock().unwrap();
        crate::path::tests::private_run();
        let mounts = Mounts::default();
        let mount = |point: &str| Mount {
            fs_type: "tmpfs",
            source: "test".to_owned(),
            mount_point: RunPath::parse(point).unwrap(),
            flags: MsFlags::empty(),
            data: None,
            overlay: None,
        };
        let outer = mount("/run/kvrun/outer");
        mounts.mount(&outer).unwrap();
        assert!(matches!(mounts.mount(&outer), Err(MountError::Taken(_))));
        std::fs::write("/run/kvrun/outer/file", "").unwrap();
        let inner = mount("/run/kvrun/outer/in/ner");
        mounts.mount(&inner).unwrap();
        let busy = mounts.unmount(&outer.mount_point);
        assert!(matches!(busy, Err(MountError::Unmount { errno: Errno::EBUSY, .. })));
        mounts.unmount(&inner.mount_point).unwrap();
        assert!(matches!(mounts.unmount(&inner.mount_point), Err(MountError::NotMounted(_))));
        mounts.mount(&inner).unwrap();
        mounts.unmount_all();
        assert!(!std::path::Path::new("/run/kvrun/outer").exists(), "unmounted, and the mount point removed");

        let broken = Mount { fs_type: "no-such-fs", ..mount("/run/kvrun/broken") };
        assert!(matches!(mounts.mount(&broken), Err(MountError::Mount { errno: Errno::ENODEV, .. })));
        assert!(mounts.table().mounted.is_empty());
    }
}
