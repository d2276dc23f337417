//! Files of a cgroup that tell when they change (Linux 6.12 Documentation/admin-guide/cgroup-v2.rst: "A value change in this file generates a
//! file modified event").

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Such a file.
#[derive(Debug)]
pub struct EventFile(AsyncFd<File>);

impl EventFile {
    /// Watches it.
    ///
    /// # Errors
    ///
    /// It cannot be opened or watched.
    pub fn open(path: &Path) -> io::Result<Self> {
        // SAFETY: a File is one descriptor, open for as long as it lives, and it lives in here.
        let file = unsafe { AsyncFd::register_with_interest(File::open(path)?, Interest::PRIORITY) }?;
        Ok(Self(file))
    }

    /// Completes when something is found in what it says, now or after a change.
    ///
    /// # Errors
    ///
    /// It cannot be read: `ENODEV` if the cgroup was removed.
    pub async fn until<T>(&mut self, find: impl Fn(&str) -> Option<T>) -> io::Result<T> {
        loop {
            let mut text = String::new();
            let file = self.0.get_mut();
            file.seek(SeekFrom::Start(0))?;
            file.read_to_string(&mut text)?;
            if let Some(found) = find(&text) {
                return Ok(found);
            }
            // Linux fs/kernfs/file.c, kernfs_generic_poll: POLLPRI when it has changed since it was read.
            self.0.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}
