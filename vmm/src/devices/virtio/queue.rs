//! A virtqueue as devices see it.
//!
//! The rings are in guest memory, so every index, address and length in them is hostile. `virtio-queue` bounds the length of a
//! chain (a chain cannot loop for longer than the queue is long); this wrapper adds the one thing a device must do when the
//! ring itself is corrupt: give up ([`QueueError`]) instead of carrying on with garbage.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::GuestRam;

/// A chain of descriptors taken from the available ring.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap<()>>;

/// A queue the driver has made ready, with the descriptor by which the driver kicks it.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
}

/// The driver broke the rules of the ring: the device stops and asks for a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available ring claims more chains than the queue is long, or lies outside memory (virtio 1.3 s2.7.6).
    #[error("available ring of queue {queue} is corrupt")]
    Available {
        /// Which queue.
        queue: u16,
        /// What the ring code found.
        #[source]
        source: virtio_queue::Error,
    },
    /// The used ring cannot be written.
    #[error("used ring of queue {queue} is corrupt")]
    Used {
        /// Which queue.
        queue: u16,
        /// What the ring code found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A chain does not have the shape the device needs.
    #[error("malformed request in queue {queue}: {what}")]
    Request {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl VirtQueue {
    /// Wraps a queue that `virtio-queue` has found valid.
    pub fn new(index: u16, queue: Queue, kick: EventFd) -> Self {
        Self { index, queue, kick }
    }

    /// Its index in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its size in descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The descriptor the driver's kicks arrive at: wait for it to be readable, then [`VirtQueue::clear_kick`].
    pub fn kick(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self.kick` is, and the result borrows `self`.
        unsafe { BorrowedFd::borrow_raw(self.kick.as_raw_fd()) }
    }

    /// Kicks the queue on the driver's behalf: whoever waits for its kicks looks again.
    pub fn kick_again(&self) {
        // Only a counter at its limit refuses, and then the kick is there already.
        let _ = self.kick.write(1);
    }

    /// Takes note of all kicks so far.
    pub fn clear_kick(&self) {
        // The descriptor is non-blocking: an error means there was no kick to clear.
        let _ = self.kick.read();
    }

    /// Takes the next available chain; `None` when there is none.
    ///
    /// # Errors
    /// [`QueueError::Available`].
    pub fn pop<'m>(&mut self, mem: &'m GuestRam) -> Result<Option<Chain<'m>>, QueueError> {
        let index = self.index;
        let mut available =
            self.queue.iter(&**mem).map_err(|source| QueueError::Available { queue: index, source })?;
        Ok(available.next())
    }

    /// Puts the chain last popped back, so that the next [`VirtQueue::pop`] takes it again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Whether a chain is available.
    ///
    /// # Errors
    /// [`QueueError::Available`].
    pub fn has_available(&self, mem: &GuestRam) -> Result<bool, QueueError> {
        self.queue
            .avail_idx(&**mem, Ordering::Acquire)
            .map(|available| available.0 != self.queue.next_avail())
            .map_err(|source| QueueError::Available { queue: self.index, source })
    }

    /// Returns a chain to the driver, `written` bytes of its writable part filled.
    ///
    /// # Errors
    /// [`QueueError::Used`].
    pub fn add_used(&mut self, mem: &GuestRam, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue
            .add_used(&**mem, head, written)
            .map_err(|source| QueueError::Used { queue: self.index, source })
    }

    /// Whether the driver wants to be interrupted for the used buffers added since the last call
    /// (virtio 1.3 s2.7.7, s2.7.10).
    ///
    /// # Errors
    /// [`QueueError::Used`].
    pub fn needs_interrupt(&mut self, mem: &GuestRam) -> Result<bool, QueueError> {
        self.queue.needs_notification(&**mem).map_err(|source| QueueError::Used { queue: self.index, source })
    }

    /// Asks the driver not to kick while the device works (virtio 1.3 s2.7.10).
    ///
    /// # Errors
    /// [`QueueError::Used`].
    pub fn disable_kicks(&mut self, mem: &GuestRam) -> Result<(), QueueError> {
        self.queue
            .disable_notification(&**mem)
            .map_err(|source| QueueError::Used { queue: self.index, source })
    }

    /// Asks the driver to kick again; `true` if chains have become available meanwhile, so look once more.
    ///
    /// # Errors
    /// [`QueueError::Used`].
    pub fn enable_kicks(&mut self, mem: &GuestRam) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(&**mem)
            .map_err(|source| QueueError::Used { queue: self.index, source })
    }
}
