//! Root file systems that are on a disk: a block device or an image file of the host, whose file system the guest mounts. No file operation
//! of the container leaves the guest then.
//!
//! The guest mounts it over `rootfs` of the container's [`Place`], where the share has an empty directory. What is in it is the guest's word from
//! then on: a host that mounts it later trusts the guest.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::pod::{Pod, PodError};
use crate::share::Place;
use crate::text;

/// The only file system that the guest mounts so.
const FILE_SYSTEM: &str = "ext4";

/// The machine has not got its root file system.
#[derive(Debug, thiserror::Error)]
#[error("mount the root file system {} in the guest", path.display())]
pub struct RootDiskError {
    /// The block device or image file.
    path: PathBuf,
    /// Why.
    pub source: PodError,
}

/// A block device or an image file with the root file system of a container, open.
#[derive(Debug)]
pub struct RootImage {
    path: PathBuf,
    file: File,
    read_only: bool,
}

impl RootImage {
    /// What the host would mount as `kind` (mount(8)'s `-t`) from `source`, if the guest can mount it instead: `None` if it is of another kind
    /// or on something else than a disk, or an option asks for more than whether it can be written to.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn of_mount(kind: &str, source: &Path, options: &[String]) -> io::Result<Option<Self>> {
        if kind != FILE_SYSTEM {
            return Ok(None);
        }
        let mut read_only = false;
        for option in options {
            match option.as_str() {
                "ro" => read_only = true,
                "rw" => read_only = false,
                // How the host would make a disk of a file.
                "loop" => {}
                _ => return Ok(None),
            }
        }
        let kind = fs::metadata(source)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Ok(None);
        }
        let file = File::options().read(true).write(!read_only).open(source)?;
        Ok(Some(Self { path: source.to_owned(), file, read_only }))
    }
}

/// The disk of a container's root file system, which the guest has mounted.
#[derive(Debug)]
pub(crate) struct RootDisk {
    slot: u8,
    mount_point: String,
}

/// Has the guest mount the root file system of a container that has its place in the share.
///
/// # Errors
/// [`RootDiskError`]; the machine has no disk for it then.
pub async fn mount(pod: &Pod, place: &mut Place, image: RootImage) -> Result<(), RootDiskError> {
    let mount_point = place.root_in_guest();
    let mounted = async {
        let (slot, disk) = pod.add_disk(image.file.as_fd(), image.read_only).await?;
        let mounted = pod.agent.mount_ext4(&disk.name, &mount_point, image.read_only);
        if let Err(error) = pod.or_death(mounted).await {
            pod.remove_device(slot).await;
            return Err(error);
        }
        Ok(slot)
    };
    let slot = mounted.await.map_err(|source| RootDiskError { path: image.path, source })?;
    place.root_disk = Some(RootDisk { slot, mount_point });
    Ok(())
}

/// Has the guest let go of it. Nothing in the guest uses it any more.
pub(crate) async fn unmount(pod: &Pod, disk: &RootDisk) {
    if let Err(error) = pod.or_death(pod.agent.unmount(&disk.mount_point)).await {
        // The slot stays taken: the guest may still write to it.
        tracing::warn!(error = %text::chain(&error), "unmount a root file system in the guest");
        return;
    }
    pod.remove_device(disk.slot).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_plain_mount_of_a_disk_is_for_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, [0; 512]).unwrap();
        let of = |kind: &str, source: &Path, options: &[&str]| {
            RootImage::of_mount(kind, source, &options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
        };
        for (options, read_only) in [(&["loop", "rw"][..], false), (&["loop", "ro"], true), (&[], false)] {
            assert_eq!(of("ext4", &disk, options).unwrap().unwrap().read_only, read_only, "{options:?}");
        }
        for (kind, source, options) in [
            ("overlay", Path::new("overlay"), &["lowerdir=/a"][..]),
            ("bind", dir.path(), &["rbind"]),
            ("ext4", &disk, &["loop", "offset=4096"]),
            ("ext4", dir.path(), &[]),
            ("ext4", Path::new("/dev/null"), &[]),
        ] {
            assert!(of(kind, source, options).unwrap().is_none(), "{kind} {source:?} {options:?}");
        }
        let missing = of("ext4", &dir.path().join("missing"), &[]);
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
