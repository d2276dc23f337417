//! The memory balloon (virtio 1.3 s5.5): memory taken back from the guest.
//!
//! * this file - [`Balloon`], the device: its configuration and what is asked of it.
//! * [`queues`] - what the driver says in its queues.
//!
//! Memory comes back in three ways: the guest gives it up, as much as it is asked for, and the host drops it (inflating); or the guest tells
//! which of its pages are free as they become so (free page reporting), or when asked (free page hinting), and the host drops their
//! contents, while the guest may use them again at any time.
//!
//! What the guest gives up it may take back when it would otherwise have to kill a program (s5.5.6.1): the balloon is a request, not
//! a limit. For limits there is virtio-mem.

mod queues;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vmm_sys_util::eventfd::EventFd;

use self::queues::Queues;
use super::counter::Counter;
use super::served::ServedPart;
use super::{
    ActivateError, Activation, ConfigSpace, DeviceRequest, DeviceRequestError, DeviceState, InterruptLine,
    SavedDevice, VirtioDevice,
};
use crate::event_loop::LoopHandle;
use crate::locked;
use crate::memory::reclaim::{PAGE, Reclaimable};

/// Inflating, deflating, statistics, free page hinting, free page reporting (s5.5.2). Linux has one request under way in the first three, hints as
/// fast as the queue takes blocks of 4 MiB, and needs 32 descriptors to report (Linux 6.12 mm/page_reporting.h).
///
/// With statistics and hinting always offered, the numbers are those of the specification and at the same time those of Linux, which
/// leaves no gap where a feature is not offered.
const QUEUE_SIZES: [u16; 5] = [16, 16, 16, 256, 128];

/// s5.5.3.
mod feature {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const FREE_PAGE_HINT: u64 = 1 << 3;
    pub(super) const PAGE_POISON: u64 = 1 << 4;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
}

/// s5.5.6.5: values of `free_page_hint_cmd_id` with a meaning of their own; others name a round of hinting.
mod hint {
    /// As sent by the driver: no more hints.
    pub(super) const STOP: u32 = 0;
    /// The device has no more use for what has been hinted.
    pub(super) const DONE: u32 = 1;
    /// The first that names a round.
    pub(super) const FIRST: u32 = 2;
}

/// The balloon.
pub struct Balloon {
    memory: Reclaimable,
    reporting: bool,
    shared: Arc<Shared>,
    queues: ServedPart<Queues>,
    active: Option<Active>,
    /// The last round of hinting; the driver knows a new one by its number (s5.5.6.5).
    round: u32,
}

/// What there is of an activation beside the queues.
struct Active {
    interrupt: Arc<dyn InterruptLine>,
    features: u64,
    /// Kicks the queue of statistics.
    ask: Option<EventFd>,
}

/// What there is to save of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// How many pages of 4 KiB the guest is asked to give up.
    pub num_pages: u32,
    /// How many it says it has given up.
    pub actual: u32,
    /// The round of hinting, or that there is none.
    pub hint: u32,
    /// What the driver fills free pages with.
    pub poison: u32,
    /// The chain in which the driver wants to be asked for statistics.
    pub stats: Option<u16>,
}

/// What the device and its part on the event loop both know.
#[derive(Default)]
struct Shared {
    config: Mutex<Option<ConfigSpace>>,
    // s5.5.4, struct virtio_balloon_config.
    num_pages: AtomicU32,
    actual: Arc<AtomicU32>,
    hint: AtomicU32,
    poison: AtomicU32,
    counters: Counters,
    /// What the guest said last about itself, by tag of `struct virtio_balloon_stat`; `u64::MAX` where it did not.
    stats: [AtomicU64; STATS.len()],
    /// Someone wants to know anew.
    stats_wanted: AtomicBool,
}

impl Shared {
    /// Shows the driver how things are.
    fn show(&self) {
        let config = locked(self.config.lock());
        let fields = [&self.num_pages, &self.actual, &self.hint, &self.poison];
        let fields = fields.map(|field| field.load(Ordering::Acquire).to_le_bytes());
        if let Some(config) = &*config {
            config.write(0, fields.as_flattened());
        }
    }
}

/// s5.5.6.4, by tag.
const STATS: [&str; 10] = [
    "guest_swap_in_bytes",
    "guest_swap_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_cache_bytes",
    "guest_hugetlb_allocations",
    "guest_hugetlb_failures",
];
const UNKNOWN: u64 = u64::MAX;

#[derive(Default)]
struct Counters {
    bytes_inflated: Counter,
    bytes_deflated: Counter,
    bytes_reported: Counter,
    bytes_hinted: Counter,
    hint_rounds: Counter,
    /// Ranges that are not memory that can be given back.
    refused: Counter,
}

impl Balloon {
    /// A balloon in this memory, on this event loop. `reporting`: the guest tells of pages as they become free. `actual` is where
    /// the size of the balloon can be read, in pages of 4 KiB, as the guest says.
    pub fn new(events: LoopHandle, memory: Reclaimable, reporting: bool, actual: Arc<AtomicU32>) -> Self {
        actual.store(0, Ordering::Relaxed);
        let shared = Shared { actual, hint: AtomicU32::new(hint::DONE), ..Shared::default() };
        for stat in &shared.stats {
            stat.store(UNKNOWN, Ordering::Relaxed);
        }
        let (shared, queues) = (Arc::new(shared), ServedPart::new(events));
        Self { memory, reporting, shared, queues, active: None, round: hint::DONE }
    }

