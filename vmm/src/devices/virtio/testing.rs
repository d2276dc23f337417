//! A driver for the tests of devices: lays out virtqueues in a small guest memory, offers chains, well-formed and hostile,
//! kicks, and waits for what comes back.
//!
//! ```text
//! let mut driver = MockDriver::new(&[16]);
//! device.activate(driver.activation(0)).unwrap();
//! let reply = driver.request(0, b"bytes for the device", 64);
//! ```

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::io;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::reg;
use super::registers::Registers;
use super::{Activation, ConfigSpace, GuestRam, InterruptLine, VirtQueue, VirtioDevice};

/// A descriptor is the last of its chain unless it has this flag (virtio 1.3 s2.7.5).
pub(crate) const NEXT: u16 = 1;
/// The device may write the buffer, and may not read it.
pub(crate) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// Guest memory begins at 0 and ends here.
const MEMORY: u64 = 8 << 20;
/// An address where no memory is.
pub(crate) const NOWHERE: u64 = 1 << 40;
/// Rings are below, buffers from here on.
const HEAP: u64 = 1 << 20;
/// How long a test waits before it is declared hung.
const PATIENCE: Duration = Duration::from_secs(20);

/// Part of a chain: guest address, length in bytes, and whether the device writes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// A chain that no honest driver offers. The device must neither panic, nor loop, nor touch what is not memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hostile {
    /// A descriptor that is its own successor.
    Loop,
    /// A buffer where no memory is.
    OutsideMemory,
    /// A buffer that begins inside memory and ends outside.
    AcrossTheEnd,
    /// A buffer whose end overflows 64 bits.
    AddressOverflow,
    /// Buffers of more than 2^32 bytes altogether.
    LengthOverflow,
    /// A successor beyond the table.
    NextBeyondTable,
    /// A head beyond the table: the device cannot even name it in the used ring.
    HeadBeyondTable,
    /// An indirect table in an indirect table.
    NestedIndirect,
    /// An indirect table where no memory is.
    IndirectOutsideMemory,
    /// An indirect table of no descriptors.
    EmptyIndirect,
    /// An indirect table of as many descriptors as can be, each its own successor.
    HugeIndirect,
    /// An empty buffer.
    Empty,
}

impl Hostile {
    pub(crate) const ALL: [Self; 12] = [
        Self::Loop,
        Self::OutsideMemory,
        Self::AcrossTheEnd,
        Self::AddressOverflow,
        Self::LengthOverflow,
        Self::NextBeyondTable,
        Self::HeadBeyondTable,
        Self::NestedIndirect,
        Self::IndirectOutsideMemory,
        Self::EmptyIndirect,
        Self::HugeIndirect,
        Self::Empty,
    ];
}

/// The driver's side of one virtqueue.
struct Ring {
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    kick: EventFd,
    free: VecDeque<u16>,
    chains: HashMap<u16, Vec<u16>>,
    used_seen: u16,
    event_idx: bool,
    /// How many chains had been offered when the driver last thought of a kick.
    kick_considered: u16,
}

impl Ring {
    /// Where the device says for which chain it wants to be kicked (virtio 1.3 s2.7.8).
    fn avail_event(&self) -> GuestAddress {
        GuestAddress(self.used + 4 + u64::from(self.size) * 8)
    }

    /// Where the driver says for which used chain it wants to be interrupted (virtio 1.3 s2.7.6).
    fn used_event(&self) -> GuestAddress {
        GuestAddress(self.avail + 4 + u64::from(self.size) * 2)
    }
}

/// A driver with as many queues as its device has.
pub(crate) struct MockDriver {
    pub(crate) mem: GuestRam,
    pub(crate) interrupt: Arc<MockInterrupt>,
    rings: Vec<Ring>,
    heap: u64,
}

