//! Debugging: programs of the host's choice that run in the guest as a container which is as little contained as there can be.
//!
//! Off unless the configuration names the directory that has the programs (`debug.root`): the socket ([`DEBUG_SOCKET`]) is not there then. Whoever asks must be
//! root. The guest gets nothing that it could not do by itself; of the host, it can read that directory from the first such program on.
//!
//! * Here - what is said: JSON and descriptors over a `SOCK_SEQPACKET` socket. The first request is [`Request::Run`], with the descriptors of the streams; after
//!   [`Answer::Running`] the connection stands for the program, which is killed when it closes; [`Answer::Ended`] is the last that is said.
//! * [`server`] - the engine's end, for both doors; [`client`] - that of the command line.
//!
//! [`DEBUG_SOCKET`]: crate::state_dir::DEBUG_SOCKET

mod client;
mod server;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::stdio::Wanted;

pub use client::{Client, DebugError};
pub use server::start;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
enum Request {
    /// Run a program.
    Run {
        /// Its name, and what follows it.
        args: Vec<String>,
        /// Its terminal, if it has one.
        terminal: Option<Terminal>,
        /// Which descriptors came with this.
        streams: Wanted,
    },
    /// Send it a signal.
    Signal(i32),
    /// Its terminal has another size.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters in each.
        columns: u16,
    },
}

/// What a program is told of its terminal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terminal {
    /// Its kind (`TERM`).
    pub kind: String,
    /// Lines, and characters in each, if it is known.
    pub size: Option<(u16, u16)>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
enum Answer {
    /// It cannot be run, because.
    Failed(String),
    /// It runs.
    Running,
    /// It has ended.
    Ended(Ended),
}

/// How a program has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// Exited with this code.
    Exited(u8),
    /// Killed by this signal.
    Signaled(u8),
    /// Its machine died: why.
    VmDied(String),
}
