//! What holds of a queue whatever its driver does: an honest driver in any order of events, and one that writes anything anywhere.

use std::collections::VecDeque;

use proptest::prelude::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{MockDriver, Segment};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// One event of an honest exchange.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// The driver offers a chain of so many buffers, by way of an indirect table or not, and kicks if the device wants that.
    Offer(usize, bool),
    /// The device takes a chain.
    Pop,
    /// The device takes a chain and puts it back.
    PopAndUndo,
    /// The device returns one of the chains it has, the oldest or another.
    Use(usize),
    /// The device returns all it has, together.
    UseAll,
    /// The device asks whether to interrupt.
    Interrupt,
    /// The device stops asking for kicks.
    Disable,
    /// The device asks for kicks.
    Enable,
    /// The driver takes what is used and asks to be interrupted for the next.
    Collect,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1..5usize, any::<bool>()).prop_map(|(buffers, indirect)| Event::Offer(buffers, indirect)),
        3 => Just(Event::Pop),
        1 => Just(Event::PopAndUndo),
        2 => (0..8usize).prop_map(Event::Use),
        1 => Just(Event::UseAll),
        2 => Just(Event::Interrupt),
        1 => Just(Event::Disable),
        1 => Just(Event::Enable),
        2 => Just(Event::Collect),
    ]
}

/// A driver and a device, and what must be true of them.
struct Exchange {
    driver: MockDriver,
    queue: VirtQueue,
    features: u64,
    /// Heads and buffers of chains not taken yet, in order.
    offered: VecDeque<(u16, Vec<Segment>)>,
    /// Heads of chains the device has.
    taken: Vec<u16>,
    /// Heads and lengths of chains the driver has not collected yet, in order.
    used: VecDeque<(u16, u32)>,
    /// Descriptors that are free.
    free: usize,
    /// How many descriptors of the table each chain takes.
    descriptors: std::collections::HashMap<u16, usize>,
    /// The device asked for kicks, found nothing, and has not looked since: a chain offered from now on must kick it.
    asleep: bool,
    /// The driver has seen an empty used ring and asked to be interrupted: the next chain used must interrupt it.
    waiting: bool,
}

impl Exchange {
    fn new(size: u16, features: u64) -> Self {
        let mut driver = MockDriver::new(&[size]);
        let queue = driver.activation(features).queues.remove(0).unwrap();
        Self {
            driver,
            queue,
            features,
            offered: VecDeque::new(),
            taken: Vec::new(),
            used: VecDeque::new(),
            free: size.into(),
            descriptors: std::collections::HashMap::new(),
            asleep: false,
            waiting: false,
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Offer(buffers, indirect) => self.offer(buffers, indirect),
            Event::Pop => {
                if self.pop() {
                    let (head, _) = self.offered.pop_front().unwrap();
                    self.taken.push(head);
                }
            }
            Event::PopAndUndo => {
                if self.pop() {
                    self.queue.undo_pop();
                }
            }
            Event::Use(which) if !self.taken.is_empty() => {
                let head = self.taken.remove(which % self.taken.len());
                self.queue.add_used(&self.driver.mem, head, head.into()).unwrap();
                self.used.push_back((head, head.into()));
            }
            Event::Use(_) => {}
            Event::UseAll => {
                let all: Vec<_> = self.taken.drain(..).map(|head| (head, 7)).collect();
                self.queue.add_used_together(&self.driver.mem, &all).unwrap();
                self.used.extend(all);
            }
            Event::Interrupt => {
                let interrupted = self.queue.needs_interrupt(&self.driver.mem).unwrap();
                if self.waiting && !self.used.is_empty() {
                    assert!(interrupted, "the driver would wait for ever");
                    self.waiting = false;
                }
            }
            Event::Disable => {
                self.queue.disable_kicks(&self.driver.mem).unwrap();
                self.asleep = false;
            }
            Event::Enable => {
                let more = self.queue.enable_kicks(&self.driver.mem).unwrap();
                assert_eq!(more, !self.offered.is_empty());
                self.queue.clear_kick();
                self.asleep = !more;
            }
            Event::Collect => {
                while let Some(used) = self.driver.pop_used(0) {
                    assert_eq!(Some(used), self.used.pop_front());
                    self.free += self.descriptors[&used.0];
                }
                assert!(self.used.is_empty());
                let position = self.queue.position().next_used;
                self.driver.interrupt_after(0, position);
                self.waiting = true;
            }
        }
        let available = self.queue.has_available(&self.driver.mem).unwrap();
        assert_eq!(available, !self.offered.is_empty());
    }

    fn offer(&mut self, buffers: usize, indirect: bool) {
        let needed = if indirect { 1 } else { buffers };
        if self.free < needed {
            return;
        }
        let segments: Vec<_> = (0..buffers)
            .map(|i| Segment { addr: 0x20_0000 + i as u64 * 64, len: 8 + i as u32, writable: i > 0 })
            .collect();
        let head =
            if indirect { self.driver.add_indirect(0, &segments) } else { self.driver.add(0, &segments) };
        self.free -= needed;
        self.descriptors.insert(head, needed);
        self.offered.push_back((head, segments));
        self.driver.kick_if_wanted(0);
        if std::mem::take(&mut self.asleep) {
            assert!(self.queue.kick_event().read().is_ok(), "the device would sleep for ever");
        }
    }

