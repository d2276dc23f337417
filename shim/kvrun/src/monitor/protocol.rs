//! What the command line and a monitor say to each other: JSON and descriptors over a `SOCK_SEQPACKET` socket in the container's state
//! directory, which only root may enter.
//!
//! Each request has one answer. After [`Answer::Attached`] the connection stands for the process that was made:
//! [`Request::Signal`] and [`Request::Resize`] have no answer, and [`Answer::Ended`] is the last that is said. What may be
//! longer than a message goes in a memfd beside it ([`payload`]).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use kvrun_pod::container_id::ContainerId;
use kvrun_pod::stdio::Wanted;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::attach::End;
use crate::error::Failure;

/// The longest payload in bytes: as long as a `config.json` may be, and a list of processes.
const MAX_PAYLOAD: u64 = 16 * 1024 * 1024;

/// A request about a container.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Call {
    /// Which.
    pub(crate) id: ContainerId,
    /// What.
    pub(crate) request: Request,
}

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Request {
    /// Create it in the machine of this monitor. With descriptors: its state directory, its config, its network namespace, and its mount trees
    /// ([`Trees::descriptors`](kvrun_pod::share::Trees::descriptors)). Answer: `Attached`, and its streams.
    Create {
        /// Absolute; the monitor may not see it.
        bundle: PathBuf,
        /// Its streams.
        wanted: Wanted,
    },
    /// Run its process.
    Start,
    /// Send it a signal.
    Kill {
        /// The number.
        signal: i32,
        /// To all its processes.
        all: bool,
    },
    /// Kill what is left of it, and end with it. The answer is that it has begun.
    Delete,
    /// Hold its processes.
    Pause,
    /// Let them run.
    Resume,
    /// With [`super::exec::Program`] as payload. Answer: `Attached`, and its streams.
    Exec {
        /// Also while the container is paused.
        ignore_paused: bool,
        /// Its streams.
        wanted: Wanted,
    },
    /// Answer: a payload, a list of [`ProcessRow`].
    Processes,
    /// Answer: a payload, a list of the processes on the host that stand for processes of the container.
    HostProcesses,
    /// What the container's own `/proc` has at a path. Answer: a payload, a [`ProcEntry`](kvrun_pod::agent::ProcEntry) if there is something.
    LookAtProc {
        /// Relative to `/proc`.
        path: String,
    },
    /// Answer: a payload, the counters by name.
    Stats,
    /// With OCI resources as payload.
    Update,
    /// To the process of this connection.
    Signal {
        /// The number.
        signal: i32,
    },
    /// The terminal of the process of this connection has another size.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters in each.
        columns: u16,
    },
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Answer {
    /// It is done.
    Done,
    /// It is done, and here is what was asked for.
    Payload,
    /// It cannot be done.
    Failed(Failure),
    /// The process runs, or is created; with its streams, in the order of [`Wanted`].
    Attached,
    /// The process has ended.
    Ended(End),
}

/// A process in the guest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ProcessRow {
    /// As the container has it.
    pub(crate) pid: u32,
    /// Likewise; 0 if it is not in it.
    pub(crate) parent_pid: u32,
    /// As the guest has it.
    pub(crate) uid: u32,
    /// Seconds since the epoch.
    pub(crate) started_s: u64,
    /// CPU time in milliseconds.
    pub(crate) cpu_ms: u64,
    /// Empty if it has none.
    pub(crate) terminal: String,
    /// Its command line.
    pub(crate) command: String,
}

/// Puts a value into a file in memory.
pub(crate) fn payload(value: &impl Serialize) -> io::Result<OwnedFd> {
    file_of(&serde_json::to_vec(value)?)
}

/// Puts bytes into a file in memory.
pub(crate) fn file_of(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("payload", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.into())
}

/// Takes a value out of the file that came with a message.
pub(crate) fn unpack<T: DeserializeOwned>(fds: Vec<OwnedFd>) -> io::Result<T> {
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "a message came without its payload");
    let file = File::from(fds.into_iter().next().ok_or_else(missing)?);
    let mut bytes = Vec::new();
    file.take(MAX_PAYLOAD).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_arrives_whole() {
        let value = vec!["x".repeat(1 << 20)];
        let fd = payload(&value).unwrap();
        assert_eq!(unpack::<Vec<String>>(vec![fd]).unwrap(), value);
        assert!(unpack::<Vec<String>>(vec![]).is_err());
        let fd = payload(&1).unwrap();
        assert!(unpack::<Vec<String>>(vec![fd]).is_err());
    }

    #[test]
    fn request_of_another_version_is_not_taken_for_one_of_ours() {
        assert!(serde_json::from_str::<Call>(r#"{"id":"c","request":"Start"}"#).is_ok());
        for text in [
            r#"{"id":"../c","request":"Start"}"#,
            r#"{"id":"c","request":"Start","more":1}"#,
            r#"{"id":"c","request":{"Kill":{"signal":9,"all":false,"more":1}}}"#,
        ] {
            assert!(serde_json::from_str::<Call>(text).is_err(), "{text}");
        }
    }
}
