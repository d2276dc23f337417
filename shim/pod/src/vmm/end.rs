//! The death of the VMM: noticed by its pidfd, explained by its last words.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvrun_vmm_api::{ExitReason, VIOLATION_EXIT};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::AsyncReadExt;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::timeout;

use super::process::{Child, Status, reap};
use super::violation::Violation;
use super::{Closed, Control};
use crate::text;

/// How long a VMM that has closed its control socket may take to end, and its last words to arrive after its end.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How much of the VMM's standard error is kept, in bytes.
const STDERR_TAIL: usize = 4 * 1024;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Death {
    /// The VMM said so.
    #[error("{}", text::one_line(&.0.to_string(), 500))]
    Reported(ExitReason),
    /// The VMM made a system call that its filter does not allow; which, if it could still say so.
    #[error("its VMM, kvrun-vmm, was killed by its seccomp filter{}", .0.as_ref().map_or_else(String::new, |v| format!(": {v}")))]
    Filtered(Option<Violation>),
    /// The VMM was killed.
    #[error("its VMM, kvrun-vmm, was killed by signal {0}")]
    Signaled(i32),
    /// The VMM ended without a word.
    #[error("its VMM, kvrun-vmm, ended with exit code {0} and no reason")]
    Exited(i32),
    /// The VMM ended, and somebody else took its exit code.
    #[error("its VMM, kvrun-vmm, ended for no known reason")]
    Unknown,
    /// We have killed the VMM.
    #[error("it was killed because {0}")]
    Killed(&'static str),
}

/// The end of a machine.
#[derive(Clone, Debug)]
pub struct VmEnd {
    /// Why.
    pub death: Death,
    /// The last the guest wrote to its console. Hostile: clean it with [`text::lines`] before a person sees it.
    pub console_tail: String,
    /// The last the VMM wrote to its standard error, as hostile.
    pub stderr_tail: String,
}

/// How many lines of last words are passed on, and how many characters of each: a message of `kvrun` to itself has 64 KiB.
const LAST_LINES: (usize, usize) = (60, 200);

impl VmEnd {
    /// The last that was said, and by whom: lines without control characters, as many as a person may want to read.
    pub fn last_words(&self) -> Vec<(&'static str, Vec<String>)> {
        let (most, longest) = LAST_LINES;
        [("guest console", &self.console_tail), ("VMM", &self.stderr_tail)]
            .into_iter()
            .map(|(title, tail)| {
                let all: Vec<String> = text::lines(tail).map(|line| text::one_line(&line, longest)).collect();
                (title, all[all.len().saturating_sub(most)..].to_vec())
            })
            .filter(|(_, lines)| !lines.is_empty())
            .collect()
    }
}

impl fmt::Display for VmEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.death.fmt(f)
    }
}

/// Starts the task that reads the control socket and waits for the process.
pub(super) fn watch(control: Arc<Control>, child: Child) -> io::Result<watch::Receiver<Option<Arc<VmEnd>>>> {
    let (sender, receiver) = watch::channel(None);
    let stderr = pipe::Receiver::from_owned_fd(child.stderr)?;
    // SAFETY: an OwnedFd is one descriptor, open for as long as it lives, and it lives in here.
    let pidfd = unsafe { AsyncFd::register_with_interest(child.pidfd, Interest::READABLE) }
        .map_err(io::Error::from)?;
    tokio::spawn(async move {
        let end = watch_until_end(&control, stderr, pidfd).await;
        tracing::debug!(death = %end.death, "the VMM ended");
        sender.send_replace(Some(Arc::new(end)));
    });
    Ok(receiver)
}

async fn watch_until_end(control: &Control, stderr: pipe::Receiver, pidfd: AsyncFd<OwnedFd>) -> VmEnd {
    let tail = Arc::new(Mutex::new(VecDeque::new()));
    let mut stderr = tokio::spawn(keep_tail(stderr, Arc::clone(&tail)));
    let mut receive = pin!(control.receive());
    let ended = || async { pidfd.readable().await.map(drop) };

    // Either may be first: the process dies, or it closes its socket.
    let closed = tokio::select! {
        closed = &mut receive => {
            if matches!(closed, Closed::Violation(_)) || timeout(LAST_WORDS, ended()).await.is_err() {
                let _ = pidfd_send_signal(pidfd.get_ref(), Signal::KILL);
                let _ = ended().await;
            }
            closed
        }
        _ = ended() => timeout(LAST_WORDS, &mut receive).await.unwrap_or(Closed::ByPeer(None)),
    };
    let status = reap(pidfd.get_ref());
    let _ = timeout(LAST_WORDS, &mut stderr).await;
    stderr.abort();

    let mut stderr_tail = {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(tail.make_contiguous()).into_owned()
    };
    let killed = control.waiting().killed;
    let (death, console_tail) = match (closed, status) {
        (Closed::Violation(what), _) => (Death::Killed(what), String::new()),
        (Closed::ByPeer(Some((reason, console_tail))), _) => (Death::Reported(reason), console_tail),
        (Closed::ByPeer(None), _) if killed.is_some() => {
            (Death::Killed(killed.unwrap_or_default()), String::new())
        }
        (Closed::ByPeer(None), Status::Exited(VIOLATION_EXIT) | Status::Signaled(libc::SIGSYS)) => {
            (Death::Filtered(Violation::take_from(&mut stderr_tail)), String::new())
        }
        (Closed::ByPeer(None), Status::Signaled(signal)) => (Death::Signaled(signal), String::new()),
        (Closed::ByPeer(None), Status::Exited(code)) => (Death::Exited(code), String::new()),
        (Closed::ByPeer(None), Status::Unknown) => (Death::Unknown, String::new()),
    };
    VmEnd { death, console_tail, stderr_tail }
}

/// Reads to the end and keeps the last [`STDERR_TAIL`] bytes, so that the writer never waits and our memory is bounded.
async fn keep_tail(mut from: pipe::Receiver, tail: Arc<Mutex<VecDeque<u8>>>) {
    let mut buffer = vec![0; 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&buffer[..n]);
        let excess = tail.len().saturating_sub(STDERR_TAIL);
        tail.drain(..excess);
    }
}
