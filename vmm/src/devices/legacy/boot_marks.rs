//! Port 0xe9: the guest writes one byte to say how far it has come, and each byte is timed once.

use std::sync::Mutex;

use kvrun_vmm_api::control::BOOT_MARK_PORT;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::{locked, monotonic_ns};

/// The port of [`BootMarks`].
pub const BASE: u64 = BOOT_MARK_PORT as u64;

/// What a read of the port gives: its own number, by which guests recognise such a port (Bochs, QEMU `isa-debugcon`).
const IDENTITY: u8 = 0xe9;

/// What the guest wrote to the port.
#[derive(Debug, Default)]
pub struct BootMarks {
    state: Mutex<BootMarksState>,
}

/// Each byte seen, in order of its first arrival, with the time of it. At most 256 entries, whatever the guest does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootMarksState {
    marks: Vec<(u8, u64)>,
}

impl BootMarks {
    /// No mark seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The marks seen so far: byte and `CLOCK_MONOTONIC` in nanoseconds, first occurrence of each, in order of arrival.
    pub fn marks(&self) -> Vec<(u8, u64)> {
        locked(self.state.lock()).marks.clone()
    }
}

impl BusDevice for BootMarks {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(IDENTITY);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut state = locked(self.state.lock());
        for &byte in data {
            if !state.marks.iter().any(|&(seen, _)| seen == byte) {
                state.marks.push((byte, monotonic_ns()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_occurrence_of_each_byte_is_kept_in_order() {
        let marks = BootMarks::new();
        let before = monotonic_ns();
        for byte in *b"IRIRI" {
            marks.write(0, &[byte]);
        }
        let seen = marks.marks();
        assert_eq!(seen.iter().map(|mark| mark.0).collect::<Vec<_>>(), b"IR");
        assert!(before <= seen[0].1 && seen[0].1 <= seen[1].1 && seen[1].1 <= monotonic_ns());
    }

    #[test]
    fn a_guest_cannot_fill_memory() {
        let marks = BootMarks::new();
        for byte in (0..=u8::MAX).cycle().take(10_000) {
            marks.write(0, &[byte; 3]);
        }
        assert_eq!(marks.marks().len(), 256);
    }

    #[test]
    fn the_port_answers_its_number() {
        let mut data = [0];
        BootMarks::new().read(0, &mut data);
        assert_eq!(data, [0xe9]);
    }
}
