//! The guest's end of vsock tests: `vsock-peer echo PORT COUNT` or `vsock-peer farewell PORT`. It is the test binary by another name.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{VsockAddr, bind};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, accept_with, listen, shutdown, socket_with,
};

/// The name by which it is called.
pub const NAME: &str = "vsock-peer";

/// Does what the command line says.
///
/// # Errors
/// When that makes no sense, or a system call fails.
pub fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[1..] {
        ["echo", port, count] => echo(&listen_on(port.parse()?)?, count.parse()?),
        ["farewell", port] => farewell(&listen_on(port.parse()?)?),
        _ => bail!("takes echo PORT COUNT, or farewell PORT"),
    }
}

fn listen_on(port: u32) -> Result<OwnedFd> {
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &VsockAddr::new(u32::MAX, port)).context("bind")?;
    listen(&socket, 4096)?;
    say("ready")?;
    Ok(socket)
}

fn say(text: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// A connection whose bytes go back where they came from.
struct Echo {
    socket: File,
    /// Read, but not written yet.
    held: Vec<u8>,
    /// The other end sends no more.
    ended: bool,
}

/// Gives back what arrives on `count` connections, and ends each when the other end has.
fn echo(listener: &OwnedFd, count: usize) -> Result<()> {
    const LISTENER: u64 = 0;
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    let mut open: HashMap<u64, Echo> = HashMap::new();
    let (mut accepted, mut over) = (0, 0);
    let mut events = Vec::with_capacity(64);
    while over < count {
        events.clear();
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let token = event.data.u64();
            if token == LISTENER {
                let socket = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
                accepted += 1;
                epoll::add(&epoll, &socket, EventData::new_u64(accepted), EventFlags::IN)?;
                open.insert(accepted, Echo { socket: socket.into(), held: Vec::new(), ended: false });
                continue;
            }
            let Some(echo) = open.get_mut(&token) else { continue };
            if echo.turn()? {
                open.remove(&token);
                over += 1;
            } else {
                let wanted = if echo.held.is_empty() { EventFlags::IN } else { EventFlags::OUT };
                epoll::modify(&epoll, &echo.socket, EventData::new_u64(token), wanted)?;
            }
        }
    }
    say(&format!("served {over}"))
}

impl Echo {
    /// Reads or writes once; whether it is over.
    fn turn(&mut self) -> Result<bool> {
        if self.held.is_empty() {
            let mut bytes = vec![0; 64 * 1024];
            match self.socket.read(&mut bytes) {
                Ok(0) => self.ended = true,
                Ok(count) => self.held.extend_from_slice(&bytes[..count]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        if !self.held.is_empty() {
            match self.socket.write(&self.held) {
                Ok(count) => drop(self.held.drain(..count)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(self.ended && self.held.is_empty())
    }
}

/// Says goodbye and goes on listening.
fn farewell(listener: &OwnedFd) -> Result<()> {
    let socket = accept_with(listener, SocketFlags::CLOEXEC)?;
    rustix::io::write(&socket, b"goodbye")?;
    shutdown(&socket, Shutdown::Write)?;
    let mut bytes = Vec::new();
    File::from(socket).read_to_end(&mut bytes)?;
    say(&format!("heard {}", bytes.len()))
}
