//! A request: taken from a chain, checked, carried out, answered (virtio 1.3 s5.2.6).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use kvrun_vmm_api::config::MAX_BLK_SERIAL;
use libc::iovec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

use crate::devices::virtio::GuestRam;
use crate::devices::virtio::queue::Chain;

/// The unit of capacity, offsets and lengths, in bytes (virtio 1.3 s5.2.4).
pub(super) const SECTOR: u64 = 512;
/// `struct virtio_blk_req` up to its data: type, reserved, sector.
const HEADER_LEN: usize = 16;
/// Most buffers one preadv(2) or pwritev(2) takes.
const IOV_MAX: usize = 1024;
/// Most buffers of a request. A driver may not make a chain longer than its queue (virtio 1.3 s2.7.5.3.1).
const MAX_BUFFERS: usize = super::QUEUE_SIZE as usize;

/// What a disk consists of.
pub(super) struct Disk {
    pub(super) image: File,
    /// Capacity in sectors.
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// Serial number, padded with NULs.
    pub(super) id: [u8; MAX_BLK_SERIAL],
}

/// Why a request was not carried out: the status the driver sees.
struct Refusal(u32);

/// The host's I/O errors are the guest's I/O errors; which one it was is the host's business.
impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Self(VIRTIO_BLK_S_IOERR)
    }
}

/// The parts of a well-formed request.
#[derive(Default)]
struct Request {
    header: [u8; HEADER_LEN],
    /// What follows the header: data for the disk.
    out: Buffers,
    /// What precedes the status: room for data from the disk.
    room: Buffers,
}

/// Buffers in guest memory.
#[derive(Default)]
struct Buffers {
    iov: Vec<iovec>,
    /// Bytes in all of them.
    len: u64,
}

impl Disk {
    /// Carries out the request in `chain`; returns how many bytes of the chain's writable part were filled.
    pub(super) fn serve(&self, mem: &GuestRam, chain: Chain<'_>, write_through: bool) -> u32 {
        let mut status_at = None;
        let request = Request::take(mem, chain, &mut status_at);
        // Without a status byte the driver has no way to know what happened, so nothing does.
        let Some(status_at) = status_at else { return 0 };
        let (status, filled) = match request.and_then(|mut request| self.perform(&mut request, write_through))
        {
            Ok(filled) => (VIRTIO_BLK_S_OK, filled),
            Err(Refusal(status)) => (status, 0),
        };
        // The address was found to be in memory, which does not shrink.
        let _ = mem.write_obj(status as u8, status_at);
        filled + 1
    }

    /// Returns how many bytes of data went to the guest.
    fn perform(&self, request: &mut Request, write_through: bool) -> Result<u32, Refusal> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = request.header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                let offset = self.locate(sector, request.room.len)?;
                let filled = request.room.len as u32;
                request.room.transfer(offset, |iov, offset| {
                    // SAFETY: the buffers are guest memory, which stays mapped while the request is alive, and which
                    // nothing in this process holds references into.
                    unsafe { libc::preadv(self.image.as_raw_fd(), iov.as_ptr(), iov.len() as i32, offset) }
                })?;
                Ok(filled)
            }
            VIRTIO_BLK_T_OUT => {
                // virtio 1.3 s5.2.6.2: whatever the driver has negotiated.
                if self.read_only {
                    return Err(Refusal(VIRTIO_BLK_S_IOERR));
                }
                let offset = self.locate(sector, request.out.len)?;
                request.out.transfer(offset, |iov, offset| {
                    // SAFETY: as above; the guest may change the bytes meanwhile, and gets what it deserves.
                    unsafe { libc::pwritev(self.image.as_raw_fd(), iov.as_ptr(), iov.len() as i32, offset) }
                })?;
                if write_through {
                    self.image.sync_data()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                if !self.read_only {
                    self.image.sync_data()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => Ok(request.room.fill(&self.id)),
            _ => Err(Refusal(VIRTIO_BLK_S_UNSUPP)),
        }
    }

    /// The offset in the image of `len` bytes from `sector` on, if all of them are on the disk.
    fn locate(&self, sector: u64, len: u64) -> Result<i64, Refusal> {
        let end = sector.checked_add(len / SECTOR);
        if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > self.sectors) {
            return Err(Refusal(VIRTIO_BLK_S_IOERR));
        }
        // The image is that large, so the offset is one of a file.
        Ok((sector * SECTOR) as i64)
    }
}

