//! A FUSE request, taken out of the guest's reach as far as it needs to be, checked, and brought into the shape `virtiofsd`
//! reads.
//!
//! `virtiofsd` reads a descriptor chain over guest memory of its own type, and trusts some of what it finds there:
//!
//! * names are passed on to `unlinkat(2)` and the like, so `../../x` would leave the share;
//! * a client that knows less than it may wish makes it write to standard error, time and again;
//! * room for less than the header of an answer makes it panic, and so does a file offset above `i64::MAX`.
//!
//! A guest may change all of these while they are being read. So each worker has a [`Frame`]: a private area that appears
//! beside guest memory at an address no guest has. A request is laid out there anew, as a chain whose descriptors, header and
//! names are private copies that have been checked; only data stays in guest memory.

use std::io;
use std::sync::Arc;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use super::counters::Outcome;
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::queue::Chain;

/// Guest memory as `virtiofsd` wants it: with a dirty bitmap, which stays off.
type View = GuestMemoryMmap<BitmapMmapRegion>;

/// Size of the private descriptor table.
const TABLE: u16 = 1024;
/// Most descriptors taken over from the guest: more than its queue has, which is the most a driver may use for a chain (virtio
/// 1.3 s2.7.5.3.1), and less than the table by those a frame adds.
const MAX_PARTS: usize = TABLE as usize - 2;
/// Where the private area appears: beyond what any processor can address, so no guest memory is there.
const PRIVATE: GuestAddress = GuestAddress(1 << 56);
/// Parts of the private area, as offsets: the descriptor table, the available ring, the copy of the request, and where an answer
/// goes that the guest left no room for.
const AVAIL: u64 = TABLE as u64 * 16;
const COPY: u64 = AVAIL + 4096;
const NOWHERE: u64 = COPY + MAX_COPY as u64;
const NOWHERE_LEN: u32 = 256;
const SIZE: usize = NOWHERE as usize + NOWHERE_LEN as usize;

/// Longest request with names in it: two names or a name and the target of a link, and then some.
const MAX_COPY: usize = 16 * 1024;
/// `struct fuse_in_header` (Linux include/uapi/linux/fuse.h) ...
const IN_HEADER_LEN: usize = 40;
/// ... and the longest argument that holds a file offset, `struct fuse_write_in`: what is copied of any request.
const MIN_COPY: usize = IN_HEADER_LEN + 40;
/// Where both `struct fuse_read_in` and `struct fuse_write_in` hold the offset.
const FILE_OFFSET: std::ops::Range<usize> = 48..56;
/// Where `struct fuse_init_in` holds the flags.
const INIT_FLAGS: std::ops::Range<usize> = 52..56;
/// `struct fuse_out_header`: the least room an answer needs ...
const OUT_HEADER_LEN: u64 = 16;
/// ... where its error number is ...
const OUT_ERROR: usize = 4;
/// ... and where, behind it, `struct fuse_write_out` says how much was written.
const OUT_WRITTEN: usize = 16;

const FUSE_READ: u32 = 15;
const FUSE_WRITE: u32 = 16;
const FUSE_INIT: u32 = 26;
const FUSE_SUBMOUNTS: u32 = 1 << 27;

/// The size of the argument that comes before the names of a request, and how many names follow: `enum fuse_opcode`.
fn names_of(opcode: u32) -> Option<(usize, usize)> {
    Some(match opcode {
        1 /* LOOKUP */ | 6 /* SYMLINK */ | 10 /* UNLINK */ | 11 /* RMDIR */ => (0, 1),
        9 /* MKDIR */ | 13 /* LINK */ => (8, 1),
        8 /* MKNOD */ | 35 /* CREATE */ => (16, 1),
        12 /* RENAME */ => (8, 2),
        45 /* RENAME2 */ => (16, 2),
        _ => return None,
    })
}

/// The request is none that an honest driver sends: its chain is too long or outside memory, or a name is not one.
#[derive(Debug)]
pub(super) struct BadRequest;

/// Where a worker lays out the request it works on.
pub(super) struct Frame {
    /// Keeps the mappings alive that `view` refers to.
    ram: GuestRam,
    view: View,
    ring: Queue,
    /// The descriptors of the request at hand, before they go into the table.
    parts: Vec<Part>,
    /// The bytes of the request at hand that have been copied.
    copy: Vec<u8>,
    opcode: u32,
    /// How many bytes of an answer reach the guest at most: 0 if there is no room even for a header.
    room: u32,
}

/// What a descriptor of ours says.
#[derive(Clone, Copy)]
struct Part {
    addr: GuestAddress,
    len: u32,
    writable: bool,
}

