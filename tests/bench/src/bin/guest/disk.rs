//! The disk, past the page cache: what is measured is the device.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};

const DISK: &str = "/dev/vda";
/// What O_DIRECT asks of buffers, and the length of a random access.
const PAGE: usize = 4096;

/// Memory as O_DIRECT wants it.
struct Buffer {
    start: *mut u8,
    layout: Layout,
}

impl Buffer {
    fn new(bytes: usize) -> Result<Self> {
        ensure!(bytes > 0, "an access of no bytes");
        let layout = Layout::from_size_align(bytes, PAGE)?;
        // SAFETY: the layout is not of size zero.
        let start = unsafe { alloc_zeroed(layout) };
        ensure!(!start.is_null(), "out of memory");
        Ok(Self { start, layout })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `start` is an allocation of that size, initialised, and borrowed through `self` alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) }
    }
}

fn open(write: bool) -> Result<File> {
    let disk = OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT).open(DISK);
    disk.with_context(|| format!("cannot open {DISK}"))
}

/// One block after the other.
pub(crate) fn sequential(write: bool, block: usize, count: usize) -> Result<Duration> {
    let disk = open(write)?;
    let mut buffer = Buffer::new(block)?;
    let started = Instant::now();
    for index in 0..count {
        let at = (index * block) as u64;
        match write {
            true => disk.write_all_at(buffer.bytes(), at)?,
            false => disk.read_exact_at(buffer.bytes(), at)?,
        }
    }
    Ok(started.elapsed())
}

/// Blocks of 4 KiB all over the disk, `depth` of them under way at any time.
pub(crate) fn random(write: bool, depth: usize, count: usize) -> Result<Duration> {
    let disk = open(write)?;
    let pages = rustix::fs::seek(&disk, rustix::fs::SeekFrom::End(0))? / PAGE as u64;
    let buffers = (0..depth).map(|_| Buffer::new(PAGE)).collect::<Result<Vec<_>>>()?;
    let mut ring = IoUring::new(depth.next_power_of_two() as u32)?;
    let mut next_page = pages_of(pages);
    let mut entry = |index: usize| {
        let (fd, offset) = (types::Fd(disk.as_raw_fd()), next_page() * PAGE as u64);
        let buffer = buffers[index].start;
        match write {
            true => opcode::Write::new(fd, buffer, PAGE as u32).offset(offset).build(),
            false => opcode::Read::new(fd, buffer, PAGE as u32).offset(offset).build(),
        }
        .user_data(index as u64)
    };

    let started = Instant::now();
    let (mut begun, mut done) = (0, 0);
    let mut idle: Vec<usize> = (0..depth).collect();
    while done < count {
        while begun < count
            && let Some(index) = idle.pop()
        {
            // SAFETY: the buffers outlive the ring's work, for the loop ends only when all is done; an error ends the program.
            unsafe { ring.submission().push(&entry(index))? };
            begun += 1;
        }
        ring.submit_and_wait(1)?;
        for completion in ring.completion() {
            ensure!(completion.result() == PAGE as i32, "an access ended with {}", completion.result());
            idle.push(completion.user_data() as usize);
            done += 1;
        }
    }
    Ok(started.elapsed())
}

/// The same pages in the same order each time, far from each other: a linear congruential generator (Knuth's MMIX).
fn pages_of(count: u64) -> impl FnMut() -> u64 {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % count
    }
}
