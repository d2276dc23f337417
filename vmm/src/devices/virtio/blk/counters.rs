//! What a disk counts.

use rustix::io::Errno;

use super::io::Io;
use crate::devices::virtio::counter::Counter;

/// Declares the counters once, for the struct and for its report.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a disk has counted since it was attached.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $($(#[$doc])* pub(super) $name: Counter,)*
        }

        impl Counters {
            /// Every counter by name.
            pub(super) fn report(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }
        }
    };
}

counters! {
    /// Reads done.
    reads,
    /// Writes done.
    writes,
    /// Bytes of the image that went to the guest.
    bytes_read,
    /// Bytes of the guest that went to the image.
    bytes_written,
    /// Flushes done.
    flushes,
    /// Discards done.
    discards,
    /// Requests for zeroes done.
    zeroes,
    /// Requests that were refused or failed.
    errors,
    /// How often a request had to wait because of the limit.
    throttled,
}

impl Counters {
    /// Counts the bytes an outcome moved.
    pub(super) fn count_bytes(&self, io: &Io, outcome: Result<u32, Errno>) {
        let moved = u64::from(outcome.unwrap_or(0));
        match io {
            Io::Read(_) => self.bytes_read.add(moved),
            Io::Write { .. } => self.bytes_written.add(moved),
            Io::Flush | Io::Discard(_) | Io::Zero { .. } => {}
        }
    }
}

impl Io {
    /// Where it is counted if it goes well.
    pub(super) fn counter(&self) -> fn(&Counters) -> &Counter {
        match self {
            Self::Read(_) => |it| &it.reads,
            Self::Write { .. } => |it| &it.writes,
            Self::Flush => |it| &it.flushes,
            Self::Discard(_) => |it| &it.discards,
            Self::Zero { .. } => |it| &it.zeroes,
        }
    }
}
