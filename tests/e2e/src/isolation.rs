//! What the process of a test has of its own: mount, network and PID namespaces, and an empty `/tmp`, `/run` and `/dev/shm`.
//!
//! So whatever is in them after the test was left by that test, and ends with it: the process is PID 1 of its namespace. Cgroups
//! have no such namespace that leaves controllers usable; they are told apart by the container ID in their name.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change, move_mount,
    open_tree,
};

/// The directories that are empty at the start of a test, with their modes.
pub const FRESH: [(&str, &str); 3] = [("/tmp", "mode=1777"), ("/run", "mode=755"), ("/dev/shm", "mode=1777")];

/// A command that runs `program` in namespaces of its own and ends it when it is killed.
pub fn command(program: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]).arg(program);
    command
}

/// Finishes what [`command`] began, from within: empty directories, and mounts that are shared, but not with the host. Shared,
/// because that is how systemd leaves every host; a mount that is meant to be private must be made so by kvrun.
///
/// # Errors
/// When a mount fails; each names its directory.
pub fn enter(kvrun: &Path) -> Result<()> {
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .context("cannot share mounts")?;
    let prefix = kvrun.parent().and_then(Path::parent).context("kvrun is not at PREFIX/bin/kvrun")?;
    for (dir, mode) in FRESH {
        // The tree under test may itself lie there: it stays visible.
        let kept = prefix
            .starts_with(dir)
            .then(|| {
                open_tree(CWD, prefix, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
            })
            .transpose()
            .with_context(|| format!("cannot clone the mount of {}", prefix.display()))?;
        let data = std::ffi::CString::new(mode)?;
        mount("tmpfs", dir, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, data.as_c_str())
            .with_context(|| format!("cannot mount a tmpfs on {dir}"))?;
        if let Some(tree) = kept {
            fs::create_dir_all(prefix)?;
            move_mount(tree, "", CWD, prefix, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                .with_context(|| format!("cannot keep {} visible", prefix.display()))?;
        }
    }
    Ok(())
}
