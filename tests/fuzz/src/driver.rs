//! A hostile driver.
//!
//! It knows enough of virtio to bring a device up and to lay out chains, or no mutation would ever get past the first check; everything
//! else is the fuzzer's to choose, and one descriptor in eight is wholly its own.

use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use kvrun_vmm::bus::BusDevice;
use kvrun_vmm::devices::virtio::mmio::MmioSlot;
use kvrun_vmm::devices::virtio::registers::{RegisterPage, Registers};
use kvrun_vmm::devices::virtio::{GuestRam, VirtioDevice};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Guest memory in bytes.
pub(crate) const MEMORY: usize = 256 * 1024;
/// Each queue has its rings in 4 KiB of its own, from here on: descriptor table, available ring, used ring.
const RINGS: u64 = 0x1000;
const AVAIL: u64 = 0x800;
const USED: u64 = 0xc00;
/// Buffers lie from here to the end of memory.
const BUFFERS: u64 = 0x1_0000;
/// The size of every queue: small, so that the rings wrap.
const QUEUE_SIZE: u16 = 16;
/// How long a device may take over what it has been given before the driver goes on; only inputs that leave a queue stuck wait for it.
const PATIENCE: Duration = Duration::from_millis(2);

/// `VIRTQ_DESC_F_NEXT`, `_WRITE`, `_INDIRECT` (virtio 1.3 s2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Registers (virtio 1.3 s4.2.2).
mod reg {
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const CONFIG: u64 = 0x100;
}

/// A device in its slot, and the driver's idea of its queues.
pub(crate) struct Driver {
    pub(crate) mem: GuestRam,
    pub(crate) slot: MmioSlot,
    queues: Vec<Ring>,
}

/// One queue as the driver sees it.
#[derive(Clone, Copy, Default)]
struct Ring {
    /// Chains made available so far.
    available: u16,
}

/// Guest memory of [`MEMORY`] bytes, all zero.
pub(crate) fn memory() -> GuestRam {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("guest memory"))
}

/// The page of the one slot, which every input has anew: a page is never unmapped.
static REGISTERS: OnceLock<RegisterPage> = OnceLock::new();

impl Driver {
    /// Puts the device into a slot over `mem`.
    pub(crate) fn new(device: Box<dyn VirtioDevice>, mem: GuestRam) -> Self {
        let registers =
            REGISTERS.get_or_init(|| Registers::new(0, 1).expect("a page").page(0).expect("one slot"));
        let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let slot = MmioSlot::new(mem.clone(), irq, registers.clone());
        slot.fill(device).expect("an empty slot");
        Self { mem, slot, queues: Vec::new() }
    }

    /// Brings the device up with the features the input lets through, and all its queues.
    pub(crate) fn start(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        self.write(reg::STATUS, 1);
        self.write(reg::STATUS, 3);
        for half in 0..2 {
            self.write(reg::DEVICE_FEATURES_SEL, half);
            let offered = self.read(reg::DEVICE_FEATURES);
            self.write(reg::DRIVER_FEATURES_SEL, half);
            // VIRTIO_F_VERSION_1 is bit 0 of the upper half; without it nothing begins.
            self.write(reg::DRIVER_FEATURES, offered & (input.arbitrary::<u32>()? | half));
        }
        self.write(reg::STATUS, 11);
        for index in 0.. {
            self.write(reg::QUEUE_SEL, index);
            let most = self.read(reg::QUEUE_NUM_MAX);
            // What does not fit before the buffers is left out, as a driver may.
            if most == 0 || u64::from(index) * 0x1000 + 2 * RINGS > BUFFERS {
                break;
            }
            let rings = rings(index as usize) as u32;
            self.write(reg::QUEUE_NUM, u32::from(QUEUE_SIZE).min(most));
            self.write(reg::QUEUE_DESC_LOW, rings);
            self.write(reg::QUEUE_DRIVER_LOW, rings + AVAIL as u32);
            self.write(reg::QUEUE_DEVICE_LOW, rings + USED as u32);
            self.write(reg::QUEUE_READY, 1);
            self.queues.push(Ring::default());
        }
        self.write(reg::STATUS, 15);
        Ok(())
    }

    /// Puts bytes of the input into the buffers.
    pub(crate) fn fill_buffers(&self, bytes: &[u8]) {
        let length = bytes.len().min(MEMORY - BUFFERS as usize);
        self.mem.write_slice(&bytes[..length], GuestAddress(BUFFERS)).expect("buffers are in memory");
    }

