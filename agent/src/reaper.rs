//! The one place that waits for children: the processes of containers, which are reparented to PID 1, and the helper
//! processes. Nothing else in the agent calls wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::WaitOptions;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, oneshot};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this code.
    Exited(u8),
    /// It was killed by the signal of this number.
    Signaled(u8),
}

/// Hands the end of children to those who asked for it.
#[derive(Debug, Default)]
pub struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<End>>>,
    reaped: Notify,
}

impl Reaper {
    /// Starts to reap, in a task of the current runtime.
    ///
    /// # Errors
    ///
    /// The handler of `SIGCHLD` cannot be installed.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let sigchld = signal(SignalKind::child())?;
        tokio::spawn(reaper.clone().run(sigchld));
        Ok(reaper)
    }

    /// Asks for the end of the child `pid`. The process must not have been reaped: call this before control returns to the
    /// runtime after the spawn, or while another process still holds the child.
    pub fn register(&self, pid: i32) -> oneshot::Receiver<End> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, sender);
        receiver
    }

    /// Completes when some child has been reaped after this call.
    pub fn next(&self) -> tokio::sync::futures::Notified<'_> {
        self.reaped.notified()
    }

    async fn run(self: Arc<Self>, mut sigchld: Signal) {
        loop {
            self.reap_all();
            if sigchld.recv().await.is_none() {
                return;
            }
        }
    }

    /// Signals coalesce, so every ended child is taken, however many signals came.
    fn reap_all(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let end = match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => End::Exited(code as u8),
                        // The kernel's numbers are below 128 (wait status bits 0..6).
                        (None, Some(signal)) => End::Signaled(signal as u8),
                        (None, None) => continue,
                    };
                    let waiter = self
                        .waiting
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(&pid.as_raw_nonzero().get());
                    if let Some(waiter) = waiter {
                        // A waiter that has gone away does not care.
                        let _ = waiter.send(end);
                    }
                    self.reaped.notify_waiters();
                }
                Ok(None) | Err(rustix::io::Errno::CHILD) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(err) => {
                    log::error!("wait for children failed: {err}");
                    return;
                }
            }
        }
    }
}