/// A request ready to be handled.
pub(super) struct Request<'f> {
    pub(super) reader: Reader<'f>,
    pub(super) writer: Writer<'f>,
}

impl Frame {
    /// A frame beside this guest memory.
    ///
    /// # Errors
    /// When the private area cannot be mapped.
    pub(super) fn new(ram: GuestRam) -> io::Result<Self> {
        let mut regions = Vec::new();
        for region in ram.iter() {
            let mapping: &MmapRegion<()> = region;
            let builder = MmapRegionBuilder::new(mapping.size())
                .with_mmap_prot(mapping.prot())
                .with_mmap_flags(mapping.flags());
            // SAFETY: the pointer is that of a live mapping of this very size; `self.ram` keeps it alive for as long as
            // the view exists, and a region built from a pointer does not unmap it.
            let builder = unsafe { builder.with_raw_mmap_pointer(mapping.as_ptr()) };
            regions.push((region.start_addr(), builder.build()));
        }
        regions.push((PRIVATE, MmapRegion::new(SIZE)));
        let mut shared = Vec::new();
        for (start, mapping) in regions {
            let region = GuestRegionMmap::new(mapping.map_err(io::Error::other)?, start);
            shared.push(Arc::new(region.ok_or(io::ErrorKind::InvalidInput)?));
        }
        let view = View::from_arc_regions(shared).map_err(io::Error::other)?;

        let mut ring = Queue::new(TABLE).map_err(io::Error::other)?;
        let high = Some((PRIVATE.0 >> 32) as u32);
        ring.set_desc_table_address(Some(0), high);
        ring.set_avail_ring_address(Some(AVAIL as u32), high);
        ring.set_ready(true);
        // One chain is available, and its head is descriptor 0: the rest of a fresh mapping is zero.
        view.write_obj(1u16, private(AVAIL + 2)).map_err(io::Error::other)?;
        Ok(Self { ram, view, ring, parts: Vec::new(), copy: Vec::new(), opcode: 0, room: 0 })
    }

