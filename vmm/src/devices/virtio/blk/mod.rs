//! The block device (virtio 1.3 s5.2): a raw image file, or a host block device, as a disk of the guest.
//!
//! * this file - [`Blk`], the device.
//! * [`worker`] - the thread that serves its queue.
//! * [`request`] - a request taken from a chain and carried out.
//!
//! The image is raw by declaration. Nothing in it is ever looked at.

mod request;
mod worker;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvrun_vmm_api::config::MAX_BLK_SERIAL;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::request::{Disk, SECTOR};
use self::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_config_bytes};

const QUEUE_SIZE: u16 = 256;
/// All descriptors of a chain but those of header and status may be data.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// `struct virtio_blk_config` (virtio 1.3 s5.2.4) up to what the features offered make valid: capacity, size_max, seg_max.
const CONFIG_LEN: usize = 16;

/// Why something cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The descriptor is of something else.
    #[error("disk image is neither a regular file nor a block device")]
    NotAnImage,
    /// The descriptor allows less than the disk is to do.
    #[error("disk image is not open for {0}")]
    Access(&'static str),
    /// The serial number does not fit.
    #[error("serial number {0:?} of the disk is longer than {MAX_BLK_SERIAL} bytes")]
    Serial(String),
    /// The host refused.
    #[error("cannot {what} of the disk image")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The block device.
pub struct Blk {
    disk: Arc<Disk>,
    worker: Option<Worker>,
}

impl Blk {
    /// A disk over `image`. Its capacity is the size of the image now; bytes after the last whole sector are out of the guest's
    /// reach. A disk that is `read_only` never writes, whatever the descriptor allows.
    ///
    /// # Errors
    /// [`BlkError`].
    pub fn open(image: OwnedFd, read_only: bool, serial: &str) -> Result<Self, BlkError> {
        let failed = |what| move |source: io::Error| BlkError::Host { what, source };
        let stat = fstat(&image).map_err(io::Error::from).map_err(failed("find out the type"))?;
        if !matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::BlockDevice) {
            return Err(BlkError::NotAnImage);
        }
        let flags =
            fcntl_getfl(&image).map_err(io::Error::from).map_err(failed("find out the access mode"))?;
        let mode = flags & OFlags::ACCMODE;
        if flags.contains(OFlags::PATH) || mode == OFlags::WRONLY {
            return Err(BlkError::Access("reading"));
        }
        if !read_only && mode != OFlags::RDWR {
            return Err(BlkError::Access("writing"));
        }
        let mut id = [0; MAX_BLK_SERIAL];
        let Some(room) = id.get_mut(..serial.len()) else { return Err(BlkError::Serial(serial.to_owned())) };
        room.copy_from_slice(serial.as_bytes());
        let mut image = File::from(image);
        // The end of a block device is its size too.
        let size = image.seek(SeekFrom::End(0)).map_err(failed("find out the size"))?;
        Ok(Self { disk: Arc::new(Disk { image, sectors: size / SECTOR, read_only, id }), worker: None })
    }
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &'static str {
        "blk"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only { 1 << VIRTIO_BLK_F_RO } else { 0 };
        1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | read_only
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_LEN];
        config[..8].copy_from_slice(&self.disk.sectors.to_le_bytes());
        config[12..].copy_from_slice(&SEG_MAX.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.take_queues()?;
        // A driver that cannot flush is to find every write it completes on the medium (virtio 1.3 s5.2.6.2).
        let write_through = activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        let worker =
            Worker::start(self.disk.clone(), write_through, queue, activation.mem, activation.interrupt)
                .map_err(|source| ActivateError::Host { what: "start the thread of a disk", source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
