//! The jail's file systems: its root, its share, and a procfs that knows only this process.

use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount_bind_recursive, mount_remount, move_mount, unmount,
};
use rustix::process::{fchdir, pivot_root};

use super::{JailError, failed};

/// Where the share is in the jail.
pub(super) const SHARE: &str = "/share";

/// A procfs of this process's PID namespace, in which it is alone, attached nowhere. Without what is not about processes (`subset=pid`):
/// `/proc/sys` would be writable for root, and this process stays the host's user 0.
///
/// To be called while the process has the privilege, outside the user namespace to come.
pub(super) fn own_proc() -> Result<OwnedFd, JailError> {
    let step = failed("make a procfs");
    let fs = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).map_err(&step)?;
    fsconfig_set_string(&fs, "subset", "pid").map_err(&step)?;
    fsconfig_create(&fs).map_err(&step)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(&step)
}

/// Makes an empty tmpfs the root, with the working directory in it as [`SHARE`] if that is asked for, and lets go of every other mount.
///
/// To be called in the new mount namespace. All mounts in it are slaves of those outside, because it belongs to another user namespace
/// (mount_namespaces(7)); so what the engine mounts in the share appears, and nothing done here is seen outside.
pub(super) fn replace(share: bool) -> Result<(), JailError> {
    let step = failed("make a root");
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(&step)?;
    for (key, value) in [("mode", "0555"), ("size", "4k"), ("nr_inodes", "8")] {
        fsconfig_set_string(&fs, key, value).map_err(&step)?;
    }
    fsconfig_create(&fs).map_err(&step)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(&step)?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(&step)?;

    let path_only = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let shared = rustix::fs::open(".", path_only, Mode::empty()).map_err(&step)?;
    // pivot_root(2), "pivot_root(".", ".")": the old root is then mounted on top of the new one.
    fchdir(&root).map_err(&step)?;
    pivot_root(".", ".").map_err(failed("enter the root"))?;
    if share {
        let step = failed("mount the share");
        rustix::fs::mkdir(SHARE, Mode::from_raw_mode(0o555)).map_err(&step)?;
        fchdir(&shared).map_err(&step)?;
        // A copy of what is mounted there now, and one more slave of the mounts outside; in one step, so that nothing the engine mounts
        // meanwhile is missed.
        mount_bind_recursive(".", SHARE).map_err(&step)?;
        fchdir(&root).map_err(&step)?;
    }
    unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?;
    let read_only =
        MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_remount("/", read_only, c"").map_err(failed("make the root read-only"))?;
    rustix::process::chdir("/").map_err(&step)
}
