//! The container's file system tree: its root, its mounts, `/dev`, and what is hidden or read-only in it (config.md, "Root", "Mounts";
//! config-linux.md, "Devices", "Default Devices", "Masked Paths", "Readonly Paths", "Rootfs Mount Propagation").
//!
//! Mounts are made with the descriptor calls (fsopen(2), open_tree(2), move_mount(2)): a mount is complete, attributes included, before it is
//! attached, at a descriptor that was resolved within the root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::{CWD, FileType, OFlags, fstat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
    move_mount, open_tree, unmount,
};

use super::copy_up;
use super::devices;
use super::error::{SetupError, system};
use super::in_root;
use super::mount_options::MountOptions;
use super::namespaces::Namespaces;
use super::sys::{self, MountAttr};

/// Where the container's device nodes are.
const DEV: &str = "/dev";

/// Trees of the guest that the container gets, cloned while we still see the guest with all privileges.
#[derive(Debug)]
pub struct Sources {
    root: OwnedFd,
    /// By mount; `None`: a file system of its own.
    mounts: Vec<Option<OwnedFd>>,
    /// Of `/dev/null`.
    null: OwnedFd,
    /// In a user namespace, where device nodes cannot be made.
    devices: Vec<devices::Bound>,
}

impl Sources {
    /// Clones what the spec names.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn open(spec: &Spec, namespaces: &Namespaces, cgroup: &Path) -> Result<Self, SetupError> {
        let root_path = root_path(spec);
        let root = clone_tree(CWD, root_path, true)
            .map_err(system(format!("root.path: clone {}", root_path.display())))?;
        let own_cgroups = namespaces.is_private(LinuxNamespaceType::Cgroup);
        // Who does not own the network may not mount sysfs, which shows it (Linux fs/sysfs/mount.c, `sysfs_init_fs_context`).
        let is_a_guest_on_the_network = namespaces.is_private(LinuxNamespaceType::User)
            && !namespaces.is_private(LinuxNamespaceType::Network);
        let mut mounts = Vec::new();
        for (index, mount) in spec.mounts().iter().flatten().enumerate() {
            let options = MountOptions::parse(index, mount)?;
            mounts.push(match (options.bind, mount.typ().as_deref()) {
                (Some(recursive), _) => {
                    let path = mount.source().as_deref().unwrap_or(Path::new(""));
                    let what = || format!("mounts[{index}].source: clone {}", path.display());
                    Some(clone_tree(CWD, path, recursive).map_err(system(what()))?)
                }
                // In the guest's cgroup namespace, its own cgroup is all that it is to see.
                (None, Some("cgroup" | "cgroup2")) if !own_cgroups => Some(
                    clone_tree(CWD, cgroup, true)
                        .map_err(system(format!("mounts[{index}]: clone the cgroup")))?,
                ),
                (None, Some("sysfs")) if is_a_guest_on_the_network => Some(
                    new_file_system("sysfs", "sysfs", &options.data)
                        .map_err(|(step, err)| system(format!("mounts[{index}]: {step}"))(err))?,
                ),
                _ => None,
            });
        }
        let null = clone_tree(CWD, Path::new("/dev/null"), false).map_err(system("clone /dev/null"))?;
        let devices = if namespaces.is_private(LinuxNamespaceType::User) && sets_up_dev(spec) {
            devices::bound(spec)?
        } else {
            Vec::new()
        };
        Ok(Self { root, mounts, null, devices })
    }
}

fn root_path(spec: &Spec) -> &Path {
    spec.root().as_ref().map_or(Path::new("rootfs"), |root| root.path())
}

/// As with runc: a `/dev` that is bound from elsewhere is left as it is.
fn sets_up_dev(spec: &Spec) -> bool {
    let is_bind = |mount: &Mount| {
        mount.typ().as_deref() == Some("bind")
            || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
    };
    !spec.mounts().iter().flatten().any(|mount| is_at_dev(mount) && is_bind(mount))
}

fn is_at_dev(mount: &Mount) -> bool {
    mount.destination().components().eq(Path::new(DEV).components())
}

fn clone_tree(dir: impl AsFd, path: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(dir.as_fd(), path, flags)
}

/// A root with everything in it, in the container's mount namespace.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    null: OwnedFd,
    null_is_attached: bool,
    /// To be made read-only when nothing is put into them any more, with their names.
    read_only_later: Vec<(OwnedFd, PathBuf)>,
}

impl Root {
    /// Builds the tree. Runs in the container's namespaces, with the umask 0.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn build(spec: &Spec, sources: Sources) -> Result<Self, SetupError> {
        let Sources { root, mounts: trees, null, devices } = sources;
        // Nothing we do here shows in the guest.
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .map_err(system("make the mount namespace private"))?;
        move_mount(&root, "", CWD, root_path(spec), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(system("root.path: mount the root file system"))?;
        let mut built = Self { fd: root, null, null_is_attached: false, read_only_later: Vec::new() };

        let list = spec.mounts().as_deref().unwrap_or_default();
        if !list.iter().any(is_at_dev) {
            built.mount_default_dev()?;
        }
        for ((index, mount), tree) in list.iter().enumerate().zip(trees) {
            built.mount(index, mount, tree)?;
        }
        if sets_up_dev(spec) {
            devices::make(built.fd.as_fd(), spec, devices)?;
        }
        Ok(built)
    }

