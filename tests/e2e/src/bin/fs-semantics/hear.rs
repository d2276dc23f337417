//! What a program hears of a directory that it watches (inotify(7)).

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

/// Says `listening`, and then `made NAME`, `moved NAME` (to there) or `removed NAME`, until it is killed.
pub(crate) fn hear(directory: &Path) -> Result<bool> {
    let inotify = inotify::init(CreateFlags::CLOEXEC).context("cannot make an inotify instance")?;
    let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE;
    inotify::add_watch(&inotify, directory, flags).context("cannot watch")?;
    io::stdout().write_all(b"listening\n")?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(&inotify, &mut buffer);
    loop {
        let event = reader.next().context("cannot listen")?;
        let flags = event.events();
        let what = match flags {
            _ if flags.contains(ReadFlags::CREATE) => "made",
            _ if flags.contains(ReadFlags::MOVED_TO) => "moved",
            _ => "removed",
        };
        let name = event.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        io::stdout().write_all(format!("{what} {name}\n").as_bytes())?;
    }
}
