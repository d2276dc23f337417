//! What the bench and its program in the guest say to each other, and how both [`copy`].
//!
//! The guest connects to [`CONTROL_PORT`] of the host over vsock. From there it is sent a [`Job`] a line, in JSON, and answers each with a
//! line that holds an [`Answer`].

pub mod copy;

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// The vsock port of the host that the guest connects to for its jobs.
pub const CONTROL_PORT: u32 = 1024;
/// The port of the guest, of vsock and TCP, for the streams that are measured.
pub const STREAM_PORT: u16 = 5000;
/// The tag of the shared directory.
pub const SHARE_TAG: &str = "share";

/// What the guest is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Job {
    /// Bind the driver of a virtio-mmio slot that was empty at boot.
    Bind {
        /// Its number.
        slot: u8,
    },
    /// Bring up the link with this Ethernet address.
    Link {
        /// Its Ethernet address.
        mac: [u8; 6],
        /// The guest's address on it, in a network of 256.
        address: Ipv4Addr,
    },
    /// Mount the shared directory.
    Mount,
    /// Read or write the disk from its beginning on, past the page cache, a block at a time.
    DiskSequential {
        /// Write it.
        write: bool,
        /// Bytes of a block.
        block: usize,
        /// How many blocks.
        count: usize,
    },
    /// Read or write blocks of 4 KiB all over the disk, past the page cache.
    DiskRandom {
        /// Write them.
        write: bool,
        /// How many at a time.
        depth: usize,
        /// How many altogether.
        count: usize,
    },
    /// Accept a connection to [`STREAM_PORT`], send so many bytes, and wait until they have been read.
    Send(Stream),
    /// Accept a connection to [`STREAM_PORT`], ask for bytes, and read so many.
    Receive(Stream),
    /// Accept a connection to [`STREAM_PORT`], and exchange so many single bytes with the host, one after the other.
    PingPong(Stream),
    /// Write a file of the share anew.
    FileWrite {
        /// Its length.
        bytes: usize,
    },
    /// Read it from beginning to end.
    FileRead {
        /// Its length.
        bytes: usize,
    },
    /// Create, stat, list and remove so many small files of the share.
    Files {
        /// How many.
        count: usize,
    },
}

/// Bytes on a stream.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stream {
    /// Over TCP; else over vsock.
    pub tcp: bool,
    /// How many.
    pub bytes: usize,
}

/// How a job went.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Answer {
    /// How long it took on the guest's monotonic clock.
    Took {
        /// In nanoseconds.
        ns: u64,
    },
    /// It failed.
    Failed(String),
}
