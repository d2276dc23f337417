//! What a file system device counts.

use crate::devices::virtio::counter::Counter;

/// Counters of one device, over all its activations.
#[derive(Debug, Default)]
pub(super) struct Counters {
    requests: Counter,
    errors: Counter,
    bytes_read: Counter,
    bytes_written: Counter,
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
        self.requests.add(1);
        match outcome {
            Outcome::Read(bytes) => self.bytes_read.add(bytes.into()),
            Outcome::Written(bytes) => self.bytes_written.add(bytes.into()),
            Outcome::Error => self.errors.add(1),
            Outcome::Done => {}
        }
    }

    /// All of them, by name.
    pub(super) fn report(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("requests", self.requests.get()),
            ("errors", self.errors.get()),
            ("bytes_read", self.bytes_read.get()),
            ("bytes_written", self.bytes_written.get()),
        ]
    }
}
