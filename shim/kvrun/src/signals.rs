//! Signals to us that are meant for the container.
//!
//! They are blocked before the first thread starts and read from a descriptor, so that none is lost and none interrupts us; they are
//! forwarded one by one, unchanged.

use std::io;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Signals that are read. Not among them: those that stop us (job control is between the shell and us), those that
/// report our own faults, SIGPIPE and SIGCHLD.
const READ: [Signal; 9] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
    Signal::SIGWINCH,
];

/// Signals that are blocked from now on.
#[derive(Debug)]
pub(crate) struct Blocked(SigSet);

/// Blocks the signals we read. To be called while there is one thread.
pub(crate) fn block() -> io::Result<Blocked> {
    let set: SigSet = READ.into_iter().collect();
    set.thread_block()?;
    Ok(Blocked(set))
}

impl Blocked {
    /// Reads them. Must be called in a tokio runtime.
    pub(crate) fn listen(self) -> io::Result<Signals> {
        let fd = SignalFd::with_flags(&self.0, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        // SAFETY: a SignalFd owns its descriptor, the same one for as long as it lives, and it lives in here.
        let fd =
            unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Signals(fd))
    }
}

/// The signals that arrive.
#[derive(Debug)]
pub(crate) struct Signals(AsyncFd<SignalFd>);

impl Signals {
    /// The next one. Cancel-safe.
    pub(crate) async fn next(&self) -> io::Result<Signal> {
        loop {
            let read = |fd: &SignalFd| fd.read_signal()?.ok_or_else(|| io::ErrorKind::WouldBlock.into());
            let info = self.0.async_io(Interest::READABLE, read).await?;
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            if let Ok(signal) = Signal::try_from(number) {
                return Ok(signal);
            }
        }
    }
}

/// Whether a signal asks us to end.
pub(crate) fn asks_to_end(signal: Signal) -> bool {
    matches!(signal, Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM)
}
