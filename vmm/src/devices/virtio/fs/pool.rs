//! The threads that serve a share.
//!
//! Any request may block for as long as the host's file system pleases, and must not hold up the others meanwhile. So while
//! requests are being handled there is always one more thread that waits for the next, until there are [`MAX_THREADS`]. All wait
//! in one epoll instance, from which the kernel lets the thread go that came last: a guest that does one thing at a time is served
//! by one warm thread, and the others are never scheduled. Those that have rested for [`REST`] end, but for one, which sleeps
//! until the next kick.

use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use super::counters::{Counters, Outcome};
use super::frame::{BadRequest, Frame};
use super::share::{Share, ShareSource};
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError, QueuePosition, VirtQueue};
use crate::locked;
use crate::thread::{self, Class};

/// Most requests of one share handled at a time.
pub(super) const MAX_THREADS: usize = 8;
/// After how long a thread that is not needed ends: long against the pauses in the work of a busy guest, short against the life of
/// a guest that was busy once.
pub(super) const REST: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };
/// Address space for the stack of a thread; memory is used only as far as it is touched.
const STACK_SIZE: usize = 256 * 1024;

/// The threads of one activation.
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    source: Arc<ShareSource>,
    share: Share,
    ram: GuestRam,
    interrupt: Arc<dyn InterruptLine>,
    epoll: OwnedFd,
    /// Readable once the threads are to end.
    stop: OwnedFd,
    state: Mutex<State>,
    /// The last request in flight is done.
    quiet: Condvar,
    counters: Arc<Counters>,
}

struct State {
    /// In order of priority, which is that of their numbers: the hiprio queue is the first (virtio 1.3 s5.11.2).
    queues: Vec<VirtQueue>,
    threads: Vec<JoinHandle<()>>,
    /// The thread that ended last for want of work; it has joined the one before.
    retired: Option<JoinHandle<()>>,
    /// How many threads wait for kicks. Those that do not look at the queues again before they do.
    idle: usize,
    /// How many requests are being handled.
    busy: usize,
    /// Take no requests for now.
    paused: bool,
    /// Take no more requests.
    ended: bool,
}

/// Opens the share of `source`, on a thread of its own since only such may.
///
/// # Errors
/// When the thread cannot be had or the share cannot be opened.
pub(super) fn open(source: &Arc<ShareSource>) -> io::Result<Share> {
    let source = source.clone();
    let opener =
        thread::spawn(Class::Fs, "fs", STACK_SIZE, move || source.enter().and_then(|()| source.open()))?;
    opener.join().unwrap_or_else(|_| Err(io::Error::other("the file server panicked")))
}

impl Pool {
    /// Starts to serve `share`, which was opened from `source`.
    ///
    /// # Errors
    /// When the host is out of descriptors or threads.
    pub(super) fn start(
        source: Arc<ShareSource>,
        share: Share,
        ram: GuestRam,
        queues: Vec<VirtQueue>,
        interrupt: Arc<dyn InterruptLine>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &stop, EventData::new_u64(0), EventFlags::IN)?;
        for queue in &queues {
            // Edge-triggered: each kick lets one thread go, once. Nobody reads the counter.
            epoll::add(&epoll, queue.kick(), EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        }
        let state = Mutex::new(State {
            queues,
            threads: Vec::new(),
            retired: None,
            idle: 0,
            busy: 0,
            paused: false,
            ended: false,
        });
        let quiet = Condvar::new();
        let shared = Arc::new(Shared { source, share, ram, interrupt, epoll, stop, state, quiet, counters });
        // Under the lock: a thread that looks at the state must find itself counted.
        let mut state = locked(shared.state.lock());
        state.threads.push(shared.spawn()?);
        drop(state);
        Ok(Self { shared })
    }

    /// Lets the requests in flight end and takes no more. Idempotent.
    pub(super) fn pause(&self) {
        let mut state = locked(self.shared.state.lock());
        state.paused = true;
        while state.busy > 0 {
            state = locked(self.shared.quiet.wait(state));
        }
    }

    /// Takes requests again, those that came meanwhile first. Idempotent.
    pub(super) fn resume(&self) {
        let mut state = locked(self.shared.state.lock());
        if std::mem::replace(&mut state.paused, false) {
            // Threads that heard a kick meanwhile have not looked.
            state.queues.iter().for_each(VirtQueue::kick_again);
        }
    }

    /// How far the queues are, and the session. To be called while paused.
    ///
    /// # Errors
    /// When a thread cannot be had for it, or as [`Share::save`].
    pub(super) fn save(&self) -> io::Result<(Vec<Option<QueuePosition>>, Vec<u8>)> {
        let positions =
            locked(self.shared.state.lock()).queues.iter().map(|queue| Some(queue.position())).collect();
        let shared = self.shared.clone();
        let saver = thread::spawn(Class::Fs, "fs", STACK_SIZE, move || {
            shared.source.enter().and_then(|()| shared.share.save())
        })?;
        let session = saver.join().unwrap_or_else(|_| Err(io::Error::other("the file server panicked")))?;
        Ok((positions, session))
    }

    /// Goes on with a session.
    #[cfg(test)]
    pub(super) fn restore(&self, session: &[u8]) {
        std::thread::scope(|scope| {
            let shared = &self.shared;
            scope
                .spawn(|| {
                    shared.source.enter().unwrap();
                    shared.share.restore(session).unwrap();
                })
                .join()
                .unwrap();
        });
    }

