//! What a file system device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one device, over all its activations.
#[derive(Debug, Default)]
pub(super) struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

/// How a request ended, as far as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// File data went to the guest: how many bytes.
    Read(u32),
    /// File data came from the guest: how many bytes.
    Written(u32),
    /// Anything else that succeeded.
    Done,
    /// The answer is an error number, as a name that does not exist gets; or the request was none.
    Error,
}

impl Counters {
    /// Counts a request.
    pub(super) fn count(&self, outcome: Outcome) {
        let add = |counter: &AtomicU64, n: u64| counter.fetch_add(n, Ordering::Relaxed);
        add(&self.requests, 1);
        match outcome {
            Outcome::Read(bytes) => add(&self.bytes_read, bytes.into()),
            Outcome::Written(bytes) => add(&self.bytes_written, bytes.into()),
            Outcome::Error => add(&self.errors, 1),
            Outcome::Done => 0,
        };
    }

    /// All of them, by name.
    pub(super) fn report(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("requests", get(&self.requests)),
            ("errors", get(&self.errors)),
            ("bytes_read", get(&self.bytes_read)),
            ("bytes_written", get(&self.bytes_written)),
        ]
    }
}
