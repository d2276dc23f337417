//! The serial console: what the guest says is kept as a tail of bounded length, for the report when it dies.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::locked;

/// First port of COM1.
pub const BASE: u64 = 0x3f8;
/// How many ports a 16550 has.
pub const LENGTH: u64 = 8;
/// The interrupt of COM1.
pub const GSI: u32 = 4;

/// The registers of the serial port, by their names in the data sheet of the 16550; and what the guest has received but not read, which is
/// what it has sent to itself in loopback mode, at most a FIFO's worth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of the registers")]
pub struct ConsoleState {
    pub baud_divisor: u16,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub received: Vec<u8>,
}

/// A 16550 whose transmitter fills a ring.
#[derive(Debug)]
pub struct Console {
    serial: Mutex<Serial<Line, NoEvents, Tail>>,
}

impl Console {
    /// A console that keeps the last `capacity` bytes. `interrupt` is written when the port interrupts; register it as
    /// irqfd of [`GSI`].
    pub fn new(interrupt: EventFd, capacity: usize) -> Self {
        Self { serial: Mutex::new(Serial::new(Line(interrupt), Tail::new(capacity))) }
    }

    /// Where it stopped. What the guest has written is not part of it: nobody asks for that in another machine.
    pub fn save(&self) -> ConsoleState {
        let state = locked(self.serial.lock()).state();
        ConsoleState {
            baud_divisor: u16::from_le_bytes([state.baud_divisor_low, state.baud_divisor_high]),
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// The last bytes written, oldest first, made valid UTF-8: what is not becomes U+FFFD.
    pub fn tail(&self) -> String {
        let serial = locked(self.serial.lock());
        let (front, back) = serial.writer().bytes.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }
}

impl BusDevice for Console {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match data {
            // `offset` is below LENGTH.
            [byte] => *byte = locked(self.serial.lock()).read(offset as u8),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // More than one byte comes from a string instruction, all of them to the same port.
        let mut serial = locked(self.serial.lock());
        for &byte in data {
            // Fails only if the interrupt cannot be signalled: its counter is full, so one is pending anyway.
            let _ = serial.write(offset as u8, byte);
        }
    }
}

#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The last bytes written to it.
#[derive(Debug)]
struct Tail {
    bytes: VecDeque<u8>,
    capacity: usize,
}

impl Tail {
    /// Allocated in full at once, so that a byte written by the guest never allocates.
    fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::with_capacity(capacity), capacity }
    }
}

impl Write for Tail {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let kept = &data[data.len().saturating_sub(self.capacity)..];
        let surplus = (self.bytes.len() + kept.len()).saturating_sub(self.capacity);
        self.bytes.drain(..surplus);
        self.bytes.extend(kept);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const INTERRUPT_IDENTIFICATION: u64 = 2;
    const LINE_STATUS: u64 = 5;

    fn console(capacity: usize) -> (Console, EventFd) {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (Console::new(interrupt.try_clone().unwrap(), capacity), interrupt)
    }

    #[test]
    fn tail_is_what_was_written_last() {
        let (console, _) = console(8);
        for &byte in b"0123456789abc" {
            console.write(DATA, &[byte]);
        }
        assert_eq!(console.tail(), "56789abc");
        console.write(DATA, b"a string instruction");
        assert_eq!(console.tail(), "truction");
        console.write(DATA, &[0xff]);
        assert_eq!(console.tail(), "ruction\u{fffd}");
    }

    #[test]
    fn transmitter_is_always_ready_and_interrupts_when_asked() {
        let (console, interrupt) = console(8);
        let mut status = [0];
        console.read(LINE_STATUS, &mut status);
        // Transmitter empty, holding register empty.
        assert_eq!(status[0] & 0x60, 0x60);
        console.write(DATA, b"x");
        assert!(interrupt.read().is_err());
        console.write(INTERRUPT_ENABLE, &[2]);
        assert!(interrupt.read().is_ok());
        // The driver asks what it was, which acknowledges it.
        let mut identification = [0];
        console.read(INTERRUPT_IDENTIFICATION, &mut identification);
        assert_eq!(identification[0] & 0xf, 2, "transmitter empty");
        console.write(DATA, b"x");
        assert!(interrupt.read().is_ok());
    }

    #[test]
    fn saved_state_has_what_the_guest_has_set() {
        let (console, _) = console(8);
        console.write(INTERRUPT_ENABLE, &[1]);
        console.write(7, &[0x5a]);
        let saved = console.save();
        assert_eq!((saved.interrupt_enable, saved.scratch), (1, 0x5a));
        let text = serde_json::to_string(&saved).unwrap();
        assert_eq!(serde_json::from_str::<ConsoleState>(&text).unwrap(), saved);
    }

    #[test]
    fn every_register_survives_every_access() {
        let (console, _) = console(8);
        for offset in 0..LENGTH {
            for value in 0..=u8::MAX {
                console.write(offset, &[value]);
                console.write(offset, &[value; 4]);
                console.read(offset, &mut [0]);
                console.read(offset, &mut [0; 4]);
                console.read(offset, &mut []);
            }
        }
        assert!(console.tail().len() <= 8 * '\u{fffd}'.len_utf8());
    }
}
