//! The thread that serves the queue of a disk: waits for kicks, carries requests out one after the other with blocking system
//! calls straight on guest memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::request::Disk;
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError, VirtQueue};
use crate::thread::{self, Class};

/// Address space for the stack of the thread; memory is used only as far as it is touched.
const STACK_SIZE: usize = 128 * 1024;

/// The thread of one activation.
pub(super) struct Worker {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// Tells the thread to end, whether it waits or works.
struct Stop {
    told: AtomicBool,
    wake: OwnedFd,
}

impl Worker {
    /// Starts to serve `queue` from `disk`. With `write_through`, every write is on the medium before it is completed.
    ///
    /// # Errors
    /// When the host is out of descriptors or threads.
    pub(super) fn start(
        disk: Arc<Disk>,
        write_through: bool,
        queue: VirtQueue,
        mem: GuestRam,
        interrupt: Arc<dyn InterruptLine>,
    ) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = Arc::new(Stop { told: AtomicBool::new(false), wake });
        let mut work = Work { disk, write_through, queue, mem, stop: stop.clone() };
        let thread = thread::spawn(Class::Blk, "blk", STACK_SIZE, move || {
            if let Err(reason) = work.run(&*interrupt) {
                interrupt.needs_reset(&reason);
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    /// Waits for the request being carried out.
    fn drop(&mut self) {
        self.stop.told.store(true, Ordering::Relaxed);
        // Fails only if the counter is at its limit, and then it is readable.
        let _ = rustix::io::write(&self.stop.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // Panics abort the process, except in tests, where they are reported on the way.
            let _ = thread.join();
        }
    }
}

struct Work {
    disk: Arc<Disk>,
    write_through: bool,
    queue: VirtQueue,
    mem: GuestRam,
    stop: Arc<Stop>,
}

impl Work {
    /// Serves the queue until told to stop.
    fn run(&mut self, interrupt: &dyn InterruptLine) -> Result<(), QueueError> {
        loop {
            let mut waiting = [
                PollFd::from_borrowed_fd(self.queue.kick(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.wake.as_fd(), PollFlags::IN),
            ];
            // EINTR is the only error possible, and no worse than a kick for nothing.
            let _ = poll(&mut waiting, None);
            self.queue.clear_kick();
            loop {
                self.queue.disable_kicks(&self.mem)?;
                while let Some(chain) = self.queue.pop(&self.mem)? {
                    if self.stop.told.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    let head = chain.head_index();
                    let written = self.disk.serve(&self.mem, chain, self.write_through);
                    self.queue.add_used(&self.mem, head, written)?;
                    if self.queue.needs_interrupt(&self.mem)? {
                        interrupt.signal_queue(self.queue.index());
                    }
                }
                if !self.queue.enable_kicks(&self.mem)? {
                    break;
                }
            }
            if self.stop.told.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }
}