impl Request {
    /// Takes a request apart; says where its status belongs even if the rest is not well-formed. How the parts are spread over
    /// descriptors is the driver's choice (virtio 1.3 s2.7.4).
    fn take(mem: &GuestRam, chain: Chain<'_>, status_at: &mut Option<GuestAddress>) -> Result<Self, Refusal> {
        let malformed = Refusal(VIRTIO_BLK_S_IOERR);
        let mut request = Self::default();
        let mut copied = 0;
        let mut well_formed = true;
        for descriptor in chain {
            let (mut addr, mut len) = (descriptor.addr(), descriptor.len() as usize);
            if len == 0 {
                continue;
            }
            if !mem.check_range(addr, len) {
                well_formed = false;
                continue;
            }
            if descriptor.is_write_only() {
                // In range, so the last byte has an address.
                *status_at = addr.checked_add(len as u64 - 1);
                well_formed &= request.room.push(mem, addr, len);
                continue;
            }
            // virtio 1.3 s2.7.4.2: what the device reads comes before what it writes.
            well_formed &= status_at.is_none();
            let take = len.min(HEADER_LEN - copied);
            well_formed &= mem.read_slice(&mut request.header[copied..copied + take], addr).is_ok();
            copied += take;
            len -= take;
            addr = GuestAddress(addr.0 + take as u64);
            if len > 0 {
                well_formed &= request.out.push(mem, addr, len);
            }
        }
        if !well_formed || copied < HEADER_LEN {
            return Err(malformed);
        }
        request.room.cut_last_byte();
        Ok(request)
    }
}

impl Buffers {
    /// Adds a buffer; `false` if there are too many already or if it is not in one piece on the host.
    fn push(&mut self, mem: &GuestRam, addr: GuestAddress, len: usize) -> bool {
        let Ok(slice) = mem.get_slice(addr, len) else { return false };
        if self.iov.len() == MAX_BUFFERS {
            return false;
        }
        self.iov.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len });
        self.len += len as u64;
        true
    }

    /// Takes the status away from the room for data.
    fn cut_last_byte(&mut self) {
        if let Some(last) = self.iov.last_mut() {
            last.iov_len -= 1;
            self.len -= 1;
            if last.iov_len == 0 {
                self.iov.pop();
            }
        }
    }

    /// Moves all bytes by as many calls of `io` as it takes.
    fn transfer(&mut self, mut offset: i64, io: impl Fn(&[iovec], i64) -> isize) -> io::Result<()> {
        let mut left = &mut self.iov[..];
        while !left.is_empty() {
            let now = left.len().min(IOV_MAX);
            let moved = match usize::try_from(io(&left[..now], offset)) {
                // The image has become shorter than it was.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => moved,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
            };
            offset += moved as i64;
            left = advance(left, moved);
        }
        Ok(())
    }

    /// Fills the buffers from `bytes` as far as both go; returns how far.
    fn fill(&mut self, bytes: &[u8]) -> u32 {
        let mut filled = 0;
        for buffer in &self.iov {
            let now = buffer.iov_len.min(bytes.len() - filled);
            // SAFETY: the buffer is guest memory, mapped for `iov_len` bytes, into which nothing holds references; `now`
            // is within both.
            unsafe { std::ptr::copy_nonoverlapping(bytes[filled..].as_ptr(), buffer.iov_base.cast(), now) };
            filled += now;
        }
        filled as u32
    }
}

/// What is left of the buffers after `moved` bytes.
fn advance(mut iov: &mut [iovec], mut moved: usize) -> &mut [iovec] {
    while let [first, ..] = iov {
        if moved < first.iov_len {
            // SAFETY: `moved` bytes on is still in the same buffer.
            first.iov_base = unsafe { first.iov_base.byte_add(moved) };
            first.iov_len -= moved;
            break;
        }
        moved -= first.iov_len;
        iov = &mut iov[1..];
    }
    iov
}
