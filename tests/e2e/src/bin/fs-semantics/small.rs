//! A file system that is full. To be run on one of a few MiB, and of a limited number of files.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::sys::{fallocate, file, list, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    full_is_said_and_can_be_mended,
    what_was_written_before_stays,
    allocation_says_so_before,
    files_run_out_too,
    statfs_counts_down,
];

/// Writes until it is full; how many bytes went.
fn fill(path: &Path) -> Result<u64> {
    let mut file = file(path, b"")?;
    let mut written = 0;
    while written < 1 << 30 {
        match file.write(&[7; 64 * 1024]) {
            Ok(bytes) => written += bytes as u64,
            Err(e) if e.kind() == ErrorKind::StorageFull => return Ok(written),
            Err(e) => bail!("after {written} bytes: {e}"),
        }
    }
    bail!("this file system is not small");
}

fn full_is_said_and_can_be_mended(dir: &Path) -> Result<()> {
    let written = fill(&dir.join("big"))?;
    ensure!(written > 1 << 20 && dir.join("big").metadata()?.len() == written, "{written}");
    let other = file(&dir.join("other"), b"")?;
    refused(other.write_at(&[1; 8192], 0), Errno::NOSPC)?;
    fs::remove_file(dir.join("big"))?;
    ensure!(other.write_at(&[1; 8192], 0)? == 8192);
    Ok(())
}

fn what_was_written_before_stays(dir: &Path) -> Result<()> {
    file(&dir.join("before"), &[3; 100_000])?;
    fill(&dir.join("big"))?;
    ensure!(fs::read(dir.join("before"))? == [3; 100_000]);
    ensure!(fs::read(dir.join("big"))?.iter().all(|byte| *byte == 7));
    // Over what is there it can be written still.
    let before = crate::sys::open(&dir.join("before"))?;
    before.write_all_at(&[4; 100_000], 0)?;
    ensure!(fs::read(dir.join("before"))? == [4; 100_000]);
    Ok(())
}

fn allocation_says_so_before(dir: &Path) -> Result<()> {
    let open = file(&dir.join("file"), b"x")?;
    refused(fallocate(&open, FallocateFlags::empty(), 0, 1 << 40), Errno::NOSPC)?;
    ensure!(open.metadata()?.len() == 1);
    // A hole is no promise.
    open.set_len(1 << 40)?;
    Ok(())
}

fn files_run_out_too(dir: &Path) -> Result<()> {
    let mut made = 0;
    let error = loop {
        match fs::File::create(dir.join(made.to_string())) {
            Ok(_) => made += 1,
            Err(e) => break e,
        }
        ensure!(made < 100_000, "this file system has too many files");
    };
    ensure!(error.kind() == ErrorKind::StorageFull, "{error}");
    refused(fs::create_dir(dir.join("dir")), Errno::NOSPC)?;
    refused(std::os::unix::fs::symlink("x", dir.join("link")), Errno::NOSPC)?;
    ensure!(list(dir)?.len() == made);
    fs::remove_file(dir.join("0"))?;
    fs::create_dir(dir.join("dir"))?;
    Ok(())
}

fn statfs_counts_down(dir: &Path) -> Result<()> {
    let free = || rustix::fs::statvfs(dir).map(|fs| fs.f_bfree * fs.f_frsize);
    let before = free()?;
    let file = file(&dir.join("file"), &[1; 512 * 1024])?;
    file.sync_all()?;
    let between = free()?;
    ensure!(before - between >= 512 * 1024, "{before} - {between}");
    drop(file);
    fs::remove_file(dir.join("file"))?;
    ensure!(free()? > between);
    Ok(())
}
