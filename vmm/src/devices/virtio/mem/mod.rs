//! The memory device (virtio 1.3 s5.15): memory that the guest plugs and unplugs, block by block, as far as it is asked to.
//!
//! * this file - [`Mem`], the device: its configuration and what is asked of it.
//! * [`request`] - what the driver asks, and the answers.
//!
//! What is plugged is a matter of memory slots ([`hotplug`](crate::memory::hotplug)): a guest that uses memory it has not plugged finds
//! none, and it cannot plug more than it has been given.

mod request;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use self::request::Requests;
use super::counter::Counter;
use super::served::ServedPart;
use super::{
    ActivateError, Activation, ConfigSpace, DeviceRequest, DeviceRequestError, DeviceState, InterruptLine,
    SavedDevice, VirtioDevice,
};
use crate::event_loop::LoopHandle;
use crate::locked;
use crate::memory::hotplug::Hotplug;

/// Linux has one request under way.
const QUEUE_SIZES: [u16; 1] = [16];
/// s5.15.3: VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE. A driver without it may read unplugged memory.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The memory device.
pub struct Mem {
    shared: Arc<Shared>,
    requests: ServedPart<Requests>,
    interrupt: Option<Arc<dyn InterruptLine>>,
    /// How much may be asked for, in bytes.
    most: u64,
}

/// What there is to save of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    /// Guest physical address of the first block.
    pub start: u64,
    /// Size of a block in bytes.
    pub block: u64,
    /// How much the guest has been asked to have, in bytes.
    pub requested: u64,
    /// Whether each block is plugged.
    pub plugged: Vec<bool>,
}

/// What the device and its part on the event loop both know.
struct Shared {
    hotplug: Arc<Hotplug>,
    /// s5.15.4: `requested_size`.
    requested: AtomicU64,
    config: Mutex<Option<ConfigSpace>>,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    plug_requests: Counter,
    unplug_requests: Counter,
    state_requests: Counter,
    /// Not answered with ACK.
    refused: Counter,
    bytes_plugged: Counter,
    bytes_unplugged: Counter,
}

impl Shared {
    /// Shows the driver how things are.
    fn show(&self) {
        let hotplug = &self.hotplug;
        let config = locked(self.config.lock());
        // s5.15.4, struct virtio_mem_config. The second field is a node of NUMA, which there is none of. All of the region is usable:
        // what limits the guest is how much it may plug, not where.
        let fields = [
            hotplug.block(),
            0,
            hotplug.start().0,
            hotplug.length(),
            hotplug.length(),
            hotplug.plugged(),
            self.requested.load(Ordering::Acquire),
        ];
        if let Some(config) = &*config {
            config.write(0, fields.map(u64::to_le_bytes).as_flattened());
        }
    }
}

impl Mem {
    /// A device for this memory, of which at most `most` bytes may be plugged, on this event loop.
    pub fn new(events: LoopHandle, hotplug: Arc<Hotplug>, most: u64) -> Self {
        let most = most.next_multiple_of(hotplug.block()).min(hotplug.length());
        let shared = Shared {
            hotplug,
            requested: AtomicU64::new(0),
            config: Mutex::default(),
            counters: Counters::default(),
        };
        Self { shared: Arc::new(shared), requests: ServedPart::new(events), interrupt: None, most }
    }
}

impl VirtioDevice for Mem {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn name(&self) -> &'static str {
        "mem"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn place_config(&mut self, space: ConfigSpace) {
        *locked(self.shared.config.lock()) = Some(space);
        self.shared.show();
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.features & UNPLUGGED_INACCESSIBLE == 0 {
            return Err(ActivateError::MissingFeature("VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE"));
        }
        let interrupt = activation.interrupt.clone();
        self.requests.start(activation, Requests::new(self.shared.clone()))?;
        self.interrupt = Some(interrupt);
        Ok(())
    }

    // s5.15.6.2: a reset leaves what is plugged as it is; the driver that comes next unplugs all.
    fn reset(&mut self) {
        self.requests.stop();
        self.interrupt = None;
    }

    fn pause(&mut self) {
        self.requests.pause();
    }

    fn resume(&mut self) {
        self.requests.resume();
    }

    fn save(&self) -> Option<SavedDevice> {
        let hotplug = &self.shared.hotplug;
        let state = MemState {
            start: hotplug.start().0,
            block: hotplug.block(),
            requested: self.shared.requested.load(Ordering::Acquire),
            plugged: hotplug.save(),
        };
        Some(SavedDevice { queues: self.requests.positions(), state: DeviceState::Mem(state) })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.shared.counters;
        vec![
            ("plug_requests", counters.plug_requests.get()),
            ("unplug_requests", counters.unplug_requests.get()),
            ("state_requests", counters.state_requests.get()),
            ("refused", counters.refused.get()),
            ("bytes_plugged", counters.bytes_plugged.get()),
            ("bytes_unplugged", counters.bytes_unplugged.get()),
        ]
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), DeviceRequestError> {
        let DeviceRequest::Plug(bytes) = request else { return Err(DeviceRequestError::NotForThis(request)) };
        if bytes > self.most {
            return Err(DeviceRequestError::Range {
                what: "memory to plug in bytes",
                value: bytes,
                most: self.most,
            });
        }
        let requested = bytes.next_multiple_of(self.shared.hotplug.block());
        self.shared.requested.store(requested, Ordering::Release);
        self.shared.show();
        // A driver that is not there yet reads it when it comes.
        if let Some(interrupt) = &self.interrupt {
            interrupt.signal_config();
        }
        Ok(())
    }
}
