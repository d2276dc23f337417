//! Directories read: large, from any place, and while they change.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, Mode, OFlags, RawDir, SeekFrom, openat, seek};
use rustix::io::Errno;

use crate::sys::{Child, DIRECTORY, file, list, make_node, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    lists_each_entry_once,
    tells_type_and_inode_of_entries,
    stays_complete_while_it_changes,
    can_be_read_from_any_place,
    can_be_rewound,
    can_be_emptied_while_it_is_read,
    two_readers_have_their_own_places,
    cannot_be_read_as_a_file,
    can_be_flushed,
];

/// Makes `count` files of numbered names.
pub(crate) fn make_many(dir: &Path, count: usize) -> Result<()> {
    let dir = openat(CWD, dir, DIRECTORY, Mode::empty())?;
    for i in 0..count {
        let create = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        openat(&dir, format!("file-{i:06}"), create, Mode::from(0o644)).with_context(|| i.to_string())?;
    }
    Ok(())
}

fn lists_each_entry_once(dir: &Path) -> Result<()> {
    for count in [0, 1, 2, 31, 32, 33, 200] {
        let dir = dir.join(count.to_string());
        fs::create_dir(&dir)?;
        make_many(&dir, count)?;
        let names = list(&dir)?;
        ensure!(names.len() == count, "{} of {count}", names.len());
        ensure!(names.iter().enumerate().all(|(i, name)| *name == format!("file-{i:06}")));
    }
    let mut entries = Vec::new();
    read_from(&openat(CWD, dir, DIRECTORY, Mode::empty())?, 4096, |name, _| entries.push(name.to_owned()))?;
    ensure!(entries.iter().filter(|name| *name == ".").count() == 1, "{entries:?}");
    ensure!(entries.iter().filter(|name| *name == "..").count() == 1, "{entries:?}");
    Ok(())
}

fn tells_type_and_inode_of_entries(dir: &Path) -> Result<()> {
    file(&dir.join("file"), b"")?;
    fs::create_dir(dir.join("dir"))?;
    std::os::unix::fs::symlink("x", dir.join("link"))?;
    make_node(&dir.join("fifo"), rustix::fs::FileType::Fifo)?;
    make_node(&dir.join("socket"), rustix::fs::FileType::Socket)?;
    let mut seen = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.path().symlink_metadata()?;
        ensure!(entry.file_type()? == metadata.file_type() && entry.ino() == metadata.ino(), "{entry:?}");
        seen += 1;
    }
    ensure!(seen == 5);
    Ok(())
}

fn stays_complete_while_it_changes(dir: &Path) -> Result<()> {
    // What is there all the time is listed once, whatever else comes and goes (POSIX readdir).
    make_many(dir, 200)?;
    let changer = Child::start(|| {
        for round in 0..40 {
            let (a, b) = (dir.join(format!("new-{round}")), dir.join(format!("newer-{round}")));
            file(&a, b"")?;
            fs::rename(&a, &b)?;
            fs::remove_file(&b)?;
        }
        Ok(())
    })?;
    for _ in 0..4 {
        let mut seen = HashSet::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            ensure!(!name.starts_with("file-") || seen.insert(name.clone()), "{name} twice");
        }
        ensure!(seen.len() == 200, "{} of 200", seen.len());
    }
    changer.wait()
}

/// Reads from the current place to the end with a buffer of a size; gives each name with the place after it.
fn read_from(dir: &impl std::os::fd::AsFd, buffer: usize, mut each: impl FnMut(&str, u64)) -> Result<()> {
    let mut buffer = Vec::with_capacity(buffer);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        each(&entry.file_name().to_string_lossy(), entry.next_entry_cookie());
    }
    Ok(())
}

fn can_be_read_from_any_place(dir: &Path) -> Result<()> {
    make_many(dir, 200)?;
    let open = openat(CWD, dir, DIRECTORY, Mode::empty())?;
    let (mut names, mut places) = (Vec::new(), Vec::new());
    read_from(&open, 32768, |name, next| {
        names.push(name.to_owned());
        places.push(next);
    })?;
    ensure!(names.len() == 202);
    for at in [100, 0, 199, 75, 200, 3] {
        seek(&open, SeekFrom::Start(places[at]))?;
        let mut rest = Vec::new();
        read_from(&open, 1024, |name, _| rest.push(name.to_owned()))?;
        ensure!(rest == names[at + 1..], "from {at}: {} names", rest.len());
    }
    Ok(())
}

fn can_be_rewound(dir: &Path) -> Result<()> {
    make_many(dir, 100)?;
    let open = openat(CWD, dir, DIRECTORY, Mode::empty())?;
    let count = |open: &_| -> Result<usize> {
        let mut count = 0;
        read_from(open, 512, |_, _| count += 1)?;
        Ok(count)
    };
    ensure!(count(&open)? == 102 && count(&open)? == 0);
    file(&dir.join("new"), b"")?;
    seek(&open, SeekFrom::Start(0))?;
    ensure!(count(&open)? == 103);
    Ok(())
}

fn can_be_emptied_while_it_is_read(dir: &Path) -> Result<()> {
    // As `rm -r` does.
    make_many(dir, 200)?;
    let mut removed = 0;
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
        removed += 1;
    }
    ensure!(removed == 200, "{removed}");
    ensure!(list(dir)?.is_empty());
    Ok(())
}

fn two_readers_have_their_own_places(dir: &Path) -> Result<()> {
    make_many(dir, 200)?;
    let (mut one, mut other) = (fs::read_dir(dir)?, fs::read_dir(dir)?);
    let mut names = [HashSet::new(), HashSet::new()];
    loop {
        let (a, b) = (one.next(), other.next());
        if a.is_none() && b.is_none() {
            break;
        }
        for (names, entry) in names.iter_mut().zip([a, b]) {
            if let Some(entry) = entry {
                names.insert(entry?.file_name());
            }
        }
    }
    ensure!(names.iter().all(|names| names.len() == 200));
    Ok(())
}

fn cannot_be_read_as_a_file(dir: &Path) -> Result<()> {
    let open = openat(CWD, dir, DIRECTORY, Mode::empty())?;
    refused(rustix::io::read(&open, &mut [0; 10]), Errno::ISDIR)?;
    refused(crate::sys::open(dir), Errno::ISDIR)?;
    file(&dir.join("file"), b"")?;
    refused(openat(CWD, dir.join("file"), DIRECTORY, Mode::empty()), Errno::NOTDIR)
}

fn can_be_flushed(dir: &Path) -> Result<()> {
    file(&dir.join("file"), b"x")?;
    let open = openat(CWD, dir, DIRECTORY, Mode::empty())?;
    rustix::fs::fsync(&open)?;
    rustix::fs::fdatasync(&open)?;
    rustix::fs::syncfs(&open)?;
    Ok(())
}