    /// Lays out the request of a chain from `ram`.
    pub(super) fn load(&mut self, chain: Chain<'_>) -> Result<Request<'_>, BadRequest> {
        self.room = self.gather(chain)?;
        self.copy.clear();
        self.take(MIN_COPY)?;
        let opcode = self.copy.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
        self.opcode = opcode;
        if let Some((argument, count)) = names_of(opcode) {
            self.take(MAX_COPY)?;
            let names = self.copy.get(IN_HEADER_LEN + argument..).ok_or(BadRequest)?;
            check_names(names, count)?;
        }
        if let (FUSE_INIT, Some(flags)) = (opcode, self.copy.get_mut(INIT_FLAGS)) {
            // What Linux has said since 5.10. To a client that does not, the server would say so on standard error, as often
            // as the client likes to hear it.
            flags[3] |= (FUSE_SUBMOUNTS >> 24) as u8;
        }
        if let (FUSE_READ | FUSE_WRITE, Some(offset)) = (opcode, self.copy.get_mut(FILE_OFFSET)) {
            // Beyond the end of any file all offsets are the same.
            if offset[7] & 0x80 != 0 {
                offset.copy_from_slice(&i64::MAX.to_le_bytes());
            }
        }
        self.view.write_slice(&self.copy, private(COPY)).map_err(|_| BadRequest)?;
        let copy = Part { addr: private(COPY), len: self.copy.len() as u32, writable: false };

        for (i, part) in std::iter::once(&copy).chain(&self.parts).enumerate() {
            let next = if i < self.parts.len() { VRING_DESC_F_NEXT } else { 0 };
            let write = if part.writable { VRING_DESC_F_WRITE } else { 0 };
            let descriptor = Descriptor::new(part.addr.0, part.len, (next | write) as u16, i as u16 + 1);
            self.view.write_obj(descriptor, private(i as u64 * 16)).map_err(|_| BadRequest)?;
        }
        self.ring.set_next_avail(0);
        let chain = self.ring.iter(&self.view).map_err(|_| BadRequest)?.next().ok_or(BadRequest)?;
        let reader = Reader::new(&self.view, chain.clone()).map_err(|_| BadRequest)?;
        let writer = Writer::new(&self.view, chain).map_err(|_| BadRequest)?;
        Ok(Request { reader, writer })
    }

    /// What has become of the request loaded last, whose answer has this length, if it has one: how many bytes of it are in the
    /// guest's buffers, and how it went. The latter is read back from where the guest may have changed it meanwhile: a guest can
    /// spoil what is counted of it, and nothing else.
    pub(super) fn settle(&self, answered: Option<usize>) -> (u32, Outcome) {
        let Some(answered) = answered else { return (0, Outcome::Error) };
        // An answer is shorter than its chain, and that is shorter than 2^32 bytes.
        let answered = answered as u32;
        let answer = self.answer_begin();
        let field =
            |at: usize| u32::from_le_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]);
        let outcome = match self.opcode {
            _ if answered > 0 && field(OUT_ERROR) != 0 => Outcome::Error,
            FUSE_READ => Outcome::Read(answered.saturating_sub(OUT_HEADER_LEN as u32)),
            FUSE_WRITE => Outcome::Written(field(OUT_WRITTEN)),
            _ => Outcome::Done,
        };
        (answered.min(self.room), outcome)
    }

    /// The first bytes of where the answer is; zeros where there is no room.
    fn answer_begin(&self) -> [u8; OUT_WRITTEN + 4] {
        let mut bytes = [0; OUT_WRITTEN + 4];
        let mut rest = &mut bytes[..];
        for part in self.parts.iter().filter(|part| part.writable) {
            let (now, later) = rest.split_at_mut(rest.len().min(part.len as usize));
            // All parts are within memory.
            let _ = self.view.read_slice(now, part.addr);
            if later.is_empty() {
                break;
            }
            rest = later;
        }
        bytes
    }

    /// Fills `parts` with the buffers of a chain and returns how much room there is for an answer.
    fn gather(&mut self, chain: Chain<'_>) -> Result<u32, BadRequest> {
        self.parts.clear();
        let mut room = 0;
        for descriptor in chain {
            let (addr, len, writable) = (descriptor.addr(), descriptor.len(), descriptor.is_write_only());
            if len == 0 {
                continue;
            }
            // Checked against guest memory itself, so that the private area stays out of reach.
            if self.parts.len() == MAX_PARTS || !self.ram.check_range(addr, len as usize) {
                return Err(BadRequest);
            }
            if writable {
                room += u64::from(len);
            } else if room > 0 {
                // virtio 1.3 s2.7.4.2: what the device reads comes before what it writes.
                return Err(BadRequest);
            }
            self.push(Part { addr, len, writable });
        }
        if room < OUT_HEADER_LEN {
            // Requests without an answer (FORGET) have no room for one. Where another lacks it, its answer is for nobody.
            self.parts.retain(|part| !part.writable);
            self.parts.push(Part { addr: private(NOWHERE), len: NOWHERE_LEN, writable: true });
            return Ok(0);
        }
        // The iterator over a chain ends before 2^32 bytes (virtio 1.3 s2.7.5.2).
        Ok(room as u32)
    }

    /// Appends a part, or makes it one with the last if the two lie side by side: pages of a file often do.
    fn push(&mut self, part: Part) {
        if let Some(last) = self.parts.last_mut()
            && last.writable == part.writable
            && last.addr.unchecked_add(u64::from(last.len)) == part.addr
            // The server takes no part that is in two regions.
            && self.ram.to_region_addr(last.addr).is_some_and(|(region, at)| {
                region.get_slice(at, last.len as usize + part.len as usize).is_ok()
            })
        {
            // No overflow: a chain is shorter than 2^32 bytes.
            last.len += part.len;
        } else {
            self.parts.push(part);
        }
    }

    /// Moves readable bytes from `parts` to `copy` until that has `len` bytes or there are no more.
    fn take(&mut self, len: usize) -> Result<(), BadRequest> {
        let mut emptied = 0;
        for part in self.parts.iter_mut().take_while(|part| !part.writable) {
            let start = self.copy.len();
            let now = (len - start).min(part.len as usize);
            self.copy.resize(start + now, 0);
            self.ram.read_slice(&mut self.copy[start..], part.addr).map_err(|_| BadRequest)?;
            part.len -= now as u32;
            part.addr = part.addr.checked_add(now as u64).ok_or(BadRequest)?;
            if part.len > 0 {
                break;
            }
            emptied += 1;
        }
        self.parts.drain(..emptied);
        Ok(())
    }
}

/// Whether the first `count` of these NUL-terminated strings are names of directory entries, and nothing but.
fn check_names(names: &[u8], count: usize) -> Result<(), BadRequest> {
    let mut names = names.split_inclusive(|&byte| byte == 0);
    for _ in 0..count {
        match names.next().and_then(|name| name.strip_suffix(&[0])) {
            None | Some(b"" | b"." | b"..") => return Err(BadRequest),
            Some(name) if name.contains(&b'/') => return Err(BadRequest),
            Some(_) => {}
        }
    }
    Ok(())
}

/// An address in the private area.
fn private(offset: u64) -> GuestAddress {
    GuestAddress(PRIVATE.0 + offset)
}
