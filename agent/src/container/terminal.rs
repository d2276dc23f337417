//! The terminal of a process, as the agent has it: its master.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{Gid, Uid, fchown};
use rustix::termios::{Winsize, tcsetwinsize};

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
    let slave = crate::oci::sys::open_slave(master)?;
    Ok(fchown(&slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?)
}
