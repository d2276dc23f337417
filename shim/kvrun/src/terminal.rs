//! The caller's terminal while a container has it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, Once, PoisonError};

use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// What to go back to; here and not in the guard, because a panic in a program that aborts runs no destructor.
static BEFORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// The terminal on standard input, output or error: the first that is one.
#[derive(Debug)]
pub(crate) struct Terminal(OwnedFd);

impl Terminal {
    /// Finds it.
    pub(crate) fn find() -> io::Result<Option<Self>> {
        let found = [stdin(), stdout(), stderr()].into_iter().find(|fd| isatty(fd));
        found.map(|fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(Self)).transpose()
    }

    /// Rows and columns, if it knows them.
    pub(crate) fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(&self.0).ok()?;
        (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
    }

    /// Switches to raw mode, in which every byte goes to the container.
    pub(crate) fn raw(&self) -> io::Result<RawMode> {
        let before = tcgetattr(&self.0)?;
        let mut raw = before.clone();
        raw.make_raw();
        HOOK.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        });
        let remembered = (self.0.try_clone()?, before);
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(remembered);
        let entered = RawMode(());
        tcsetattr(self.0.as_fd(), OptionalActions::Drain, &raw)?;
        Ok(entered)
    }
}

/// A terminal in raw mode. Dropping it, and a panic, restore it.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((terminal, before)) = before {
        // The terminal may be gone.
        let _ = tcsetattr(terminal, OptionalActions::Drain, &before);
    }
}
