//! The root file system of a container, as containerd names it: mounts, which the guest makes if it can ([`RootImage`], [`LayeredRoot`]), and else we.

use std::path::{Path, PathBuf};

use containerd_shim::mount::mount_rootfs;
use containerd_shim::protos::types::mount::Mount;
use kvrun_pod::layers::LayeredRoot;
use kvrun_pod::root_disk::RootImage;
use nix::mount::{MntFlags, umount2};

use crate::error::{Error, host};

/// Where a container's root file system is mounted, in its bundle.
const ROOTFS: &str = "rootfs";

/// What containerd has named as root file system, mounted in our own namespace. Dropped, it is unmounted.
#[derive(Debug)]
pub(crate) struct Rootfs {
    target: PathBuf,
    mounted: Vec<PathBuf>,
    /// What the guest is to mount instead.
    pub(crate) image: Option<RootImage>,
    /// Likewise; then the directory for changes is what is mounted.
    pub(crate) layers: Option<LayeredRoot>,
    /// What is left to us if it does not.
    instead: Vec<Mount>,
}

impl Rootfs {
    pub(crate) fn mount(mounts: Vec<Mount>, bundle: &Path) -> Result<Self, Error> {
        let target = bundle.join(ROOTFS);
        let mut rootfs = Self { target, mounted: Vec::new(), image: None, layers: None, instead: Vec::new() };
        if mounts.is_empty() {
            return Ok(rootfs);
        }
        std::fs::create_dir_all(&rootfs.target)
            .map_err(host("make the directory of the root file system"))?;
        if let [mount] = &mounts[..]
            && mount.target.is_empty()
        {
            let image = RootImage::of_mount(&mount.type_, Path::new(&mount.source), &mount.options);
            rootfs.image = image.map_err(host(format!("open the root file system {}", mount.source)))?;
            if rootfs.image.is_some() {
                return Ok(rootfs);
            }
            let layers = LayeredRoot::of_mount(&mount.type_, &mount.options);
            rootfs.layers = layers.map_err(host("open the layers of the root file system"))?;
        }
        let Some(layers) = &rootfs.layers else {
            rootfs.mount_all(mounts)?;
            return Ok(rootfs);
        };
        let changes = Mount {
            type_: "bind".to_owned(),
            source: layers.upper().to_string_lossy().into_owned(),
            options: vec!["bind".to_owned()],
            ..Default::default()
        };
        rootfs.instead = mounts;
        rootfs.mount_all(vec![changes])?;
        Ok(rootfs)
    }

    /// Mounts what the guest was to mount.
    pub(crate) fn serve_files(&mut self) -> Result<(), Error> {
        let mounts = std::mem::take(&mut self.instead);
        self.mount_all(mounts)
    }

    fn mount_all(&mut self, mounts: Vec<Mount>) -> Result<(), Error> {
        for mount in mounts {
            let target = if mount.target.is_empty() {
                self.target.clone()
            } else {
                self.target.join(mount.target.trim_start_matches('/'))
            };
            let at = target.clone();
            // On a thread of its own: it may leave the working directory for good, to make paths shorter.
            let done = std::thread::spawn(move || {
                let kind = Some(mount.type_.as_str()).filter(|kind| !kind.is_empty());
                mount_rootfs(kind, Some(&mount.source), &mount.options, &at)
            });
            let done = done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            done.map_err(host(format!("mount the root file system at {}", target.display())))?;
            self.mounted.push(target);
        }
        Ok(())
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            if let Err(error) = umount2(target, MntFlags::MNT_DETACH) {
                tracing::warn!(target = %target.display(), %error, "unmount a root file system");
            }
        }
    }
}
