//! `kvrun` on a pseudo-terminal, as a person would run it.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::bundle::Bundle;
use crate::fixture::Test;
use crate::process::{Captured, Outcome, Running};

/// A pseudo-terminal: the test holds both ends, `kvrun` runs on the far one.
#[derive(Debug)]
pub struct Terminal {
    near: File,
    far: OwnedFd,
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
        let far = open(
            ptsname(&near, Vec::new())?,
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let terminal = Self { near: near.into(), far };
        terminal.resize(rows, columns)?;
        Ok(terminal)
    }

    /// Runs a bundle in a session of its own that this terminal controls; its standard output is what the terminal shows.
    ///
    /// # Errors
    /// When `kvrun` cannot be started.
    pub fn start(&self, test: &Test, bundle: &Bundle) -> Result<Running> {
        // setsid(1) replaces itself with the program, so this child is kvrun.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(test.program()).arg("--root").arg(test.state()).args(test.run_args(bundle));
        test.environment(&mut command);
        let end = || -> Result<Stdio> { Ok(self.far.try_clone()?.into()) };
        let child = command.stdin(end()?).stdout(end()?).stderr(Stdio::piped()).spawn();
        let mut child = child.context("cannot start setsid")?;
        let stderr = Captured::new(child.stderr.take().context("no stderr")?);
        let shown = Captured::new(self.near.try_clone()?);
        Ok(Running::adopt(child, shown, stderr))
    }

    /// Waits for the end of `kvrun`. The test holds the far end open, so what is shown has no end of its own.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn end_of(&self, run: Running) -> Result<Outcome> {
        run.wait_for_exit()
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

    /// Its settings.
    ///
    /// # Errors
    /// As tcgetattr(3).
    pub fn settings(&self) -> Result<Termios> {
        Ok(tcgetattr(&self.far)?)
    }
}
