//! The few devices of a PC that a guest without firmware, PCI and ACPI still needs.
//!
//! * [`console`] - the 16550 serial port at 0x3f8: guest console, kept as a bounded tail.
//! * [`boot_marks`] - port 0xe9: the guest notes how far it has come.
//! * [`keyboard`] - ports 0x60 and 0x64: the keyboard controller, of which only the reset line is left.

pub mod boot_marks;
pub mod console;
pub mod keyboard;

pub use boot_marks::BootMarks;
pub use console::{Console, ConsoleState};
pub use keyboard::KeyboardController;
