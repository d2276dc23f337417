//! Streams to the host, over TCP and vsock.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kvrun_bench::{STREAM_PORT, Stream, copy};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, listen, socket,
};
use rustix::net::{Shutdown, shutdown};

/// Bytes of a write and of a read.
const CHUNK: usize = 64 * 1024;

/// Where the host connects to.
pub(crate) struct Listeners {
    tcp: TcpListener,
    vsock: OwnedFd,
}

impl Listeners {
    pub(crate) fn new() -> Result<Self> {
        let tcp = TcpListener::bind(("0.0.0.0", STREAM_PORT))?;
        let vsock = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(vsock.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, STREAM_PORT.into()))?;
        listen(&vsock, Backlog::new(1)?)?;
        Ok(Self { tcp, vsock })
    }

    fn accept(&self, tcp: bool) -> Result<File> {
        if tcp {
            let (stream, _) = self.tcp.accept()?;
            stream.set_nodelay(true)?;
            return Ok(OwnedFd::from(stream).into());
        }
        let stream = accept4(self.vsock.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: accept4(2) has just returned it to us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(stream) }.into())
    }
}

/// From the first byte written until the host says that it has read the last.
pub(crate) fn send(listeners: &Listeners, Stream { tcp, bytes }: Stream) -> Result<Duration> {
    let mut stream = listeners.accept(tcp)?;
    let chunk = vec![0x5a; CHUNK];
    let started = Instant::now();
    copy::write(&mut stream, bytes, &chunk)?;
    shutdown(&stream, Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(started.elapsed())
}

/// From the request until the last byte is here.
pub(crate) fn receive(listeners: &Listeners, Stream { tcp, bytes }: Stream) -> Result<Duration> {
    let mut stream = listeners.accept(tcp)?;
    let mut chunk = vec![0; CHUNK];
    let started = Instant::now();
    stream.write_all(&[0])?;
    let received = copy::read(&mut stream, &mut chunk)?;
    let took = started.elapsed();
    ensure!(received == bytes, "received {received} bytes of {bytes}");
    Ok(took)
}

/// A byte there and a byte back, `bytes` times.
pub(crate) fn ping_pong(listeners: &Listeners, Stream { tcp, bytes }: Stream) -> Result<Duration> {
    let mut stream = listeners.accept(tcp)?;
    let mut byte = [0];
    let started = Instant::now();
    for _ in 0..bytes {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    Ok(started.elapsed())
}
