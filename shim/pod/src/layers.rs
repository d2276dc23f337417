//! Root file systems in layers, as containerd's EROFS snapshotter has them (its `docs/snapshotters/erofs.md`): images, which become read-only memory of
//! the machine, and a directory of the host for what a container changes. The guest mounts the images and an overlay over them; so what is
//! read of them is the host's own page cache, without a file operation that leaves the guest.
//!
//! The directory is served as files, at the container's [`Place`]. Overlayfs wants two directories that are on the same mount, the changes and its workbench, and
//! the snapshotter's two have in common only the one above them. That has what the host relies on beside them, which the guest must not
//! get its hands on. So both are made in that of the changes, as [`CHANGES`]. A root file system that has it can be mounted by a guest only.
//!
//! An image that several containers of a pod have is there once. An image is a stranger's: only the guest looks at what is in it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use kvrun_vmm_api::DeviceConfig;

use crate::agent::AgentError;
use crate::pod::{Pod, PodError};
use crate::share::{FileId, Place};
use crate::text;
use crate::vmm::VmmError;

/// What the guest makes in the directory for changes.
const CHANGES: &str = ".kvrun";
/// Where the guest has the images, by their slots.
const GUEST_LAYERS_DIR: &str = "/run/kvrun/layers";
/// The directory at which the snapshotter has a layer mounted, and the image of it, beside.
const MOUNTED: &str = "fs";
const IMAGE: &str = "layer.erofs";
/// How many slots layers leave to what comes later: memory that is plugged, and one link or disk.
const SLOTS_LEFT: usize = 2;
/// How long images may be together, in memories of the machine at its boot. The guest has a structure of 64 bytes for each page of 4096: so they are no
/// more than a sixteenth of it.
const MOST_MEMORIES: u64 = 4;

/// The machine has not got its root file system.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// The images are too long together.
    #[error(
        "the layer {} would make {bytes} bytes of layers, and the guest has memory to keep account of {most} bytes", path.display()
    )]
    TooLong {
        /// The image.
        path: PathBuf,
        /// With those that are there.
        bytes: u64,
        /// What may be.
        most: u64,
    },
    /// An image cannot be memory of the guest, or be mounted there.
    #[error("mount the layer {} in the guest", path.display())]
    Layer {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: PodError,
    },
    /// The guest cannot make one of them.
    #[error("mount the layers of a root file system over each other in the guest, with {} for what is changed", path.display())]
    Overlay {
        /// The directory on the host.
        path: PathBuf,
        /// Why.
        #[source]
        source: PodError,
    },
}

impl LayersError {
    /// If the machine or its agent failed: how.
    pub fn pod_error(&self) -> Option<&PodError> {
        match self {
            Self::TooLong { .. } => None,
            Self::Layer { source, .. } | Self::Overlay { source, .. } => Some(source),
        }
    }

    /// Whether the machine has no room, or the guest does not take it: it works all the same, and can be served files.
    pub fn is_refusal(&self) -> bool {
        self.pod_error().is_none_or(|error| {
            matches!(
                error,
                PodError::NoSlot
                    | PodError::NoDisk
                    | PodError::Vmm(VmmError::Refused { .. })
                    | PodError::Agent(AgentError::Refused { .. })
            )
        })
    }
}

/// A root file system in layers.
#[derive(Debug)]
pub struct LayeredRoot {
    /// The uppermost first.
    images: Vec<Image>,
    upper: PathBuf,
}

#[derive(Debug)]
struct Image {
    path: PathBuf,
    file: File,
    id: FileId,
    bytes: u64,
}

