//! Holding the processes of a cgroup (Linux 6.12 Documentation/admin-guide/cgroup-v2.rst, `cgroup.freeze`).

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Holds them, or lets them run; completes when all of them are.
///
/// # Errors
///
/// A file of the cgroup cannot be written, read or watched.
pub async fn freeze(dir: &Path, frozen: bool) -> io::Result<()> {
    let events = File::open(dir.join("cgroup.events"))?;
    fs::write(dir.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
    let line = if frozen { "frozen 1" } else { "frozen 0" };
    // SAFETY: a File is one descriptor, open for as long as it lives, and it lives in here.
    let mut events = unsafe { AsyncFd::register_with_interest(events, Interest::PRIORITY) }?;
    loop {
        let mut text = String::new();
        let file = events.get_mut();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_string(&mut text)?;
        if text.lines().any(|have| have == line) {
            return Ok(());
        }
        // Linux fs/kernfs/file.c, kernfs_generic_poll: POLLPRI when it has changed since it was read.
        events.ready(Interest::PRIORITY).await?.clear_ready();
    }
}
