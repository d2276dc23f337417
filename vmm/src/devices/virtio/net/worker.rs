//! The threads of a link, and how they are told what to do.
//!
//! They start when the link is attached and end when it is detached. In between, each is handed queues when the driver is ready
//! and hands them back, at rest, when it is told to stop. A driver that resets its device over and over so costs no thread, and system calls
//! that concern the taps are never made by a vCPU's.
//!
//! They call, beside what every thread does: ppoll(2), readv(2), writev(2); read(2) and write(2) of eventfds; ioctl(2) with `TUNSETOFFLOAD` and
//! `TUNSETQUEUE`; and with vhost also the requests named in `vhost.rs`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use libc::{POLLIN, c_short, pollfd, timespec};
use rustix::event::{EventfdFlags, eventfd};

use super::link::Choice;
use crate::devices::virtio::{GuestRam, InterruptLine, VirtQueue};
use crate::thread::{Class, spawn};

/// Address space for the stack of a thread; memory is used only as far as it is touched.
const STACK_SIZE: usize = 128 * 1024;

/// What a thread works with while the driver is ready.
pub(super) struct Rings {
    pub(super) mem: GuestRam,
    pub(super) interrupt: Arc<dyn InterruptLine>,
    /// What the driver has accepted.
    pub(super) features: u64,
    /// Pairs of queues: to receive, to send.
    pub(super) pairs: Vec<(VirtQueue, VirtQueue)>,
    /// How many pairs of queues the driver has set up, those of other threads included.
    pub(super) ready_pairs: u16,
    pub(super) control: Option<VirtQueue>,
    /// What the driver has decided by it.
    pub(super) choice: Choice,
}

/// What a thread can be told.
pub(super) enum Command {
    /// Serve these.
    Start(Rings),
    /// Hand back what is being served, at rest.
    Stop(SyncSender<Rings>),
    /// The tap has been attached to its interface again, so there may be something to receive.
    Receive,
    /// End.
    Quit,
}

/// Where commands for a thread are left.
#[derive(Clone)]
pub(super) struct Mailbox {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    /// Leaves a command.
    pub(super) fn send(&self, command: Command) {
        // Its thread ends by Quit only, which is the last command it is sent.
        if self.commands.send(command).is_ok() {
            self.wake();
        }
    }

    /// Lets the thread look around.
    pub(super) fn wake(&self) {
        // Fails only if the counter is at its limit, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Where a thread finds its commands.
pub(super) struct Inbox {
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
}

impl Inbox {
    /// Waits for a command.
    pub(super) fn wait(&self) -> Command {
        self.commands.recv().unwrap_or(Command::Quit)
    }

    /// A command, if there is one.
    pub(super) fn next(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// Takes note that there may be commands; to be called before looking for them.
    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}

impl AsRawFd for Inbox {
    /// Readable when there may be a command.
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// How serving ended.
pub(super) enum Served {
    /// Stopped; the rings go to whoever asked.
    Stopped(SyncSender<Rings>, Rings),
    /// The thread is to end.
    Quit,
}

/// A thread of a link.
pub(super) struct Worker {
    mailbox: Mailbox,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// A thread that lets `serve` serve what it is handed.
    ///
    /// # Errors
    /// When the host is out of descriptors or threads.
    pub(super) fn start(
        name: &str,
        mut serve: impl FnMut(Rings, &Inbox) -> Served + Send + 'static,
    ) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, commands) = channel();
        let inbox = Inbox { commands, wake: wake.clone() };
        let thread = spawn(Class::Net, name, STACK_SIZE, move || {
            loop {
                let served = match inbox.wait() {
                    Command::Start(rings) => serve(rings, &inbox),
                    // Of use only to who is serving.
                    Command::Receive | Command::Stop(_) => continue,
                    Command::Quit => Served::Quit,
                };
                match served {
                    // Whoever asked is waiting.
                    Served::Stopped(reply, rings) => drop(reply.send(rings)),
                    Served::Quit => return,
                }
            }
        })?;
        Ok(Self { mailbox: Mailbox { commands: sender, wake }, thread: Some(thread) })
    }

    /// Where to leave commands.
    pub(super) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// Hands it queues to serve. It must have none.
    pub(super) fn serve(&self, rings: Rings) {
        self.mailbox.send(Command::Start(rings));
    }

    /// Takes back what it serves: when this returns, it touches neither guest memory nor the driver's interrupt. `None` if it serves nothing.
    pub(super) fn stop(&self) -> Option<Rings> {
        let (reply, rings) = sync_channel(1);
        self.mailbox.send(Command::Stop(reply));
        // An idle thread drops the reply.
        rings.recv().ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.mailbox.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            // Panics abort the process, except in tests, where they are reported on the way.
            let _ = thread.join();
        }
    }
}

/// Nothing to wait for. poll(2) passes negative descriptors over.
pub(super) const NOTHING: pollfd = pollfd { fd: -1, events: 0, revents: 0 };

/// Something to wait for, with poll(2).
pub(super) fn awaited(fd: &impl AsRawFd, events: c_short) -> pollfd {
    pollfd { fd: fd.as_raw_fd(), events, revents: 0 }
}

/// As [`awaited`], for a descriptor to become readable.
pub(super) fn readable(fd: &impl AsRawFd) -> pollfd {
    awaited(fd, POLLIN)
}

/// Waits for one of `fds`, at most until `deadline`. Who waits for a descriptor does so no longer than that is open.
pub(super) fn wait(fds: &mut [pollfd], deadline: Option<Instant>) {
    let timeout = deadline.map(|at| {
        let left = at.saturating_duration_since(Instant::now());
        timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: left.subsec_nanos().into(),
        }
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `fds` is a slice, `timeout` null or a live timespec. EINTR is the only error possible, and no worse than
    // waking up for nothing.
    unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout, std::ptr::null()) };
}