impl LayeredRoot {
    /// What the host would mount as `kind` (mount(8)'s `-t`), if the guest can mount it instead: `None` if it is no overlay whose layers
    /// are all images, an option asks for more than that, or the host has mounted it before and somebody has changed something.
    ///
    /// # Errors
    /// An image or the directory for changes cannot be opened.
    pub fn of_mount(kind: &str, options: &[String]) -> io::Result<Option<Self>> {
        if kind != "overlay" {
            return Ok(None);
        }
        let (mut layers, mut upper) = (None, None);
        for option in options {
            match option.split_once('=') {
                // A colon in a name is escaped.
                Some(("lowerdir", paths)) if !paths.contains('\\') => layers = Some(paths),
                Some(("upperdir", path)) => upper = Some(PathBuf::from(path)),
                Some(("workdir", _)) => {}
                _ => return Ok(None),
            }
        }
        let (Some(layers), Some(upper)) = (layers, upper) else { return Ok(None) };
        let images = layers.split(':').map(|layer| Image::of_layer(Path::new(layer)));
        let Some(images) = images.collect::<io::Result<Option<Vec<_>>>>()? else { return Ok(None) };
        let root = Self { images, upper };
        let is_fresh = fs::read_dir(&root.upper)?.next().is_none();
        Ok((is_fresh || root.is_guests()).then_some(root))
    }

    /// The directory for changes.
    pub fn upper(&self) -> &Path {
        &self.upper
    }

    /// Whether a guest has changed something in it, which only a guest finds.
    pub fn is_guests(&self) -> bool {
        self.upper.join(CHANGES).symlink_metadata().is_ok()
    }
}

