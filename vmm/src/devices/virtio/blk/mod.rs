//! The block device (virtio 1.3 s5.2): a raw image file, or a host block device, as a disk of the guest.
//!
//! * this file - [`Blk`], the device: what it offers, and when it works.
//! * [`image`] - the image on the host.
//! * [`worker`] - the thread of a disk.
//! * [`session`] - what the thread does from `DRIVER_OK` to reset: requests out of the queues, into an engine, and back.
//! * [`request`] - a request taken from a chain and checked.
//! * [`io`] - what it asks of the image.
//! * [`engine`] - io_uring, or blocking system calls.
//! * [`counters`] - what is counted.

mod counters;
mod engine;
mod image;
mod io;
mod request;
mod session;
mod worker;

#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvrun_vmm_api::RateLimit;
use kvrun_vmm_api::config::MAX_BLK_SERIAL;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::counters::Counters;
use self::engine::Choice;
use self::image::{Image, ImageError};
use self::request::{MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS};
use self::session::Session;
use self::worker::Worker;
use super::{
    ActivateError, Activation, ConfigSpace, DeviceRequest, DeviceRequestError, DeviceState, SavedDevice,
    VirtQueue, VirtioDevice,
};
use crate::locked;
use crate::rate_limiter::RateLimiter;

const QUEUE_SIZE: u16 = 256;
/// All descriptors of a chain but those of header and status may be data.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The most bytes of a descriptor. Linux merges pages that are neighbours up to this.
const SIZE_MAX: u32 = 128 << 10;
/// `struct virtio_blk_config` (virtio 1.3 s5.2.4) as far as the features offered make it valid.
const CONFIG_LEN: usize = 60;

/// Why something cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The image cannot be one.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The serial number does not fit.
    #[error("serial number {0:?} of the disk is longer than {MAX_BLK_SERIAL} bytes")]
    Serial(String),
    /// The host refused the thread.
    #[error("cannot start the thread of a disk")]
    Thread(#[source] std::io::Error),
}

/// What a disk is to be like: see [`DeviceConfig::Blk`](kvrun_vmm_api::DeviceConfig).
#[derive(Clone, Copy, Debug)]
pub struct BlkOptions<'a> {
    /// It never writes, whatever the descriptor allows.
    pub read_only: bool,
    /// Its serial number.
    pub serial: &'a str,
    /// How many queues it has.
    pub queues: u8,
    /// How fast it may be.
    pub limit: RateLimit,
}

/// What the driver knows of the disk: whoever restores the device checks that the image it gives is still of that kind. Of the rest there is
/// nothing to save: a paused disk has no request under way, and a limit is given anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// Capacity in sectors.
    pub sectors: u64,
    /// The driver has been told that it cannot write.
    pub read_only: bool,
    /// Serial number, padded with NULs.
    pub serial: [u8; MAX_BLK_SERIAL],
}

/// The block device.
pub struct Blk {
    disk: Arc<Disk>,
    queue_sizes: Vec<u16>,
    worker: Worker,
    phase: Phase,
}

/// What a disk consists of, whoever works on it.
struct Disk {
    image: Image,
    engine: Choice,
    /// Serial number, padded with NULs.
    id: [u8; MAX_BLK_SERIAL],
    limiter: Mutex<RateLimiter>,
    counters: Counters,
}

/// Where the device is in the circle of [`VirtioDevice`].
enum Phase {
    /// Reset.
    Inactive,
    /// The worker has the session.
    Running,
    /// No one works.
    Paused(Box<Session>),
}

impl Blk {
    /// A disk over `image`. Its capacity is the size of the image now; bytes after the last whole block are out of the guest's
    /// reach.
    ///
    /// # Errors
    /// [`BlkError`].
    pub fn open(image: OwnedFd, options: BlkOptions<'_>) -> Result<Self, BlkError> {
        let image = Image::open(image, options.read_only)?;
        let engine = if image.is_in_memory() { Choice::Plain } else { Choice::Best };
        Self::new(image, options, engine)
    }

    fn new(image: Image, options: BlkOptions<'_>, engine: Choice) -> Result<Self, BlkError> {
        let BlkOptions { read_only: _, serial, queues, limit } = options;
        let mut id = [0; MAX_BLK_SERIAL];
        let Some(room) = id.get_mut(..serial.len()) else { return Err(BlkError::Serial(serial.to_owned())) };
        room.copy_from_slice(serial.as_bytes());
        let limiter = Mutex::new(RateLimiter::new(limit, Instant::now()));
        Ok(Self {
            disk: Arc::new(Disk { image, engine, id, limiter, counters: Counters::default() }),
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            worker: Worker::start().map_err(BlkError::Thread)?,
            phase: Phase::Inactive,
        })
    }

    /// Takes the session back from the worker.
    fn halt(&mut self) -> Option<Box<Session>> {
        match std::mem::replace(&mut self.phase, Phase::Inactive) {
            Phase::Inactive => None,
            Phase::Running => self.worker.halt(),
            Phase::Paused(session) => Some(session),
        }
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
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let changes = if self.disk.image.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        let queues = if self.queue_sizes.len() > 1 { 1 << VIRTIO_BLK_F_MQ } else { 0 };
        1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | changes
            | queues
    }

    fn place_config(&mut self, space: ConfigSpace) {
        let image = &self.disk.image;
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &image.sectors().to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        // Geometry (16..20) and topology (24..32) are not offered.
        put(20, &image.block_size().to_le_bytes());
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        if !image.is_read_only() {
            // Discards, then zeroes: sectors at most, ranges at most; alignment, and whether space may be given back.
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &image.granularity().to_le_bytes());
            put(48, &MAX_ZERO_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        space.write(0, &config);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { mem, features, queues, interrupt } = activation;
        // A driver with fewer CPUs than there are queues leaves the rest out (Linux 6.12 drivers/block/virtio_blk.c: init_vq).
        let queues: Vec<VirtQueue> = queues.into_iter().flatten().collect();
        if queues.is_empty() {
            return Err(ActivateError::MissingQueue(0));
        }
        // A driver that cannot flush is to find every change it completes on the medium (virtio 1.3 s5.2.6.2).
        let durable = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        self.worker.begin(Box::new(Session::new(self.disk.clone(), mem, interrupt, durable, queues)));
        self.phase = Phase::Running;
        Ok(())
    }

    fn reset(&mut self) {
        drop(self.halt());
    }

    fn pause(&mut self) {
        if let Some(session) = self.halt() {
            self.phase = Phase::Paused(session);
        }
    }

    fn resume(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Inactive) {
            Phase::Paused(session) => {
                self.worker.begin(session);
                self.phase = Phase::Running;
            }
            other => self.phase = other,
        }
    }

    fn save(&self) -> Option<SavedDevice> {
        let queues = match &self.phase {
            Phase::Paused(session) => session.positions(self.queue_sizes.len()),
            Phase::Inactive | Phase::Running => Vec::new(),
        };
        let Disk { image, id, .. } = &*self.disk;
        let state = BlkState { sectors: image.sectors(), read_only: image.is_read_only(), serial: *id };
        Some(SavedDevice { queues, state: DeviceState::Blk(state) })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.disk.counters.report()
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), DeviceRequestError> {
        let DeviceRequest::Limit(limit, None) = request else {
            return Err(DeviceRequestError::NotForThis(request));
        };
        locked(self.disk.limiter.lock()).set(limit, Instant::now());
        self.worker.wake_up();
        Ok(())
    }
}
