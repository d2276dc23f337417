//! The protocol between the pod engine and `kvrun-agent`: generated types ([`agent`], [`agent_ttrpc`]), port numbers
//! and limits. `proto/agent.proto` is the text to read.

#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    nonstandard_style,
    unused,
    unused_qualifications,
    unreachable_pub
)]
mod generated {
    /// Messages.
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }

    /// Client and server of the service `kvrun.agent.v1.Agent`.
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
}

pub use generated::{agent, agent_ttrpc};

/// vsock port in the guest on which the agent answers ttrpc.
pub const RPC_PORT: u32 = 1024;
/// vsock port in the guest on which the agent takes stdio streams; see `CreateContainerRequest`.
pub const STREAM_PORT: u32 = 1025;
/// vsock port on the host to which the agent connects, once, when it answers.
pub const READY_PORT: u32 = 1024;
/// Length of the token that starts a stdio stream, in bytes.
pub const TOKEN_LEN: usize = 8;
/// The directory in the guest under which everything the agent mounts and keeps lives.
pub const GUEST_RUN_DIR: &str = "/run/kvrun";
/// `GUEST_CONTAINERS_DIR/ID/ns/NAME` in `linux.namespaces[].path` names a namespace of another container of the guest; NAME as in
/// `/proc/PID/ns`. There is no such directory.
pub const GUEST_CONTAINERS_DIR: &str = "/run/kvrun/containers";
/// Where volumes of `UpdateVolume` are, each in a directory whose name is its number.
pub const GUEST_VOLUMES_DIR: &str = "/run/kvrun/volumes";
/// What of that directory is the volume.
pub const VOLUME_FILES: &str = "files";
/// How many entries such a volume may have, itself included.
pub const MAX_VOLUME_ENTRIES: usize = 256;
/// How many bytes its files may have together.
pub const MAX_VOLUME_BYTES: usize = 1 << 20;
/// How many parts the path of an entry may have.
pub const MAX_VOLUME_DEPTH: usize = 16;
/// How long, in seconds, the agent waits for the streams a request names to be connected.
pub const STREAM_TIMEOUT_SECS: u64 = 10;
