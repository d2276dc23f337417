//! Holding the processes of a cgroup (Linux 6.12 Documentation/admin-guide/cgroup-v2.rst, `cgroup.freeze`).

use std::fs;
use std::io;
use std::path::Path;

use super::event_file::EventFile;

/// Holds them, or lets them run; completes when all of them are.
///
/// # Errors
///
/// A file of the cgroup cannot be written, read or watched.
pub async fn freeze(dir: &Path, frozen: bool) -> io::Result<()> {
    let mut events = EventFile::open(&dir.join("cgroup.events"))?;
    fs::write(dir.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
    let line = if frozen { "frozen 1" } else { "frozen 0" };
    events.until(|text| text.lines().any(|have| have == line).then_some(())).await
}
