//! The share: the one directory of the host that the guest sees, and all it sees.
//!
//! It is a small tmpfs of its own, in which each container has a [`Place`], a directory whose name is a number, with
//!
//! * `rootfs`, where the bundle's root file system is bind-mounted, or a directory over which the guest mounts it, empty ([`root_disk`](crate::root_disk)) or with what is
//!   changed in it ([`layers`](crate::layers));
//!
//! and beside them `volumes`, where the sources of bind mounts are, by number: one for all containers of the pod that have it ([`volumes`]).
//!
//! The guest has it mounted at [`GUEST_SHARE_DIR`]; [`Share::add`] rewrites a spec's paths accordingly. No number is used twice: for as long as
//! the guest may use a name without asking again, it would find what a removed container had there.
//!
//! Contract:
//! * The process is in a mount namespace of its own ([`enter_mount_namespace`]), so all these mounts vanish with it and the VMM, however they
//!   end. Nothing is mounted in the host's namespace.
//! * The VMM is given [`Share::directory`]; what is mounted there later appears to it.
//! * No path is walked twice: trees are cloned from descriptors that were opened, and checked, when the bundle was read ([`Trees`]), and attached
//!   at descriptors.
//! * Read-only is enforced here, outside the guest, as the spec has it: `ro` for the mount itself (mount_setattr(2)), `rro`
//!   for those below too; unless another container of the pod may write to the same: then it is up to the guest, in which both are. So is that no device node of the host can be opened through the share.
//! * The tmpfs itself is read-only to the VMM: a guest cannot fill the host's memory through it.

mod huge_pages;
mod id_map;
mod mount_points;
mod trees;
mod view;
mod volumes;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use oci_spec::runtime::Spec;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};

use crate::bundle::{Bind, Bundle};
use crate::layers::MountedLayers;
use crate::root_disk::RootDisk;
use crate::sys::{self, MountAttr};
use crate::watched::Kept;

use huge_pages::HugePages;
pub use mount_points::MountPointError;
pub use trees::Trees;
use trees::clone_tree;
pub use view::View;
pub(crate) use volumes::FileId;
use volumes::Volumes;

/// The tag of the virtio-fs device.
pub const SHARE_TAG: &str = "kvrun";
/// Where the guest has the share.
pub const GUEST_SHARE_DIR: &str = "/run/kvrun/share";
/// The root file system of a container, in its place.
const ROOTFS: &str = "rootfs";
/// Where volumes are in the share.
const VOLUMES: &str = "volumes";

/// What can go wrong with the share.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The process has several threads, or may not.
    #[error("enter a mount namespace; kvrun needs to run as root (CAP_SYS_ADMIN)")]
    Namespace(#[source] io::Error),
    /// A step of making the share failed.
    #[error("{step}")]
    Make {
        /// Which.
        step: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A directory of the host could not be put into it.
    #[error("share {} with the guest", path.display())]
    Attach {
        /// The directory or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mount point does not exist in a read-only root and could not be made.
    #[error(transparent)]
    MountPoint(#[from] MountPointError),
}

/// Proof that the process is in a mount namespace of its own.
#[derive(Debug)]
pub struct MountNamespace(());

/// Puts the process into a mount namespace of its own, into which the host's later mounts still arrive. To be called while there is one
/// thread.
///
/// # Errors
/// [`ShareError::Namespace`].
pub fn enter_mount_namespace() -> Result<MountNamespace, ShareError> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(ShareError::Namespace)?.count();
    if threads != 1 {
        // Only the calling thread would change.
        return Err(ShareError::Namespace(io::Error::other(format!(
            "there are {threads} threads instead of one"
        ))));
    }
    sys::unshare_mount_namespace().map_err(ShareError::Namespace)?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).map_err(|e| ShareError::Namespace(e.into()))?;
    Ok(MountNamespace(()))
}

/// The share of one pod. Dropping it unmounts it.
#[derive(Debug)]
pub struct Share {
    /// The tmpfs as everybody sees it: read-only, and with everything that is mounted in it.
    root: OwnedFd,
    /// The same tmpfs, writable and without the mounts in it; not attached anywhere.
    writable: OwnedFd,
    mounted: Mounted,
    next: AtomicU64,
    volumes: Mutex<Volumes>,
}

/// A container's directory in the share.
#[derive(Debug)]
pub struct Place {
    name: String,
    /// The numbers of the volumes it uses.
    volumes: Vec<u64>,
    /// What the guest has mounted over its `rootfs`, if anything.
    pub(crate) root_disk: Option<RootDisk>,
    /// Likewise, in layers.
    pub(crate) layers: Option<MountedLayers>,
    /// Volumes of it that are kept up to date on the host.
    pub(crate) kept: Vec<Kept>,
    /// The numbers of those that it has as copies ([`watched`](crate::watched)).
    pub(crate) copies: Vec<u64>,
}

impl Place {
    /// Where the guest has it.
    pub fn in_guest(&self) -> PathBuf {
        Path::new(GUEST_SHARE_DIR).join(&self.name)
    }

    /// Where the guest has the root file system.
    pub(crate) fn root_in_guest(&self) -> String {
        format!("{GUEST_SHARE_DIR}/{}/{ROOTFS}", self.name)
    }
}

/// Unmounts what is mounted at a path when dropped.
#[derive(Debug)]
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // With everything below it; whoever still has it open keeps it until then.
        if let Err(error) = unmount(&self.0, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            tracing::warn!(path = %self.0.display(), %error, "unmount the share");
        }
    }
}