impl MockDriver {
    /// A driver with one queue of each size.
    pub(crate) fn new(sizes: &[u16]) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let mut driver =
            Self { mem: Arc::new(mem), interrupt: Arc::default(), rings: Vec::new(), heap: HEAP };
        let mut at = 0x1000;
        for &size in sizes {
            let table = at;
            let avail = table + u64::from(size) * 16;
            let used = (avail + u64::from(size) * 2 + 6).next_multiple_of(4);
            at = (used + u64::from(size) * 8 + 6).next_multiple_of(16);
            let kick = EventFd::new(EFD_NONBLOCK).unwrap();
            let (free, chains) = ((0..size).collect(), HashMap::new());
            driver.rings.push(Ring {
                size,
                table,
                avail,
                used,
                kick,
                free,
                chains,
                used_seen: 0,
                event_idx: false,
                kick_considered: 0,
            });
        }
        assert!(at < HEAP);
        driver
    }

    /// Sets the queues up afresh, as a driver does after a reset, and gives the device its side of them.
    pub(crate) fn activation(&mut self, features: u64) -> Activation {
        self.interrupt = Arc::default();
        self.heap = HEAP;
        let mut queues = Vec::new();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            ring.kick = EventFd::new(EFD_NONBLOCK).unwrap();
            ring.free = (0..ring.size).collect();
            ring.chains.clear();
            ring.used_seen = 0;
            ring.event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            ring.kick_considered = 0;
            for field in [ring.avail, ring.used] {
                self.mem.write_obj(0u32, GuestAddress(field)).unwrap();
            }
            for event in [ring.avail_event(), ring.used_event()] {
                self.mem.write_obj(0u16, event).unwrap();
            }
            let mut queue = Queue::new(ring.size).unwrap();
            queue.set_desc_table_address(Some(ring.table as u32), Some(0));
            queue.set_avail_ring_address(Some(ring.avail as u32), Some(0));
            queue.set_used_ring_address(Some(ring.used as u32), Some(0));
            queue.set_event_idx(ring.event_idx);
            queue.set_ready(true);
            assert!(queue.is_valid(&*self.mem));
            queues.push(Some(VirtQueue::new(index as u16, queue, ring.kick.try_clone().unwrap())));
        }
        Activation { mem: self.mem.clone(), features, queues, interrupt: self.interrupt.clone() }
    }

    /// Room of `len` bytes in guest memory.
    pub(crate) fn alloc(&mut self, len: usize) -> u64 {
        let addr = self.heap;
        self.heap += (len as u64).next_multiple_of(16);
        assert!(self.heap <= MEMORY, "the test needs more guest memory");
        addr
    }

    /// Remembers which buffers there are.
    pub(crate) fn mark(&self) -> u64 {
        self.heap
    }

    /// Frees all buffers since the mark.
    pub(crate) fn release(&mut self, mark: u64) {
        self.heap = mark;
    }

    /// A buffer the device reads.
    pub(crate) fn readable(&mut self, bytes: &[u8]) -> Segment {
        let addr = self.alloc(bytes.len());
        self.write(addr, bytes);
        Segment { addr, len: bytes.len() as u32, writable: false }
    }

    /// A buffer the device writes.
    pub(crate) fn writable(&mut self, len: usize) -> Segment {
        let addr = self.alloc(len);
        Segment { addr, len: len as u32, writable: true }
    }

    /// Writes guest memory.
    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// Reads guest memory.
    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Offers a chain; returns its head. Does not kick.
    pub(crate) fn add(&mut self, queue: usize, segments: &[Segment]) -> u16 {
        let taken: Vec<u16> =
            segments.iter().map(|_| self.rings[queue].free.pop_front().expect("queue is full")).collect();
        for (i, segment) in segments.iter().enumerate() {
            let next = taken.get(i + 1).copied();
            let flags = if segment.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.set_descriptor(queue, taken[i], segment.addr, segment.len, flags, next.unwrap_or(0));
        }
        let head = taken[0];
        self.rings[queue].chains.insert(head, taken);
        self.offer(queue, head);
        head
    }

    /// Offers a chain by way of an indirect table.
    pub(crate) fn add_indirect(&mut self, queue: usize, segments: &[Segment]) -> u16 {
        let table = self.alloc(segments.len() * 16);
        for (i, segment) in segments.iter().enumerate() {
            let more = i + 1 < segments.len();
            let flags = if segment.writable { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.write(table + i as u64 * 16, &descriptor(segment.addr, segment.len, flags, i as u16 + 1));
        }
        self.add_raw(queue, table, segments.len() as u32 * 16, INDIRECT, 0)
    }

    /// Offers a chain of one descriptor, as it is.
    pub(crate) fn add_raw(&mut self, queue: usize, addr: u64, len: u32, flags: u16, next: u16) -> u16 {
        let head = self.rings[queue].free.pop_front().expect("queue is full");
        self.set_descriptor(queue, head, addr, len, flags, next);
        self.rings[queue].chains.insert(head, vec![head]);
        self.offer(queue, head);
        head
    }

    /// Offers a chain that breaks the rules, its buffers writable or readable. Does not kick.
    pub(crate) fn add_hostile(&mut self, queue: usize, kind: Hostile, writable: bool) -> u16 {
        let flag = if writable { WRITE } else { 0 };
        let size = self.rings[queue].size;
        let buffer = self.alloc(64);
        match kind {
            Hostile::Loop => {
                let own = *self.rings[queue].free.front().expect("queue is full");
                self.add_raw(queue, buffer, 64, flag | NEXT, own)
            }
            Hostile::OutsideMemory => self.add_raw(queue, NOWHERE, 64, flag, 0),
            Hostile::AcrossTheEnd => self.add_raw(queue, MEMORY - 8, 64, flag, 0),
            Hostile::AddressOverflow => self.add_raw(queue, u64::MAX - 8, 64, flag, 0),
            Hostile::LengthOverflow => {
                let segment = Segment { addr: buffer, len: u32::MAX, writable };
                self.add(queue, &[segment, segment])
            }
            Hostile::NextBeyondTable => self.add_raw(queue, buffer, 64, flag | NEXT, size),
            Hostile::HeadBeyondTable => {
                self.offer(queue, size);
                size
            }
            Hostile::NestedIndirect => {
                self.write(buffer, &descriptor(buffer, 16, INDIRECT | flag, 0));
                self.add_raw(queue, buffer, 16, INDIRECT, 0)
            }
            Hostile::IndirectOutsideMemory => self.add_raw(queue, NOWHERE, 64, INDIRECT, 0),
            Hostile::EmptyIndirect => self.add_raw(queue, buffer, 0, INDIRECT, 0),
            Hostile::HugeIndirect => {
                self.write(buffer, &descriptor(buffer, 64, NEXT | flag, 0));
                self.add_raw(queue, buffer, u32::from(u16::MAX) * 16, INDIRECT, 0)
            }
            Hostile::Empty => self.add_raw(queue, buffer, 0, flag, 0),
        }
    }

    /// Writes a descriptor of the queue's table.
    pub(crate) fn set_descriptor(
        &self,
        queue: usize,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        self.write(self.rings[queue].table + u64::from(index) * 16, &descriptor(addr, len, flags, next));
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &self.rings[queue];
        let idx = self.avail_idx(queue);
        self.write(ring.avail + 4 + u64::from(idx % ring.size) * 2, &head.to_le_bytes());
        self.set_avail_idx(queue, idx.wrapping_add(1));
    }

    /// How many chains have been offered.
    pub(crate) fn avail_idx(&self, queue: usize) -> u16 {
        self.mem.read_obj(GuestAddress(self.rings[queue].avail + 2)).unwrap()
    }

    /// Claims to have offered so many chains.
    pub(crate) fn set_avail_idx(&self, queue: usize, idx: u16) {
        let addr = GuestAddress(self.rings[queue].avail).checked_add(2).unwrap();
        self.mem.store(idx, addr, Ordering::Release).unwrap();
    }

    /// Claims to have offered more chains than the queue can hold (virtio 1.3 s2.7.6).
    pub(crate) fn jump_avail_idx(&self, queue: usize) {
        self.set_avail_idx(queue, self.avail_idx(queue).wrapping_add(self.rings[queue].size + 1));
    }

    /// Kicks the device.
    pub(crate) fn kick(&self, queue: usize) {
        self.rings[queue].kick.write(1).unwrap();
    }

    /// Kicks the device as Linux does: only if it wants to be (virtio 1.3 s2.7.10).
    pub(crate) fn kick_if_wanted(&mut self, queue: usize) {
        let new = self.avail_idx(queue);
        let old = std::mem::replace(&mut self.rings[queue].kick_considered, new);
        let ring = &self.rings[queue];
        // What was offered must be seen by a device that this look at its wish still finds asleep.
        fence(Ordering::SeqCst);
        let wanted = if ring.event_idx {
            let event: u16 = self.mem.load(ring.avail_event(), Ordering::Relaxed).unwrap();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            !self.kicks_disabled(queue)
        };
        if wanted {
            self.kick(queue);
        }
    }

    /// Whether the device has asked not to be kicked (virtio 1.3 s2.7.10).
    pub(crate) fn kicks_disabled(&self, queue: usize) -> bool {
        self.mem.read_obj::<u16>(GuestAddress(self.rings[queue].used)).unwrap() == 1
    }

    /// Wants to be interrupted when the chain at this position of the used ring is used (virtio 1.3 s2.7.7).
    pub(crate) fn interrupt_after(&self, queue: usize, position: u16) {
        self.mem.store(position, self.rings[queue].used_event(), Ordering::Relaxed).unwrap();
    }

    /// Wants no interrupts. Of interest only if the driver has not accepted EVENT_IDX.
    pub(crate) fn refuse_interrupts(&self, queue: usize) {
        self.mem.store(1u16, GuestAddress(self.rings[queue].avail), Ordering::Relaxed).unwrap();
    }

    /// Takes the next used chain, if there is one: its head and how many bytes the device says it wrote.
    pub(crate) fn pop_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let idx: u16 = self.mem.load(GuestAddress(ring.used + 2), Ordering::Acquire).unwrap();
        if idx == ring.used_seen {
            return None;
        }
        let entry = GuestAddress(ring.used + 4 + u64::from(ring.used_seen % ring.size) * 8);
        let [head, len]: [u32; 2] = self.mem.read_obj(entry).unwrap();
        ring.used_seen = ring.used_seen.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        let chain = ring.chains.remove(&head).expect("the device returned a chain it was not given");
        ring.free.extend(chain);
        Some((head, len))
    }

    /// Waits for the next used chain.
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            let seen = self.interrupt.queue_count(queue as u16);
            // virtio 1.3 s2.7.7: of interest only if the driver has accepted EVENT_IDX.
            let ring = &self.rings[queue];
            self.mem.store(ring.used_seen, ring.used_event(), Ordering::Relaxed).unwrap();
            fence(Ordering::SeqCst);
            if let Some(used) = self.pop_used(queue) {
                return used;
            }
            self.interrupt
                .wait("a used chain", |it| it.queues.get(&(queue as u16)).copied().unwrap_or(0) > seen);
        }
    }

    /// Sends bytes to the device with room for `room` bytes of an answer; waits for the answer, which must be the next chain
    /// to be used.
    pub(crate) fn request(&mut self, queue: usize, bytes: &[u8], room: usize) -> Vec<u8> {
        let mark = self.mark();
        let (out, answer) = (self.readable(bytes), self.writable(room));
        let head = self.add(queue, &[out, answer]);
        self.kick_if_wanted(queue);
        let (used, len) = self.wait_used(queue);
        assert_eq!(used, head);
        assert!(len as usize <= room, "the device claims to have written {len} of {room} bytes");
        let answer = self.read(answer.addr, len as usize);
        self.release(mark);
        answer
    }
}

