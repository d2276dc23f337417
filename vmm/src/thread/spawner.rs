//! The thread that starts all others.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::Builder;

use super::{Class, filter, violation};

/// The stack of the spawner in bytes: it clones, and nothing else.
const STACK: usize = 64 * 1024;

type Job = Box<dyn FnOnce() + Send>;

/// Reaches the spawner.
pub(super) struct Spawner {
    jobs: Sender<Job>,
}

static SPAWNER: OnceLock<Spawner> = OnceLock::new();

/// From now on, every thread that [`spawn`](super::spawn) starts has the filter of its class, and cannot be started without. The
/// calling thread has none of that: see [`filter::install`]. To be called once, while there is one thread.
///
/// # Errors
/// When the host is out of threads.
pub fn confine_spawned() -> io::Result<()> {
    violation::handle()?;
    let (jobs, received) = channel::<Job>();
    // It ends when the process does.
    Builder::new().name(Class::Spawner.name().to_owned()).stack_size(STACK).spawn(move || {
        filter::install_or_die(Class::Spawner);
        for job in received {
            job();
        }
    })?;
    SPAWNER.set(Spawner { jobs }).map_err(|_| io::ErrorKind::AlreadyExists.into())
}

/// The spawner, if threads are to have filters.
pub(super) fn get() -> Option<&'static Spawner> {
    SPAWNER.get()
}

impl Spawner {
    /// Does `start` on the spawner. That takes no lock that the caller could have, so it does not wait for the caller.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        start: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (sender, started) = sync_channel(1);
        let job = move || {
            // The caller waits.
            let _ = sender.send(start());
        };
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.jobs.send(Box::new(job)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        started.recv().map_err(gone)?
    }
}
