//! How long the agent takes over requests.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The upper bounds in seconds between which times are told apart: a look takes a millisecond or less on hardware, a start of a container tens, and 30 s are what
/// a guest has for most requests.
pub(super) const BOUNDS: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0];

/// The times of one kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Histogram {
    /// How many were no longer than each bound, and longer than the one before.
    pub(super) counts: [u64; BOUNDS.len()],
    /// All there were.
    pub(super) count: u64,
    pub(super) sum: Duration,
    /// Of these, how many had no success.
    pub(super) failed: u64,
}

impl Histogram {
    /// Adds one.
    pub(super) fn add(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(count) =
            BOUNDS.iter().position(|bound| seconds <= *bound).and_then(|at| self.counts.get_mut(at))
        {
            *count += 1;
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(took);
    }
}

/// Those of all kinds, by what is asked.
#[derive(Debug, Default)]
pub(crate) struct Latencies(Mutex<BTreeMap<&'static str, Histogram>>);

impl Latencies {
    /// Adds a request that was answered, or given up.
    pub(crate) fn add(&self, what: &'static str, took: Duration, is_failed: bool) {
        let mut all = self.all();
        let histogram = all.entry(what).or_default();
        histogram.add(took);
        histogram.failed += u64::from(is_failed);
    }

    /// All so far.
    pub(super) fn all(&self) -> MutexGuard<'_, BTreeMap<&'static str, Histogram>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
