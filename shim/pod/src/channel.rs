//! A socket of JSON messages and descriptors ([`Channel`]) in the runtime.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use kvrun_vmm_api::{Channel, ChannelError, Received};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::state_dir::socket_path;

/// A [`Channel`] whose waits let others run.
#[derive(Debug)]
pub struct AsyncChannel(AsyncFd<Socket>);

/// What tokio watches; it wants the descriptor as a number.
#[derive(Debug)]
struct Socket(Channel);

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsyncChannel {
    /// Takes a channel over, which becomes non-blocking. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(channel: Channel) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(channel.as_fd(), true)?;
        // SAFETY: the socket owns its descriptor, the same one for as long as it lives, and it lives in here.
        unsafe { AsyncFd::register(Socket(channel)) }.map(Self).map_err(io::Error::from)
    }

    /// As [`AsyncChannel::new`], of a `SOCK_SEQPACKET` socket that is connected.
    ///
    /// # Errors
    /// As [`AsyncChannel::new`].
    pub fn of_socket(socket: OwnedFd) -> Result<Self, ChannelError> {
        Ok(Self::new(socket.into()).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?)
    }

    /// Sends a message without waiting.
    ///
    /// # Errors
    /// As [`Channel::send`]; `EAGAIN` in it when the peer's queue is full.
    pub fn send_now(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        self.0.get_ref().0.send(message, fds)
    }

    /// Sends a message.
    ///
    /// # Errors
    /// As [`Channel::send`].
    pub async fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let sent = self.0.async_io(Interest::WRITABLE, |socket| would_block(socket.0.send(message, fds)));
        sent.await.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?
    }

    /// Receives a message; `None` when the peer has closed its end. Cancel-safe.
    ///
    /// # Errors
    /// As [`Channel::receive`].
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<Option<Received<T>>, ChannelError> {
        let received = self.0.async_io(Interest::READABLE, |socket| would_block(socket.0.receive()));
        received.await.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?
    }
}

/// Turns "try again" into the error by which tokio knows it.
fn would_block<T>(result: Result<T, ChannelError>) -> io::Result<Result<T, ChannelError>> {
    match result {
        Err(ChannelError::Socket(Errno::AGAIN)) => Err(io::ErrorKind::WouldBlock.into()),
        other => Ok(other),
    }
}

/// A listening socket of channels.
#[derive(Debug)]
pub struct ChannelListener(AsyncFd<OwnedFd>);

impl ChannelListener {
    /// Listens on a socket of this name in a state directory. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn bind(dir: impl AsFd, name: &str, backlog: i32) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrUnix::new(socket_path(dir.as_fd(), name))?)?;
        listen(&socket, backlog)?;
        Self::new(socket)
    }

    /// Takes over a `SOCK_SEQPACKET` socket that listens. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        // SAFETY: an OwnedFd is one descriptor, open for as long as it lives, and it lives in here.
        let watched = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        watched.map(Self).map_err(io::Error::from)
    }

    /// The next connection. Cancel-safe.
    ///
    /// # Errors
    /// Out of descriptors or memory, which passes: callers rest before they ask again.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        let accept = |socket: &OwnedFd| Ok(rustix::net::accept_with(socket, SocketFlags::CLOEXEC)?);
        self.0.async_io(Interest::READABLE, accept).await
    }
}
