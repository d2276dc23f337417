//! A request as it is in its chain (virtio 1.3 s5.2.6): taken apart, checked against the disk, answered.

use kvrun_vmm_api::config::MAX_BLK_SERIAL;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

use super::image::{Image, MAX_TRANSFER, SECTOR};
use super::io::{Buffers, Io, Range, Status, Transfer, ZeroBy};
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::queue::Chain;

/// `struct virtio_blk_req` up to its data: type, reserved, sector.
const HEADER_LEN: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE_LEN: usize = 16;
/// The most sectors of a discard: space is given back quickly, but not at once.
pub(super) const MAX_DISCARD_SECTORS: u32 = (256 << 20) / SECTOR as u32;
/// The most sectors of a request for zeroes, which some hosts have to write.
pub(super) const MAX_ZERO_SECTORS: u32 = (32 << 20) / SECTOR as u32;

/// A request that has a place for its status.
pub(super) struct Request {
    status_at: GuestAddress,
    /// `None` if it is malformed.
    parts: Option<Parts>,
}

/// The parts of a well-formed request.
#[derive(Default)]
struct Parts {
    header: [u8; HEADER_LEN],
    /// What follows the header: data for the disk.
    out: Buffers,
    /// What precedes the status: room for data from the disk.
    room: Buffers,
}

/// What is to be done about a request.
pub(super) enum Todo {
    /// Work on the image; then tell the driver, and if it went well, that so many bytes of its room are filled.
    Io(Io, u32),
    /// Nothing more: so many bytes of its room are filled.
    Nothing(u32),
}

impl Request {
    /// Takes a request apart; `None` without a place for a status, for then the driver has no way to know what happened, so nothing
    /// must. How the parts are spread over descriptors is the driver's choice (virtio 1.3 s2.7.4).
    pub(super) fn take(mem: &GuestRam, chain: Chain<'_>) -> Option<Self> {
        let mut parts = Parts::default();
        let mut status_at = None;
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
                status_at = addr.checked_add(len as u64 - 1);
                well_formed &= parts.room.push(mem, addr, len);
                continue;
            }
            // virtio 1.3 s2.7.4.2: what the device reads comes before what it writes.
            well_formed &= status_at.is_none();
            let take = len.min(HEADER_LEN - copied);
            well_formed &= mem.read_slice(&mut parts.header[copied..copied + take], addr).is_ok();
            copied += take;
            len -= take;
            addr = GuestAddress(addr.0 + take as u64);
            if len > 0 {
                well_formed &= parts.out.push(mem, addr, len);
            }
        }
        well_formed &= copied == HEADER_LEN;
        parts.room.cut_last_byte();
        Some(Self { status_at: status_at?, parts: well_formed.then_some(parts) })
    }

    /// Where its status belongs.
    pub(super) fn status_at(&self) -> GuestAddress {
        self.status_at
    }

    /// Finds out what is to be done. With `durable`, a change is to be on the medium before the driver hears of it.
    pub(super) fn check(
        self,
        image: &Image,
        id: &[u8; MAX_BLK_SERIAL],
        durable: bool,
    ) -> Result<Todo, Status> {
        let Parts { header, out, room } = self.parts.ok_or(Status::IoError)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        // virtio 1.3 s5.2.6.2: whatever the driver has negotiated.
        let changes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
        if changes && image.is_read_only() {
            return Err(Status::IoError);
        }
        let transfer = |buffers: Buffers| {
            if buffers.len() > MAX_TRANSFER {
                return Err(Status::IoError);
            }
            let offset = image.locate(sector, buffers.len()).ok_or(Status::IoError)?;
            Ok(Transfer::new(buffers, offset))
        };
        match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT if out.len() + room.len() == 0 => Ok(Todo::Nothing(0)),
            VIRTIO_BLK_T_IN => {
                let filled = room.len();
                // No more than MAX_TRANSFER, once this is known to be true.
                Ok(Todo::Io(Io::Read(transfer(room)?), filled as u32))
            }
            VIRTIO_BLK_T_OUT => Ok(Todo::Io(Io::Write { transfer: transfer(out)?, durable }, 0)),
            VIRTIO_BLK_T_FLUSH if image.is_read_only() => Ok(Todo::Nothing(0)),
            VIRTIO_BLK_T_FLUSH => Ok(Todo::Io(Io::Flush, 0)),
            VIRTIO_BLK_T_GET_ID => Ok(Todo::Nothing(room.fill(id))),
            VIRTIO_BLK_T_DISCARD => {
                let (range, flags) = range(image, &out, MAX_DISCARD_SECTORS)?;
                // virtio 1.3 s5.2.6.2: the unmap bit is none of a discard's either.
                if flags != 0 {
                    return Err(Status::Unsupported);
                }
                Ok(Todo::Io(Io::Discard(range), 0))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (range, flags) = range(image, &out, MAX_ZERO_SECTORS)?;
                let by = match flags {
                    0 => ZeroBy::Extent,
                    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => ZeroBy::Hole,
                    _ => return Err(Status::Unsupported),
                };
                Ok(Todo::Io(Io::Zero { range, by, again: false, durable }, 0))
            }
            _ => Err(Status::Unsupported),
        }
    }
}

/// The one range of a request that has no data of its own, and its flags. One, because that is what the configuration space allows.
fn range(image: &Image, out: &Buffers, most: u32) -> Result<(Range, u32), Status> {
    let mut bytes = [0; RANGE_LEN];
    if !out.copy_to(&mut bytes) {
        return Err(Status::IoError);
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    if sectors == 0 || sectors > most {
        return Err(Status::IoError);
    }
    let len = u64::from(sectors) * SECTOR;
    let offset = image.locate(sector, len).ok_or(Status::IoError)?;
    Ok((Range { offset, len }, u32::from_le_bytes(flags)))
}
