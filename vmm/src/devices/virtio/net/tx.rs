//! Sending: from the driver's buffers straight to the tap.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use libc::iovec;

use super::buffers;
use super::counters::Counters;
use super::header;
use super::turn::{Budget, Next};
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError, VirtQueue};
use crate::rate_limiter::{RateLimiter, Throttled};

/// The sending half of a pair of queues.
pub(super) struct Transmitter {
    queue: VirtQueue,
    features: u64,
    /// The buffers of the packet at hand, after room for its header.
    pieces: Vec<iovec>,
    /// Chains sent in this turn.
    used: Vec<(u16, u32)>,
}

impl Transmitter {
    /// Sends packets from this queue, of a driver that has accepted `features`.
    pub(super) fn new(queue: VirtQueue, features: u64) -> Self {
        Self { queue, features, pieces: Vec::new(), used: Vec::new() }
    }

    /// The queue.
    pub(super) fn into_queue(self) -> VirtQueue {
        self.queue
    }

    /// The queue.
    pub(super) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Moves packets, for one turn. A packet that the host does not take is lost, as on any wire; the queue goes on.
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
        self.queue.disable_kicks(mem)?;
        let next = loop {
            if budget.is_spent() {
                break Next::Turn;
            }
            let Some(chain) = self.queue.pop(mem)? else {
                if self.queue.enable_kicks(mem)? {
                    self.queue.disable_kicks(mem)?;
                    continue;
                }
                break Next::Kick;
            };
            let head = chain.head_index();
            let Some((header, frame)) = self.take(mem, chain) else {
                counters.tx_malformed.add(1);
                budget.spend(0);
                self.used.push((head, 0));
                continue;
            };
            if let Some(limiter) = &mut limiter
                && let Err(Throttled { until }) = limiter.allow(frame as u64, Instant::now())
            {
                counters.tx_throttled.add(1);
                self.queue.undo_pop();
                break Next::At(until);
            }
            match self.write(tap, &header) {
                Ok(()) => {
                    counters.tx_packets.add(1);
                    counters.tx_bytes.add(frame as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    self.queue.undo_pop();
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.undo_pop();
                    break Next::Tap;
                }
                Err(_) => counters.tx_dropped.add(1),
            }
            if let Some(limiter) = &mut limiter {
                limiter.charge(frame as u64, Instant::now());
            }
            budget.spend(frame);
            self.used.push((head, 0));
        };
        if !self.used.is_empty() {
            self.queue.add_used_together(mem, &self.used)?;
            self.used.clear();
            if self.queue.needs_interrupt(mem)? {
                interrupt.signal_queue(self.queue.index());
            }
        }
        Ok(next)
    }

    /// Takes a packet apart: its header as the host is to see it, and the length of the frame, whose buffers are then in `pieces`. `None` if
    /// it is no packet.
    fn take(&mut self, mem: &GuestRam, chain: Chain<'_>) -> Option<([u8; header::LENGTH], usize)> {
        self.pieces.clear();
        let mut length = 0;
        for descriptor in chain {
            let now = descriptor.len() as usize;
            if descriptor.is_write_only() || !buffers::push(&mut self.pieces, mem, descriptor.addr(), now) {
                return None;
            }
            length += now;
        }
        let mut header = [0; header::LENGTH];
        if !buffers::peek(&self.pieces, &mut header) {
            return None;
        }
        buffers::skip(&mut self.pieces, header::LENGTH);
        let frame = length - header::LENGTH;
        Some((header::to_host(header, frame, self.features)?, frame))
    }

    fn write(&mut self, tap: BorrowedFd<'_>, header: &[u8; header::LENGTH]) -> io::Result<()> {
        let first = iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() };
        self.pieces.insert(0, first);
        // SAFETY: the pieces are `header` and guest memory, which is mapped as long as `mem` lives. The guest may change it
        // meanwhile; what it then sends is its own business.
        let written =
            unsafe { libc::writev(tap.as_raw_fd(), self.pieces.as_ptr(), self.pieces.len() as libc::c_int) };
        if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