    /// Makes chains available in the queue, as many and of the shape the input says, and kicks it.
    pub(crate) fn submit(&mut self, queue: usize, input: &mut Unstructured<'_>) -> Result<()> {
        let Some(&(mut ring)) = self.queues.get(queue) else { return Ok(()) };
        let rings = rings(queue);
        let mut next = 0;
        // Where the next buffer lies: one after the other, so that what the fuzzer puts there in a row is read in a row.
        let mut buffer = BUFFERS + u64::from(input.arbitrary::<u8>()?) * 64;
        for _ in 0..input.int_in_range(1..=4)? {
            let head = next;
            for left in (0..input.int_in_range(0..=4_u16)?).rev() {
                let kind: u8 = input.arbitrary()?;
                let descriptor = if kind & 7 == 7 {
                    input.arbitrary::<(u64, u32, u16, u16)>()?
                } else {
                    let length: u16 = match kind & 6 {
                        // Headers and status bytes, mostly.
                        0 => 1,
                        2 => 16,
                        4 => input.arbitrary::<u8>()?.into(),
                        _ => input.arbitrary::<u16>()?,
                    };
                    let at = buffer;
                    buffer += u64::from(length);
                    let mut flags = if kind & 8 == 0 { 0 } else { WRITE };
                    flags |= if left > 0 { NEXT } else { 0 };
                    flags |= if kind & 0xf0 == 0xf0 { INDIRECT } else { 0 };
                    (at, length.into(), flags, (next + 1) % QUEUE_SIZE)
                };
                self.describe(rings, next, descriptor);
                next = (next + 1) % QUEUE_SIZE;
            }
            let entry = rings + AVAIL + 4 + 2 * u64::from(ring.available % QUEUE_SIZE);
            self.mem.write_obj(head, GuestAddress(entry)).expect("rings are in memory");
            ring.available = ring.available.wrapping_add(1);
        }
        // One time in 32 the index is nonsense.
        let index = if input.ratio(1, 32)? { input.arbitrary()? } else { ring.available };
        self.mem.write_obj(index, GuestAddress(rings + AVAIL + 2)).expect("rings are in memory");
        self.queues[queue] = ring;
        self.write(reg::QUEUE_NOTIFY, queue as u32);
        Ok(())
    }

    fn describe(&self, rings: u64, index: u16, (address, length, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(rings + 16 * u64::from(index));
        self.mem.write_slice(&bytes, at).expect("rings are in memory");
    }

    /// Waits until the device has used all it was given in `queue`, has given up, or the driver's patience is at an end.
    pub(crate) fn wait(&self, queue: usize) {
        let Some(ring) = self.queues.get(queue) else { return };
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            let used: u16 = self.mem.read_obj(GuestAddress(rings(queue) + USED + 2)).expect("in memory");
            // DEVICE_NEEDS_RESET.
            if used == ring.available || self.read(reg::STATUS) & 64 != 0 {
                return;
            }
            thread::yield_now();
        }
    }

    /// Reads all of configuration space, then writes four bytes of the input somewhere in it.
    pub(crate) fn configure(&self, input: &mut Unstructured<'_>) -> Result<()> {
        for offset in (0..64).step_by(4) {
            self.read(reg::CONFIG + offset);
        }
        let (offset, value): (u8, u32) = input.arbitrary()?;
        self.write(reg::CONFIG + u64::from(offset), value);
        Ok(())
    }

    /// Pauses, looks at what would be saved, and resumes: after that everything goes on.
    pub(crate) fn pause_and_resume(&self) {
        self.slot.pause();
        self.slot.resume();
    }

    /// Resets the device and checks that it then leaves memory alone, and takes it out of the slot.
    pub(crate) fn finish(self) {
        self.write(reg::STATUS, 0);
        let pattern = vec![0xa5; MEMORY];
        self.mem.write_slice(&pattern, GuestAddress(0)).expect("all of memory");
        self.slot.empty().expect("a filled slot");
        let mut after = vec![0; MEMORY];
        self.mem.read_slice(&mut after, GuestAddress(0)).expect("all of memory");
        assert!(after == pattern, "the device wrote to memory after its reset");
    }

    /// Any register access the input says.
    pub(crate) fn poke(&self, input: &mut Unstructured<'_>) -> Result<()> {
        let (offset, value): (u16, u64) = input.arbitrary()?;
        let width = input.int_in_range(0..=8)?;
        if input.arbitrary()? {
            self.slot.write(offset.into(), &value.to_le_bytes()[..width]);
        } else {
            self.slot.read(offset.into(), &mut [0; 8][..width]);
        }
        Ok(())
    }

    fn read(&self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.slot.read(register, &mut value);
        u32::from_le_bytes(value)
    }

    fn write(&self, register: u64, value: u32) {
        self.slot.write(register, &value.to_le_bytes());
    }
}

/// Where the rings of a queue are.
fn rings(queue: usize) -> u64 {
    RINGS + 0x1000 * queue as u64
}
