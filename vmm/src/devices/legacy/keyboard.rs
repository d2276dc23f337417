//! The keyboard controller (i8042), of which only the reset line is left: the way a guest without ACPI ends itself.

use std::sync::Arc;

use kvrun_vmm_api::ExitReason;

use crate::bus::BusDevice;
use crate::vcpu::ExitSlot;

/// First port: data at offset 0, status and command at offset 4.
pub const BASE: u64 = 0x60;
/// How many ports it takes. Ports 0x61 to 0x63 between data and command are not its own; they answer as nothing does.
pub const LENGTH: u64 = 5;

const STATUS_COMMAND: u64 = 4;
/// Pulse output line 0, which is wired to the processor's reset pin. Linux 6.12 arch/x86/kernel/reboot.c writes it for
/// `reboot=k`.
const PULSE_RESET: u8 = 0xfe;
/// Both buffers empty: a driver that waits for one of them to drain goes on at once.
const STATUS_IDLE: u8 = 0;

/// A keyboard controller without keyboard.
#[derive(Debug)]
pub struct KeyboardController {
    exit: Arc<ExitSlot>,
}

impl KeyboardController {
    /// A guest that pulses the reset line ends the machine: `exit` gets [`ExitReason::GuestReset`].
    pub fn new(exit: Arc<ExitSlot>) -> Self {
        Self { exit }
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(match offset {
            STATUS_COMMAND => STATUS_IDLE,
            0 => 0,
            _ => 0xff,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == STATUS_COMMAND && data == [PULSE_RESET] {
            self.exit.report(ExitReason::GuestReset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_command_ends_the_machine() {
        let exit = Arc::new(ExitSlot::new().unwrap());
        let controller = KeyboardController::new(exit.clone());
        // Every other command, the reset byte elsewhere, and with something beside it, are ignored.
        for command in (0..=u8::MAX).filter(|&command| command != PULSE_RESET) {
            controller.write(STATUS_COMMAND, &[command]);
        }
        for offset in 0..STATUS_COMMAND {
            controller.write(offset, &[PULSE_RESET]);
        }
        controller.write(STATUS_COMMAND, &[PULSE_RESET, 0]);
        assert_eq!(exit.reason(), None);
        controller.write(STATUS_COMMAND, &[PULSE_RESET]);
        assert_eq!(exit.reason(), Some(&ExitReason::GuestReset));
    }

    #[test]
    fn status_never_makes_a_driver_wait() {
        let controller = KeyboardController::new(Arc::new(ExitSlot::new().unwrap()));
        let mut status = [0xff];
        controller.read(STATUS_COMMAND, &mut status);
        assert_eq!(status, [0]);
        let mut other = [0];
        controller.read(1, &mut other);
        assert_eq!(other, [0xff]);
    }
}
