//! Creating containers with `libcontainer`, which forks, waits for what it forked, and changes the working directory of its
//! process: none of that is for PID 1. So it runs in a helper process:
//!
//! * [`create`] - the agent's end: spawns the helper, learns how it went, starts the user process.
//! * [`helper`] - the helper's `main`: `kvrun-agent oci create ...`.
//! * [`executor`] - the last step inside the container, exec, and what can be wrong with it.
//! * [`events`] - takes libcontainer's error events, which hold causes that its errors leave out.
//!
//! One `SOCK_SEQPACKET` socket pair connects the two. The helper, and the processes that libcontainer forks from it, send
//! [`Report`]s. The agent answers [`Report::Created`] once it has asked its reaper for the container's process, and the helper
//! exits; only then is that process reparented to PID 1. The container's process holds the last copy of the helper's end, until
//! exec closes it: so end-of-file after the start means that the user's program runs.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::SendFlags;
use serde::{Deserialize, Serialize};

pub mod create;
pub mod events;
pub mod executor;
pub mod helper;

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
    /// An error event of libcontainer: what went wrong, more exactly than its error value tells.
    Detail(String),
    /// The container could not be created. The last report.
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