impl Image {
    fn of_layer(layer: &Path) -> io::Result<Option<Self>> {
        if !layer.ends_with(MOUNTED) {
            return Ok(None);
        }
        let path = layer.with_file_name(IMAGE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let metadata = file.metadata()?;
        let id = FileId::of(&file)?;
        Ok(metadata.is_file().then_some(Self { path, file, id, bytes: metadata.len() }))
    }
}

/// The layers that a machine has.
pub(crate) type Layers = tokio::sync::Mutex<HashMap<FileId, Layer>>;

/// One of them.
#[derive(Debug)]
pub(crate) struct Layer {
    slot: u8,
    bytes: u64,
    containers: usize,
}

impl Layer {
    fn mount_point(slot: u8) -> String {
        format!("{GUEST_LAYERS_DIR}/{slot}")
    }
}

/// The root file system of a container, which the guest has mounted.
#[derive(Debug)]
pub(crate) struct MountedLayers {
    images: Vec<FileId>,
    mount_point: String,
}

/// Has the guest mount the root file system of a container, whose place in the share has its directory for changes.
///
/// # Errors
/// [`LayersError`]; the machine has nothing of it then.
pub async fn mount(pod: &Pod, place: &mut Place, root: &LayeredRoot) -> Result<(), LayersError> {
    place.layers = Some(mount_at(pod, place.root_in_guest(), root).await?);
    Ok(())
}

async fn mount_at(pod: &Pod, mount_point: String, root: &LayeredRoot) -> Result<MountedLayers, LayersError> {
    let mut layers = pod.layers.lock().await;
    let (mut images, mut mount_points) = (Vec::new(), Vec::new());
    let mounted = async {
        for image in &root.images {
            let slot = add(pod, &mut layers, image).await?;
            images.push(image.id);
            mount_points.push(Layer::mount_point(slot));
        }
        let changes = format!("{mount_point}/{CHANGES}");
        let mounted = pod.agent.mount_overlay(mount_points, &changes, &mount_point);
        let failed = |source| LayersError::Overlay { path: root.upper.clone(), source };
        pod.or_death(mounted).await.map_err(failed)
    };
    if let Err(error) = mounted.await {
        release(pod, &mut layers, &images).await;
        return Err(error);
    }
    Ok(MountedLayers { images, mount_point })
}

/// Has the guest let go of it. Nothing in the guest uses it any more.
pub(crate) async fn unmount(pod: &Pod, root: &MountedLayers) {
    if let Err(error) = pod.or_death(pod.agent.unmount(&root.mount_point)).await {
        // The layers stay: the guest may still read them.
        tracing::warn!(error = %text::chain(&error), "unmount a root file system in the guest");
        return;
    }
    release(pod, &mut *pod.layers.lock().await, &root.images).await;
}

/// Has the guest mount an image, if it has not yet; the slot it is in.
async fn add(pod: &Pod, layers: &mut HashMap<FileId, Layer>, image: &Image) -> Result<u8, LayersError> {
    if let Some(layer) = layers.get_mut(&image.id) {
        layer.containers += 1;
        return Ok(layer.slot);
    }
    let most = MOST_MEMORIES * (u64::from(pod.growth.memory_mib().0) << 20);
    let bytes = layers.values().fold(image.bytes, |sum, layer| sum.saturating_add(layer.bytes));
    if bytes > most {
        return Err(LayersError::TooLong { path: image.path.clone(), bytes, most });
    }
    let failed = |source| LayersError::Layer { path: image.path.clone(), source };
    let slot = pod.slots.take_leaving(SLOTS_LEFT).ok_or_else(|| failed(PodError::NoSlot))?;
    let added = pod.add_device(slot, DeviceConfig::Pmem, &[image.file.as_fd()]).await.map_err(failed)?;
    let mounted = async {
        let device = added.ok_or(PodError::NoDisk)?;
        pod.or_death(pod.agent.mount_erofs(&device.name, &Layer::mount_point(slot))).await
    };
    if let Err(error) = mounted.await {
        pod.remove_device(slot).await;
        return Err(failed(error));
    }
    layers.insert(image.id, Layer { slot, bytes: image.bytes, containers: 1 });
    Ok(slot)
}

/// Takes images away that a container has used, unless other containers have them.
async fn release(pod: &Pod, layers: &mut HashMap<FileId, Layer>, images: &[FileId]) {
    for image in images {
        let Some(layer) = layers.get_mut(image) else { continue };
        layer.containers -= 1;
        if layer.containers > 0 {
            continue;
        }
        let slot = layer.slot;
        layers.remove(image);
        if let Err(error) = pod.or_death(pod.agent.unmount(&Layer::mount_point(slot))).await {
            // Its slot stays taken: the guest may still read it.
            tracing::warn!(slot, error = %text::chain(&error), "unmount a layer in the guest");
            continue;
        }
        pod.remove_device(slot).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::pod::tests::{Extent, Program, boot, guest_with, run};
    use crate::pod::{SHARE_SLOT, SLOTS};

    /// The directories of snapshots, as the snapshotter has them: layers 1 and 2 are images, 3 is none, 4 has changes.
    fn snapshots() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for number in ["1", "2", "3", "4"] {
            fs::create_dir_all(dir.path().join(number).join("fs")).unwrap();
        }
        for number in ["1", "2"] {
            fs::write(dir.path().join(number).join(IMAGE), [0; 4096]).unwrap();
        }
        dir
    }

    fn of(dir: &Path, kind: &str, options: &[&str]) -> Option<LayeredRoot> {
        let options: Vec<_> =
            options.iter().map(|option| option.replace('@', &dir.to_string_lossy())).collect();
        LayeredRoot::of_mount(kind, &options).unwrap()
    }

    const ITS_OWN: [&str; 2] = ["workdir=@/4/work", "upperdir=@/4/fs"];

    #[test]
    fn overlay_of_images_is_for_the_guest_and_all_else_for_the_host() {
        let dir = snapshots();
        let layered = |lower: &str| of(dir.path(), "overlay", &[&ITS_OWN[..], &[lower]].concat());
        let root = layered("lowerdir=@/2/fs:@/1/fs").unwrap();
        let paths: Vec<_> = root.images.iter().map(|image| image.path.clone()).collect();
        assert_eq!(paths, [dir.path().join("2/layer.erofs"), dir.path().join("1/layer.erofs")]);
        assert_eq!((root.images[0].bytes, root.upper()), (4096, &*dir.path().join("4/fs")));
        for lower in ["lowerdir=@/3/fs:@/1/fs", "lowerdir=@/1", "lowerdir=@/1\\:2/fs", "lowerdir="] {
            assert!(layered(lower).is_none(), "{lower}");
        }
        let lower = "lowerdir=@/1/fs";
        for options in [&[lower][..], &ITS_OWN, &[ITS_OWN[0], ITS_OWN[1], lower, "userxattr"]] {
            assert!(of(dir.path(), "overlay", options).is_none(), "{options:?}");
        }
        assert!(of(dir.path(), "bind", &["rbind", "rw"]).is_none());
    }

    #[test]
    fn what_the_host_has_changed_is_for_the_host() {
        let dir = snapshots();
        let layered = || of(dir.path(), "overlay", &[ITS_OWN[0], ITS_OWN[1], "lowerdir=@/1/fs"]);
        assert!(!layered().unwrap().is_guests());
        fs::create_dir(dir.path().join("4/fs/etc")).unwrap();
        assert!(layered().is_none());
        fs::create_dir(dir.path().join("4/fs").join(CHANGES)).unwrap();
        assert!(layered().unwrap().is_guests());
    }

    #[test]
    fn layers_are_there_once_and_go_with_the_last_that_has_them() {
        let dir = snapshots();
        let root = |lower: &str| of(dir.path(), "overlay", &[ITS_OWN[0], ITS_OWN[1], lower]).unwrap();
        let extent = Arc::new(Mutex::new(Extent::default()));
        let mounted = || extent.lock().unwrap().mounted;
        run(async {
            let pod = boot(guest_with(Program::Cat, Arc::clone(&extent))).await.unwrap();
            let both = root("lowerdir=@/2/fs:@/1/fs");
            let first = mount_at(&pod, "/run/kvrun/first".to_owned(), &both).await.unwrap();
            let second =
                mount_at(&pod, "/run/kvrun/second".to_owned(), &root("lowerdir=@/1/fs")).await.unwrap();
            assert_eq!((mounted(), pod.layers.lock().await.len()), (4, 2));
            unmount(&pod, &first).await;
            assert_eq!((mounted(), pod.layers.lock().await.len()), (2, 1));
            unmount(&pod, &second).await;
            assert_eq!((mounted(), pod.layers.lock().await.len()), (0, 0));

            extent.lock().unwrap().is_stubborn = true;
            let refused = mount_at(&pod, "/run/kvrun/first".to_owned(), &both).await.unwrap_err();
            assert!(matches!(refused, LayersError::Overlay { .. }) && refused.is_refusal(), "{refused:?}");
            assert_eq!((mounted(), pod.layers.lock().await.len()), (0, 0));
            // All slots are empty again.
            assert_eq!(std::iter::from_fn(|| pod.slots.take()).count(), usize::from(SLOTS - SHARE_SLOT - 1));
            let full = mount_at(&pod, "/run/kvrun/first".to_owned(), &both).await.unwrap_err();
            assert!(matches!(full.pod_error(), Some(PodError::NoSlot)) && full.is_refusal(), "{full:?}");
        });
    }

    #[test]
    fn layers_beyond_what_the_guest_can_keep_account_of_are_refused() {
        let dir = snapshots();
        let lower = "lowerdir=@/2/fs:@/1/fs";
        run(async {
            let pod = boot(guest_with(Program::Cat, Arc::default())).await.unwrap();
            let most = MOST_MEMORIES * (u64::from(pod.growth.memory_mib().0) << 20);
            File::options()
                .write(true)
                .open(dir.path().join("1/layer.erofs"))
                .unwrap()
                .set_len(most)
                .unwrap();
            let root = of(dir.path(), "overlay", &[ITS_OWN[0], ITS_OWN[1], lower]).unwrap();
            let refused = mount_at(&pod, "/run/kvrun/first".to_owned(), &root).await.unwrap_err();
            assert!(matches!(refused, LayersError::TooLong { .. }) && refused.is_refusal(), "{refused:?}");
            assert_eq!(pod.layers.lock().await.len(), 0);
        });
    }
}
