//! The first thread of a process that stands for a container.
//!
//! Mount namespaces belong to threads, and `/proc/PID/ns/mnt`, by which engines enter that of a container, is the first one's. So the first
//! thread is where the container's files are ([`View`]) and its processes ([`guest_proc`]), and another one does the work.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use kvrun_pod::container_id::ContainerId;
use kvrun_pod::share::View;

use crate::error::{Error, host};
use crate::guest_proc;

/// What the thread that works says to the first one, and is told.
pub(crate) struct Showing {
    show: Sender<()>,
    shown: Receiver<io::Result<()>>,
}

impl Showing {
    /// Has the first thread show the container's files and processes, and waits until it does.
    ///
    /// # Errors
    /// It cannot, and so would show the host's.
    pub(crate) fn show(&self) -> Result<(), Error> {
        let shown = self.show.send(()).map_err(io::Error::other);
        let shown = shown.and_then(|()| self.shown.recv().map_err(io::Error::other)?);
        shown.map_err(host("show the container's files to processes of the host"))
    }
}

/// Does the work in a thread of its own, while this one, the first, shows the container as soon as it is asked to. What work takes must be moved into
/// it: this thread does not see the host's files when it ends.
pub(crate) fn beside<T: Send>(
    root: &Path,
    id: &ContainerId,
    view: View,
    work: impl FnOnce(Showing) -> T + Send,
) -> T {
    let (show, asked) = mpsc::channel();
    let (done, shown) = mpsc::channel();
    thread::scope(|scope| {
        let worker = scope.spawn(move || work(Showing { show, shown }));
        if asked.recv().is_ok() {
            let proc = guest_proc::mount(root, id);
            // Then there is an empty directory.
            let proc = proc.inspect_err(|error| tracing::debug!(%error, "mount the container's /proc"));
            // Whoever waits for it may have been aborted.
            let _ = done.send(view.enter(proc.ok()));
        }
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