    /// The root directory.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A spec without a mount on `/dev` still has default devices; they must not be left in the root file system, which
    /// is the host's.
    fn mount_default_dev(&mut self) -> Result<(), SetupError> {
        let data = [("mode", "0755"), ("size", "64k")]
            .map(|(name, value)| (name.to_owned(), Some(value.to_owned())));
        let tree =
            new_file_system("tmpfs", "tmpfs", &data).map_err(|(_, err)| err).map_err(system("make /dev"))?;
        let attr =
            MountAttr { set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC, ..MountAttr::default() };
        sys::mount_setattr(&tree, false, attr).map_err(system("make /dev"))?;
        let target =
            in_root::make(&self.fd, Path::new(DEV), false).map_err(system("make the mount point /dev"))?;
        attach(&tree, &target).map_err(system("mount /dev"))
    }

    fn mount(&mut self, index: usize, mount: &Mount, tree: Option<OwnedFd>) -> Result<(), SetupError> {
        let options = MountOptions::parse(index, mount)?;
        let destination = mount.destination();
        let typ = mount.typ().as_deref().unwrap_or("none");
        let what = |step: &str| format!("mounts[{index}] ({}): {step}", destination.display());

        let is_file = match &tree {
            Some(tree) => {
                let stat = fstat(tree).map_err(system(what("look at the source")))?;
                FileType::from_raw_mode(stat.st_mode) != FileType::Directory
            }
            None => false,
        };
        let mut target =
            in_root::make(&self.fd, destination, is_file).map_err(system(what("make the mount point")))?;
        if matches!(typ, "proc" | "sysfs") && options.bind.is_none() {
            // What everybody trusts to be at its place must not be led elsewhere by the image.
            target = in_root::open_without_links(&self.fd, destination)
                .map_err(system(what("open the mount point, which must not contain a symbolic link")))?;
        }
        let tree = match tree {
            Some(tree) => tree,
            None => {
                let name = if typ == "cgroup" { "cgroup2" } else { typ };
                let source = mount.source().as_deref().and_then(Path::to_str).unwrap_or(name);
                new_file_system(name, source, &options.data)
                    .map_err(|(step, err)| system(what(&step))(err))?
            }
        };
        if options.copy_up {
            let says = |name: &str| options.data.iter().any(|(option, _)| option == name);
            copy_up::copy(&target, &tree, says)
                .map_err(system(what("tmpcopyup: copy what the image has there")))?;
        }
        let mut attr = options.attr;
        if is_at_dev(mount) && attr.set & libc::MOUNT_ATTR_RDONLY != 0 && options.bind.is_none() {
            // The device nodes are still to come.
            attr.set &= !libc::MOUNT_ATTR_RDONLY;
            let later = tree.try_clone().map_err(system(what("duplicate a descriptor")))?;
            self.read_only_later.push((later, destination.clone()));
        }
        sys::mount_setattr(&tree, false, attr).map_err(system(what("set the options")))?;
        sys::mount_setattr(&tree, true, options.recursive)
            .map_err(system(what("set the recursive options")))?;
        attach(&tree, &target).map_err(system(what("mount")))?;
        for (propagation, recursive) in options.propagation {
            let attr = MountAttr { propagation, ..MountAttr::default() };
            sys::mount_setattr(&tree, recursive, attr).map_err(system(what("set the propagation")))?;
        }
        Ok(())
    }

    /// Makes it the root of this process, and takes the guest out of its sight.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn enter(&self) -> Result<(), SetupError> {
        let old = rustix::fs::open(
            "/",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .map_err(system("open the guest's root"))?;
        // pivot_root(2): "." twice stacks the old root on the new one.
        rustix::process::fchdir(&self.fd)
            .and_then(|()| rustix::process::pivot_root(".", "."))
            .and_then(|()| rustix::process::fchdir(&old))
            .and_then(|()| unmount(".", UnmountFlags::DETACH))
            .and_then(|()| rustix::process::chdir("/"))
            .map_err(system("change the root"))
    }

