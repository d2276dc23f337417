//! Creating containers, and further processes in them. That forks, waits for what it forked, and joins namespaces: none of that is for PID 1. So
//! it runs in a helper process, and the processes that it forks:
//!
//! * [`create`] - the agent's end: spawns the helper, learns how it went, starts the user process.
//! * [`helper`] - the helper's `main`: what needs the guest's privileges, from outside of the container - its cgroup, trees of mounts, ID mappings.
//! * [`init`] - the forked process, inside, from its first step to exec, in these parts: [`namespaces`]; [`rootfs`] with [`mount_options`],
//!   [`copy_up`], [`devices`] and [`in_root`]; [`hooks`]; [`process`] with [`capabilities`] and [`seccomp`]; and [`executor`], exec and what
//!   can be wrong with it.
//! * [`error`] - one line for the user; [`sys`] - system calls.
//!
//! One `SOCK_SEQPACKET` socket pair connects agent and helper. The helper, and the process that it forks, send
//! [`Report`]s. The agent answers [`Report::Created`] once it has asked its reaper for the container's process, and the helper
//! exits; only then is that process reparented to PID 1. It holds the last copy of the helper's end: one more byte of the agent
//! starts it, and exec closes the socket: so end-of-file after the start means that the user's program runs.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};

use self::error::SetupError;

pub mod capabilities;
pub mod copy_up;
pub mod create;
pub mod devices;
pub mod error;
pub mod executor;
pub mod helper;
pub mod hooks;
pub mod in_root;
pub mod init;
pub mod mount_options;
pub mod namespaces;
pub mod process;
pub mod rootfs;
pub mod seccomp;
pub mod sys;

/// The longest text in a report, in bytes.
const TEXT_MAX: usize = 2048;
/// The longest report as it is sent: JSON makes up to 6 bytes of one.
const REPORT_MAX: usize = 6 * TEXT_MAX + 64;

/// What the helper's side tells the agent. The text is one line for the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The container is created; its process waits for the start.
    Created {
        /// The process, in the guest's numbers.
        pid: i32,
    },
    /// The program to run does not exist.
    NotFound(String),
    /// The program to run exists and cannot be executed.
    NotExecutable(String),
    /// Comes with the master of the process's terminal.
    Terminal,
    /// What went wrong. The last report.
    Failed(String),
}

/// Sends reports.
#[derive(Clone, Debug)]
pub struct Reporter(Arc<OwnedFd>);

impl Reporter {
    /// Sends on this socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(socket))
    }

    /// Sends one report. There is nobody to tell of a failure: the agent sees end-of-file instead.
    pub fn send(&self, report: &Report) {
        if let Ok(bytes) = serde_json::to_vec(report) {
            let _ = rustix::net::send(&self.0, &bytes, SendFlags::NOSIGNAL);
        }
    }

    /// Sends one report with a descriptor.
    ///
    /// # Errors
    ///
    /// sendmsg(2).
    pub fn send_with(&self, report: &Report, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        let bytes = serde_json::to_vec(report)?;
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Reports what went wrong.
    pub fn fail(&self, err: &SetupError) {
        let text = error_chain(err);
        self.send(&match err {
            SetupError::NotFound(_) => Report::NotFound(text),
            SetupError::NotExecutable(_) => Report::NotExecutable(text),
            _ => Report::Failed(text),
        });
    }

    /// The socket itself, to wait on.
    #[must_use]
    pub fn socket(&self) -> &OwnedFd {
        &self.0
    }

    /// Waits until the agent answers, or is gone.
    pub fn wait_for_answer(&self) {
        let mut answer = [0; 1];
        while let Err(rustix::io::Errno::INTR) = rustix::io::read(&*self.0, &mut answer) {}
    }
}

/// One line of bounded length.
#[must_use]
pub fn one_line(text: &str) -> String {
    let mut line = text.replace(['\n', '\r'], " ");
    if let Some((cut, _)) = line.char_indices().find(|(index, c)| index + c.len_utf8() > TEXT_MAX) {
        line.truncate(cut);
    }
    line
}

/// An error with all its sources. A source whose text the error repeats is left out.
#[must_use]
pub fn error_chain(err: &dyn std::error::Error) -> String {
    let mut line = err.to_string();
    let mut next = err.source();
    while let Some(source) = next {
        let text = source.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = source.source();
    }
    one_line(&line)
}
