//! An io_uring: many requests under way, and the thread sleeps for their outcomes, for kicks and for calls of other threads in one
//! system call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::io::Errno;

use super::Done;
use crate::devices::virtio::blk::image::Image;
use crate::devices::virtio::blk::io::{Io, ZeroBy};

/// The most requests under way at a time.
pub(super) const DEPTH: usize = 128;
/// Room for all of them and for every descriptor slept for (one per queue, at most 32, and the wake-up), so it is never full.
const ENTRIES: u32 = 256;
/// The most threads the kernel may make for this ring, for what it cannot do without blocking one.
const KERNEL_THREADS: u32 = 4;
/// The kernel adds the length of a sleep to its clock, which must not overflow. Who wakes up early looks again.
const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 60 * 60);
/// User data from here on is of descriptors slept for, below it is of requests.
const AWAITED: u64 = 1 << 32;

pub(in crate::devices::virtio::blk) struct Ring {
    ring: IoUring,
    /// What can end a sleep beside outcomes.
    awaited: Vec<RawFd>,
    /// Of what was done at once, without the ring.
    done: Vec<Done>,
}

impl Ring {
    /// A ring that sleeps for these descriptors.
    ///
    /// # Errors
    /// When the kernel has no io_uring, one that is too old (before 5.13), or forbids it (sysctl `kernel.io_uring_disabled`, a
    /// seccomp filter).
    pub(super) fn new(kicks: &[BorrowedFd<'_>], wake: BorrowedFd<'_>) -> io::Result<Self> {
        let ring = set_up()?;
        // Resource tags came with the polls that stay armed, in 5.13.
        let params = ring.params();
        if !params.is_feature_resource_tagging()
            || !params.is_feature_ext_arg()
            || !params.is_feature_nodrop()
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Without it (before 5.15), there are as many as the kernel sees fit.
        let _ = ring.submitter().register_iowq_max_workers(&mut [KERNEL_THREADS; 2]);
        let awaited: Vec<RawFd> = kicks.iter().chain([&wake]).map(AsRawFd::as_raw_fd).collect();
        let mut this = Self { ring, awaited, done: Vec::new() };
        for index in 0..this.awaited.len() {
            this.sleep_for(index);
        }
        Ok(this)
    }

    pub(super) fn submit(&mut self, token: u16, image: &Image, io: &Io) {
        if image.must_block(io) {
            self.done.push(Done { token, outcome: image.perform(io) });
            return;
        }
        let entry = entry(image, io).user_data(token.into());
        // SAFETY: the image outlives the session and with it this ring; the memory is guest memory, which the session keeps mapped
        // until the outcome is here. The array of buffers is copied when the ring is entered.
        unsafe { self.push(&entry) };
    }

    pub(super) fn start(&mut self, done: &mut Vec<Done>) -> bool {
        if !self.ring.submission().is_empty() {
            survive(self.ring.submit());
        }
        self.reap(done)
    }

    pub(super) fn wait(&mut self, deadline: Option<Instant>, done: &mut Vec<Done>) {
        match deadline {
            None => survive(self.ring.submit_and_wait(1)),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).min(LONGEST_SLEEP);
                let timeout = Timespec::from(left);
                survive(self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout)));
            }
        }
        self.reap(done);
    }

    /// Takes out all there is; whether there was anything.
    fn reap(&mut self, done: &mut Vec<Done>) -> bool {
        let mut any = !self.done.is_empty();
        done.append(&mut self.done);
        let mut ended = Vec::new();
        for entry in self.ring.completion() {
            any = true;
            match entry.user_data().checked_sub(AWAITED) {
                None => {
                    let outcome = u32::try_from(entry.result())
                        .map_err(|_| Errno::from_raw_os_error(entry.result().wrapping_neg()));
                    // Below AWAITED there are only tokens.
                    done.push(Done { token: entry.user_data() as u16, outcome });
                }
                // A kick or a call: being awake is all it is for. The kernel disarms a poll if it runs short of room for entries.
                Some(index) if !cqueue::more(entry.flags()) => ended.push(index as usize),
                Some(_) => {}
            }
        }
        for index in ended {
            self.sleep_for(index);
        }
        any
    }

    /// Has each event on a descriptor wake the thread up, from now on. Nothing is read: the kernel tells of every write anew.
    fn sleep_for(&mut self, index: usize) {
        let poll = opcode::PollAdd::new(Fd(self.awaited[index]), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(AWAITED + index as u64);
        // SAFETY: it names no memory, and the descriptor is open.
        unsafe { self.push(&poll) };
    }

    /// # Safety
    /// What the entry names must be there until its outcome is.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("a ring has room for more requests than are ever under way");
    }
}

/// The ring as we would like it, or as an older kernel has it.
fn set_up() -> io::Result<IoUring> {
    // No other thread submits, and the work that outcomes need is done when this thread asks for them: Linux 6.1. It asks whenever the
    // ring says that there is such work, also if it does not sleep.
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .build(ENTRIES)
        .or_else(|e| if e.raw_os_error() == Some(libc::EINVAL) { IoUring::new(ENTRIES) } else { Err(e) })
}

fn entry(image: &Image, io: &Io) -> squeue::Entry {
    let fd = Fd(image.raw_fd());
    let fallocate = |by: ZeroBy, range: super::super::io::Range| {
        let mode = by.flags().bits() as i32;
        opcode::Fallocate::new(fd, range.len).offset(range.offset).mode(mode).build()
    };
    match io {
        Io::Read(transfer) => {
            let (iov, len) = transfer.iov();
            opcode::Readv::new(fd, iov, len as u32).offset(transfer.offset() as u64).build()
        }
        Io::Write { transfer, durable } => {
            let (iov, len) = transfer.iov();
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(fd, iov, len as u32).offset(transfer.offset() as u64).rw_flags(flags).build()
        }
        Io::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Io::Discard(range) => fallocate(ZeroBy::Hole, *range),
        Io::Zero { range, by, .. } => fallocate(*by, *range),
    }
}

/// Entering a ring can fail for the moment: interrupted, timed out, out of memory, too many outcomes not looked at yet. All of that passes
/// when the thread comes back. Any other failure would leave the kernel at work on guest memory with nobody to hear when it is
/// done, and no reset could keep its promise: then the process must end.
fn survive(entered: io::Result<usize>) {
    if let Err(e) = entered {
        let code = e.raw_os_error();
        let passes = [libc::EINTR, libc::ETIME, libc::EAGAIN, libc::EBUSY, libc::ENOMEM];
        assert!(code.is_some_and(|code| passes.contains(&code)), "io_uring_enter(2) failed: {e}");
    }
}
