//! The terminal of a process: libcontainer makes the pty inside the container and sends its master over a Unix socket.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{CWD, Gid, Mode, OFlags, Uid, fchown, openat};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::path::of_fd;

/// Listens for the master on `name` in `dir`, whose path may be longer than a socket address takes.
///
/// # Errors
///
/// socket(2), bind(2).
pub fn listen(dir: &Path, name: &str) -> io::Result<UnixListener> {
    let dir = openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let listener = UnixListener::bind(of_fd(&dir).join(name))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Takes the master that was sent. To be called when the container is created: then it is there.
///
/// # Errors
///
/// It is not.
pub fn receive(listener: &UnixListener) -> io::Result<OwnedFd> {
    let (stream, _) = listener.accept()?;
    stream.set_nonblocking(true)?;
    let mut byte = [0; 64];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&stream, &mut [io::IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "no terminal was sent"))
}

/// Sets the size of the window.
///
/// # Errors
///
/// `TIOCSWINSZ`.
pub fn resize(master: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(master, size)?)
}

/// Gives the slave to the process's user, who may then open `/dev/tty`'s device by name, as after a login.
///
/// # Errors
///
/// `TIOCGPTPEER`, fchown(2).
pub fn give_to(master: impl AsFd, (uid, gid): (u32, u32)) -> io::Result<()> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags as its argument and touches no memory of ours.
    let slave =
        unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&master.as_fd()), libc::TIOCGPTPEER, flags) };
    if slave < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor and nobody else knows of it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    Ok(fchown(&slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?)
}