/// A descriptor as it is in memory (virtio 1.3 s2.7.5).
pub(crate) fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Counts interrupts and lets tests wait for them.
#[derive(Default)]
pub(crate) struct MockInterrupt {
    counts: Mutex<Counts>,
    changed: Condvar,
}

/// What a device has signalled.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) queues: HashMap<u16, u64>,
    pub(crate) config: u64,
    /// Reasons given for needing a reset.
    pub(crate) resets: Vec<String>,
}

impl MockInterrupt {
    /// How often the device has signalled this queue.
    pub(crate) fn queue_count(&self, queue: u16) -> u64 {
        self.counts.lock().unwrap().queues.get(&queue).copied().unwrap_or(0)
    }

    /// The reasons the device gave for needing a reset.
    pub(crate) fn resets(&self) -> Vec<String> {
        self.counts.lock().unwrap().resets.clone()
    }

    /// Waits until the device needs a reset.
    pub(crate) fn wait_reset(&self) {
        self.wait("DEVICE_NEEDS_RESET", |counts| !counts.resets.is_empty());
    }

    /// Waits until `condition` holds.
    pub(crate) fn wait(&self, what: &str, condition: impl Fn(&Counts) -> bool) {
        let counts = self.counts.lock().unwrap();
        let (counts, timeout) =
            self.changed.wait_timeout_while(counts, PATIENCE, |counts| !condition(counts)).unwrap();
        assert!(!timeout.timed_out(), "waited in vain for {what}: {counts:?}");
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap());
        self.changed.notify_all();
    }
}

impl InterruptLine for MockInterrupt {
    fn signal_queue(&self, queue: u16) {
        self.change(|counts| *counts.queues.entry(queue).or_default() += 1);
    }

    fn queue_event(&self) -> io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }

    fn signal_config(&self) {
        self.change(|counts| counts.config += 1);
    }

    fn needs_reset(&self, reason: &dyn Error) {
        self.change(|counts| counts.resets.push(reason.to_string()));
    }
}

impl ConfigSpace {
    /// One that is in no slot.
    pub(crate) fn alone() -> Self {
        Registers::new(0, 1).unwrap().page(0).unwrap().config_space()
    }

    /// The first `N` bytes, as a driver reads them.
    pub(crate) fn read<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0xff; N];
        self.page().read(reg::CONFIG, &mut bytes);
        bytes
    }

    /// What changes when it changes.
    pub(crate) fn generation(&self) -> u32 {
        self.page().at(reg::CONFIG_GENERATION).load(Ordering::Acquire)
    }
}

/// The first `N` bytes of a device's configuration space.
pub(crate) fn config_of<const N: usize>(device: &mut impl VirtioDevice) -> [u8; N] {
    let space = ConfigSpace::alone();
    device.place_config(space.clone());
    space.read()
}
