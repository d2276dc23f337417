//! Starting a program with descriptors at numbers it expects.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::sys::signal::SigSet;

use crate::sys;

/// Starts a program in a session of its own, with no signal blocked, and with these descriptors beside the standard ones: each at its number,
/// which ascend from 3. No other is open in it.
///
/// # Errors
/// It cannot be started.
pub fn in_new_session(command: &mut Command, descriptors: &[(BorrowedFd<'_>, i32)]) -> io::Result<Child> {
    // Two descriptors must not be on the numbers these are to have: they themselves (dup2 onto itself would leave them
    // close-on-exec), and the pipe by which the standard library reports a failed exec (it would be overwritten). So
    // those numbers and all below are taken while the child is made.
    let last = descriptors.iter().map(|(_, number)| *number).max().unwrap_or(2);
    let mut placeholders = vec![File::open("/dev/null")?];
    while placeholders.last().is_some_and(|f| f.as_raw_fd() <= last) {
        placeholders.push(File::open("/dev/null")?);
    }
    let above = descriptors.iter().map(|(fd, number)| {
        rustix::io::fcntl_dupfd_cloexec(fd, last + 1).map(|fd| (fd, *number)).map_err(io::Error::from)
    });
    let above = above.collect::<io::Result<Vec<_>>>()?;
    let kept: Vec<(i32, i32)> = above.iter().map(|(fd, number)| (fd.as_raw_fd(), *number)).collect();
    // SAFETY: the closure only makes async-signal-safe system calls and does not allocate.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            // We may have blocked signals to read them from a descriptor; a mask survives exec.
            SigSet::empty().thread_set_mask()?;
            sys::keep_descriptors(&kept)
        });
    }
    command.spawn()
}
