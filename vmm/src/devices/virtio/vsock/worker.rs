//! The device's part on the event loop: takes packets from the transmit queue, puts packets into the receive queue.
//!
//! Every wake-up does a bounded amount of work for each queue and then lets the loop look at everything else that is ready, so
//! neither direction starves the other, and this device starves no other.

use std::io;
use std::sync::Arc;

use rustix::event::epoll::EventFlags;

use super::handle::Shared;
use super::packet::TxPacket;
use super::table::Table;
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError, QueuePosition, VirtQueue};
use crate::event_loop::{Registry, Subscriber};

/// Packets taken from the guest per wake-up.
const TX_TURNS: usize = 64;
/// Turns given to connections per wake-up.
const RX_TURNS: usize = 64;

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const WAKE: u32 = 2;

/// An active device. Dropping it closes all connections.
pub(super) struct Worker {
    mem: GuestRam,
    interrupt: Arc<dyn InterruptLine>,
    shared: Arc<Shared>,
    rx: VirtQueue,
    tx: VirtQueue,
    /// virtio 1.3 s5.10.6.7: tells the guest that it has been moved to another host, which never happens while it runs.
    event: VirtQueue,
    table: Table,
    /// The driver broke the rules: nothing is done any more until the device is reset.
    broken: bool,
}

impl Worker {
    pub(super) fn new(
        mem: GuestRam,
        interrupt: Arc<dyn InterruptLine>,
        shared: Arc<Shared>,
        [rx, tx, event]: [VirtQueue; 3],
    ) -> Self {
        let table = Table::new(shared.clone());
        Self { mem, interrupt, shared, rx, tx, event, table, broken: false }
    }

    /// How to interrupt the guest's driver.
    pub(super) fn interrupt(&self) -> Arc<dyn InterruptLine> {
        self.interrupt.clone()
    }

    /// How far it has come in its queues.
    pub(super) fn positions(&self) -> Vec<Option<QueuePosition>> {
        [&self.rx, &self.tx, &self.event].map(|queue| Some(queue.position())).into()
    }

    fn work(&mut self, token: u32, events: EventFlags, registry: &Registry<'_>) -> Result<(), QueueError> {
        match token {
            RX_KICK => {}
            TX_KICK => self.take_packets(registry)?,
            WAKE => self.table.take_requests(registry),
            token => self.table.stream_ready(token, events, registry),
        }
        self.give_packets(registry)
    }

    /// From the guest.
    fn take_packets(&mut self, registry: &Registry<'_>) -> Result<(), QueueError> {
        let mem = self.mem.clone();
        let mut used = false;
        self.tx.disable_kicks(&mem)?;
        for _ in 0..TX_TURNS {
            let Some(packet) = TxPacket::pop(&mut self.tx, &mem)? else {
                if self.tx.enable_kicks(&mem)? {
                    self.tx.disable_kicks(&mem)?;
                    continue;
                }
                return self.interrupt_for_tx(used);
            };
            let head = packet.head;
            self.shared.counters.packets_from_guest.add(1);
            self.table.receive(packet, registry);
            self.tx.add_used(&mem, head, 0)?;
            used = true;
        }
        self.tx.kick_again();
        self.interrupt_for_tx(used)
    }

    fn interrupt_for_tx(&mut self, used: bool) -> Result<(), QueueError> {
        if used && self.tx.needs_interrupt(&self.mem)? {
            self.interrupt.signal_queue(self.tx.index());
        }
        Ok(())
    }

    /// To the guest.
    fn give_packets(&mut self, registry: &Registry<'_>) -> Result<(), QueueError> {
        if !self.table.has_work() {
            return Ok(());
        }
        let mem = self.mem.clone();
        let mut used = false;
        self.rx.disable_kicks(&mem)?;
        for turn in 0.. {
            if !self.table.has_work() {
                break;
            }
            // The loop comes back to it after it has looked at everything else.
            if turn == RX_TURNS {
                self.rx.kick_again();
                break;
            }
            // Without buffers the work waits for the kick that announces some.
            if !self.rx.has_available(&mem)? {
                if !self.rx.enable_kicks(&mem)? {
                    break;
                }
                self.rx.disable_kicks(&mem)?;
            }
            used |= self.table.serve(&mut self.rx, &mem, registry)?;
        }
        if used && self.rx.needs_interrupt(&mem)? {
            self.interrupt.signal_queue(self.rx.index());
        }
        Ok(())
    }

    fn give_up(&mut self, reason: &QueueError, registry: &Registry<'_>) {
        self.shared.close();
        self.unsubscribe(registry);
        self.table.clear();
        self.broken = true;
        self.interrupt.needs_reset(reason);
    }
}

impl Subscriber for Worker {
    fn subscribe(&mut self, registry: &Registry<'_>) -> io::Result<()> {
        if self.broken {
            return Ok(());
        }
        // Edge-triggered: each kick wakes the loop once, and nobody has to read the counter.
        registry.add(self.rx.kick(), RX_KICK, EventFlags::IN | EventFlags::ET)?;
        registry.add(self.tx.kick(), TX_KICK, EventFlags::IN | EventFlags::ET)?;
        registry.add(&self.shared.wake, WAKE, EventFlags::IN)?;
        self.table.register(registry)
    }

    fn ready(&mut self, token: u32, events: EventFlags, registry: &Registry<'_>) {
        // An event of the batch in which the driver broke the rules.
        if self.broken {
            return;
        }
        if let Err(e) = self.work(token, events, registry) {
            self.give_up(&e, registry);
        }
    }

    fn unsubscribe(&mut self, registry: &Registry<'_>) {
        self.table.deregister(registry);
        // Fails for what is not registered (any more).
        let _ = registry.delete(self.rx.kick());
        let _ = registry.delete(self.tx.kick());
        let _ = registry.delete(&self.shared.wake);
    }
}
