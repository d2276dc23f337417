//! Virtio 1.3 devices.
//!
//! * this file - the contract between a device and its transport: [`VirtioDevice`], [`Activation`], [`InterruptLine`].
//! * [`queue`] - a virtqueue as devices see it: every index and length the guest chose checked before use.
//! * [`state`] - what a slot and its device would need to go on elsewhere.
//! * [`loop_part`] - the part of a device that works on the event loop, [`served`] - that of one which only serves its queues; [`counter`] - what devices count with.
//! * [`mmio`] - the MMIO transport, with slots that are filled and emptied while the guest runs; [`registers`] - what the guest reads of them.
//! * `balloon`, `blk`, `fs`, `mem`, `net`, `pmem`, `rng`, `vsock` - the devices.
//!
//! A device knows nothing of its transport, and a transport nothing of what its device does.

pub mod balloon;
pub mod blk;
pub(crate) mod counter;
pub mod fs;
pub(crate) mod loop_part;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod registers;
pub mod rng;
pub(crate) mod served;
pub mod state;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;

use std::io;
use std::sync::Arc;

use kvrun_vmm_api::RateLimit;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use queue::{QueueError, VirtQueue};
pub use registers::ConfigSpace;
pub use state::{DeviceState, QueuePosition, SavedDevice, SlotState};

/// Memory of the guest, shared by everything that reads or writes it.
pub type GuestRam = Arc<GuestMemoryMmap<()>>;

/// A virtio device behind some transport.
///
/// The transport calls these from whichever thread carries the guest's register access or the control request, never from
/// two at a time. Order: `place_config`, any number of `features`/`write_config`, then `activate` once the driver has set
/// `DRIVER_OK`, then `write_config` again, then `reset`, after which the device is as new and the circle starts over.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 1.3 s5).
    fn device_id(&self) -> u32;

    /// The name of its kind, for messages: `"rng"`, `"blk"`, ...
    fn name(&self) -> &'static str;

    /// The largest size of each queue; its length is the number of queues. Powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits the device offers. The transport adds `VIRTIO_F_VERSION_1` and insists on it.
    fn features(&self) -> u64;

    /// Whether something else than this process raises its interrupt for used buffers, all the time ([`InterruptLine::queue_event`]). That the
    /// driver acknowledges one tells nothing then, and need not be heard.
    fn is_interrupted_elsewhere(&self) -> bool {
        false
    }

    /// Where its configuration space is. The device writes there what drivers are to read, now and whenever it changes. Most have
    /// nothing that changes; by default there is nothing at all.
    fn place_config(&mut self, _space: ConfigSpace) {}

    /// The driver writes to configuration space. Most devices have nothing writable there.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: start to work on the queues.
    ///
    /// # Errors
    /// The transport sets `DEVICE_NEEDS_RESET` and logs the error once. The device is then as after `reset`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops all work and drops the queues. When this returns, the device neither reads nor writes guest memory nor signals
    /// an interrupt, requests in flight included. Called on an inactive device it does nothing.
    fn reset(&mut self);

    /// Brings all work on the queues to rest, requests in flight included, as [`VirtioDevice::reset`] does, but forgets nothing:
    /// [`VirtioDevice::resume`] goes on where it stopped, or [`VirtioDevice::reset`] ends it. Called while the vCPUs are held. Does
    /// nothing on an inactive or a paused device.
    fn pause(&mut self);

    /// Goes on after [`VirtioDevice::pause`]; kicks that arrived meanwhile count. Does nothing on a device that is not paused.
    fn resume(&mut self);

    /// What it would need to go on elsewhere. Called on a paused or an inactive device; `None` if that cannot be told, which is logged.
    fn save(&self) -> Option<SavedDevice>;

    /// What the device has counted since it was made, by name.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// Carries out a request of the control protocol that is about this device.
    ///
    /// # Errors
    /// [`DeviceRequestError`]; the device is as before.
    fn request(&mut self, request: DeviceRequest) -> Result<(), DeviceRequestError> {
        Err(DeviceRequestError::NotForThis(request))
    }
}

/// What the control protocol asks of a device in its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRequest {
    /// [`Request::ResizeMemory`](kvrun_vmm_api::Request), in bytes.
    Plug(u64),
    /// [`Request::SetBalloon`](kvrun_vmm_api::Request), in bytes.
    Inflate(u64),
    /// [`Request::HintFreePages`](kvrun_vmm_api::Request).
    HintFreePages,
    /// [`Request::SetRateLimit`](kvrun_vmm_api::Request).
    Limit(RateLimit, Option<RateLimit>),
}

/// Why a device does not do what the control protocol asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceRequestError {
    /// It is of the wrong kind.
    #[error("{0:?} is not for this kind of device")]
    NotForThis(DeviceRequest),
    /// The guest's driver is not there, or cannot do it.
    #[error("the guest's driver is not ready for it")]
    NotReady,
    /// A value is out of range.
    #[error("{what} is {value}; it can be at most {most}")]
    Range {
        /// Which value.
        what: &'static str,
        /// What it is.
        value: u64,
        /// What it can be at most.
        most: u64,
    },
}

/// What an activated device works with.
pub struct Activation {
    /// Guest memory.
    pub mem: GuestRam,
    /// The features offered that the driver accepted.
    pub features: u64,
    /// The queues, all of them, in order. A queue the driver did not make ready is `None`.
    pub queues: Vec<Option<VirtQueue>>,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn InterruptLine>,
}

/// How a device interrupts its driver. Any thread may call it.
pub trait InterruptLine: Send + Sync {
    /// Used buffers are there in this queue (virtio 1.3 s2.7.7). Call only if [`VirtQueue::needs_interrupt`] says so.
    fn signal_queue(&self, queue: u16);
    /// A descriptor which, written to, does what [`InterruptLine::signal_queue`] does for every queue, for a device that lives in
    /// the host's kernel. From this call to the next reset the driver may find itself interrupted for used buffers when there are
    /// none, which does no harm (virtio 1.3 s2.7.7.1).
    ///
    /// # Errors
    /// When the host is out of descriptors.
    fn queue_event(&self) -> io::Result<EventFd>;
    /// Configuration space has changed.
    fn signal_config(&self);
    /// The device has given up on a driver that broke the rules: sets `DEVICE_NEEDS_RESET` (virtio 1.3 s2.1.2) and
    /// interrupts. `reason` is logged, once per activation.
    fn needs_reset(&self, reason: &dyn std::error::Error);
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left a queue unconfigured that the device cannot do without.
    #[error("the driver did not set up queue {0}")]
    MissingQueue(u16),
    /// The driver did not accept a feature that the device cannot do without.
    #[error("the driver did not accept {0}")]
    MissingFeature(&'static str),
    /// A host resource (thread, descriptor, ...) could not be had.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Activation {
    /// Takes all `N` queues of a device that needs every one of them.
    ///
    /// # Errors
    /// [`ActivateError::MissingQueue`] with the first that the driver left out.
    pub fn take_queues<const N: usize>(&mut self) -> Result<[VirtQueue; N], ActivateError> {
        let mut taken = Vec::with_capacity(N);
        for index in 0..N {
            let queue = self.queues.get_mut(index).and_then(Option::take);
            taken.push(queue.ok_or(ActivateError::MissingQueue(index as u16))?);
        }
        // The loop pushed exactly N.
        taken.try_into().map_err(|_| ActivateError::MissingQueue(0))
    }
}
