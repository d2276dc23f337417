//! A number that only grows, for [`VirtioDevice::counters`](super::VirtioDevice::counters).

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts from any thread. A count says nothing about other memory, so no order is kept.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
