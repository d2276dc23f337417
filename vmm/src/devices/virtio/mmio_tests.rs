use std::error::Error;
use std::sync::mpsc::{Receiver, Sender, channel};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::devices::virtio::registers::Registers;
use crate::devices::virtio::rng::RngState;
use crate::devices::virtio::{ActivateError, ConfigSpace, DeviceState, QueuePosition, SavedDevice};

/// What the probe device was told, in order.
#[derive(Debug, PartialEq)]
enum Call {
    Activated { features: u64, queues: Vec<Option<u16>> },
    Paused,
    Resumed,
    Reset,
}

/// A device that writes down its calls.
struct Probe {
    calls: Sender<Call>,
    refuse: bool,
    elsewhere: bool,
    interrupt: Sender<Arc<dyn InterruptLine>>,
}

const PROBE_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << 5;
const CONFIG: [u8; 6] = [1, 2, 3, 4, 5, 6];

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        42
    }
    fn name(&self) -> &'static str {
        "probe"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        PROBE_FEATURES
    }
    fn is_interrupted_elsewhere(&self) -> bool {
        self.elsewhere
    }
    fn place_config(&mut self, space: ConfigSpace) {
        space.write(0, &CONFIG);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.refuse {
            return Err(ActivateError::MissingQueue(1));
        }
        let queues = activation.queues.iter().map(|q| q.as_ref().map(VirtQueue::size)).collect();
        self.calls.send(Call::Activated { features: activation.features, queues }).unwrap();
        self.interrupt.send(activation.interrupt).unwrap();
        Ok(())
    }
    fn pause(&mut self) {
        self.calls.send(Call::Paused).unwrap();
    }
    fn resume(&mut self) {
        self.calls.send(Call::Resumed).unwrap();
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("calls", 3)]
    }
    fn save(&self) -> Option<SavedDevice> {
        let queues = vec![Some(QueuePosition { next_avail: 7, next_used: 5 }), None];
        Some(SavedDevice { queues, state: DeviceState::Rng(RngState {}) })
    }
    fn reset(&mut self) {
        // The transport of a dropped test has no listener any more.
        let _ = self.calls.send(Call::Reset);
    }
}

struct Bench {
    slot: MmioSlot,
    irq: EventFd,
    signals: Vec<Signal>,
    calls: Receiver<Call>,
    interrupts: Receiver<Arc<dyn InterruptLine>>,
}

