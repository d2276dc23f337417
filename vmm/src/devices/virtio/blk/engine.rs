//! The two ways to carry work out: an io_uring where the kernel has one, blocking system calls where it has none or forbids it.
//!
//! Either is of one session and one thread. Work is put in ([`Engine::submit`]) under a token, set going ([`Engine::start`]), and comes
//! out as [`Done`]. The engine also is what the thread sleeps in ([`Engine::wait`]): for outcomes, kicks, and calls of other threads.

mod plain;
mod ring;

use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::io::Errno;

use self::plain::Plain;
use self::ring::Ring;
use super::image::Image;
use super::io::Io;

/// The outcome of the work put in under a token: how many bytes were moved, if it was of that kind.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) token: u16,
    pub(super) outcome: Result<u32, Errno>,
}

/// Which way to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// A ring if the kernel has one.
    Best,
    /// No ring. For an image in memory (tmpfs): its reads and writes have nothing to wait for, but the kernel cannot know that and
    /// would hand each of them to a thread of its own (Linux 6.12 io_uring/rw.c: `io_file_supports_nowait`).
    Plain,
}

/// One way or the other.
pub(super) enum Engine {
    Ring(Box<Ring>),
    Plain(Plain),
}

impl Engine {
    /// The engine of a session that sleeps for `kicks` and `wake`, which must be open for as long as it lives.
    pub(super) fn new(choice: Choice, kicks: &[BorrowedFd<'_>], wake: BorrowedFd<'_>) -> Self {
        if choice == Choice::Best {
            match Ring::new(kicks, wake) {
                Ok(ring) => return Self::Ring(Box::new(ring)),
                Err(e) => log::debug!("a disk does without io_uring: {e}"),
            }
        }
        Self::Plain(Plain::new(kicks, wake))
    }

    /// The most work that can be under way at a time.
    pub(super) fn depth(&self) -> usize {
        match self {
            Self::Ring(_) => ring::DEPTH,
            Self::Plain(_) => 1,
        }
    }

    /// Takes work in. `io` must not change, and its memory must be mapped, before it is done.
    pub(super) fn submit(&mut self, token: u16, image: &Image, io: &Io) {
        match self {
            Self::Ring(ring) => ring.submit(token, image, io),
            Self::Plain(plain) => plain.submit(token, image, io),
        }
    }

    /// Sets going what was taken in, without sleeping for its outcome; adds what is done to `done`. Whether there is a reason to look at
    /// everything again before sleeping: something is done, or there was a kick or a call.
    #[must_use]
    pub(super) fn start(&mut self, done: &mut Vec<Done>) -> bool {
        match self {
            Self::Ring(ring) => ring.start(done),
            Self::Plain(plain) => plain.start(done),
        }
    }

    /// Sleeps until something is done, there was a kick, another thread has called, or it is `deadline`; adds what is done to `done`. May
    /// return for no reason.
    pub(super) fn wait(&mut self, deadline: Option<Instant>, done: &mut Vec<Done>) {
        match self {
            Self::Ring(ring) => ring.wait(deadline, done),
            Self::Plain(plain) => plain.wait(deadline),
        }
    }
}
