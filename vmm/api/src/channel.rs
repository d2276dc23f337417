//! The control socket: one JSON message per datagram, descriptors beside it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most descriptors that go with one message: the kernel's limit (unix(7), `SCM_RIGHTS`).
pub const MAX_FDS: usize = 253;

/// What can go wrong on the control socket.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The message is longer than [`MAX_MESSAGE`], or came with more than [`MAX_FDS`] descriptors.
    #[error("control message is longer than {MAX_MESSAGE} bytes or has more than {MAX_FDS} descriptors")]
    TooLarge,
    /// The message is not what the protocol says.
    #[error("control message is malformed")]
    Malformed(#[source] serde_json::Error),
    /// The socket failed.
    #[error("control socket failed")]
    Socket(#[from] Errno),
}

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    /// Its descriptors, close-on-exec, in the sender's order.
    pub fds: Vec<OwnedFd>,
}

/// One end of a control socket. Sending and receiving take `&self`: a datagram is atomic, so threads may share it.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// A connected pair: one end for the engine, one to be inherited by the VMM. Both are close-on-exec.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Sends one message with its descriptors; blocks if the peer's queue is full (unless the socket is non-blocking).
    ///
    /// # Errors
    /// [`ChannelError::TooLarge`]; [`ChannelError::Socket`] with `EPIPE` when the peer is gone.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Malformed)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::TooLarge);
        }
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Receives one message; `None` when the peer has closed its end.
    ///
    /// # Errors
    /// [`ChannelError::TooLarge`] and [`ChannelError::Malformed`] consume the message (its descriptors are closed) and
    /// leave the socket usable.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<Received<T>>, ChannelError> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                // The peer has closed its end and left something of ours unread (Linux net/unix/af_unix.c, unix_release_sock). This is told
                // once, before what it had sent.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                other => break other?,
            }
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        // unix(7): a closed peer reads as a datagram of no bytes, which no sender of this protocol makes.
        if got.bytes == 0 {
            return Ok(None);
        }
        if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(ChannelError::TooLarge);
        }
        let message = serde_json::from_slice(&bytes[..got.bytes]).map_err(ChannelError::Malformed)?;
        Ok(Some(Received { message, fds }))
    }
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::{Request, ToVmm};

    #[test]
    fn message_and_its_descriptors_arrive_together() {
        let (a, b) = Channel::pair().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        let sent = ToVmm { id: 7, request: Request::VsockConnect { port: 1024 } };
        a.send(&sent, &[far.as_fd()]).unwrap();
        drop(far);
        let received: Received<ToVmm> = b.receive().unwrap().unwrap();
        assert_eq!(received.message, sent);
        let [fd] = <[OwnedFd; 1]>::try_from(received.fds).unwrap();
        UnixStream::from(fd).write_all(b"x").unwrap();
        let mut byte = [0];
        near.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn closed_peer_is_the_end() {
        let (a, b) = Channel::pair().unwrap();
        drop(a);
        assert!(b.receive::<ToVmm>().unwrap().is_none());
    }

    #[test]
    fn last_words_of_a_peer_that_has_left_something_unread_arrive() {
        let (a, b) = Channel::pair().unwrap();
        let last = ToVmm { id: 1, request: Request::Stop };
        a.send(&last, &[]).unwrap();
        b.send(&ToVmm { id: 2, request: Request::State }, &[]).unwrap();
        drop(a);
        assert_eq!(b.receive::<ToVmm>().unwrap().unwrap().message, last);
        assert!(b.receive::<ToVmm>().unwrap().is_none());
    }

    #[test]
    fn malformed_and_oversized_messages_leave_the_socket_usable() {
        let (a, b) = Channel::pair().unwrap();
        rustix::net::send(&a, b"{\"id\":", SendFlags::empty()).unwrap();
        rustix::net::send(&a, &vec![b' '; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        a.send(&ToVmm { id: 1, request: Request::State }, &[]).unwrap();
        assert!(matches!(b.receive::<ToVmm>(), Err(ChannelError::Malformed(_))));
        assert!(matches!(b.receive::<ToVmm>(), Err(ChannelError::TooLarge)));
        assert_eq!(b.receive::<ToVmm>().unwrap().unwrap().message.id, 1);
    }

    #[test]
    fn unknown_fields_are_refused() {
        let (a, b) = Channel::pair().unwrap();
        let text = br#"{"id":1,"request":{"detach":{"slot":2,"force":true}}}"#;
        rustix::net::send(&a, text, SendFlags::empty()).unwrap();
        assert!(matches!(b.receive::<ToVmm>(), Err(ChannelError::Malformed(_))));
    }
}
