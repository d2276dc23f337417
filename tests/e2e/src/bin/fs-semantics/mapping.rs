//! mmap(2).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

use crate::sys::{Child, Turns, content, file, open, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    shared_mapping_is_the_file,
    writes_are_seen_in_mappings,
    shared_mapping_is_seen_by_other_processes,
    private_mapping_keeps_its_changes,
    mapping_outlives_descriptor_and_name,
    beyond_the_end_is_a_bus_error,
    truncated_mapping_is_a_bus_error,
    growing_file_grows_into_its_mapping,
    what_may_be_mapped_is_what_was_opened,
    executable_mapping_runs,
];

const PAGE: usize = 4096;

/// Some memory; unmapped in the end.
struct Mapping {
    at: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(file: impl AsFd, len: usize, prot: ProtFlags, flags: MapFlags) -> rustix::io::Result<Self> {
        // SAFETY: where it goes is up to the kernel, so it replaces nothing.
        let at = unsafe { mmap(std::ptr::null_mut(), len, prot, flags, file, 0)? };
        Ok(Self { at: at.cast(), len })
    }

    fn shared(file: &File, len: usize) -> rustix::io::Result<Self> {
        Self::new(file, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)
    }

    fn get(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: within the mapping. Volatile, for others write to it too.
        unsafe { self.at.add(at).read_volatile() }
    }

    fn set(&self, at: usize, byte: u8) {
        assert!(at < self.len);
        // SAFETY: as above.
        unsafe { self.at.add(at).write_volatile(byte) }
    }

    fn sync(&self) -> Result<()> {
        // SAFETY: the whole of a live mapping.
        unsafe { msync(self.at.cast(), self.len, MsyncFlags::SYNC)? };
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it.
        let _ = unsafe { munmap(self.at.cast(), self.len) };
    }
}

fn shared_mapping_is_the_file(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = file(&path, &[1; 3 * PAGE])?;
    let map = Mapping::shared(&file, 3 * PAGE)?;
    ensure!(map.get(0) == 1 && map.get(3 * PAGE - 1) == 1);
    map.set(10, 2);
    map.set(PAGE + 10, 3);
    map.sync()?;
    let bytes = fs::read(&path)?;
    ensure!(bytes[10] == 2 && bytes[PAGE + 10] == 3 && bytes[11] == 1);
    map.set(2 * PAGE, 4);
    drop(map);
    drop(file);
    ensure!(fs::read(&path)?[2 * PAGE] == 4);
    Ok(())
}

fn writes_are_seen_in_mappings(dir: &Path) -> Result<()> {
    let file = file(&dir.join("file"), &[1; 2 * PAGE])?;
    let map = Mapping::shared(&file, 2 * PAGE)?;
    ensure!(map.get(5) == 1);
    file.write_all_at(b"x", 5)?;
    ensure!(map.get(5) == b'x');
    map.set(6, b'y');
    let mut byte = [0];
    file.read_exact_at(&mut byte, 6)?;
    ensure!(byte == *b"y");
    Ok(())
}

fn shared_mapping_is_seen_by_other_processes(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let map = Mapping::shared(&file(&path, &[0; PAGE])?, PAGE)?;
    let (mut mine, mut other) = Turns::pair()?;
    let child = Child::start(|| {
        let map = Mapping::shared(&open(&path)?, PAGE)?;
        for round in 1..100u8 {
            other.wait()?;
            ensure!(map.get(0) == round);
            map.set(1, round);
            other.pass()?;
        }
        Ok(())
    })?;
    for round in 1..100u8 {
        map.set(0, round);
        mine.pass()?;
        mine.wait()?;
        ensure!(map.get(1) == round);
    }
    child.wait()
}

