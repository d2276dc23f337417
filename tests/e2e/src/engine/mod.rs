//! Container engines that run containers with `kvrun`: each test has an engine of its own, whose files are among the test's.
//!
//! * [`podman`] - [`Podman`]: a command line without a daemon.
//! * [`docker`] - [`Docker`]: a daemon, which ends with the test.

mod docker;
mod podman;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

pub use self::docker::Docker;
pub use self::podman::Podman;
use crate::bundle::{archive, userland};
use crate::netns;
use crate::process::{Outcome, Running};
use crate::terminal::{Terminal, on_terminal};

/// The image that every engine of a test has: busybox and nothing else.
pub const IMAGE: &str = "localhost/busybox";

/// An engine, by its command line.
pub trait Engine {
    /// Its program.
    const PROGRAM: &'static str;

    /// Has a command speak with this engine and no other.
    fn prepare(&self, command: &mut Command);

    /// A command of it.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(Self::PROGRAM);
        self.prepare(&mut command);
        command.args(args);
        command
    }

    /// What a command becomes.
    ///
    /// # Errors
    /// When it cannot be started, or does not end in time.
    fn invoke(&self, args: &[&str]) -> Result<Outcome> {
        self.start(args)?.without_input().wait()
    }

    /// What a command says that must succeed.
    ///
    /// # Errors
    /// When it does not.
    fn say(&self, args: &[&str]) -> Result<String> {
        let said = self.invoke(args)?;
        ensure!(said.status.success(), "{} {args:?}: {said}", Self::PROGRAM);
        Ok(said.text())
    }

    /// A command with its streams on pipes.
    ///
    /// # Errors
    /// When it cannot be started.
    fn start(&self, args: &[&str]) -> Result<Running> {
        Running::start(&mut self.command(args))
    }

    /// A command on a terminal.
    ///
    /// # Errors
    /// When it cannot be started.
    fn start_on(&self, terminal: &Terminal, args: &[&str]) -> Result<Running> {
        let mut command = on_terminal(Self::PROGRAM);
        self.prepare(&mut command);
        command.args(args);
        terminal.attach(command)
    }

    /// Gives it [`IMAGE`], whose files come to be in a directory.
    ///
    /// # Errors
    /// When it refuses.
    fn import_image(&self, dir: &Path) -> Result<()> {
        let (root, path) = (dir.join("image"), dir.join("image.tar"));
        userland(&root)?;
        archive(&root, &path, &["."])?;
        let mut import = self.command(&["import", "-", IMAGE]);
        let status = import.stdin(File::open(&path)?).stdout(Stdio::null()).status()?;
        ensure!(status.success(), "{} import: {status}", Self::PROGRAM);
        Ok(())
    }
}

/// Makes the test's own network namespace one in which engines work.
fn prepare_network() -> Result<()> {
    netns::run("ip link set lo up").map(drop)
}

/// Removes what engines themselves keep in `/run` as long as the host runs.
fn remove_directories(dirs: &[&str]) -> Result<()> {
    for dir in dirs {
        remove_if_there(fs::remove_dir_all(dir)).with_context(|| format!("cannot remove {dir}"))?;
    }
    Ok(())
}

fn remove_if_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