    /// Takes a chain and compares it with what was offered; whether there was one.
    fn pop(&mut self) -> bool {
        self.asleep = false;
        let chain = self.queue.pop(&self.driver.mem).unwrap();
        assert_eq!(chain.is_some(), !self.offered.is_empty());
        let Some(chain) = chain else { return false };
        let (head, segments) = &self.offered[0];
        assert_eq!(chain.head_index(), *head);
        let found: Vec<_> = chain.map(|it| (it.addr().0, it.len(), it.is_write_only())).collect();
        let expected: Vec<_> = segments.iter().map(|it| (it.addr, it.len, it.writable)).collect();
        assert_eq!(found, expected);
        true
    }
}

proptest! {
    /// Every chain is taken once, in order, as it was offered; comes back once; and neither side sleeps when it must not.
    #[test]
    fn honest_exchange_loses_nothing(
        size in prop_oneof![Just(1u16), Just(2), Just(8), Just(32)],
        event_idx in any::<bool>(),
        events in prop::collection::vec(event(), 1..400),
    ) {
        let mut exchange = Exchange::new(size, if event_idx { EVENT_IDX } else { 0 });
        let mark = exchange.driver.mark();
        for event in events {
            exchange.happen(event);
            if exchange.offered.is_empty() {
                // Nothing refers to indirect tables any more.
                exchange.driver.release(mark);
            }
        }
        prop_assert_eq!(exchange.features & EVENT_IDX != 0, event_idx);
    }

    /// Whatever is in the rings, each call ends, no chain is longer than a queue can make it, and nothing is written but the used ring.
    #[test]
    fn hostile_rings_do_no_harm(
        event_idx in any::<bool>(),
        rings in prop::collection::vec(any::<u8>(), 0x400..0x401),
        avail_steps in prop::collection::vec(prop_oneof![4 => 0..9u16, 1 => any::<u16>()], 1..20),
        heads in prop::collection::vec(prop_oneof![4 => 0..8u16, 1 => any::<u16>()], 1..20),
    ) {
        const SIZE: u16 = 8;
        let mut driver = MockDriver::new(&[SIZE]);
        let mut queue = driver.activation(if event_idx { EVENT_IDX } else { 0 }).queues.remove(0).unwrap();
        let state = queue.state();
        driver.write(state.desc_table, &rings);
        driver.set_avail_idx(0, 0);
        let used = state.used_ring..state.used_ring + 6 + 8 * u64::from(SIZE);
        let snapshot = |driver: &MockDriver| {
            let (before, after) = (driver.read(0, used.start as usize), driver.read(used.end, 0x1_0000));
            (before, after)
        };
        for (step, head) in avail_steps.into_iter().zip(heads) {
            driver.set_avail_idx(0, driver.avail_idx(0).wrapping_add(step));
            let before = snapshot(&driver);
            let mut popped = 0u32;
            while let Ok(Some(chain)) = queue.pop(&driver.mem) {
                popped += 1;
                prop_assert!(popped <= u32::from(SIZE), "more chains than the queue is long");
                // A direct chain and one indirect table.
                prop_assert!(chain.count() <= usize::from(SIZE) + usize::from(u16::MAX));
            }
            let _ = queue.has_available(&driver.mem);
            let refused = queue.add_used(&driver.mem, head, 1).is_err();
            prop_assert_eq!(refused, head >= SIZE);
            let _ = queue.needs_interrupt(&driver.mem);
            let _ = queue.enable_kicks(&driver.mem);
            let _ = queue.disable_kicks(&driver.mem);
            prop_assert!(before == snapshot(&driver));
        }
    }

    /// A queue of which any part is not in memory never gets to a device.
    #[test]
    fn parts_outside_memory_are_found(
        size in prop_oneof![Just(1u16), Just(16), Just(256)],
        at in prop::array::uniform3(prop_oneof![
            (0..0x3000u64), (0x0f00..0x1100u64), (0x1f00..0x2100u64), (0x2f00..0x3100u64), any::<u64>(),
        ]),
    ) {
        let [desc_table, avail_ring, used_ring] = [at[0] & !15, at[1] & !1, at[2] & !3];
        // Two pages of memory with a hole of one between them.
        let page = 0x1000;
        let mem: GuestMemoryMmap<()> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), page), (GuestAddress(0x2000), page)]).unwrap();
        let queue = Queue::try_from(QueueState {
            max_size: 256, next_avail: 0, next_used: 0, event_idx_enabled: true, size, ready: true,
            desc_table, avail_ring, used_ring,
        }).unwrap();
        let n = u64::from(size);
        let inside = |at: u64, len: u64| mem.read_slice(&mut vec![0; len as usize], GuestAddress(at)).is_ok();
        let all = inside(desc_table, 16 * n) && inside(avail_ring, 6 + 2 * n) && inside(used_ring, 6 + 8 * n);
        prop_assert_eq!(is_in_memory(&queue, &mem), all);
    }
}
