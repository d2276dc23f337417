//! The thread of a disk: sleeps until there is a session, serves it until told to halt, hands it back.
//!
//! There is one for all queues, for as long as the disk is in its slot: it is started by whoever attaches the disk, never by a vCPU
//! whose guest has set `DRIVER_OK`, so a vCPU need not be allowed to start threads.
//!
//! System calls in a session: io_uring_setup, io_uring_register and mmap to begin with, munmap and close at the end; io_uring_enter;
//! eventfd reads (read) and writes of interrupts (write); clock_gettime with a limit. Without io_uring: ppoll, preadv, pwritev2,
//! fdatasync, fallocate. In both, on a block device: ioctl `BLKDISCARD`. Between sessions: futex. Memory for requests: brk, mmap,
//! munmap. Of the threads the kernel makes for the ring, seccomp knows nothing: they run no code of this program.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use super::session::Session;
use crate::thread::{self, Class};

/// Address space for the stack of the thread; memory is used only as far as it is touched.
const STACK_SIZE: usize = 128 * 1024;

/// The thread. It ends when this is dropped.
pub(super) struct Worker {
    /// `None` only while it is dropped.
    begin: Option<Sender<Box<Session>>>,
    ended: Receiver<Box<Session>>,
    calls: Arc<Calls>,
    thread: Option<JoinHandle<()>>,
}

/// How other threads reach one that serves a session.
pub(super) struct Calls {
    halt: AtomicBool,
    wake: OwnedFd,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the host is out of descriptors or threads.
    pub(super) fn start() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let calls = Arc::new(Calls { halt: AtomicBool::new(false), wake });
        let (begin, sessions) = channel::<Box<Session>>();
        let (end, ended) = channel();
        let its_calls = calls.clone();
        let thread = thread::spawn(Class::Blk, "blk", STACK_SIZE, move || {
            for mut session in sessions {
                session.run(&its_calls);
                // Whoever began the session waits for it, unless the device is gone.
                let _ = end.send(session);
            }
        })?;
        Ok(Self { begin: Some(begin), ended, calls, thread: Some(thread) })
    }

    /// Has the thread serve a session, which must not be served already.
    pub(super) fn begin(&self, session: Box<Session>) {
        self.calls.halt.store(false, Ordering::Relaxed);
        if let Some(begin) = &self.begin {
            // The thread ends only when the sender is dropped.
            let _ = begin.send(session);
        }
    }

    /// Takes the session back from the thread, with no request under way.
    pub(super) fn halt(&self) -> Option<Box<Session>> {
        self.calls.halt.store(true, Ordering::Release);
        self.calls.wake_up();
        // An error would be a panic of the thread, which ends the process, except in tests.
        self.ended.recv().ok()
    }

    /// Has the thread look again at what it shares with others.
    pub(super) fn wake_up(&self) {
        self.calls.wake_up();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.begin = None;
        self.calls.halt.store(true, Ordering::Release);
        self.calls.wake_up();
        if let Some(thread) = self.thread.take() {
            // As above.
            let _ = thread.join();
        }
    }
}

impl Calls {
    /// Whether the session is to end.
    pub(super) fn halt_wanted(&self) -> bool {
        self.halt.load(Ordering::Acquire)
    }

    /// Readable when there is something to look at.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn wake_up(&self) {
        // Fails only if the counter is at its limit, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}
