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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// The only test of this crate's unit tests with children: a reaper takes every child of its process.
    #[test]
    #[allow(clippy::zombie_processes, reason = "the reaper waits")]
    fn every_end_reaches_its_waiter_and_nobody_is_left() {
        let _guard = crate::path::tests::FORK_OR_UNMOUNT.lock().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let reaper = Reaper::start().unwrap();
            let spawn = |script: &str| {
                let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
                reaper.register(child.id() as i32)
            };
            // Many at once: their signals coalesce.
            let exits: Vec<_> = (0..40).map(|code| (code, spawn(&format!("exit {code}")))).collect();
            let killed: Vec<_> =
                [9, 10, 15, 34, 64].map(|n| (n, spawn(&format!("kill -{n} $$; sleep 9")))).into();
            // Nobody waits for this one: it must not stay a zombie.
            let forgotten = Command::new("sh").args(["-c", "exit 0"]).spawn().unwrap().id() as i32;
            for (code, exit) in exits {
                assert_eq!(exit.await.unwrap(), End::Exited(code));
            }
            for (signal, end) in killed {
                assert_eq!(end.await.unwrap(), End::Signaled(signal));
            }
            // SAFETY: signal 0 only asks whether the process is there.
            while unsafe { libc::kill(forgotten, 0) } == 0 {
                reaper.next().await;
            }
            assert!(reaper.waiting.lock().unwrap().is_empty());
        });
    }
}
