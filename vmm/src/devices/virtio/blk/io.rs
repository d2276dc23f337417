//! What a request asks of the image, as either engine carries it out, and what its outcome means.

use libc::iovec;
use rustix::io::Errno;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{GuestAddress, GuestMemory, VolatileSlice};

use crate::devices::virtio::GuestRam;

/// Most buffers of a request. A driver may not make a chain longer than its queue (virtio 1.3 s2.7.5.3.1).
const MAX_BUFFERS: usize = super::QUEUE_SIZE as usize;

/// What the driver reads in the last byte of its request (virtio 1.3 s5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as isize,
    /// Malformed, or not possible. The host's I/O errors are the guest's I/O errors; which one it was is the host's business.
    IoError = VIRTIO_BLK_S_IOERR as isize,
    /// Not possible on this disk, now and ever.
    Unsupported = VIRTIO_BLK_S_UNSUPP as isize,
}

/// Work on the image. Whatever memory it names is guest memory, mapped for as long as the session that holds the request.
#[derive(Debug)]
pub(super) enum Io {
    /// To the guest.
    Read(Transfer),
    /// From the guest.
    Write {
        /// The data.
        transfer: Transfer,
        /// It is to be on the medium when done.
        durable: bool,
    },
    /// What has been written is to be on the medium when done.
    Flush,
    /// The contents do not matter any more.
    Discard(Range),
    /// The contents are to be zero.
    Zero {
        /// Where.
        range: Range,
        /// The way that is tried.
        by: ZeroBy,
        /// Whether it is the second one.
        again: bool,
        /// It is to be on the medium when done.
        durable: bool,
    },
}

/// Bytes of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// How fallocate(2) makes zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroBy {
    /// By giving the space back.
    Hole,
    /// By keeping it.
    Extent,
}

/// What follows from an outcome.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// There is more to do: carry the same [`Io`], which has changed, out again.
    Again,
    /// That was all.
    Done(Status),
}

impl Io {
    /// Bytes to or from the guest.
    pub(super) fn bytes_to_move(&self) -> u64 {
        match self {
            Self::Read(transfer) | Self::Write { transfer, .. } => transfer.buffers.len,
            Self::Flush | Self::Discard(_) | Self::Zero { .. } => 0,
        }
    }

    /// Bytes the host may have to move to get it done.
    pub(super) fn weight(&self) -> u64 {
        match self {
            Self::Zero { range, .. } => range.len,
            _ => self.bytes_to_move(),
        }
    }

    /// Takes note of an outcome.
    pub(super) fn next(&mut self, outcome: Result<u32, Errno>) -> Next {
        match (&mut *self, outcome) {
            // A signal came between, or (of a ring) the kernel had no thread at hand.
            (_, Err(Errno::INTR | Errno::AGAIN)) => Next::Again,
            // The image has become shorter than it was.
            (Self::Read(_) | Self::Write { .. }, Ok(0)) => Next::Done(Status::IoError),
            (Self::Read(transfer) | Self::Write { transfer, .. }, Ok(moved)) => {
                if transfer.advance(moved as usize) { Next::Done(Status::Ok) } else { Next::Again }
            }
            (Self::Discard(_), Err(Errno::OPNOTSUPP)) => Next::Done(Status::Unsupported),
            // Some file systems know only one of the two ways. A driver that hears of neither writes zeroes itself (Linux 6.12
            // block/blk-lib.c).
            (Self::Zero { again: true, .. }, Err(Errno::OPNOTSUPP)) => Next::Done(Status::Unsupported),
            (Self::Zero { by, again, .. }, Err(Errno::OPNOTSUPP)) => {
                *by = by.other();
                *again = true;
                Next::Again
            }
            (Self::Zero { durable: true, .. }, Ok(_)) => {
                *self = Self::Flush;
                Next::Again
            }
            (_, Ok(_)) => Next::Done(Status::Ok),
            (_, Err(_)) => Next::Done(Status::IoError),
        }
    }
}

impl ZeroBy {
    fn other(self) -> Self {
        match self {
            Self::Hole => Self::Extent,
            Self::Extent => Self::Hole,
        }
    }
}

/// Buffers in guest memory.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    iov: Vec<iovec>,
    /// Bytes in all of them.
    len: u64,
}

// SAFETY: the pointers are into guest memory, which any thread may access.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Adds a buffer; `false` if there are too many already or if it is not in one piece on the host.
    pub(super) fn push(&mut self, mem: &GuestRam, addr: GuestAddress, len: usize) -> bool {
        let Ok(slice) = mem.get_slice(addr, len) else { return false };
        if self.iov.len() == MAX_BUFFERS {
            return false;
        }
        self.iov.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len });
        self.len += len as u64;
        true
    }

    /// Bytes in all of them.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Takes the last byte away.
    pub(super) fn cut_last_byte(&mut self) {
        if let Some(last) = self.iov.last_mut() {
            last.iov_len -= 1;
            self.len -= 1;
            if last.iov_len == 0 {
                self.iov.pop();
            }
        }
    }

    /// Fills the buffers from `bytes` as far as both go; returns how far.
    pub(super) fn fill(&self, bytes: &[u8]) -> u32 {
        let mut filled = 0;
        for buffer in &self.iov {
            let now = buffer.iov_len.min(bytes.len() - filled);
            // SAFETY: the buffer is guest memory, mapped for `iov_len` bytes.
            unsafe { volatile(buffer) }.copy_from(&bytes[filled..filled + now]);
            filled += now;
        }
        filled as u32
    }

    /// Fills `bytes` from the buffers; `false` if they are not of the same size.
    pub(super) fn copy_to(&self, bytes: &mut [u8]) -> bool {
        if self.len != bytes.len() as u64 {
            return false;
        }
        let mut rest = bytes;
        for buffer in &self.iov {
            let (now, later) = rest.split_at_mut(buffer.iov_len);
            // SAFETY: as above.
            unsafe { volatile(buffer) }.copy_to(now);
            rest = later;
        }
        true
    }
}

