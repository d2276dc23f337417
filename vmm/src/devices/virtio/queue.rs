//! A virtqueue as devices see it.
//!
//! The rings are in guest memory, so every index, address and length in them is hostile. `virtio-queue` bounds the length of a
//! chain (a chain cannot loop for longer than the queue is long); this wrapper adds the one thing a device must do when the
//! ring itself is corrupt: give up ([`QueueError`]) instead of carrying on with garbage.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{GuestRam, QueuePosition};

/// A chain of descriptors taken from the available ring.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap<()>>;

/// A queue the driver has made ready, with the descriptor by which the driver kicks it.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    /// The position in the used ring at the last [`VirtQueue::needs_interrupt`].
    interrupted_at: u16,
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
    /// Wraps a queue that `virtio-queue` has found valid and that [`is_in_memory`].
    pub fn new(index: u16, queue: Queue, kick: EventFd) -> Self {
        let interrupted_at = queue.next_used();
        Self { index, queue, kick, interrupted_at }
    }

    /// Its index in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its size in descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// How far the device has come in it.
    pub fn position(&self) -> QueuePosition {
        QueuePosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
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

    /// Returns chains to the driver, each with how many bytes of it are filled, so that the driver sees either none or all of
    /// them: what it must find together, as the buffers of one packet.
    ///
    /// # Errors
    /// [`QueueError::Used`].
    pub fn add_used_together(&mut self, mem: &GuestRam, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((&(head, written), first)) = used.split_last() else { return Ok(()) };
        for &(head, written) in first {
            let slot = u64::from(self.queue.next_used() % self.queue.size());
            // virtio 1.3 s2.7.8: two bytes of flags and two of index come before the elements. The ring was found to be in memory.
            let element = GuestAddress(self.queue.used_ring() + 4 + slot * 8);
            mem.write_obj([u32::from(head).to_le(), written.to_le()], element)
                .map_err(|e| self.used_error(e))?;
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
        }
        // Writes the last element, and then the index that makes all of them visible.
        self.add_used(mem, head, written)
    }

    /// Whether the driver wants to be interrupted for the used buffers added since the last call
    /// (virtio 1.3 s2.7.7, s2.7.10).
    ///
    /// # Errors
    /// [`QueueError::Available`], for that is the ring in which the driver says so.
    pub fn needs_interrupt(&mut self, mem: &GuestRam) -> Result<bool, QueueError> {
        let (new, old) = (self.queue.next_used(), self.interrupted_at);
        self.interrupted_at = new;
        // What was added must be visible before the driver's wish is read: it writes the wish, then looks.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        let read = |at| {
            mem.load(GuestAddress(at), Ordering::Relaxed).map(u16::from_le).map_err(|e| {
                QueueError::Available { queue: self.index, source: virtio_queue::Error::GuestMemory(e) }
            })
        };
        if !self.queue.event_idx_enabled() {
            return Ok(read(avail)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        let event = read(avail + 4 + u64::from(self.queue.size()) * 2)?;
        // Linux 6.12 include/uapi/linux/virtio_ring.h, vring_need_event(): whether the event lies between old and new.
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
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

    /// Where the driver has put its parts, and how far the device is in them: for who serves the queue in the device's stead.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Goes on where someone else has stopped.
    pub fn set_position(&mut self, next_avail: u16, next_used: u16) {
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(next_used);
        self.interrupted_at = next_used;
    }

    /// The descriptor of the driver's kicks, for the kernel to wait on.
    pub fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    fn used_error(&self, source: GuestMemoryError) -> QueueError {
        QueueError::Used { queue: self.index, source: virtio_queue::Error::GuestMemory(source) }
    }
}

/// Whether every byte of a queue is in memory: `virtio-queue` looks at ends only, but memory may have a hole.
pub fn is_in_memory(queue: &Queue, mem: &GuestMemoryMmap<()>) -> bool {
    let entries = usize::from(queue.size());
    // virtio 1.3 s2.7: bytes per entry, and of the fields around the entries.
    let parts = [(queue.desc_table(), 16, 0), (queue.avail_ring(), 2, 6), (queue.used_ring(), 8, 6)];
    parts.into_iter().all(|(at, each, around)| mem.check_range(GuestAddress(at), entries * each + around))
}

#[cfg(test)]
#[path = "queue_properties.rs"]
mod properties;

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

    use super::*;
    use crate::devices::virtio::testing::MockDriver;

    const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

    /// A queue with as many chains taken from it as it is long, and their heads.
    fn queue(driver: &mut MockDriver, features: u64) -> (VirtQueue, Vec<u16>) {
        let activation = driver.activation(features);
        let mut queue = activation.queues.into_iter().flatten().next().unwrap();
        for _ in 0..queue.size() {
            let buffer = driver.writable(16);
            driver.add(0, &[buffer]);
        }
        let pop = || queue.pop(&driver.mem).unwrap().map(|chain| chain.head_index());
        let heads = std::iter::from_fn(pop).collect();
        (queue, heads)
    }

    #[test]
    fn chains_used_together_arrive_in_order_also_around_the_end_of_the_ring() {
        let mut driver = MockDriver::new(&[8]);
        let (mut queue, heads) = queue(&mut driver, 0);
        let used: Vec<_> = heads.iter().map(|&head| (head, u32::from(head) + 100)).collect();
        queue.add_used_together(&driver.mem, &[]).unwrap();
        assert_eq!(driver.pop_used(0), None);
        queue.add_used_together(&driver.mem, &used[..6]).unwrap();
        for &expected in &used[..6] {
            assert_eq!(driver.pop_used(0), Some(expected));
        }
        for _ in 0..2 {
            let buffer = driver.writable(16);
            driver.add(0, &[buffer]);
        }
        let more: Vec<_> =
            (0..2).map(|_| (queue.pop(&driver.mem).unwrap().unwrap().head_index(), 7)).collect();
        let around = [used[6], used[7], more[0], more[1]];
        queue.add_used_together(&driver.mem, &around).unwrap();
        for expected in around {
            assert_eq!(driver.pop_used(0), Some(expected));
        }
        assert_eq!(driver.pop_used(0), None);
    }

    #[test]
    fn chain_that_does_not_exist_cannot_be_used() {
        let mut driver = MockDriver::new(&[8]);
        let (mut queue, _) = queue(&mut driver, 0);
        assert!(matches!(queue.add_used(&driver.mem, 8, 0), Err(QueueError::Used { queue: 0, .. })));
    }

    #[test]
    fn driver_is_interrupted_once_the_chain_it_waits_for_is_used() {
        let mut driver = MockDriver::new(&[8]);
        let (mut queue, heads) = queue(&mut driver, EVENT_IDX);
        let used: Vec<_> = heads.iter().map(|&head| (head, 0)).collect();
        driver.interrupt_after(0, 1);
        queue.add_used(&driver.mem, heads[0], 0).unwrap();
        assert!(!queue.needs_interrupt(&driver.mem).unwrap());
        // It waits for one in the middle of those used together.
        queue.add_used_together(&driver.mem, &used[1..4]).unwrap();
        assert!(queue.needs_interrupt(&driver.mem).unwrap());
        assert!(!queue.needs_interrupt(&driver.mem).unwrap());
        queue.add_used(&driver.mem, heads[4], 0).unwrap();
        assert!(!queue.needs_interrupt(&driver.mem).unwrap());
    }

    #[test]
    fn driver_without_event_index_says_whether_it_wants_interrupts() {
        let mut driver = MockDriver::new(&[8]);
        let (mut queue, heads) = queue(&mut driver, 0);
        queue.add_used(&driver.mem, heads[0], 0).unwrap();
        assert!(queue.needs_interrupt(&driver.mem).unwrap());
        driver.refuse_interrupts(0);
        queue.add_used(&driver.mem, heads[1], 0).unwrap();
        assert!(!queue.needs_interrupt(&driver.mem).unwrap());
    }
}
