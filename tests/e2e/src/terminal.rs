//! `kvrun` on a pseudo-terminal, as a person would run it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::bundle::Bundle;
use crate::fixture::Test;
use crate::process::{Captured, Running};

/// A pseudo-terminal, of which the test holds the near end and `kvrun` the far one; so what is shown ends with `kvrun`.
#[derive(Debug)]
pub struct Terminal {
    near: File,
}

impl Terminal {
    /// A terminal of a size.
    ///
    /// # Errors
    /// As openpty(3).
    pub fn open(rows: u16, columns: u16) -> Result<Self> {
        let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .context("cannot open a pty")?;
        grantpt(&near)?;
        unlockpt(&near)?;
        let terminal = Self { near: near.into() };
        terminal.resize(rows, columns)?;
        Ok(terminal)
    }

    /// Runs a bundle in a session of its own that this terminal controls; its standard output is what the terminal shows.
    ///
    /// # Errors
    /// When `kvrun` cannot be started.
    pub fn start(&self, test: &Test, bundle: &Bundle) -> Result<Running> {
        let mut command = on_terminal(test.program());
        command.arg("--root").arg(test.state()).args(test.run_args(bundle));
        test.environment(&mut command);
        self.attach(command)
    }

    /// Runs a command that [`on_terminal`] has begun.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn attach(&self, mut command: Command) -> Result<Running> {
        let name = ptsname(&self.near, Vec::new())?;
        let far = open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        command.stdin(far.try_clone()?).stdout(far).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start setsid")?;
        let stderr = Captured::new(child.stderr.take().context("no stderr")?);
        let shown = Captured::new(self.near.try_clone()?);
        Ok(Running::adopt(child, shown, stderr))
    }

    /// Changes the size; the kernel sends SIGWINCH to the foreground process group (`tty_do_resize`).
    ///
    /// # Errors
    /// As `TIOCSWINSZ`.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.near, size).context("cannot resize the terminal")
    }

    /// Types keys.
    ///
    /// # Errors
    /// As write(2).
    pub fn keys(&self, bytes: &[u8]) -> Result<()> {
        (&self.near).write_all(bytes).context("cannot write to the terminal")
    }

    /// Its settings. Both ends of a pseudo-terminal share them (Linux drivers/tty/tty_ioctl.c, `tty_mode_ioctl`).
    ///
    /// # Errors
    /// As tcgetattr(3).
    pub fn settings(&self) -> Result<Termios> {
        Ok(tcgetattr(&self.near)?)
    }
}

/// A command for [`Terminal::attach`].
pub fn on_terminal(program: impl AsRef<OsStr>) -> Command {
    // setsid(1) replaces itself with the program, so this child is it.
    let mut command = Command::new("setsid");
    command.arg("--ctty").arg(program);
    command
}