/// A buffer as memory that the guest may change at any time.
///
/// # Safety
/// It must be mapped for as long as the result is used.
unsafe fn volatile(buffer: &iovec) -> VolatileSlice<'_> {
    // SAFETY: the caller's promise.
    unsafe { VolatileSlice::new(buffer.iov_base.cast(), buffer.iov_len) }
}

/// Buffers on their way to or from a place in the image.
#[derive(Debug)]
pub(super) struct Transfer {
    buffers: Buffers,
    /// How many of them are done with.
    done: usize,
    offset: u64,
}

impl Transfer {
    pub(super) fn new(buffers: Buffers, offset: u64) -> Self {
        Self { buffers, done: 0, offset }
    }

    /// Where the bytes that are left belong. They are within the image, so it is an offset of a file.
    pub(super) fn offset(&self) -> i64 {
        self.offset as i64
    }

    /// What is left, as preadv(2) takes it: at most as many buffers as that can take (1024).
    pub(super) fn iov(&self) -> (*const iovec, usize) {
        let left = &self.buffers.iov[self.done..];
        (left.as_ptr(), left.len())
    }

    /// Takes note of `moved` bytes; whether nothing is left.
    fn advance(&mut self, mut moved: usize) -> bool {
        self.offset += moved as u64;
        while let Some(first) = self.buffers.iov.get_mut(self.done) {
            if moved < first.iov_len {
                // SAFETY: `moved` bytes on is still in the same buffer.
                first.iov_base = unsafe { first.iov_base.byte_add(moved) };
                first.iov_len -= moved;
                return false;
            }
            moved -= first.iov_len;
            self.done += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_made_in_either_way_before_the_driver_has_to() {
        let range = Range { offset: 0, len: 512 };
        let zero = |by, durable| Io::Zero { range, by, again: false, durable };
        let mut io = zero(ZeroBy::Extent, false);
        assert_eq!(io.next(Err(Errno::OPNOTSUPP)), Next::Again);
        assert!(matches!(io, Io::Zero { by: ZeroBy::Hole, .. }));
        assert_eq!(io.next(Err(Errno::OPNOTSUPP)), Next::Done(Status::Unsupported));
        assert_eq!(zero(ZeroBy::Hole, false).next(Ok(0)), Next::Done(Status::Ok));
        assert_eq!(zero(ZeroBy::Hole, false).next(Err(Errno::NOSPC)), Next::Done(Status::IoError));
        // A driver that does not flush.
        let mut io = zero(ZeroBy::Hole, true);
        assert_eq!(io.next(Ok(0)), Next::Again);
        assert!(matches!(io, Io::Flush));
        assert_eq!(io.next(Ok(0)), Next::Done(Status::Ok));
    }

    #[test]
    fn interrupted_work_is_done_again_and_failed_work_is_not() {
        assert_eq!(Io::Flush.next(Err(Errno::INTR)), Next::Again);
        assert_eq!(Io::Flush.next(Err(Errno::AGAIN)), Next::Again);
        assert_eq!(Io::Flush.next(Err(Errno::IO)), Next::Done(Status::IoError));
        let mut io = Io::Discard(Range { offset: 0, len: 512 });
        assert_eq!(io.next(Err(Errno::OPNOTSUPP)), Next::Done(Status::Unsupported));
    }

    #[test]
    fn transfers_go_on_where_the_kernel_stopped() {
        let mut memory = [0u8; 30];
        let base = memory.as_mut_ptr();
        let iov: Vec<iovec> = [(0, 10), (10, 15), (25, 5)]
            .iter()
            .map(|&(at, iov_len)| iovec { iov_base: base.wrapping_add(at).cast(), iov_len })
            .collect();
        let mut io = Io::Read(Transfer::new(Buffers { iov, len: 30 }, 512));
        let left = |io: &Io| {
            let Io::Read(transfer) = io else { panic!("{io:?}") };
            let first = &transfer.buffers.iov[transfer.done];
            (transfer.offset, first.iov_base as usize - base as usize, first.iov_len, transfer.iov().1)
        };
        assert_eq!(io.next(Ok(4)), Next::Again);
        assert_eq!(left(&io), (516, 4, 6, 3));
        assert_eq!(io.next(Ok(6)), Next::Again);
        assert_eq!(left(&io), (522, 10, 15, 2));
        assert_eq!(io.next(Ok(19)), Next::Again);
        assert_eq!(left(&io), (541, 29, 1, 1));
        assert_eq!(io.next(Ok(1)), Next::Done(Status::Ok));
        // Nothing moved: there is nothing more.
        let mut short = Io::Read(Transfer::new(Buffers::default(), 0));
        assert_eq!(short.next(Ok(0)), Next::Done(Status::IoError));
    }
}
