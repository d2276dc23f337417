//! The control queue (virtio 1.3 s5.1.6.5): the driver says how many pairs of queues it uses and which offloads it takes.
//!
//! Addresses it would filter by are not offered: a pod's link has one guest on it, to whom everything on it is addressed.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_MQ,
    VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestAddress};

use super::CONTROL_SIZE;
use super::counters::Counters;
use super::link::Link;
use super::tap::GUEST_OFFLOADS;
use super::turn::Next;
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError, VirtQueue};

/// Most commands obeyed in one turn. Each may wait for a lock of the host's network stack.
const TURN: usize = 8;
/// Most buffers a command is looked for in.
const MAX_PIECES: usize = CONTROL_SIZE as usize;
/// The longest command offered: class, command, 64 bits of data.
const LONGEST: usize = 10;

/// The control queue of a driver.
pub(super) struct Control {
    queue: VirtQueue,
    /// What the driver has accepted.
    features: u64,
    /// How many pairs of queues it has set up.
    pairs: u16,
}

impl Control {
    /// Obeys what comes by this queue, of a driver that has accepted `features` and set up `pairs` pairs of queues.
    pub(super) fn new(queue: VirtQueue, features: u64, pairs: u16) -> Self {
        Self { queue, features, pairs }
    }

    /// The queue.
    pub(super) fn into_queue(self) -> VirtQueue {
        self.queue
    }

    /// The queue.
    pub(super) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Obeys commands, for one turn.
    ///
    /// # Errors
    /// [`QueueError`]: the driver has broken the rules.
    pub(super) fn turn(
        &mut self,
        mem: &GuestRam,
        link: &mut Link,
        counters: &Counters,
        interrupt: &dyn InterruptLine,
    ) -> Result<Next, QueueError> {
        let mut next = Next::Turn;
        let mut obeyed = false;
        for _ in 0..TURN {
            let Some(chain) = self.queue.pop(mem)? else {
                // Kicks are never disabled here, so one that follows is seen.
                next = Next::Kick;
                break;
            };
            let head = chain.head_index();
            let (command, length, ack) = take(mem, chain);
            let done = ack.is_some() && self.obey(&command[..length], link);
            if done { &counters.control_done } else { &counters.control_refused }.add(1);
            let status = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
            let written = ack.is_some_and(|at| mem.write_obj(status, at).is_ok());
            self.queue.add_used(mem, head, written.into())?;
            obeyed = true;
        }
        if next == Next::Kick && self.queue.enable_kicks(mem)? {
            next = Next::Turn;
        }
        if obeyed && self.queue.needs_interrupt(mem)? {
            interrupt.signal_queue(self.queue.index());
        }
        Ok(next)
    }

    /// Carries a command out; `false` if it is not one that can be.
    fn obey(&self, command: &[u8], link: &mut Link) -> bool {
        let [class, command, data @ ..] = command else { return false };
        match (u32::from(*class), u32::from(*command)) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let Ok(data) = data.try_into() else { return false };
                let pairs = u16::from_le_bytes(data);
                self.features & 1 << VIRTIO_NET_F_MQ != 0
                    && (1..=self.pairs).contains(&pairs)
                    && link.set_pairs(pairs).is_ok()
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                let Ok(data) = data.try_into() else { return false };
                let offloads = u64::from_le_bytes(data);
                // s5.1.6.5.6.1: only what was negotiated can be asked for.
                self.features & 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS != 0
                    && offloads & !(self.features & GUEST_OFFLOADS) == 0
                    && link.set_offloads(offloads).is_ok()
            }
            _ => false,
        }
    }
}

/// Takes a chain apart: the command, how long it is, and where the driver wants to find what became of it. One that is no command offered, if
/// only by its length, comes out as an empty one.
fn take(mem: &GuestRam, chain: Chain<'_>) -> ([u8; LONGEST], usize, Option<GuestAddress>) {
    let mut command = [0; LONGEST];
    let mut length = Some(0);
    for descriptor in chain.take(MAX_PIECES) {
        let now = descriptor.len() as usize;
        if descriptor.is_write_only() {
            let ack = (now > 0).then(|| descriptor.addr());
            return (command, length.unwrap_or(0), ack);
        }
        length = length.filter(|&at| {
            let room = command.get_mut(at..at + now);
            room.is_some_and(|room| mem.read_slice(room, descriptor.addr()).is_ok())
        });
        length = length.map(|at| at + now);
    }
    (command, 0, None)
}
