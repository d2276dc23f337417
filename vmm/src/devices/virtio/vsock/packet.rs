//! Vsock packets as they lie in descriptor chains.
//!
//! A driver may cut a packet into descriptors wherever it likes (virtio 1.3 s2.7.4): the header may be split, the data
//! scattered. [`Buffers`] is what a chain covers of guest memory; data never leaves it but by system call.

use smallvec::SmallVec;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, VolatileSlice};

use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{GuestRam, QueueError, VirtQueue};

/// Length of `struct virtio_vsock_hdr` in bytes (virtio 1.3 s5.10.6).
pub(super) const HEADER_LEN: usize = 44;
/// The host's context identifier (virtio 1.3 s5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// The only socket type without feature bits (virtio 1.3 s5.10.6.1).
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet is for (virtio 1.3 s5.10.6).
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// The sender of `SHUTDOWN` will not receive any more (virtio 1.3 s5.10.6.6).
pub(super) const SHUT_RCV: u32 = 1;
/// The sender of `SHUTDOWN` will not send any more.
pub(super) const SHUT_SEND: u32 = 2;
/// Both.
pub(super) const SHUT_BOTH: u32 = SHUT_RCV | SHUT_SEND;

/// `struct virtio_vsock_hdr` (virtio 1.3 s5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Of the data, in bytes.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// How many bytes the sender buffers on this connection.
    pub(super) buf_alloc: u32,
    /// How many bytes the sender has consumed of this connection, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// From its layout in memory.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u16_at = |at: usize| u16::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Its layout in memory.
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// What a chain covers of guest memory, in order.
///
/// A packet as Linux makes it is one or two pieces of memory, and a busy stream is many packets: so few take no memory of their own.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers<'m>(SmallVec<[VolatileSlice<'m>; 2]>);

impl<'m> Buffers<'m> {
    /// All buffers of a chain, which must all be writable or all readable. The error says what is wrong with it.
    fn gather(
        mem: &'m GuestMemoryMmap<()>,
        chain: Chain<'m>,
        queue_size: u16,
        writable: bool,
    ) -> Result<Self, &'static str> {
        let mut slices = SmallVec::new();
        let mut count = 0;
        let mut complete = false;
        for descriptor in chain {
            // virtio 1.3 s2.7.5.3.1: no chain is longer than the queue, indirect ones included.
            count += 1;
            if count > queue_size {
                return Err("descriptor chain is longer than the queue");
            }
            if descriptor.is_write_only() != writable {
                return Err("buffer is in the wrong direction");
            }
            for slice in mem.get_slices(descriptor.addr(), descriptor.len() as usize) {
                slices.push(slice.map_err(|_| "buffer is outside memory")?);
            }
            complete = !descriptor.has_next();
        }
        // The iterator ends early on loops, successors beyond the table and tables outside memory.
        if !complete {
            return Err("descriptor chain is broken");
        }
        Ok(Self(slices))
    }

    /// None yet, but soon so many.
    pub(super) fn expecting(count: usize) -> Self {
        Self(SmallVec::with_capacity(count))
    }

    /// The slices, for a system call.
    pub(super) fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.0
    }

    /// Length in bytes; a chain covers less than 2^32.
    pub(super) fn len(&self) -> usize {
        self.slices().iter().map(VolatileSlice::len).sum()
    }

    /// Leaves out the first `count` bytes; all of them if there are fewer.
    pub(super) fn skip(&mut self, mut count: usize) {
        let mut whole = 0;
        for slice in &mut self.0 {
            if slice.len() > count {
                if let Ok(rest) = slice.offset(count) {
                    *slice = rest;
                }
                break;
            }
            count -= slice.len();
            whole += 1;
        }
        self.0.drain(..whole);
    }

    /// Leaves out what is beyond the first `count` bytes.
    pub(super) fn truncate(&mut self, mut count: usize) {
        let mut kept = 0;
        for slice in &mut self.0 {
            if count == 0 {
                break;
            }
            if slice.len() > count
                && let Ok(part) = slice.subslice(0, count)
            {
                *slice = part;
            }
            count -= slice.len();
            kept += 1;
        }
        self.0.truncate(kept);
    }

    /// Adds the slices of `other` behind its own.
    pub(super) fn append(&mut self, other: &Self) {
        self.0.extend_from_slice(other.slices());
    }

    /// Copies from the front.
    fn read_front(&self, bytes: &mut [u8]) {
        let mut at = 0;
        for slice in self.slices() {
            at += slice.copy_to(&mut bytes[at..]);
        }
    }

    /// Copies to the front.
    fn write_front(&self, bytes: &[u8]) {
        let mut at = 0;
        for slice in self.slices() {
            // A volatile slice takes what fits, and says how much that was.
            at += slice.write(&bytes[at..], 0).unwrap_or(0);
            if at == bytes.len() {
                break;
            }
        }
    }
}

