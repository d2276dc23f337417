//! Container engines that run containers with `kvrun`: each test has an engine of its own, whose files are among the test's.
//!
//! * [`podman`] - [`Podman`]: a command line without a daemon.
//! * [`docker`] - [`Docker`]: a daemon, which ends with the test.

mod docker;
mod podman;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

pub use self::docker::Docker;
pub use self::podman::Podman;
use crate::bundle::userland;
use crate::netns;
use crate::process::Running;

/// The image that every engine of a test has: busybox and nothing else.
pub const IMAGE: &str = "localhost/busybox";

/// Writes the image's files as a tar archive into a directory.
fn image_archive(dir: &Path) -> Result<File> {
    let (root, archive) = (dir.join("image"), dir.join("image.tar"));
    userland(&root)?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&root).arg("-cf").arg(&archive).arg(".");
    let output = tar.output().context("cannot run tar")?;
    ensure!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
    File::open(&archive).context("no archive")
}

/// Makes the test's own network namespace one in which engines work.
fn prepare_network() -> Result<()> {
    netns::run("ip link set lo up").map(drop)
}

/// What an engine's command says when it must succeed.
fn output(mut command: Command) -> Result<String> {
    let said = Running::start(&mut command)?.without_input().wait()?;
    ensure!(said.status.success(), "{command:?}: {said}");
    Ok(said.text())
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
