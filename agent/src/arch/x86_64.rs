//! Boot marks on x86_64: one byte each to an I/O port.

use std::arch::asm;

/// The port. `BOOT_MARK_PORT` of `kvrun-vmm-api`, which the agent does not depend on.
const PORT: u16 = 0xe9;

/// The right to write boot marks. Given up when dropped: a process with an I/O bitmap makes every task switch dearer.
#[derive(Debug)]
pub struct BootMarks {
    permitted: bool,
}

impl BootMarks {
    /// The first instruction of the guest's init.
    pub const INIT: u8 = b'I';
    /// The agent answers requests.
    pub const READY: u8 = b'R';

    /// Asks the kernel for the port. Where it refuses (no `CONFIG_X86_IOPL_IOPERM`) marks are not written: they are for
    /// measuring, and no machine depends on them.
    pub fn open() -> Self {
        // SAFETY: ioperm(2) takes integers only and gives this thread access to one port, which no device in a guest
        // uses for anything but debug output.
        let permitted = unsafe { libc::ioperm(PORT.into(), 1, 1) } == 0;
        Self { permitted }
    }

    /// Writes one mark.
    pub fn write(&self, mark: u8) {
        if self.permitted {
            // SAFETY: ioperm(2) has given access to this port; OUT touches neither memory nor flags.
            unsafe {
                asm!("out dx, al", in("dx") PORT, in("al") mark, options(nomem, nostack, preserves_flags));
            }
        }
    }
}

impl Drop for BootMarks {
    fn drop(&mut self) {
        if self.permitted {
            // SAFETY: as in `open`; it takes the access away.
            unsafe { libc::ioperm(PORT.into(), 1, 0) };
        }
    }
}