/// A packet from the guest.
pub(super) struct TxPacket<'m> {
    /// The head of its chain.
    pub(super) head: u16,
    pub(super) header: Header,
    /// The data, as long as the header says; `None` if the chain is shorter than that.
    pub(super) data: Option<Buffers<'m>>,
}

impl<'m> TxPacket<'m> {
    /// Takes the next packet from the transmit queue; `None` when there is none.
    ///
    /// # Errors
    /// When the ring is corrupt or the chain cannot be a packet.
    pub(super) fn pop(queue: &mut VirtQueue, mem: &'m GuestRam) -> Result<Option<Self>, QueueError> {
        let Some(chain) = queue.pop(mem)? else { return Ok(None) };
        let malformed = |what| QueueError::Request { queue: queue.index(), what };
        let head = chain.head_index();
        let mut data = Buffers::gather(mem, chain, queue.size(), false).map_err(malformed)?;
        if data.len() < HEADER_LEN {
            return Err(malformed("packet is shorter than its header"));
        }
        // The header is copied once: the guest may change it under our eyes.
        let mut bytes = [0; HEADER_LEN];
        data.read_front(&mut bytes);
        let header = Header::decode(&bytes);
        data.skip(HEADER_LEN);
        let data = (data.len() >= header.len as usize).then(|| {
            data.truncate(header.len as usize);
            data
        });
        Ok(Some(Self { head, header, data }))
    }
}

/// A buffer for a packet to the guest.
pub(super) struct RxBuffer<'m> {
    head: u16,
    buffers: Buffers<'m>,
}

impl<'m> RxBuffer<'m> {
    /// Takes the next buffer from the receive queue; `None` when there is none.
    ///
    /// # Errors
    /// When the ring is corrupt or the buffer has no room for a header.
    pub(super) fn pop(queue: &mut VirtQueue, mem: &'m GuestRam) -> Result<Option<Self>, QueueError> {
        let Some(chain) = queue.pop(mem)? else { return Ok(None) };
        let malformed = |what| QueueError::Request { queue: queue.index(), what };
        let head = chain.head_index();
        let buffers = Buffers::gather(mem, chain, queue.size(), true).map_err(malformed)?;
        if buffers.len() < HEADER_LEN {
            return Err(malformed("receive buffer is shorter than a header"));
        }
        Ok(Some(Self { head, buffers }))
    }

    /// The room behind the header.
    pub(super) fn data(&self) -> Buffers<'m> {
        let mut data = self.buffers.clone();
        data.skip(HEADER_LEN);
        data
    }

    /// Returns the buffer to the guest; `header.len` bytes of data are in it already.
    ///
    /// # Errors
    /// When the ring is corrupt.
    pub(super) fn finish(
        self,
        header: &Header,
        queue: &mut VirtQueue,
        mem: &GuestRam,
    ) -> Result<(), QueueError> {
        self.buffers.write_front(&header.encode());
        queue.add_used(mem, self.head, HEADER_LEN as u32 + header.len)
    }
}
