//! The root file system of a container, as containerd names it.

use std::path::{Path, PathBuf};

use containerd_shim::mount::mount_rootfs;
use containerd_shim::protos::types::mount::Mount;
use nix::mount::{MntFlags, umount2};

use crate::error::{Error, host};

/// Where a container's root file system is mounted, in its bundle.
const ROOTFS: &str = "rootfs";

/// What containerd has named as root file system, mounted in our own namespace. Dropped, it is unmounted.
#[derive(Debug)]
pub(crate) struct Rootfs(Vec<PathBuf>);

impl Rootfs {
    pub(crate) fn mount(mounts: Vec<Mount>, bundle: &Path) -> Result<Self, Error> {
        let target = bundle.join(ROOTFS);
        let mut mounted = Self(Vec::new());
        if mounts.is_empty() {
            return Ok(mounted);
        }
        std::fs::create_dir_all(&target).map_err(host("make the directory of the root file system"))?;
        for mount in mounts {
            let target = if mount.target.is_empty() {
                target.clone()
            } else {
                target.join(mount.target.trim_start_matches('/'))
            };
            let at = target.clone();
            // On a thread of its own: it may leave the working directory for good, to make paths shorter.
            let done = std::thread::spawn(move || {
                let kind = Some(mount.type_.as_str()).filter(|kind| !kind.is_empty());
                mount_rootfs(kind, Some(&mount.source), &mount.options, &at)
            });
            let done = done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            done.map_err(host(format!("mount the root file system at {}", target.display())))?;
            mounted.0.push(target);
        }
        Ok(mounted)
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        for target in self.0.iter().rev() {
            if let Err(error) = umount2(target, MntFlags::MNT_DETACH) {
                tracing::warn!(target = %target.display(), %error, "unmount a root file system");
            }
        }
    }
}
