//! Blocking system calls, one after the other.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Done;
use crate::devices::virtio::blk::image::Image;
use crate::devices::virtio::blk::io::Io;

pub(in crate::devices::virtio::blk) struct Plain {
    /// What can end a sleep: kicks, and calls of other threads.
    awaited: Vec<RawFd>,
    done: Option<Done>,
}

impl Plain {
    pub(super) fn new(kicks: &[BorrowedFd<'_>], wake: BorrowedFd<'_>) -> Self {
        let awaited = kicks.iter().chain([&wake]).map(AsRawFd::as_raw_fd).collect();
        Self { awaited, done: None }
    }

    pub(super) fn submit(&mut self, token: u16, image: &Image, io: &Io) {
        self.done = Some(Done { token, outcome: image.perform(io) });
    }

    pub(super) fn start(&mut self, done: &mut Vec<Done>) -> bool {
        // Kicks and calls are not looked at here, so they still end the next sleep.
        done.extend(self.done.take());
        !done.is_empty()
    }

    pub(super) fn wait(&self, deadline: Option<Instant>) {
        let mut awaited: Vec<_> = self
            .awaited
            .iter()
            // SAFETY: the descriptors are open for as long as this engine is used.
            .map(|&fd| PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(fd) }, PollFlags::IN))
            .collect();
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // Only centuries do not fit, and whoever wakes up early looks again.
            Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
        });
        // EINTR is the only error possible, and no worse than a kick for nothing.
        let _ = poll(&mut awaited, timeout.as_ref());
        for ready in awaited.iter().filter(|ready| !ready.revents().is_empty()) {
            // Level-triggered: what is not read would end the next sleep too. The descriptors are non-blocking, so an error means
            // that there was nothing.
            let _ = rustix::io::read(ready, &mut [0u8; 8]);
        }
    }
}
