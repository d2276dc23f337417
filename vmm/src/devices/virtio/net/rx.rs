//! Receiving: from the tap straight into the buffers the driver has offered.
//!
//! How long a packet is turns out when it is read, so room for the longest must be there before (virtio 1.3 s5.1.6.3.1 says how much that is).
//! With mergeable buffers that takes many chains, of which most packets need one. So the chains are taken in advance and kept,
//! those a packet has filled replaced: each is looked at once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use libc::iovec;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MRG_RXBUF,
};

use super::buffers;
use super::counters::Counters;
use super::header;
use super::turn::{Budget, Next};
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError, VirtQueue};
use crate::rate_limiter::{RateLimiter, Throttled};

/// Features by which a driver takes packets longer than the MTU.
const SEGMENTS: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;
/// A VLAN tag, which comes on top of the MTU.
const VLAN: usize = 4;

/// The receiving half of a pair of queues.
pub(super) struct Receiver {
    queue: VirtQueue,
    /// A packet may fill several chains.
    mergeable: bool,
    /// Bytes that must be there before a packet is read.
    room: usize,
    /// Chains taken, in order.
    chains: VecDeque<Taken>,
    /// Their buffers, in order.
    pieces: Vec<iovec>,
    /// Bytes in all of them.
    length: usize,
    /// What the packet at hand has filled.
    used: Vec<(u16, u32)>,
}

/// A chain taken from the queue.
struct Taken {
    head: u16,
    /// How many of the pieces are its.
    pieces: usize,
    length: usize,
}

impl Receiver {
    /// Receives packets into this queue, of a driver that has accepted `features`.
    pub(super) fn new(queue: VirtQueue, features: u64, mtu: u16) -> Self {
        let frame = match features & SEGMENTS {
            0 => header::ETHERNET + VLAN + usize::from(mtu),
            _ => header::MAX_FRAME,
        };
        Self {
            queue,
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            room: header::LENGTH + frame,
            chains: VecDeque::new(),
            pieces: Vec::new(),
            length: 0,
            used: Vec::new(),
        }
    }

    /// The queue, with what has been taken in advance put back.
    pub(super) fn into_queue(mut self) -> VirtQueue {
        for _ in &self.chains {
            self.queue.undo_pop();
        }
        self.queue
    }

    /// The queue.
    pub(super) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Moves packets, for one turn.
    ///
    /// # Errors
    /// [`QueueError`]: the driver has broken the rules.
    pub(super) fn turn(
        &mut self,
        mem: &GuestRam,
        tap: BorrowedFd<'_>,
        mut limiter: Option<&mut RateLimiter>,
        counters: &Counters,
        interrupt: &dyn InterruptLine,
    ) -> Result<Next, QueueError> {
        let mut budget = Budget::new();
        let mut received = false;
        self.queue.disable_kicks(mem)?;
        let next = loop {
            if budget.is_spent() {
                break Next::Turn;
            }
            if !self.make_room(mem)? {
                if self.queue.enable_kicks(mem)? {
                    self.queue.disable_kicks(mem)?;
                    continue;
                }
                counters.rx_starved.add(1);
                break Next::Kick;
            }
            if let Some(limiter) = &mut limiter
                && let Err(Throttled { until }) = limiter.allow(1, Instant::now())
            {
                counters.rx_throttled.add(1);
                break Next::At(until);
            }
            let length = match self.read(tap) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Next::Tap,
                // EBADFD: the queue is detached from its interface, or the interface is gone.
                Err(_) => break Next::Never,
            };
            let frame = length.saturating_sub(header::LENGTH);
            if let Some(limiter) = &mut limiter {
                limiter.charge(frame as u64, Instant::now());
            }
            budget.spend(frame);
            // More than there was room for has spilled into the piece that `read` adds.
            if length > self.length || length < header::LENGTH {
                counters.rx_dropped.add(1);
                continue;
            }
            self.give(mem, length)?;
            counters.rx_packets.add(1);
            counters.rx_bytes.add(frame as u64);
            received = true;
        };
        if received && self.queue.needs_interrupt(mem)? {
            interrupt.signal_queue(self.queue.index());
        }
        Ok(next)
    }

    /// Takes chains until there is room for a packet; `false` if the driver has not offered enough.
    fn make_room(&mut self, mem: &GuestRam) -> Result<bool, QueueError> {
        while self.length < self.room {
            // Without mergeable buffers a packet must fit into one chain (virtio 1.3 s5.1.6.3.1).
            let full = !self.mergeable || self.chains.len() == usize::from(self.queue.size());
            if full && !self.chains.is_empty() {
                return Err(self.malformed("receive buffers are too short for a packet"));
            }
            if !self.take(mem)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes one chain; `false` if there is none.
    fn take(&mut self, mem: &GuestRam) -> Result<bool, QueueError> {
        let Some(chain) = self.queue.pop(mem)? else { return Ok(false) };
        let mut taken = Taken { head: chain.head_index(), pieces: 0, length: 0 };
        for descriptor in chain {
            let length = descriptor.len() as usize;
            let good =
                descriptor.is_write_only() && buffers::push(&mut self.pieces, mem, descriptor.addr(), length);
            if !good {
                return Err(self.malformed("receive buffer cannot be written to"));
            }
            taken.pieces += 1;
            taken.length += length;
        }
        if taken.length < header::LENGTH {
            return Err(self.malformed("receive buffer is too short for a header"));
        }
        self.length += taken.length;
        self.chains.push_back(taken);
        Ok(true)
    }

    /// Reads one packet, header and all, into the chains taken.
    fn read(&mut self, tap: BorrowedFd<'_>) -> io::Result<usize> {
        let mut spill = 0u8;
        self.pieces.push(iovec { iov_base: (&raw mut spill).cast(), iov_len: 1 });
        // SAFETY: the pieces are guest memory, which is mapped as long as `mem` lives and into which nothing in this process holds
        // references, and `spill`.
        let length =
            unsafe { libc::readv(tap.as_raw_fd(), self.pieces.as_ptr(), self.pieces.len() as libc::c_int) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error());
        self.pieces.pop();
        length
    }

    /// Gives the driver the packet of `length` bytes that fills the first of the chains taken.
    fn give(&mut self, mem: &GuestRam, length: usize) -> Result<(), QueueError> {
        let (mut left, mut pieces) = (length, 0);
        self.used.clear();
        while left > 0 {
            // There are as many: `length` is at most that of all of them.
            let Some(chain) = self.chains.pop_front() else { break };
            let filled = left.min(chain.length);
            self.used.push((chain.head, filled as u32));
            self.length -= chain.length;
            pieces += chain.pieces;
            left -= filled;
        }
        // virtio 1.3 s5.1.6.4.1: 1 without mergeable buffers.
        let count = (self.used.len() as u16).to_le_bytes();
        buffers::poke(&self.pieces[..pieces], header::NUM_BUFFERS, &count);
        self.pieces.drain(..pieces);
        self.queue.add_used_together(mem, &self.used)
    }

    fn malformed(&self, what: &'static str) -> QueueError {
        QueueError::Request { queue: self.queue.index(), what }
    }
}
