//! The terminal of a container on the host: the caller's own while the container has it, or one made for whoever asks for it.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, Once, PoisonError};

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
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

    /// A pseudo-terminal of the host whose other end goes to whoever listens on `socket`: one message with the terminal's name, and
    /// the descriptor, as runc sends it. Ours becomes the controlling terminal of this session, which has none, and is raw: the
    /// terminal in the guest does what terminals do.
    pub(crate) fn send(socket: &Path) -> io::Result<Self> {
        let far = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&far)?;
        unlockpt(&far)?;
        let name = ptsname(&far, Vec::new())?;
        let near = open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let mut settings = tcgetattr(&near)?;
        settings.make_raw();
        tcsetattr(&near, OptionalActions::Now, &settings)?;
        // So that a new size of the window is a signal to us (Linux drivers/tty/pty.c, pty_resize).
        rustix::process::ioctl_tiocsctty(&near)?;

        let stream = UnixStream::connect(socket)?;
        let fds = [far.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&stream, &[IoSlice::new(name.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(Self(near))
    }

    /// Another descriptor for it.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
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