    /// What only restricts: after everything else, in the entered root.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn restrict(&mut self, spec: &Spec) -> Result<(), SetupError> {
        let read_only = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
        for (mount, path) in self.read_only_later.drain(..) {
            sys::mount_setattr(&mount, false, read_only)
                .map_err(system(format!("make {} read-only", path.display())))?;
        }
        let Some(linux) = spec.linux() else { return Ok(()) };
        if let Some(name) = linux.rootfs_propagation().as_deref() {
            set_root_propagation(name)?;
        }
        for path in linux.readonly_paths().iter().flatten() {
            self.make_read_only(Path::new(path))
                .map_err(system(format!("linux.readonlyPaths: make {path} read-only")))?;
        }
        for path in linux.masked_paths().iter().flatten() {
            self.mask(Path::new(path)).map_err(system(format!("linux.maskedPaths: mask {path}")))?;
        }
        if spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly) == Some(true) {
            sys::mount_setattr(&self.fd, false, read_only)
                .map_err(system("root.readonly: make the root read-only"))?;
        }
        Ok(())
    }

    /// `None`: it does not exist, and nothing is to be done.
    fn existing(&self, path: &Path) -> Result<Option<OwnedFd>, Errno> {
        match in_root::open(&self.fd, path) {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            other => other.map(Some),
        }
    }

    fn make_read_only(&self, path: &Path) -> std::io::Result<()> {
        let Some(target) = self.existing(path)? else { return Ok(()) };
        let tree = clone_tree(&target, Path::new(""), true)?;
        let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
        sys::mount_setattr(&tree, false, attr)?;
        Ok(attach(&tree, &target)?)
    }

    fn mask(&mut self, path: &Path) -> std::io::Result<()> {
        let Some(target) = self.existing(path)? else { return Ok(()) };
        if FileType::from_raw_mode(fstat(&target)?.st_mode) == FileType::Directory {
            // No inode but its root.
            let data = [("nr_inodes", "1"), ("mode", "0755")]
                .map(|(name, value)| (name.to_owned(), Some(value.to_owned())));
            let tree = new_file_system("tmpfs", "tmpfs", &data).map_err(|(_, err)| err)?;
            let attr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
            sys::mount_setattr(&tree, false, attr)?;
            return Ok(attach(&tree, &target)?);
        }
        // A tree can be cloned again only once it is in our namespace (Linux 6.12 fs/namespace.c, `__do_loopback`).
        if std::mem::replace(&mut self.null_is_attached, true) {
            return Ok(attach(&clone_tree(&self.null, Path::new(""), false)?, &target)?);
        }
        Ok(attach(&self.null, &target)?)
    }

    /// Puts the terminal at `/dev/console`, where there is a `/dev`.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn bind_console(&self, slave: &OwnedFd) -> Result<(), SetupError> {
        let target = in_root::make(&self.fd, Path::new("/dev/console"), true)
            .map_err(system("process.terminal: make /dev/console"))?;
        clone_tree(slave, Path::new(""), false)
            .and_then(|tree| attach(&tree, &target))
            .map_err(system("process.terminal: mount the terminal at /dev/console"))
    }
}

fn attach(tree: &OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Attaches a tree at a descriptor of this namespace.
///
/// # Errors
///
/// move_mount(2).
pub(super) fn attach_at(tree: &OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
    attach(tree, target)
}

/// Clones the mount of one file.
///
/// # Errors
///
/// open_tree(2).
pub(super) fn clone_file(path: &Path) -> Result<OwnedFd, Errno> {
    clone_tree(CWD, path, false)
}

fn new_file_system(
    typ: &str,
    source: &str,
    data: &[(String, Option<String>)],
) -> Result<OwnedFd, (String, std::io::Error)> {
    let step = |step: String| move |errno: Errno| (step, std::io::Error::from(errno));
    let fs = fsopen(typ, FsOpenFlags::FSOPEN_CLOEXEC).map_err(step(format!("open the file system {typ}")))?;
    let with_log = |text: String| {
        let fs = fs.as_fd();
        move |errno: Errno| (explained(fs, text), std::io::Error::from(errno))
    };
    fsconfig_set_string(&fs, "source", source).map_err(with_log(format!("set the source {source:?}")))?;
    for (name, value) in data {
        match value {
            Some(value) => fsconfig_set_string(&fs, name.as_str(), value.as_str()),
            None => fsconfig_set_flag(&fs, name.as_str()),
        }
        .map_err(with_log(format!("set the option {name:?}")))?;
    }
    fsconfig_create(&fs).map_err(with_log(format!("create the file system {typ}")))?;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .map_err(step(format!("mount the file system {typ}")))
}

/// What was attempted, with what the kernel has to say about it: one line per read of the context.
fn explained(fs: BorrowedFd<'_>, what: String) -> String {
    let mut line = [0; 256];
    match rustix::io::read(fs, &mut line) {
        // "e tmpfs: Unknown parameter 'x'"
        Ok(length) if length > 2 => format!("{what} ({})", String::from_utf8_lossy(&line[2..length]).trim()),
        _ => what,
    }
}

fn set_root_propagation(name: &str) -> Result<(), SetupError> {
    let (recursive, kind) = match name.strip_prefix('r') {
        Some(rest) => (MountPropagationFlags::REC, rest),
        None => (MountPropagationFlags::empty(), name),
    };
    let flag = match kind {
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "private" => MountPropagationFlags::PRIVATE,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        "" => return Ok(()),
        _ => {
            return Err(SetupError::field(
                "linux.rootfsPropagation",
                format!("{name:?} is not a propagation"),
            ));
        }
    };
    mount_change("/", flag | recursive).map_err(system(format!("linux.rootfsPropagation: set {name}")))
}