impl Share {
    /// Mounts an empty share at `path`, an empty directory.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn mount(_: &MountNamespace, path: &Path) -> Result<Self, ShareError> {
        let step = |step| move |source| ShareError::Make { step, source };
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("open a tmpfs for the share"))?;
        // Mount points have no contents; the number of inodes bounds what a spec with many mounts costs.
        for (key, value) in [("source", "kvrun"), ("mode", "0755"), ("size", "4k"), ("nr_inodes", "8k")] {
            fsconfig_set_string(&fs, key, value).map_err(step("configure the tmpfs for the share"))?;
        }
        fsconfig_create(&fs).map_err(step("create the tmpfs for the share"))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        let root =
            fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(step("mount the share"))?;
        move_mount(&root, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(step("mount the share"))?;
        let mounted = Mounted(path.to_owned());
        let writable = clone_tree(root.as_fd(), false).map_err(step("clone the share"))?;
        // Shared, so that a mount namespace the VMM makes for itself receives what is mounted here later.
        let read_only =
            MountAttr { set: libc::MOUNT_ATTR_RDONLY, propagation: libc::MS_SHARED, ..MountAttr::default() };
        sys::mount_setattr(&root, false, read_only)
            .map_err(|source| ShareError::Attach { path: path.to_owned(), source })?;
        let share = Self { root, writable, mounted, next: AtomicU64::new(0), volumes: Mutex::default() };
        share.make_directory(VOLUMES).map_err(step("make a directory in the share"))?;
        Ok(share)
    }

    /// The directory that the VMM serves.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Adds the files of a container, and returns its spec with the paths the guest has for them.
    ///
    /// # Errors
    /// [`ShareError`]; nothing is left of it then.
    pub fn add(&self, bundle: &Bundle, trees: Trees) -> Result<(Spec, Place), ShareError> {
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let mut place = Place {
            name,
            volumes: Vec::new(),
            root_disk: None,
            layers: None,
            kept: Vec::new(),
            copies: Vec::new(),
        };
        match self.fill(&mut place, bundle, trees) {
            Ok(spec) => Ok((spec, place)),
            Err(error) => {
                self.remove(&place);
                Err(error)
            }
        }
    }

    fn fill(&self, place: &mut Place, bundle: &Bundle, trees: Trees) -> Result<Spec, ShareError> {
        let mut spec = bundle.spec().clone();
        if let Some(hooks) = spec.hooks_mut() {
            // The engine runs these, on the host.
            #[allow(deprecated, reason = "deprecated in the specification, and in use")]
            hooks.set_prestart(None);
            hooks.set_create_runtime(None).set_poststart(None).set_poststop(None);
        }
        let mut trees = trees.into_iter();
        let mut next = || trees.next().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| ShareError::Attach { path, source }
        };

        let step = |source| ShareError::Make { step: "make the container's directory in the share", source };
        self.make_directory(&place.name).map_err(step)?;
        let rootfs = format!("{}/{ROOTFS}", place.name);
        let attached = next().and_then(|tree| self.attach(&tree, &rootfs, true));
        attached.map_err(failed(bundle.rootfs_path()))?;
        if let Some(root) = spec.root_mut() {
            root.set_path(place.root_in_guest().into());
        }
        for bind in bundle.binds() {
            let tree = next().map_err(failed(bind.path()))?;
            let mount = spec.mounts_mut().as_mut().and_then(|mounts| mounts.get_mut(bind.index()));
            let Some(mount) = mount else { continue };
            if let Some(huge_pages) = HugePages::of(&tree).map_err(failed(bind.path()))? {
                huge_pages.mount_instead(mount);
                continue;
            }
            let source = if let Some(device) = bind.guest_device() {
                PathBuf::from(device)
            } else {
                let volume = self.add_volume(bind, &tree).map_err(failed(bind.path()))?;
                place.volumes.push(volume);
                place.kept.extend(Kept::of(bind, volume));
                Path::new(GUEST_SHARE_DIR).join(volume_name(volume))
            };
            mount.set_source(Some(source));
        }
        Ok(spec)
    }

    /// Attaches the source of a bind mount, unless it is there already; its number.
    fn add_volume(&self, bind: &Bind, tree: &OwnedFd) -> io::Result<u64> {
        let file = FileId::of(tree)?;
        let mut volumes = self.volumes();
        let number = volumes.number();
        let name = volume_name(number);
        self.attach(tree, &name, bind.is_directory())
            .inspect_err(|_| self.detach(&name, bind.is_directory()))?;
        // To whom files belong is not in the table of mounts.
        let there = if bind.id_map().is_some() { Ok(None) } else { self.that_serves(&volumes, file, number) };
        let Some(there) = there.transpose() else {
            volumes.insert(number, file, bind.is_directory());
            return Ok(number);
        };
        self.detach(&name, bind.is_directory());
        let there = there?;
        volumes.use_again(there);
        Ok(there)
    }

    /// A volume that serves as well as the one that was attached under a number.
    fn that_serves(&self, volumes: &Volumes, file: FileId, number: u64) -> io::Result<Option<u64>> {
        let mut alike = volumes.alike(file).peekable();
        if alike.peek().is_none() {
            return Ok(None);
        }
        let table = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
        let path = |number| volumes::escaped(&self.mounted.0.join(volume_name(number)).to_string_lossy());
        let new = path(number);
        Ok(alike.find(|old| volumes::serves(&table, &path(*old), &new)))
    }

    /// Opens a volume that is a directory.
    pub(crate) fn open_volume(&self, number: u64) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let opened = rustix::fs::openat2(&self.root, volume_name(number), flags, Mode::empty(), resolve);
        Ok(opened?)
    }

    /// Takes away what [`Share::add`] has added for a container, as far as no other one uses it; what that is to the guest. What the guest has still open
    /// goes on to work.
    pub fn remove(&self, place: &Place) -> Vec<PathBuf> {
        let mut removed = vec![place.in_guest()];
        self.detach(&format!("{}/{ROOTFS}", place.name), true);
        if let Err(error) = rustix::fs::unlinkat(&self.writable, &place.name, AtFlags::REMOVEDIR) {
            tracing::debug!(place = place.name, %error, "remove from the share");
        }
        let mut volumes = self.volumes();
        for number in &place.volumes {
            if let Some(is_directory) = volumes.release(*number) {
                let name = volume_name(*number);
                self.detach(&name, is_directory);
                removed.push(Path::new(GUEST_SHARE_DIR).join(name));
            }
        }
        removed
    }

    fn volumes(&self) -> MutexGuard<'_, Volumes> {
        // Nothing that holds the lock panics half-way.
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_directory(&self, place: &str) -> Result<(), Errno> {
        rustix::fs::mkdirat(&self.writable, place, Mode::from_raw_mode(0o755))
    }

    fn make_file(&self, place: &str) -> Result<(), Errno> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat(&self.writable, place, flags, Mode::from_raw_mode(0o644)).map(drop)
    }

    /// Attaches a tree at a mount point that is made for it.
    fn attach(&self, tree: &OwnedFd, place: &str, is_directory: bool) -> io::Result<()> {
        if is_directory { self.make_directory(place) } else { self.make_file(place) }?;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let target = rustix::fs::openat2(&self.root, place, flags, Mode::empty(), resolve)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(move_mount(tree, "", &target, "", flags)?)
    }

    /// Takes away what is attached at a mount point, and that.
    fn detach(&self, place: &str, is_directory: bool) {
        let _ = unmount(self.mounted.0.join(place), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let _ = rustix::fs::unlinkat(&self.writable, place, flags);
    }
}

/// A volume in the share.
fn volume_name(number: u64) -> String {
    format!("{VOLUMES}/{number}")
}

/// Whether a file may be shared as the source of a bind mount.
pub(crate) fn is_shareable(kind: FileType) -> bool {
    matches!(kind, FileType::Directory | FileType::RegularFile)
}

#[cfg(test)]
pub(crate) mod tests;