    fn signal_config(&self) -> Result<(), DeviceRequestError> {
        self.active.as_ref().ok_or(DeviceRequestError::NotReady)?.interrupt.signal_config();
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn name(&self) -> &'static str {
        "balloon"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES[..if self.reporting { 5 } else { 4 }]
    }

    fn features(&self) -> u64 {
        let always = feature::STATS_VQ
            | feature::DEFLATE_ON_OOM
            | feature::FREE_PAGE_HINT
            | feature::PAGE_POISON
            | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        if self.reporting { always | feature::PAGE_REPORTING } else { always }
    }

    fn place_config(&mut self, space: ConfigSpace) {
        *locked(self.shared.config.lock()) = Some(space);
        self.shared.show();
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        match offset {
            4 => self.shared.actual.store(value, Ordering::Release),
            12 => self.shared.poison.store(value, Ordering::Release),
            _ => return,
        }
        self.shared.show();
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (interrupt, features) = (activation.interrupt.clone(), activation.features);
        let needed = |index: usize| match index {
            queues::STATS => features & feature::STATS_VQ != 0,
            queues::HINTS => features & feature::FREE_PAGE_HINT != 0,
            queues::REPORTS => features & feature::PAGE_REPORTING != 0,
            _ => true,
        };
        for (index, queue) in activation.queues.iter().enumerate() {
            if queue.is_none() && needed(index) {
                return Err(ActivateError::MissingQueue(index as u16));
            }
        }
        let ask = activation.queues[queues::STATS].as_ref().map(|queue| queue.kick_event().try_clone());
        let ask =
            ask.transpose().map_err(|source| ActivateError::Host { what: "ask for statistics", source })?;
        let poisons = features & feature::PAGE_POISON != 0;
        let serve = Queues::new(self.shared.clone(), self.memory.clone(), interrupt.clone(), poisons);
        self.queues.start_with_some(activation, serve)?;
        self.active = Some(Active { interrupt, features, ask });
        Ok(())
    }

    fn reset(&mut self) {
        self.queues.stop();
        self.active = None;
        let Shared { actual, hint, poison, stats, .. } = &*self.shared;
        // What was given up is the guest's again: it can be used at once, whatever the host has dropped of it.
        actual.store(0, Ordering::Release);
        hint.store(hint::DONE, Ordering::Release);
        poison.store(0, Ordering::Release);
        self.shared.show();
        for stat in stats {
            stat.store(UNKNOWN, Ordering::Relaxed);
        }
    }

    fn pause(&mut self) {
        self.queues.pause();
    }

    fn resume(&mut self) {
        self.queues.resume();
    }

    fn save(&self) -> Option<SavedDevice> {
        let Shared { num_pages, actual, hint, poison, .. } = &*self.shared;
        let state = BalloonState {
            num_pages: num_pages.load(Ordering::Acquire),
            actual: actual.load(Ordering::Acquire),
            hint: hint.load(Ordering::Acquire),
            poison: poison.load(Ordering::Acquire),
            stats: self.queues.paused().and_then(Queues::stats_chain),
        };
        Some(SavedDevice { queues: self.queues.positions(), state: DeviceState::Balloon(state) })
    }

    /// What the guest says about itself is there too, by names that begin with `guest_`: as it was when it was asked last, and asking here is what
    /// makes it be asked again.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Shared { counters, stats, stats_wanted, .. } = &*self.shared;
        let mut all = vec![
            ("bytes_inflated", counters.bytes_inflated.get()),
            ("bytes_deflated", counters.bytes_deflated.get()),
            ("bytes_reported", counters.bytes_reported.get()),
            ("bytes_hinted", counters.bytes_hinted.get()),
            ("hint_rounds", counters.hint_rounds.get()),
            ("refused", counters.refused.get()),
        ];
        for (name, stat) in STATS.iter().zip(stats) {
            let value = stat.load(Ordering::Relaxed);
            if value != UNKNOWN {
                all.push((name, value));
            }
        }
        if let Some(Active { ask: Some(ask), .. }) = &self.active {
            stats_wanted.store(true, Ordering::Release);
            // Only a counter at its limit refuses, and then the kick is there already.
            let _ = ask.write(1);
        }
        all
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), DeviceRequestError> {
        match request {
            DeviceRequest::Inflate(bytes) => {
                let most = self.memory.bytes();
                if bytes > most {
                    let what = "size of the balloon in bytes";
                    return Err(DeviceRequestError::Range { what, value: bytes, most });
                }
                // No machine has 2^32 pages.
                self.shared.num_pages.store((bytes / PAGE) as u32, Ordering::Release);
                self.shared.show();
                // A driver that is not there yet reads it when it comes.
                let _ = self.signal_config();
                Ok(())
            }
            DeviceRequest::HintFreePages => {
                let features = self.active.as_ref().map_or(0, |active| active.features);
                if features & feature::FREE_PAGE_HINT == 0 {
                    return Err(DeviceRequestError::NotReady);
                }
                self.round = self.round.wrapping_add(1).max(hint::FIRST);
                self.shared.hint.store(self.round, Ordering::Release);
                self.shared.show();
                self.signal_config()
            }
            _ => Err(DeviceRequestError::NotForThis(request)),
        }
    }
}
