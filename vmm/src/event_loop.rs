//! The one thread on which devices wait for descriptors.
//!
//! A device that needs to wait registers a [`Subscriber`]; the loop owns it from then on, so it needs no lock. Other threads
//! reach the loop through a [`LoopHandle`].

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// How many events are taken from the kernel at a time.
const BATCH: usize = 64;

/// Something that waits for descriptors on the event loop.
pub trait Subscriber: Any + Send {
    /// Called once on the loop's thread before any event: register the descriptors to wait for.
    ///
    /// # Errors
    /// Passed on to the caller of [`LoopHandle::add`]; the subscriber is dropped.
    fn subscribe(&mut self, registry: &Registry<'_>) -> io::Result<()>;

    /// The descriptor registered under `token` is ready. Must not block. An event may be stale if an earlier event of the
    /// same batch changed what it stands for; so treat it as a hint.
    fn ready(&mut self, token: u32, events: EventFlags, registry: &Registry<'_>);

    /// Called once on the loop's thread when the subscriber is taken back, or when it could not subscribe: deregister every descriptor that has duplicates
    /// (KVM holds one of each ioeventfd), for only the last close(2) ends the kernel's watch.
    fn unsubscribe(&mut self, registry: &Registry<'_>);
}

/// Where a subscriber registers its descriptors, each under a token of its own choice.
#[derive(Debug)]
pub struct Registry<'a> {
    epoll: BorrowedFd<'a>,
    subscriber: u32,
}

impl Registry<'_> {
    /// Waits for `events` on `fd` (level-triggered unless asked otherwise).
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn add(&self, fd: impl AsFd, token: u32, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(self.epoll, fd, self.data(token), events)?)
    }

    /// Changes what is waited for on `fd`.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn modify(&self, fd: impl AsFd, token: u32, events: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(self.epoll, fd, self.data(token), events)?)
    }

    /// Stops waiting for `fd`. Needed before it is closed only if the descriptor has duplicates.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn delete(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(self.epoll, fd)?)
    }

    fn data(&self, token: u32) -> EventData {
        EventData::new_u64(u64::from(self.subscriber) << 32 | u64::from(token))
    }
}

/// Names a subscriber to [`LoopHandle::remove`]. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SubscriberId(u32);

enum Command {
    Add(SubscriberId, Box<dyn Subscriber>, SyncSender<io::Result<()>>),
    Remove(SubscriberId, SyncSender<Option<Box<dyn Subscriber>>>),
    Quit,
}

/// Reaches the event loop from other threads. Its methods wait for the loop: never call them on the loop's own thread.
#[derive(Clone)]
pub struct LoopHandle {
    commands: Sender<Command>,
    wake: Arc<rustix::fd::OwnedFd>,
    next_id: Arc<AtomicU32>,
}

impl LoopHandle {
    /// Hands a subscriber to the loop.
    ///
    /// # Errors
    /// What [`Subscriber::subscribe`] returned, or `BrokenPipe` if the loop has ended.
    pub fn add(&self, subscriber: Box<dyn Subscriber>) -> io::Result<SubscriberId> {
        let id = SubscriberId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (reply, answer) = sync_channel(1);
        self.send(Command::Add(id, subscriber, reply));
        answer.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        Ok(id)
    }

    /// Takes a subscriber back: when this returns, the loop will not call it again. `None` if the loop has ended.
    pub fn remove(&self, id: SubscriberId) -> Option<Box<dyn Subscriber>> {
        let (reply, answer) = sync_channel(1);
        self.send(Command::Remove(id, reply));
        answer.recv().ok().flatten()
    }

    /// As [`LoopHandle::remove`], for who knows what it was: a device that is paused keeps its part, and gives it back later.
    pub fn take<T: Subscriber>(&self, id: SubscriberId) -> Option<Box<T>> {
        let subscriber: Box<dyn Any> = self.remove(id)?;
        subscriber.downcast().ok()
    }

    /// Ends the loop; [`EventLoop::run`] returns after the events at hand.
    pub fn quit(&self) {
        self.send(Command::Quit);
    }