fn private_mapping_keeps_its_changes(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = file(&path, &[1; 2 * PAGE])?;
    let map = Mapping::new(&file, 2 * PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?;
    map.set(0, 9);
    ensure!(map.get(0) == 9 && map.get(1) == 1);
    ensure!(fs::read(&path)? == [1; 2 * PAGE]);
    // A page of its own is not the file's any more.
    file.write_all_at(&[2; PAGE], 0)?;
    ensure!(map.get(0) == 9 && map.get(1) == 1);
    Ok(())
}

fn mapping_outlives_descriptor_and_name(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let map = Mapping::shared(&file(&path, &[1; 100 * PAGE])?, 100 * PAGE)?;
    fs::hard_link(&path, dir.join("other"))?;
    fs::remove_file(&path)?;
    for page in 0..100 {
        ensure!(map.get(page * PAGE) == 1);
        map.set(page * PAGE, page as u8);
    }
    map.sync()?;
    let bytes = fs::read(dir.join("other"))?;
    ensure!((0..100).all(|page| bytes[page * PAGE] == page as u8));
    Ok(())
}

/// Fails unless touching the place ends a process by SIGBUS.
fn bus_error(map: &Mapping, at: usize) -> Result<()> {
    let child = Child::start(|| {
        map.get(at);
        Ok(())
    })?;
    ensure!(child.signal()? == Some(libc::SIGBUS), "no SIGBUS at {at}");
    Ok(())
}

fn beyond_the_end_is_a_bus_error(dir: &Path) -> Result<()> {
    let file = file(&dir.join("file"), &[1; PAGE + 10])?;
    let map = Mapping::shared(&file, 3 * PAGE)?;
    // Up to the end of the page there are zeros.
    ensure!(map.get(PAGE + 9) == 1 && map.get(PAGE + 10) == 0 && map.get(2 * PAGE - 1) == 0);
    bus_error(&map, 2 * PAGE)
}

fn truncated_mapping_is_a_bus_error(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = file(&path, &[1; 3 * PAGE])?;
    let map = Mapping::shared(&file, 3 * PAGE)?;
    ensure!(map.get(2 * PAGE) == 1);
    map.set(PAGE + 5, 7);
    map.set(PAGE + 50, 7);
    file.set_len(PAGE as u64 + 10)?;
    bus_error(&map, 2 * PAGE)?;
    ensure!(map.get(PAGE + 5) == 7 && map.get(PAGE + 50) == 0);
    file.set_len(3 * PAGE as u64)?;
    ensure!(map.get(PAGE + 50) == 0 && map.get(2 * PAGE) == 0);
    drop(map);
    let bytes = fs::read(&path)?;
    ensure!(bytes[PAGE + 5] == 7 && bytes[PAGE + 10..].iter().all(|byte| *byte == 0));
    Ok(())
}

fn growing_file_grows_into_its_mapping(dir: &Path) -> Result<()> {
    let file = file(&dir.join("file"), b"")?;
    let map = Mapping::shared(&file, 16 * PAGE)?;
    for page in 0..16 {
        file.set_len((page + 1) * PAGE as u64)?;
        map.set(page as usize * PAGE + 1, page as u8 + 1);
    }
    map.sync()?;
    let bytes = content(&file)?;
    ensure!((0..16).all(|page| bytes[page * PAGE + 1] == page as u8 + 1));
    Ok(())
}

fn what_may_be_mapped_is_what_was_opened(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, &[1; PAGE])?;
    let read = File::open(&path)?;
    let both = ProtFlags::READ | ProtFlags::WRITE;
    refused(Mapping::new(&read, PAGE, both, MapFlags::SHARED).map(drop), Errno::ACCESS)?;
    Mapping::new(&read, PAGE, both, MapFlags::PRIVATE)?;
    let write = fs::OpenOptions::new().write(true).open(&path)?;
    refused(Mapping::new(&write, PAGE, ProtFlags::WRITE, MapFlags::SHARED).map(drop), Errno::ACCESS)?;
    Ok(())
}

fn executable_mapping_runs(dir: &Path) -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(());
    }
    // mov eax, 42; ret
    let file = file(&dir.join("code"), b"\xb8\x2a\0\0\0\xc3")?;
    let map = Mapping::new(&file, PAGE, ProtFlags::READ | ProtFlags::EXEC, MapFlags::PRIVATE)?;
    // SAFETY: the mapping holds a function of this type.
    let function: extern "C" fn() -> i32 = unsafe { std::mem::transmute(map.at) };
    ensure!(function() == 42);
    Ok(())
}

/// Changes a file by a mapping, says so, and waits for a line before it flushes, and for another before it ends.
pub(crate) fn map_and_hold(path: &Path) -> Result<()> {
    let map = Mapping::shared(&open(path)?, PAGE)?;
    let mut line = String::new();
    let mut say = |what: &str| -> Result<()> {
        writeln!(io::stdout(), "{what}")?;
        io::stdin().read_line(&mut line)?;
        Ok(())
    };
    for (at, byte) in b"from a mapping".iter().enumerate() {
        map.set(at, *byte);
    }
    say("mapped")?;
    map.sync()?;
    say("flushed")
}
