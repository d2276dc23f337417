//! Files of the share.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kvrun_bench::copy;

use crate::SHARE;

/// Bytes of a write and of a read.
const CHUNK: usize = 1 << 20;

fn data() -> PathBuf {
    PathBuf::from(SHARE).join("data")
}

/// Writes the file anew.
pub(crate) fn write(bytes: usize) -> Result<Duration> {
    let chunk = vec![0x5a; CHUNK];
    let started = Instant::now();
    let mut file = File::create(data())?;
    copy::write(&mut file, bytes, &chunk)?;
    drop(file);
    Ok(started.elapsed())
}

/// Reads the file: from the host, whatever of it the guest's page cache has.
pub(crate) fn read(bytes: usize) -> Result<Duration> {
    let mut chunk = vec![0; CHUNK];
    forget("1")?;
    let started = Instant::now();
    let mut file = File::open(data())?;
    let received = copy::read(&mut file, &mut chunk)?;
    let took = started.elapsed();
    ensure!(received == bytes, "read {received} bytes of {bytes}");
    Ok(took)
}

/// Creates, stats, lists and removes files; the guest has forgotten all about them before they are looked at.
pub(crate) fn many(count: usize) -> Result<Duration> {
    let directory = PathBuf::from(SHARE).join("many");
    let file = |index: usize| directory.join(format!("file-{index}"));
    let mut took = Duration::ZERO;
    let mut timed = |step: &mut dyn FnMut() -> Result<()>| {
        let started = Instant::now();
        step()?;
        took += started.elapsed();
        anyhow::Ok(())
    };
    timed(&mut || {
        fs::create_dir(&directory)?;
        (0..count).try_for_each(|index| Ok(File::create_new(file(index))?.write_all(b"contents")?))
    })?;
    forget("2")?;
    timed(&mut || {
        (0..count).try_for_each(|index| {
            ensure!(fs::metadata(file(index))?.size() == 8, "a file has the wrong size");
            Ok(())
        })
    })?;
    forget("2")?;
    timed(&mut || {
        let mut listed = 0;
        for entry in fs::read_dir(&directory)? {
            listed += u64::from(entry?.metadata()?.is_file());
        }
        ensure!(listed == count as u64, "{listed} of {count} files are there");
        Ok(())
    })?;
    timed(&mut || {
        (0..count).try_for_each(|index| fs::remove_file(file(index)))?;
        Ok(fs::remove_dir(&directory)?)
    })?;
    Ok(took)
}

/// Empties caches of the guest: `1` the page cache, `2` names and inodes (Linux Documentation/admin-guide/sysctl/vm.rst).
fn forget(what: &str) -> Result<()> {
    Ok(fs::write("/proc/sys/vm/drop_caches", what)?)
}
