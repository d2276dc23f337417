//! A process of a container, from its creation until its end is reported.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use tokio::sync::{oneshot, watch};

use crate::cgroup::Cgroup;
use crate::descriptor::Descriptor;
use crate::reaper::End;
use crate::stdio::Pumps;

/// The end of a process, as it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// How it ended.
    pub end: End,
    /// How many processes of its container the OOM killer had killed by then.
    pub oom_kills: u64,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its number in the guest.
    pub pid: i32,
    /// The master of its terminal.
    pub terminal: Option<Arc<Descriptor>>,
    pidfd: OwnedFd,
    reaped: watch::Receiver<bool>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Process {
    /// Watches over a process that has just been created.
    #[must_use]
    pub fn watch(
        pid: i32,
        pidfd: OwnedFd,
        end: oneshot::Receiver<End>,
        terminal: Option<Arc<Descriptor>>,
        pumps: Pumps,
        cgroup: Cgroup,
    ) -> Self {
        let (reaped_sender, reaped) = watch::channel(false);
        let (exit_sender, exit) = watch::channel(None);
        tokio::spawn(async move {
            // The reaper lives as long as the agent.
            let Ok(end) = end.await else { return };
            let oom_kills = cgroup.oom_kills();
            reaped_sender.send_replace(true);
            pumps.finish().await;
            exit_sender.send_replace(Some(Exit { end, oom_kills }));
        });
        Self { pid, terminal, pidfd, reaped, exit }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        *self.reaped.borrow()
    }

    /// Completes when it has ended, whether or not its output is handed over.
    pub async fn ended(&self) {
        // An error: the watcher is gone, and with it the agent.
        let _ = self.reaped.clone().wait_for(|reaped| *reaped).await;
    }

    /// Completes when it has ended and its output is handed over. `None`: the agent is going down.
    pub async fn exit(&self) -> Option<Exit> {
        let mut exit = self.exit.clone();
        *exit.wait_for(Option::is_some).await.ok()?
    }

    /// Sends a signal; false if it has ended.
    ///
    /// # Errors
    ///
    /// pidfd_send_signal(2).
    pub fn signal(&self, signal: u32) -> io::Result<bool> {
        // SAFETY: integers and a null pointer, which means "as kill(2)". rustix has no call for signals without a name.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<()>(),
                0,
            )
        };
        if result == 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            err if err.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            err => Err(err),
        }
    }
}