impl Bench {
    fn with(refuse: bool, elsewhere: bool) -> Self {
        let mem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap());
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let registers = Registers::new(0, 1).unwrap();
        let slot = MmioSlot::new(mem, irq.try_clone().unwrap(), registers.page(0).unwrap());
        let (calls_sender, calls) = channel();
        let (interrupt, interrupts) = channel();
        let probe = Probe { calls: calls_sender, refuse, elsewhere, interrupt };
        let signals = slot.fill(Box::new(probe)).unwrap();
        Self { slot, irq, signals, calls, interrupts }
    }

    fn new() -> Self {
        Self::with(false, false)
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.slot.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.slot.write(offset, &value.to_le_bytes());
    }

    fn accept(&self, features: u64) {
        self.write(reg::STATUS, 1);
        self.write(reg::STATUS, 3);
        for half in [0, 1] {
            self.write(reg::DRIVER_FEATURES_SEL, half);
            self.write(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(reg::STATUS, 0xb);
    }

    fn set_up_queue(&self, index: u32, size: u32, base: u64) {
        self.write(reg::QUEUE_SEL, index);
        self.write(reg::QUEUE_NUM, size);
        for (low, address) in [
            (reg::QUEUE_DESC_LOW, base),
            (reg::QUEUE_DRIVER_LOW, base + 0x2000),
            (reg::QUEUE_DEVICE_LOW, base + 0x4000),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
    }

    fn start(&self) {
        self.accept(1 << VIRTIO_F_VERSION_1 | 1 << 5);
        self.set_up_queue(0, 128, 0x1_0000);
        self.set_up_queue(1, 64, 0x2_0000);
        self.write(reg::STATUS, 0xf);
    }
}

#[test]
fn empty_slot_is_a_placeholder() {
    let bench = Bench::new();
    bench.slot.empty().unwrap();
    assert_eq!(bench.read(reg::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(bench.read(reg::VERSION), 2);
    assert_eq!(bench.read(reg::DEVICE_ID), 0);
    bench.write(reg::STATUS, 0xf);
    assert_eq!(bench.read(reg::STATUS), 0);
    assert_eq!(bench.slot.empty().unwrap_err(), SlotError::Empty);
}

#[test]
fn taken_slot_is_not_filled_again() {
    let bench = Bench::new();
    let (calls, _) = channel();
    let (interrupt, _) = channel();
    assert_eq!(
        bench.slot.fill(Box::new(Probe { calls, refuse: false, elsewhere: false, interrupt })).unwrap_err(),
        SlotError::Taken
    );
}

#[test]
fn driver_walks_the_device_up_and_resets_it() {
    let bench = Bench::new();
    assert_eq!(bench.read(reg::DEVICE_ID), 42);
    bench.start();
    assert_eq!(bench.read(reg::STATUS), 0xf);
    let features = 1 << VIRTIO_F_VERSION_1 | 1 << 5;
    assert_eq!(
        bench.calls.try_recv().unwrap(),
        Call::Activated { features, queues: vec![Some(128), Some(64)] }
    );
    bench.write(reg::STATUS, 0);
    assert_eq!(bench.calls.try_recv().unwrap(), Call::Reset);
    assert_eq!((bench.read(reg::STATUS), bench.read(reg::QUEUE_READY)), (0, 0));
    bench.start();
    assert!(matches!(bench.calls.try_recv().unwrap(), Call::Activated { .. }));
}

#[test]
fn emptying_a_slot_resets_its_device() {
    let bench = Bench::new();
    bench.start();
    assert_eq!(bench.slot.empty().unwrap().len(), bench.signals.len());
    assert_eq!(bench.calls.iter().last().unwrap(), Call::Reset);
}

#[test]
fn features_not_offered_or_legacy_are_refused() {
    for features in [1 << VIRTIO_F_VERSION_1 | 1 << 6, 1 << 5] {
        let bench = Bench::new();
        bench.accept(features);
        assert_eq!(bench.read(reg::STATUS), 3, "FEATURES_OK for {features:#x}");
    }
}

#[test]
fn features_are_frozen_once_accepted() {
    let bench = Bench::new();
    bench.accept(1 << VIRTIO_F_VERSION_1);
    bench.write(reg::DRIVER_FEATURES_SEL, 0);
    bench.write(reg::DRIVER_FEATURES, 1 << 5);
    bench.set_up_queue(0, 128, 0x1_0000);
    bench.write(reg::STATUS, 0xf);
    let Call::Activated { features, queues } = bench.calls.try_recv().unwrap() else {
        panic!("not activated")
    };
    assert_eq!((features, queues), (1 << VIRTIO_F_VERSION_1, vec![Some(128), None]));
}

#[test]
fn status_bits_cannot_be_skipped() {
    let bench = Bench::new();
    bench.write(reg::STATUS, 0xc);
    assert_eq!(bench.read(reg::STATUS), 0);
    bench.write(reg::STATUS, 0x5);
    assert_eq!(bench.read(reg::STATUS), 1);
    assert!(bench.calls.try_recv().is_err());
}

#[test]
fn queues_are_frozen_once_the_driver_runs() {
    let bench = Bench::new();
    bench.start();
    bench.write(reg::QUEUE_SEL, 0);
    bench.write(reg::QUEUE_DESC_HIGH, 0xffff_ffff);
    bench.write(reg::QUEUE_READY, 1);
    assert_eq!(bench.read(reg::QUEUE_READY), 1);
    assert!(matches!(bench.calls.try_recv(), Ok(Call::Activated { .. })));
    assert!(bench.calls.try_recv().is_err());
}

#[test]
fn queue_that_is_taken_back_is_touched_no_more() {
    let bench = Bench::new();
    bench.start();
    assert!(matches!(bench.calls.try_recv(), Ok(Call::Activated { .. })));
    bench.write(reg::QUEUE_SEL, 1);
    for _ in 0..2 {
        bench.write(reg::QUEUE_READY, 0);
        assert_eq!(bench.read(reg::QUEUE_READY), 0);
    }
    assert!(matches!(bench.calls.try_recv(), Ok(Call::Reset)));
    // For good, until the driver begins anew.
    bench.write(reg::QUEUE_READY, 1);
    assert_eq!(bench.read(reg::QUEUE_READY), 0);
    assert!(bench.calls.try_recv().is_err());
    bench.write(reg::STATUS, 0);
    bench.start();
    assert_eq!(bench.read(reg::QUEUE_READY), 1);
}

#[test]
fn queues_that_cannot_be_break_the_device_and_not_the_machine() {
    // Address outside memory, unaligned address, size 0, size not a power of two, size beyond the maximum, beyond 16 bits.
    for (size, base) in [
        (128, 0xffff_ffff_0000),
        (128, 0x1_0001),
        (0, 0x1_0000),
        (3, 0x1_0000),
        (512, 0x1_0000),
        (0x1_0080, 0x1_0000),
    ] {
        let bench = Bench::new();
        bench.accept(1 << VIRTIO_F_VERSION_1);
        bench.set_up_queue(0, size, base);
        bench.write(reg::STATUS, 0xf);
        assert_eq!(bench.read(reg::STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_CONFIG_S_NEEDS_RESET);
        assert!(bench.calls.try_recv().is_err(), "activated with size {size} at {base:#x}");
        bench.write(reg::STATUS, 0);
        assert_eq!(bench.read(reg::STATUS), 0);
    }
}

#[test]
fn device_that_does_not_start_asks_for_a_reset() {
    let bench = Bench::with(true, false);
    bench.start();
    assert_eq!(bench.read(reg::STATUS), 0xf | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_eq!(bench.read(reg::INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(bench.irq.read().unwrap(), 1);
}

#[test]
fn interrupts_are_raised_and_acknowledged() {
    let bench = Bench::new();
    bench.start();
    let interrupt = bench.interrupts.try_recv().unwrap();
    interrupt.signal_queue(1);
    interrupt.signal_config();
    assert_eq!(bench.read(reg::INTERRUPT_STATUS), 3);
    assert_eq!(bench.irq.read().unwrap(), 2);
    bench.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(bench.read(reg::INTERRUPT_STATUS), 2);
}

#[test]
fn driver_that_has_not_acknowledged_an_interrupt_is_not_interrupted_again() {
    let bench = Bench::new();
    bench.start();
    let interrupt = bench.interrupts.try_recv().unwrap();
    for round in 0..3 {
        interrupt.signal_queue(0);
        interrupt.signal_queue(1);
        interrupt.signal_queue(0);
        assert_eq!(bench.irq.read().unwrap(), 1, "in round {round}");
        bench.write(reg::INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    }
    // Each cause counts for itself, and a reset forgets all.
    interrupt.signal_queue(0);
    interrupt.signal_config();
    assert_eq!(bench.irq.read().unwrap(), 2);
    bench.write(reg::STATUS, 0);
    interrupt.signal_queue(0);
    assert_eq!(bench.irq.read().unwrap(), 1);
}

#[test]
fn interrupts_raised_outside_the_process_are_announced_until_the_reset() {
    let bench = Bench::with(false, true);
    bench.start();
    let interrupt = bench.interrupts.try_recv().unwrap();
    let event = interrupt.queue_event().unwrap();
    event.write(1).unwrap();
    assert_eq!(bench.irq.read().unwrap(), 1);
    // KVM may keep to itself that they are acknowledged, so whatever else the device announces does not wait for that.
    let [.., last] = &bench.signals[..] else { panic!("no signals") };
    assert_eq!((last.offset, last.value), (reg::INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING));
    for _ in 0..2 {
        interrupt.signal_queue(1);
        assert_eq!(bench.irq.read().unwrap(), 1);
    }
    interrupt.signal_config();
    interrupt.signal_config();
    assert_eq!(bench.irq.read().unwrap(), 1);
    bench.write(reg::INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    // Acknowledged or not: another may have followed that only the driver's ring tells of.
    bench.write(reg::INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(bench.read(reg::INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    bench.write(reg::STATUS, 0);
    assert_eq!(bench.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn kicks_by_register_reach_the_queue() {
    let bench = Bench::new();
    bench.write(reg::QUEUE_NOTIFY, 1);
    bench.write(reg::QUEUE_NOTIFY, 99);
    assert!(bench.signals[0].event.read().is_err());
    assert_eq!(bench.signals[1].event.read().unwrap(), 1);
}

#[test]
fn registers_take_only_aligned_words_and_config_space_any_width() {
    let bench = Bench::new();
    bench.slot.write(reg::STATUS, &[1]);
    assert_eq!(bench.read(reg::STATUS), 0);
    let mut two = [0; 2];
    bench.slot.read(reg::CONFIG + 5, &mut two);
    assert_eq!(two, [6, 0]);
    let mut eight = [0xff; 8];
    bench.slot.read(reg::CONFIG + 0xe00, &mut eight);
    assert_eq!(eight, [0; 8]);
}

#[test]
fn absent_queue_reads_as_unavailable() {
    let bench = Bench::new();
    bench.write(reg::QUEUE_SEL, 7);
    assert_eq!((bench.read(reg::QUEUE_NUM_MAX), bench.read(reg::QUEUE_READY)), (0, 0));
    bench.write(reg::QUEUE_READY, 1);
    assert_eq!(bench.read(reg::QUEUE_READY), 0);
}

#[test]
fn broken_device_complains_once() {
    let bench = Bench::new();
    bench.start();
    let interrupt = bench.interrupts.try_recv().unwrap();
    let cause = ActivateError::MissingQueue(0);
    assert!(cause.source().is_none());
    interrupt.needs_reset(&cause);
    interrupt.needs_reset(&cause);
    assert_eq!(bench.read(reg::STATUS), 0xf | VIRTIO_CONFIG_S_NEEDS_RESET);
}

#[test]
fn pause_counters_and_end_of_pause_are_the_devices_own() {
    let bench = Bench::new();
    bench.slot.pause();
    assert_eq!(bench.calls.try_recv(), Ok(Call::Paused));
    assert_eq!(bench.slot.metrics().unwrap().counters["calls"], 3);
    bench.slot.resume();
    assert_eq!(bench.calls.try_recv(), Ok(Call::Resumed));
}

#[test]
fn saved_slot_has_all_the_driver_has_written() {
    let bench = Bench::new();
    bench.start();
    bench.write(reg::QUEUE_SEL, 1);
    bench.write(reg::DEVICE_FEATURES_SEL, 1);
    bench.interrupts.try_recv().unwrap().signal_queue(0);
    let saved = bench.slot.save().unwrap();
    let queue = |size, base| QueueConfig {
        size,
        ready: true,
        desc_table: base,
        avail_ring: base + 0x2000,
        used_ring: base + 0x4000,
    };
    let expected = SlotState {
        status: 0xf,
        broken: false,
        interrupt_status: 1,
        device_features_select: 1,
        driver_features_select: 1,
        driver_features: 1 << VIRTIO_F_VERSION_1 | 1 << 5,
        queue_select: 1,
        queues: vec![queue(128, 0x1_0000), queue(64, 0x2_0000)],
        device: SavedDevice {
            queues: vec![Some(QueuePosition { next_avail: 7, next_used: 5 }), None],
            state: DeviceState::Rng(RngState {}),
        },
    };
    assert_eq!(saved, expected);
    let text = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<SlotState>(&text).unwrap(), saved);
    bench.slot.empty().unwrap();
    assert_eq!(bench.slot.save(), None);
}
