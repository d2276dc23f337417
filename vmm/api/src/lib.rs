//! The contract between the pod engine and `kvrun-vmm`.
//!
//! * [`config`] - what a virtual machine is made of: the [`VmConfig`] that boots it, the [`DeviceConfig`] that
//!   fills a slot.
//! * [`control`] - the requests, replies and events that travel over the control socket.
//! * [`channel`] - the control socket itself: one JSON message per datagram, file descriptors beside it.
//!
//! The VMM is started as process 1 of a PID namespace, with two inherited descriptors at most: [`CONTROL_FD`], an
//! `AF_UNIX`/`SOCK_SEQPACKET` socket, and [`SHARE_FD`]. Its first message must be [`Request::Boot`]. Everything else the VMM ever
//! needs (kernel image, block files, vsock streams) arrives as an open descriptor over that socket; the only paths that a message
//! may name are those of directories in the share. When the socket closes, the virtual machine ends.
//!
//! Plain serde types, no KVM dependency: the pod engine depends on this crate and not on the VMM.

pub mod channel;
pub mod config;
pub mod control;

pub use channel::{Channel, ChannelError, Received};
pub use config::{DeviceConfig, FsCache, RateLimit, VcpuConfig, VmConfig};
pub use control::{
    DeviceMetrics, Event, ExitReason, FromVmm, Reply, Request, RequestError, ToVmm, VmMetrics, VmState,
};

/// The descriptor number on which `kvrun-vmm` finds its control socket.
pub const CONTROL_FD: i32 = 3;
/// The descriptor number on which `kvrun-vmm` finds the directory it may share with its guest, if there is one. It must be in the mount
/// namespace in which the process starts. What is mounted below it later, there, appears in the share if the directory's mount is
/// a shared one (mount_namespaces(7)).
pub const SHARE_FD: i32 = 4;

/// The exit code of a VMM one of whose threads made a system call that its filter does not allow.
pub const VIOLATION_EXIT: i32 = 159;
/// How the line on standard error begins in which such a VMM says which thread made which call.
pub const VIOLATION_PREFIX: &str = "kvrun-vmm: not allowed by its filter: ";
