//! Block devices of this host: loop devices over files, and what is on them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::fs::{major, minor};

/// Makes a file with an ext4 of so many MiB, all of it for everybody.
///
/// # Errors
/// When the host has no `mkfs.ext4`, or no room.
pub fn ext4(file: &Path, mib: u32) -> Result<()> {
    let made = Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(file).arg(format!("{mib}m")).status();
    let made = made.context("mkfs.ext4")?;
    ensure!(made.success(), "mkfs.ext4: {made}");
    Ok(())
}

/// A loop device, gone when dropped.
#[derive(Debug)]
pub struct Loop {
    path: PathBuf,
}

impl Loop {
    /// One over a file.
    ///
    /// # Errors
    /// When the host has none.
    pub fn over(file: &Path) -> Result<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output()?;
        ensure!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self { path: String::from_utf8(output.stdout)?.trim_end().into() })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its major and minor number.
    ///
    /// # Errors
    /// When it is gone.
    pub fn numbers(&self) -> Result<(u32, u32)> {
        let rdev = fs::metadata(&self.path).context("no loop device")?.rdev();
        Ok((major(rdev), minor(rdev)))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