    fn send(&self, command: Command) {
        // An ended loop has dropped the receiver; the caller sees that when no answer comes.
        if self.commands.send(command).is_ok() {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// The event loop; [`EventLoop::run`] it on a thread of its own.
pub struct EventLoop {
    epoll: rustix::fd::OwnedFd,
    wake: Arc<rustix::fd::OwnedFd>,
    commands: Receiver<Command>,
    subscribers: HashMap<u32, Box<dyn Subscriber>>,
}

/// The event data of the wake-up descriptor; subscribers are counted from 1.
const WAKE: u64 = 0;

impl EventLoop {
    /// A loop and the handle to reach it.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn new() -> io::Result<(Self, LoopHandle)> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        let (sender, commands) = channel();
        let handle =
            LoopHandle { commands: sender, wake: wake.clone(), next_id: Arc::new(AtomicU32::new(1)) };
        Ok((Self { epoll, wake, commands, subscribers: HashMap::new() }, handle))
    }

    /// Serves subscribers until [`LoopHandle::quit`].
    ///
    /// # Errors
    /// When `epoll_wait(2)` fails, which no guest can cause.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(BATCH);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            for event in &events {
                let data = event.data.u64();
                if data == WAKE {
                    if !self.obey() {
                        return Ok(());
                    }
                    continue;
                }
                let (subscriber, token) = ((data >> 32) as u32, data as u32);
                let registry = Registry { epoll: self.epoll.as_fd(), subscriber };
                // Absent: removed by a command earlier in this batch.
                if let Some(it) = self.subscribers.get_mut(&subscriber) {
                    // The flags are copied out: the kernel's struct is packed.
                    let flags = event.flags;
                    it.ready(token, flags, &registry);
                }
            }
        }
    }

    /// Carries out the commands at hand; `false` when told to quit.
    fn obey(&mut self) -> bool {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Add(id, mut subscriber, reply) => {
                    let registry = Registry { epoll: self.epoll.as_fd(), subscriber: id.0 };
                    let outcome = subscriber.subscribe(&registry);
                    if outcome.is_ok() {
                        self.subscribers.insert(id.0, subscriber);
                    } else {
                        // What it did register may have duplicates, which would wake the loop for nobody ever after.
                        subscriber.unsubscribe(&registry);
                    }
                    let _ = reply.send(outcome);
                }
                Command::Remove(id, reply) => {
                    let mut subscriber = self.subscribers.remove(&id.0);
                    if let Some(subscriber) = &mut subscriber {
                        subscriber.unsubscribe(&Registry { epoll: self.epoll.as_fd(), subscriber: id.0 });
                    }
                    let _ = reply.send(subscriber);
                }
                Command::Quit => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    /// Passes on every byte that arrives.
    struct Listener {
        stream: UnixStream,
        bytes: Sender<u8>,
    }

    impl Subscriber for Listener {
        fn subscribe(&mut self, registry: &Registry<'_>) -> io::Result<()> {
            registry.add(&self.stream, 7, EventFlags::IN)
        }
        fn ready(&mut self, token: u32, events: EventFlags, registry: &Registry<'_>) {
            assert_eq!(token, 7);
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1) => self.bytes.send(byte[0]).unwrap(),
                _ => {
                    assert!(events.contains(EventFlags::HUP));
                    registry.delete(&self.stream).unwrap();
                    self.bytes.send(0).unwrap();
                }
            }
        }
        fn unsubscribe(&mut self, registry: &Registry<'_>) {
            let _ = registry.delete(&self.stream);
        }
    }

    fn running_loop() -> (LoopHandle, thread::JoinHandle<io::Result<()>>) {
        let (event_loop, handle) = EventLoop::new().unwrap();
        (handle, thread::spawn(move || event_loop.run()))
    }

    #[test]
    fn events_reach_the_subscriber_until_it_is_taken_back() {
        let (handle, thread) = running_loop();
        let (mut near, far) = UnixStream::pair().unwrap();
        let (sender, bytes) = channel();
        // A duplicate keeps the kernel's watch alive beyond the listener's own close.
        let duplicate = far.try_clone().unwrap();
        let id = handle.add(Box::new(Listener { stream: far, bytes: sender })).unwrap();
        near.write_all(b"a").unwrap();
        assert_eq!(bytes.recv().unwrap(), b'a');
        drop(handle.remove(id).unwrap());
        near.write_all(b"b").unwrap();
        // Two round trips through the loop later, the byte has still gone nowhere: its receiver is closed.
        assert!(handle.remove(id).is_none());
        assert!(bytes.recv().is_err());
        drop(duplicate);
        handle.quit();
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn subscriber_that_cannot_register_is_an_error() {
        let (handle, thread) = running_loop();
        let (stream, _far) = UnixStream::pair().unwrap();
        let same = stream.try_clone().unwrap();
        let (sender, _bytes) = channel();
        struct Twice(Listener);
        impl Subscriber for Twice {
            fn subscribe(&mut self, registry: &Registry<'_>) -> io::Result<()> {
                self.0.subscribe(registry)?;
                self.0.subscribe(registry)
            }
            fn ready(&mut self, _: u32, _: EventFlags, _: &Registry<'_>) {}
            fn unsubscribe(&mut self, _: &Registry<'_>) {}
        }
        let listener = Listener { stream: same, bytes: sender };
        assert_eq!(handle.add(Box::new(Twice(listener))).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        handle.quit();
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn ended_loop_answers_nobody_and_hangs_nobody() {
        let (handle, thread) = running_loop();
        handle.quit();
        thread.join().unwrap().unwrap();
        let (stream, _far) = UnixStream::pair().unwrap();
        let (sender, _bytes) = channel();
        assert!(handle.add(Box::new(Listener { stream, bytes: sender })).is_err());
        assert!(handle.remove(SubscriberId(1)).is_none());
    }
}
