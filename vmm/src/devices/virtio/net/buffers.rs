//! Pieces of guest memory, for readv(2) and writev(2).

use libc::iovec;
use vm_memory::{GuestAddress, GuestMemory};

use crate::devices::virtio::GuestRam;

/// Most pieces that one system call takes (Linux: `UIO_MAXIOV`), less one that the device adds.
pub(super) const MAX_PIECES: usize = 1023;

/// Adds `length` bytes of guest memory from `at` on; `false` if that is not memory in one piece, or if there are too many already.
pub(super) fn push(pieces: &mut Vec<iovec>, mem: &GuestRam, at: GuestAddress, length: usize) -> bool {
    let Ok(slice) = mem.get_slice(at, length) else { return false };
    if pieces.len() == MAX_PIECES {
        return false;
    }
    pieces.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
    true
}

/// Copies the first bytes of the pieces out. `false` if there are too few.
pub(super) fn peek(pieces: &[iovec], to: &mut [u8]) -> bool {
    let mut done = 0;
    for piece in pieces {
        let now = piece.iov_len.min(to.len() - done);
        // SAFETY: the piece is guest memory, mapped for `iov_len` bytes, into which nothing holds references; `now` is within both.
        unsafe { std::ptr::copy_nonoverlapping(piece.iov_base.cast(), to[done..].as_mut_ptr(), now) };
        done += now;
    }
    done == to.len()
}

/// Takes the first `count` bytes away. There must be as many.
pub(super) fn skip(pieces: &mut Vec<iovec>, mut count: usize) {
    let mut gone = 0;
    for piece in &mut *pieces {
        let now = piece.iov_len.min(count);
        // SAFETY: at most `iov_len` bytes on is within the piece, or at its end.
        piece.iov_base = unsafe { piece.iov_base.byte_add(now) };
        piece.iov_len -= now;
        count -= now;
        if piece.iov_len > 0 {
            break;
        }
        gone += 1;
    }
    pieces.drain(..gone);
}

/// Writes `bytes` over what is `offset` bytes into the pieces, as far as they go.
pub(super) fn poke(pieces: &[iovec], mut offset: usize, mut bytes: &[u8]) {
    for piece in pieces {
        if offset >= piece.iov_len {
            offset -= piece.iov_len;
            continue;
        }
        let (now, later) = bytes.split_at(bytes.len().min(piece.iov_len - offset));
        // SAFETY: as in `peek`.
        unsafe {
            std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast::<u8>().add(offset), now.len());
        }
        (bytes, offset) = (later, 0);
        if bytes.is_empty() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::{MockDriver, NOWHERE};

    #[test]
    fn bytes_are_found_wherever_the_pieces_are_cut() {
        let driver = MockDriver::new(&[8]);
        for cuts in [[4, 4, 4], [1, 10, 1], [11, 1, 0], [0, 0, 12]] {
            let mut pieces = Vec::new();
            driver.write(0x20_0000, b"0123456789ab");
            let mut at = 0x20_0000;
            for length in cuts {
                assert!(push(&mut pieces, &driver.mem, GuestAddress(at), length));
                at += length as u64;
            }
            let mut bytes = [0; 10];
            assert!(peek(&pieces, &mut bytes));
            assert_eq!(&bytes, b"0123456789");
            assert!(!peek(&pieces, &mut [0; 13]));
            poke(&pieces, 3, b"xy");
            assert_eq!(driver.read(0x20_0000, 12), b"012xy56789ab");
            skip(&mut pieces, 10);
            let mut rest = [0; 2];
            assert!(peek(&pieces, &mut rest) && &rest == b"ab");
            skip(&mut pieces, 2);
            assert!(!peek(&pieces, &mut [0]));
        }
    }

    #[test]
    fn only_memory_is_taken_and_not_in_too_many_pieces() {
        let driver = MockDriver::new(&[8]);
        let mut pieces = Vec::new();
        assert!(!push(&mut pieces, &driver.mem, GuestAddress(NOWHERE), 1));
        assert!(!push(&mut pieces, &driver.mem, GuestAddress((8 << 20) - 1), 2));
        assert!(!push(&mut pieces, &driver.mem, GuestAddress(u64::MAX), usize::MAX));
        for _ in 0..MAX_PIECES {
            assert!(push(&mut pieces, &driver.mem, GuestAddress(0), 1));
        }
        assert!(!push(&mut pieces, &driver.mem, GuestAddress(0), 1));
    }
}