    /// How many threads there are.
    #[cfg(test)]
    pub(super) fn threads(&self) -> usize {
        locked(self.shared.state.lock()).threads.len()
    }

    /// How many requests are being handled.
    #[cfg(test)]
    pub(super) fn busy(&self) -> usize {
        locked(self.shared.state.lock()).busy
    }
}

impl Drop for Pool {
    /// Waits for the requests being handled, and for the threads to end.
    fn drop(&mut self) {
        self.shared.end();
        // A thread that ends has seen `ended`, so no more are started once it is set.
        let mut state = locked(self.shared.state.lock());
        let (threads, retired) = (std::mem::take(&mut state.threads), state.retired.take());
        drop(state);
        for thread in threads.into_iter().chain(retired) {
            // Panics abort the process, except in tests, where they are reported on the way.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn spawn(self: &Arc<Self>) -> io::Result<JoinHandle<()>> {
        let shared = self.clone();
        thread::spawn(Class::Fs, "fs", STACK_SIZE, move || shared.work())
    }

    /// The life of a thread.
    fn work(self: &Arc<Self>) {
        let mut frame = match self.source.enter().and_then(|()| Frame::new(self.ram.clone())) {
            Ok(frame) => frame,
            Err(reason) => return self.fail(&reason),
        };
        let mut done = false;
        while let Some((queue, chain)) = self.next(done) {
            let head = chain.head_index();
            let (written, outcome) = match frame.load(chain) {
                Ok(request) => {
                    let answered = self.share.handle(request);
                    frame.settle(answered)
                }
                Err(BadRequest) => (0, Outcome::Error),
            };
            self.counters.count(outcome);
            self.complete(queue, head, written);
            done = true;
        }
    }

    /// Waits for a request; `None` when the thread is to end. `done`: the thread has completed the one before.
    fn next(self: &Arc<Self>, done: bool) -> Option<(usize, Chain<'_>)> {
        let mut state = locked(self.state.lock());
        if done {
            state.busy -= 1;
            if state.busy == 0 {
                self.quiet.notify_all();
            }
        }
        loop {
            if state.ended {
                return None;
            }
            let next = if state.paused { Ok(None) } else { state.pop(&self.ram) };
            match next {
                Ok(Some(request)) => {
                    state.busy += 1;
                    if state.busy == state.threads.len() && state.busy < MAX_THREADS {
                        // Without another thread those at work will do, as soon as they are done.
                        state.threads.extend(self.spawn());
                    }
                    return Some(request);
                }
                Ok(None) => {}
                Err(reason) => {
                    drop(state);
                    self.fail(&reason);
                    return None;
                }
            }
            state.idle += 1;
            let rest = (state.threads.len() > 1).then_some(&REST);
            drop(state);
            let mut events = Vec::with_capacity(1);
            // An error is no worse than a kick for nothing: EINTR is the only one possible.
            let heard = epoll::wait(&self.epoll, spare_capacity(&mut events), rest);
            state = locked(self.state.lock());
            state.idle -= 1;
            // Kicks are for the others from here on: one of them waits.
            if heard == Ok(0) && state.idle > 0 {
                let previous = state.retire();
                drop(state);
                // It has nothing left to do but end.
                let _ = previous.map(JoinHandle::join);
                return None;
            }
        }
    }

    /// Returns a chain to the driver.
    fn complete(&self, queue: usize, head: u16, written: u32) {
        let mut state = locked(self.state.lock());
        let queue = &mut state.queues[queue];
        let index = queue.index();
        let outcome =
            queue.add_used(&self.ram, head, written).and_then(|()| queue.needs_interrupt(&self.ram));
        drop(state);
        match outcome {
            Ok(true) => self.interrupt.signal_queue(index),
            Ok(false) => {}
            Err(reason) => self.fail(&reason),
        }
    }

    /// Gives up on the driver, or on the host.
    fn fail(&self, reason: &dyn Error) {
        if self.end() {
            self.interrupt.needs_reset(reason);
        }
    }

    /// Tells all threads to end; `false` if they were told before.
    fn end(&self) -> bool {
        let ended = std::mem::replace(&mut locked(self.state.lock()).ended, true);
        // Fails only if the counter is at its limit, and then it is readable.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        !ended
    }
}

impl State {
    /// Takes the calling thread off the list; returns the one that retired before.
    fn retire(&mut self) -> Option<JoinHandle<()>> {
        let me = std::thread::current().id();
        let place = self.threads.iter().position(|thread| thread.thread().id() == me)?;
        let handle = self.threads.swap_remove(place);
        self.retired.replace(handle)
    }

    /// Takes the next request, and has the driver kick for the one after it if a thread waits to hear it.
    fn pop<'m>(&mut self, ram: &'m GuestRam) -> Result<Option<(usize, Chain<'m>)>, QueueError> {
        loop {
            for (i, queue) in self.queues.iter_mut().enumerate() {
                let Some(chain) = queue.pop(ram)? else { continue };
                if self.idle == 0 {
                    queue.disable_kicks(ram)?;
                } else if queue.enable_kicks(ram)? {
                    // The driver has kicked for these already, perhaps once for all.
                    queue.kick_again();
                }
                return Ok(Some((i, chain)));
            }
            let mut more = false;
            for queue in &mut self.queues {
                more |= queue.enable_kicks(ram)?;
            }
            if !more {
                return Ok(None);
            }
        }
    }
}
