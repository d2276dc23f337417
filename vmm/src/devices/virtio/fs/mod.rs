//! The file system device (virtio 1.3 s5.11): shares a host directory with the guest. The FUSE server is `virtiofsd`'s, in
//! this process.
//!
//! * this file - [`Fs`], the device.
//! * [`pool`] - the threads that serve its queues.
//! * [`frame`] - a request brought from the guest's chain into the shape the server takes.
//! * [`share`] - the server and its settings.
//! * [`descriptors`] - how many host descriptors each share may hold.
//! * [`counters`] - what is counted.
//!
//! The directory is one of the share of this process's jail, and the server does not run without one ([`crate::jail`]): the guest
//! reaches what is below it, and of mounts below it those in the jail's mount namespace.

mod counters;
mod descriptors;
mod frame;
mod pool;
mod share;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use kvrun_vmm_api::FsCache;
use kvrun_vmm_api::config::MAX_FS_TAG;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::counters::Counters;
use self::descriptors::Allotment;
use self::pool::Pool;
use self::share::{Share, ShareSource};
use super::{ActivateError, Activation, ConfigSpace, DeviceState, SavedDevice, VirtioDevice};
use crate::jail;

/// The hiprio queue and one request queue. Linux limits a request to what its queue holds without indirect descriptors, and the
/// server takes 1 MiB: 256 pages and a few headers.
const QUEUE_SIZES: [u16; 2] = [128, 512];
/// `struct virtio_fs_config` (virtio 1.3 s5.11.4): the tag, then how many request queues there are.
const CONFIG_LEN: usize = MAX_FS_TAG + 4;

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag must be something to mount by.
    #[error("tag {0:?} of the shared directory is not 1 to {MAX_FS_TAG} bytes without NUL")]
    Tag(String),
    /// It is not a directory of the share.
    #[error("cannot open the directory {directory:?} of the share")]
    Directory {
        /// Its path from there.
        directory: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file server did not start.
    #[error("cannot serve the directory of share {tag:?}")]
    Open {
        /// The share's tag.
        tag: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// How a directory is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsOptions {
    /// Refuse every change.
    pub read_only: bool,
    /// What the guest may keep without asking again.
    pub cache: FsCache,
    /// Let the guest write data out later. Nothing on a share that is read-only.
    pub writeback: bool,
}

/// A share where it stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsState {
    /// By what it is mounted.
    pub tag: String,
    /// Its settings.
    pub options: FsOptions,
    /// What the file server knows of the guest's inodes and open files, in its own, versioned form: inodes by their paths in the share.
    /// Empty if the driver has not started the device.
    pub session: Vec<u8>,
}

/// The file system device.
pub struct Fs {
    config: [u8; CONFIG_LEN],
    source: Arc<ShareSource>,
    /// Opened ahead, for the first activation.
    share: Option<Share>,
    pool: Option<Pool>,
    counters: Arc<Counters>,
}

impl Fs {
    /// Shares a directory of `share`, named by its path from there, under `tag`.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(share: &jail::Share, directory: &str, tag: &str, options: FsOptions) -> Result<Self, FsError> {
        let descriptors = Allotment::new().map_err(|source| FsError::Open { tag: tag.to_owned(), source })?;
        Self::with_descriptors(share, directory, tag, options, descriptors)
    }

    fn with_descriptors(
        share: &jail::Share,
        directory: &str,
        tag: &str,
        options: FsOptions,
        descriptors: Allotment,
    ) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > MAX_FS_TAG || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let failed = |source| FsError::Open { tag: tag.to_owned(), source };
        let root = share
            .open_directory(directory)
            .map_err(|source| FsError::Directory { directory: directory.to_owned(), source })?;
        let source = Arc::new(ShareSource::new(share, root, options, descriptors).map_err(failed)?);
        let share = Some(pool::open(&source).map_err(failed)?);
        let mut config = [0; CONFIG_LEN];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[MAX_FS_TAG..].copy_from_slice(&1u32.to_le_bytes());
        Ok(Self { config, source, share, pool: None, counters: Arc::default() })
    }
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn name(&self) -> &'static str {
        "fs"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn place_config(&mut self, space: ConfigSpace) {
        space.write(0, &self.config);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues = activation.take_queues::<2>()?;
        let failed = |source| ActivateError::Host { what: "start the file server", source };
        let share = match self.share.take() {
            Some(share) => share,
            None => pool::open(&self.source).map_err(failed)?,
        };
        let Activation { mem, interrupt, .. } = activation;
        let (source, counters) = (self.source.clone(), self.counters.clone());
        let pool = Pool::start(source, share, mem, queues.into(), interrupt, counters).map_err(failed)?;
        self.pool = Some(pool);
        Ok(())
    }

    fn reset(&mut self) {
        // Ends the session too: open files and inodes go with the share.
        self.pool = None;
    }

    fn pause(&mut self) {
        if let Some(pool) = &self.pool {
            pool.pause();
        }
    }

    fn resume(&mut self) {
        if let Some(pool) = &self.pool {
            pool.resume();
        }
    }

    fn save(&self) -> Option<SavedDevice> {
        let (queues, session) = match &self.pool {
            Some(pool) => pool
                .save()
                .inspect_err(|e| log::warn!("cannot save the session of a shared directory: {e}"))
                .ok()?,
            None => Default::default(),
        };
        let tag = self.config[..MAX_FS_TAG].split(|byte| *byte == 0).next().unwrap_or_default();
        let tag = String::from_utf8_lossy(tag).into_owned();
        let state = FsState { tag, options: self.source.options(), session };
        Some(SavedDevice { queues, state: DeviceState::Fs(state) })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.report()
    }
}
