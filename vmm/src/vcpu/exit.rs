//! Where the reason for the end of the machine is kept, and who is told.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use kvrun_vmm_api::ExitReason;
use vmm_sys_util::eventfd::EventFd;

/// Holds the first reason reported for the end of the machine; later ones are consequences of it.
#[derive(Debug)]
pub struct ExitSlot {
    reason: OnceLock<ExitReason>,
    event: EventFd,
}

impl ExitSlot {
    /// An empty slot.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { reason: OnceLock::new(), event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)? })
    }

    /// Notes why the machine ends, unless that is known already, and makes [`ExitSlot::as_fd`] readable.
    pub fn report(&self, reason: ExitReason) {
        if self.reason.set(reason).is_ok() {
            // Fails only if the counter is full, which one write cannot bring about.
            let _ = self.event.write(1);
        }
    }

    /// Why the machine ends; `None` as long as it runs.
    pub fn reason(&self) -> Option<&ExitReason> {
        self.reason.get()
    }
}

impl AsFd for ExitSlot {
    /// Readable, and never read, once there is a reason.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self.event`, which the returned value borrows.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}
