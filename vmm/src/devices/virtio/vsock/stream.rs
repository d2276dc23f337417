//! The host's end of a connection: a Unix stream socket, read into and written from guest memory without a copy.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair, sockopt};
use vm_memory::VolatileSlice;

/// How many pieces of guest memory one system call takes; what is beyond is left for the next.
const MAX_IOV: usize = 64;

/// A connected Unix stream socket.
///
/// Every call says for itself that it must not block, for the socket may share its file description with others. For the
/// same reason dropping it shuts it down: the peer must see the end even if someone else still holds a duplicate.
#[derive(Debug)]
pub(super) struct HostStream(OwnedFd);

impl HostStream {
    /// Takes a socket if it is one of the right kind.
    pub(super) fn new(socket: OwnedFd) -> Option<Self> {
        let unix = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX);
        (unix && sockopt::socket_type(&socket) == Ok(SocketType::STREAM)).then_some(Self(socket))
    }

    /// A stream and the socket at its other end, which is close-on-exec and non-blocking.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self(ours), theirs))
    }

    /// Writes from guest memory; may take less than all.
    pub(super) fn send(&self, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut iov = [EMPTY; MAX_IOV];
        for (entry, slice) in iov.iter_mut().zip(from) {
            *entry =
                libc::iovec { iov_base: slice.ptr_guard().as_ptr().cast_mut().cast(), iov_len: slice.len() };
        }
        let header = message(&mut iov, from.len());
        // SAFETY: every entry is a piece of guest memory that stays mapped while its slice is borrowed; sendmsg only reads
        // it, and the kernel does not mind that the guest may write it at the same time.
        let sent = unsafe {
            libc::sendmsg(self.0.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Writes from the VMM's memory; may take less than all.
    pub(super) fn send_bytes(&self, from: (&[u8], &[u8])) -> io::Result<usize> {
        use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
        let iov = [io::IoSlice::new(from.0), io::IoSlice::new(from.1)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(&self.0, &iov, &mut SendAncillaryBuffer::default(), flags)?)
    }

    /// Reads into guest memory; 0 at the end of the stream.
    pub(super) fn receive(&self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut iov = [EMPTY; MAX_IOV];
        for (entry, slice) in iov.iter_mut().zip(into) {
            *entry = libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
        }
        let mut header = message(&mut iov, into.len());
        // SAFETY: every entry is a piece of guest memory that stays mapped while its slice is borrowed; nothing in this
        // process holds a reference into guest memory, so recvmsg may write it.
        let received = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// The peer reads the end of the stream after what was written so far.
    pub(super) fn end_sending(&self) {
        // Fails only if the peer is gone, which is noticed elsewhere.
        let _ = shutdown(&self.0, Shutdown::Write);
    }

    /// The peer's writes fail from now on.
    pub(super) fn end_receiving(&self) {
        let _ = shutdown(&self.0, Shutdown::Read);
    }
}

impl Drop for HostStream {
    fn drop(&mut self) {
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

impl AsFd for HostStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

fn message(iov: &mut [libc::iovec; MAX_IOV], count: usize) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which all zeroes is "nothing".
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = iov.as_mut_ptr();
    header.msg_iovlen = count.min(MAX_IOV) as _;
    header
}
