use std::sync::Arc;
use std::thread::JoinHandle;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{Hostile, MockDriver, NOWHERE};
use crate::devices::virtio::{GuestRam, QueuePosition};
use crate::event_loop::EventLoop;
use crate::memory::hotplug::testing::{START, hotplug};
use crate::memory::slot::testing::FakeSlots;

const MIB: u64 = 1 << 20;
/// How many blocks of 2 MiB the region has: more than go in one turn.
const BLOCKS: u64 = 256;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

struct Bench {
    mem: Mem,
    config: ConfigSpace,
    driver: MockDriver,
    slots: Arc<FakeSlots>,
    ram: GuestRam,
    events: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Bench {
    /// A device whose driver is there, asked to plug so much.
    fn asked_for(mib: u64) -> Self {
        let (events, handle) = EventLoop::new().unwrap();
        let thread = Some(std::thread::spawn(move || events.run().unwrap()));
        let (hotplug, slots, ram) = hotplug(BLOCKS);
        let mut mem = Mem::new(handle.clone(), hotplug, BLOCKS * 2 * MIB);
        let mut driver = MockDriver::new(&QUEUE_SIZES);
        let config = ConfigSpace::alone();
        mem.place_config(config.clone());
        mem.activate(driver.activation(UNPLUGGED_INACCESSIBLE)).unwrap();
        mem.request(DeviceRequest::Plug(mib * MIB)).unwrap();
        Self { mem, config, driver, slots, ram, events: handle, thread }
    }

    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let answer = self.driver.request(0, &request(kind, address, count), 10);
        assert_eq!(answer.len(), 10);
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    fn plug(&mut self, block: u64, count: u16) -> u16 {
        self.ask(0, START + block * 2 * MIB, count).0
    }

    fn unplug(&mut self, block: u64, count: u16) -> u16 {
        self.ask(1, START + block * 2 * MIB, count).0
    }

    /// `plugged_size` and `requested_size` as the driver reads them, in MiB.
    fn sizes(&self) -> (u64, u64) {
        let config: [u8; 56] = self.config.read();
        let at = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap()) / MIB;
        (at(40), at(48))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.mem.reset();
        self.events.quit();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn request(kind: u16, address: u64, count: u16) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

#[test]
fn configuration_says_where_and_how_much() {
    let bench = Bench::asked_for(6);
    let config: [u8; 60] = bench.config.read();
    let expected = [2 * MIB, 0, START, BLOCKS * 2 * MIB, BLOCKS * 2 * MIB, 0, 6 * MIB];
    assert_eq!(config[..56], *expected.map(u64::to_le_bytes).as_flattened());
    assert_eq!(config[56..], [0; 4]);
}

#[test]
fn memory_is_plugged_as_far_as_asked_for_and_unplugged() {
    let mut bench = Bench::asked_for(300);
    assert_eq!(bench.plug(0, 100), ACK);
    assert_eq!(bench.sizes(), (200, 300));
    assert_eq!(bench.plug(100, 51), NACK);
    assert_eq!(bench.plug(200, 50), ACK);
    assert_eq!(bench.sizes(), (300, 300));
    assert_eq!(bench.slots.ranges().len(), 150);
    let at = GuestAddress(START + 200 * 2 * MIB);
    bench.ram.write_obj(7u8, at).unwrap();
    assert_eq!(bench.unplug(10, 80), ACK);
    assert_eq!(bench.unplug(200, 50), ACK);
    assert_eq!(bench.ram.read_obj::<u8>(at).unwrap(), 0);
    assert_eq!(bench.sizes(), (40, 300));
    assert_eq!(bench.ask(2, 0, 0).0, ACK);
    assert_eq!((bench.sizes(), bench.slots.ranges().len()), ((0, 300), 0));
    let counters: Vec<_> = bench.mem.counters();
    assert!(counters.contains(&("bytes_plugged", 300 * MIB)), "{counters:?}");
    assert!(counters.contains(&("bytes_unplugged", 300 * MIB)) && counters.contains(&("refused", 1)));
}

#[test]
fn state_of_blocks_is_told() {
    let mut bench = Bench::asked_for(100);
    assert_eq!(bench.plug(3, 2), ACK);
    assert_eq!(bench.ask(3, START + 6 * MIB, 2), (ACK, 0));
    assert_eq!(bench.ask(3, START, 3), (ACK, 1));
    assert_eq!(bench.ask(3, START, 4), (ACK, 2));
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let mut bench = Bench::asked_for(BLOCKS * 2);
    assert_eq!(bench.plug(8, 4), ACK);
    for kind in [0, 1, 3] {
        for (address, count) in [
            (START - 2 * MIB, 1),
            (0, 1),
            (START + 4096, 1),
            (START + 2 * MIB - 1, 1),
            (START, 0),
            (START + 2 * MIB * (BLOCKS - 1), 2),
            (START + 2 * MIB * BLOCKS, 1),
            (START, u16::MAX),
            (u64::MAX, 1),
            (u64::MAX - 2 * MIB + 1, u16::MAX),
            (NOWHERE, 1),
        ] {
            assert_eq!(bench.ask(kind, address, count).0, ERROR, "{kind} {address:#x} {count}");
        }
    }
    for (block, count) in [(8, 1), (7, 2), (11, 2), (0, 64)] {
        assert_eq!(bench.plug(block, count), ERROR, "part of it is plugged: {block} {count}");
    }
    for (block, count) in [(7, 1), (7, 2), (11, 2), (12, 1)] {
        assert_eq!(bench.unplug(block, count), ERROR, "part of it is not plugged: {block} {count}");
    }
    for kind in [4, 0xffff] {
        assert_eq!(bench.ask(kind, START, 1).0, ERROR);
    }
    assert_eq!(bench.sizes().0, 8);
}

#[test]
fn more_may_not_be_asked_for_than_there_is() {
    let mut bench = Bench::asked_for(2);
    let refused = bench.mem.request(DeviceRequest::Plug(BLOCKS * 2 * MIB + 1));
    assert!(matches!(refused, Err(DeviceRequestError::Range { .. })));
    assert!(matches!(
        bench.mem.request(DeviceRequest::HintFreePages),
        Err(DeviceRequestError::NotForThis(_))
    ));
    let generation = bench.config.generation();
    bench.mem.request(DeviceRequest::Plug(3 * MIB)).unwrap();
    assert_eq!(bench.sizes(), (0, 4), "whole blocks");
    assert_ne!(bench.config.generation(), generation);
    bench.driver.interrupt.wait("a change of configuration", |counts| counts.config == 2);
    // Asked to shrink, the guest cannot plug.
    assert_eq!(bench.plug(0, 2), ACK);
    bench.mem.request(DeviceRequest::Plug(0)).unwrap();
    assert_eq!(bench.plug(2, 1), NACK);
}

#[test]
fn what_the_host_refuses_is_undone() {
    let mut bench = Bench::asked_for(400);
    *bench.slots.room.lock().unwrap() = Some(150);
    assert_eq!(bench.plug(0, 200), BUSY);
    assert_eq!((bench.sizes().0, bench.slots.ranges().len()), (0, 0));
    *bench.slots.room.lock().unwrap() = Some(0);
    assert_eq!(bench.plug(0, 1), BUSY);
    *bench.slots.room.lock().unwrap() = None;
    assert_eq!(bench.plug(0, 200), ACK);
}

#[test]
fn driver_that_might_touch_unplugged_memory_is_refused() {
    let mut bench = Bench::asked_for(2);
    bench.mem.reset();
    let refused = bench.mem.activate(bench.driver.activation(0));
    assert!(matches!(refused, Err(ActivateError::MissingFeature(_))));
    bench.mem.activate(bench.driver.activation(UNPLUGGED_INACCESSIBLE)).unwrap();
}

#[test]
fn plugged_memory_survives_a_reset() {
    let mut bench = Bench::asked_for(20);
    assert_eq!(bench.plug(0, 10), ACK);
    bench.mem.reset();
    assert_eq!(bench.slots.ranges().len(), 10);
    bench.mem.activate(bench.driver.activation(UNPLUGGED_INACCESSIBLE)).unwrap();
    assert_eq!(bench.sizes(), (20, 20));
    assert_eq!(bench.ask(2, 0, 0).0, ACK);
    assert_eq!(bench.slots.ranges().len(), 0);
}

#[test]
fn paused_device_has_nothing_under_way() {
    let mut bench = Bench::asked_for(BLOCKS * 2);
    let (out, answer) = (bench.driver.readable(&request(0, START, 256)), bench.driver.writable(10));
    bench.driver.add(0, &[out, answer]);
    bench.driver.kick(0);
    // Blocks come in turns; the pause may be before, between or after them.
    bench.mem.pause();
    let saved = bench.mem.save().unwrap();
    let DeviceState::Mem(state) = &saved.state else { panic!("{saved:?}") };
    let count = state.plugged.iter().filter(|&&plugged| plugged).count() as u64;
    assert!(count == 0 || count == BLOCKS, "{count}");
    let done = u16::from(count > 0);
    assert_eq!(saved.queues, [Some(QueuePosition { next_avail: done, next_used: done })]);
    assert_eq!((state.start, state.block, state.requested), (START, 2 * MIB, BLOCKS * 2 * MIB));
    let json = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<SavedDevice>(&json).unwrap(), saved);
    bench.mem.resume();
    assert_eq!(bench.driver.wait_used(0).1, 10);
    assert_eq!(bench.sizes().0, BLOCKS * 2);
}

#[test]
fn hostile_chains_get_an_answer_or_end_the_device() {
    let mut bench = Bench::asked_for(2);
    for kind in Hostile::ALL {
        for writable in [true, false] {
            bench.mem.reset();
            bench.mem.activate(bench.driver.activation(UNPLUGGED_INACCESSIBLE)).unwrap();
            let head = bench.driver.add_hostile(0, kind, writable);
            bench.driver.kick(0);
            if matches!(kind, Hostile::HeadBeyondTable) {
                bench.driver.interrupt.wait_reset();
            } else {
                assert_eq!(bench.driver.wait_used(0).0, head, "{kind:?}");
                assert_eq!(bench.ask(3, START, 1), (ACK, 1), "{kind:?}");
            }
        }
    }
}
