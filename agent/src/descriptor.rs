//! Non-blocking descriptors in the runtime: pipes, pty masters, vsock and Unix sockets alike; and the vsock listeners.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername, listen,
    socket,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, Shutdown, recvmsg};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A byte stream.
#[derive(Debug)]
pub struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    /// Takes a descriptor and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        // SAFETY: an OwnedFd keeps its descriptor, and this one is not taken out of the AsyncFd.
        Ok(Self(unsafe { AsyncFd::register(fd)? }))
    }

    /// Reads once into the spare capacity of `buf`, behind what is there; 0 is end-of-file.
    pub async fn read(&self, buf: &mut Vec<u8>) -> io::Result<usize> {
        self.0.async_io(Interest::READABLE, |fd| read_once(fd, buf)).await
    }

    /// Receives one message, with the first descriptor that comes with it; 0 is end-of-file.
    pub async fn receive(&self, buf: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        self.0
            .async_io(Interest::READABLE, |fd| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let mut parts = [io::IoSliceMut::new(buf)];
                let received = recvmsg(fd, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
                let descriptor = ancillary.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                    _ => None,
                });
                Ok((received.bytes, descriptor))
            })
            .await
    }

    /// Reads once what is there now. `WouldBlock`: nothing.
    pub fn try_read(&self, buf: &mut Vec<u8>) -> io::Result<usize> {
        read_once(self.0.get_ref(), buf)
    }

    /// Writes all of `bytes`.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .0
                .async_io(Interest::WRITABLE, |fd| {
                    loop {
                        match rustix::io::write(fd, bytes) {
                            Err(rustix::io::Errno::INTR) => {}
                            other => return other.map_err(io::Error::from),
                        }
                    }
                })
                .await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Ends one direction of a socket. A peer that is gone already makes no difference.
    pub fn shutdown(&self, how: Shutdown) {
        let _ = rustix::net::shutdown(self.0.get_ref(), how);
    }
}

fn read_once(fd: &OwnedFd, buf: &mut Vec<u8>) -> io::Result<usize> {
    loop {
        match rustix::io::read(fd, rustix::buffer::spare_capacity(buf)) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsyncRead for Descriptor {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let unfilled = buf.initialize_unfilled();
            match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *unfilled)?)) {
                Ok(Ok(n)) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(err)) if err.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(err)) => return Poll::Ready(Err(err)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Descriptor {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), buf)?)) {
                Ok(Err(err)) if err.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shutdown(Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on a vsock port of this machine.
    pub fn vsock(port: u32) -> io::Result<Self> {
        let fd = vsock_socket()?;
        bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
        listen(&fd, Backlog::new(128)?)?;
        Self::new(fd)
    }

    /// Takes a socket that listens already.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        // SAFETY: as in `Descriptor::new`.
        Ok(Self(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? }))
    }

    /// The next connection. Over vsock, connections that do not come from the host are dropped: a process in the guest
    /// must not speak to the agent.
    ///
    /// # Errors
    /// Out of descriptors or memory. Both pass, and callers ask again at once: so a failure takes `ACCEPT_PAUSE`.
    pub async fn accept(&self) -> io::Result<Descriptor> {
        let accepted = self.accept_from_host().await;
        if accepted.is_err() {
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
        accepted
    }

    async fn accept_from_host(&self) -> io::Result<Descriptor> {
        loop {
            let fd = self
                .0
                .async_io(Interest::READABLE, |fd| {
                    let raw = accept4(fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
                    // SAFETY: accept4(2) has just made this descriptor and nobody else knows of it.
                    Ok(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) })
                })
                .await?;
            if comes_from_host(&fd) {
                return Descriptor::new(fd);
            }
        }
    }
}

/// How long a listener that could not accept a connection rests, so that its callers do not spin.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(10);

fn comes_from_host(fd: &OwnedFd) -> bool {
    match rustix::net::sockopt::socket_domain(fd) {
        Ok(rustix::net::AddressFamily::VSOCK) => {
            getpeername::<VsockAddr>(fd.as_raw_fd()).is_ok_and(|peer| peer.cid() == libc::VMADDR_CID_HOST)
        }
        Ok(_) => true,
        Err(_) => false,
    }
}

/// Connects to a vsock port of the host.
pub async fn connect_to_host(port: u32) -> io::Result<Descriptor> {
    let fd = vsock_socket()?;
    match connect(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, port)) {
        Ok(()) => Descriptor::new(fd),
        Err(nix::errno::Errno::EINPROGRESS) => {
            let stream = Descriptor::new(fd)?;
            stream.0.writable().await?.retain_ready();
            match rustix::net::sockopt::socket_error(&stream)? {
                Ok(()) => Ok(stream),
                Err(errno) => Err(errno.into()),
            }
        }
        Err(errno) => Err(errno.into()),
    }
}

fn vsock_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Vsock, SockType::Stream, flags, None)?)
}
