//! Turns: receiving and sending take them on one thread, so that neither waits for the other to run dry.

use std::time::Instant;

/// Most packets moved in one turn.
const PACKETS: usize = 64;
/// Most bytes moved in one turn: a few packets of the largest size. The driver hears of what it has received after the turn.
const BYTES: usize = 256 * 1024;

/// What is left of a turn.
pub(super) struct Budget {
    packets: usize,
    bytes: usize,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self { packets: PACKETS, bytes: BYTES }
    }

    pub(super) fn spend(&mut self, bytes: usize) {
        self.packets = self.packets.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    pub(super) fn is_spent(&self) -> bool {
        self.packets == 0 || self.bytes == 0
    }
}

/// When a queue is to have its next turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// As soon as all others have had theirs.
    Turn,
    /// When the driver kicks it.
    Kick,
    /// When the tap has a packet, or room for one.
    Tap,
    /// When the limit lets it.
    At(Instant),
    /// Not before somebody says so.
    Never,
}

impl Next {
    /// When the turn comes without anything happening, if it does.
    pub(super) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Turn => Some(Instant::now()),
            Self::At(time) => Some(time),
            Self::Kick | Self::Tap | Self::Never => None,
        }
    }
}
