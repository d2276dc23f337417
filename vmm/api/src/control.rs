//! The control protocol: one JSON [`ToVmm`] or [`FromVmm`] per datagram.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::{DeviceConfig, RateLimit, VmConfig};

/// What the pod engine sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToVmm {
    /// Chosen by the sender; the reply carries it back. Requests may be answered out of order.
    pub id: u64,
    /// What to do.
    pub request: Request,
}

/// What the VMM sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum FromVmm {
    /// The answer to the request with this `id`.
    Reply {
        /// The request's.
        id: u64,
        /// Its outcome.
        result: Result<Reply, RequestError>,
    },
    /// Something happened.
    Event(Event),
}

/// A request. Descriptors that go with it are named at each variant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Request {
    /// Build and start the machine: the first request, and only once. Answered with [`Reply::Done`] when the vCPUs
    /// run. Descriptors: see [`VmConfig`].
    Boot(VmConfig),
    /// Put a device into an empty slot. The guest does not see it before its driver is bound to the slot.
    /// Descriptors: see [`DeviceConfig`].
    Attach {
        /// From [`FIRST_FREE_SLOT`](crate::config::FIRST_FREE_SLOT) on.
        slot: u8,
        /// The device.
        device: DeviceConfig,
    },
    /// Empty a slot: the device is reset, its descriptors closed. Unbind the guest's driver first, and unplug all memory that a
    /// memory device has plugged.
    Detach {
        /// The slot.
        slot: u8,
    },
    /// Connect to a port on which the guest listens. One descriptor: a connected `AF_UNIX` stream socket that becomes
    /// the host's end. Answered with [`Reply::Done`] once the guest has accepted.
    VsockConnect {
        /// The guest's port.
        port: u32,
    },
    /// Stop all vCPUs at an instruction boundary. Idempotent.
    Pause,
    /// Let paused vCPUs run. Idempotent.
    Resume,
    /// Ask the guest to plug or unplug memory through its virtio-mem device. Answered with [`Reply::Done`] once the guest has been
    /// told; how far it has come is in [`Reply::State`].
    ResizeMemory {
        /// Memory wanted beyond [`VmConfig::memory_mib`], in MiB; at most [`VmConfig::hotplug_mib`]. Rounded up to whole blocks, which
        /// are of [`MEM_BLOCK_MIB`](crate::config::MEM_BLOCK_MIB) unless the machine may grow by more than KVM has memory slots for.
        plugged_mib: u32,
    },
    /// Ask the guest to give this much memory to its balloon. Answered as [`Request::ResizeMemory`].
    SetBalloon {
        /// Memory wanted in the balloon, in MiB.
        mib: u32,
    },
    /// Ask the guest's balloon which of its pages are free and drop their contents, now, without taking them away (virtio 1.3
    /// s5.5.6.5). Answered with [`Reply::Done`] once the guest has been told.
    HintFreePages,
    /// Change the limits of a block device (`first`) or a network link (`first`: receiving, `second`: sending).
    SetRateLimit {
        /// The slot.
        slot: u8,
        /// The new limit of a block device, or of receiving.
        first: RateLimit,
        /// The new limit of sending; `None` for a block device.
        second: Option<RateLimit>,
    },
    /// Report [`Reply::State`].
    State,
    /// Report [`Reply::Metrics`].
    Metrics,
    /// Report [`Reply::Console`].
    Console,
    /// End the machine now, as if its power cord were pulled. Answered with [`Reply::Done`], then
    /// [`Event::Exited`] and the end of the process.
    Stop,
}

/// A successful answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Done,
    /// The answer to [`Request::State`].
    State(VmState),
    /// The answer to [`Request::Metrics`].
    Metrics(VmMetrics),
    /// The answer to [`Request::Console`]: the last bytes (at most [`CONSOLE_TAIL`]) the guest wrote to its serial console, made valid UTF-8.
    Console(String),
}

/// A refusal. The machine is as it was before the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum RequestError {
    /// The request's own values are at fault: unknown slot, wrong number of descriptors, bad kernel image, ...
    #[error("{0}")]
    Invalid(String),
    /// The machine is not in a state for it: slot taken, slot empty, booted already, not booted.
    #[error("{0}")]
    Precondition(String),
    /// The guest refused a vsock connection: nothing listens on the port.
    #[error("nothing in the guest listens on vsock port {port}")]
    ConnectionRefused {
        /// The port asked for.
        port: u32,
    },
    /// The host failed: a system call or an ioctl.
    #[error("{0}")]
    Host(String),
}

/// What the machine is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// Whether the vCPUs are held.
    pub paused: bool,
    /// The kind of device in each slot: `None` where it is empty.
    pub slots: Vec<Option<String>>,
    /// `CLOCK_MONOTONIC`, in nanoseconds, when the first vCPU was about to enter the guest.
    pub first_entry_ns: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds, of each boot mark: byte the guest wrote to the boot-mark port
    /// ([`BOOT_MARK_PORT`]), first occurrence of each, in order of arrival.
    pub boot_marks: Vec<(u8, u64)>,
    /// How often each vCPU left the guest for the VMM (in all `KVM_RUN` returns), one number per vCPU.
    pub exits: Vec<u64>,
    /// How much memory is plugged beyond what the machine booted with, in MiB.
    pub plugged_mib: u32,
    /// How much memory is in the balloon, in MiB, as the guest says.
    pub balloon_mib: u32,
}

/// What the machine has counted since it booted. Counters only grow, but for those whose names begin with `guest_`, which are what
/// the guest said last about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmMetrics {
    /// How often vCPUs left the guest for the VMM, by kind of exit.
    pub exits: BTreeMap<String, u64>,
    /// What the device in each slot has counted; `None` where it is empty.
    pub slots: Vec<Option<DeviceMetrics>>,
}

/// What a device has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceMetrics {
    /// The kind of device, as in [`VmState::slots`].
    pub device: String,
    /// Counters by name, `bytes_read` for example.
    pub counters: BTreeMap<String, u64>,
}

/// The I/O port to which a guest writes boot marks (one byte each). QEMU's `isa-debugcon` and Bochs use the same port, so one
/// initramfs is measured in both.
pub const BOOT_MARK_PORT: u16 = 0xe9;
/// The boot mark of the first instruction of the guest's init.
pub const BOOT_MARK_INIT: u8 = b'I';
/// The boot mark of an agent that answers requests.
pub const BOOT_MARK_READY: u8 = b'R';

/// Something happened without being asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Event {
    /// The guest connected to a host port of [`VmConfig::vsock_listen`]. One descriptor: the connected stream socket of the
    /// host's end. The port is closed from now on.
    VsockAccepted {
        /// The host port.
        port: u32,
    },
    /// The machine has ended; the process follows.
    Exited {
        /// Why.
        reason: ExitReason,
        /// The last bytes (at most [`CONSOLE_TAIL`]) the guest wrote to its serial console, made valid UTF-8.
        console_tail: String,
    },
}

/// How many bytes of the guest's serial console are kept.
pub const CONSOLE_TAIL: usize = 8 * 1024;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest reset the machine by the keyboard controller, which is also how it powers off.
    #[error("the guest shut down")]
    GuestReset,
    /// A vCPU triple-faulted (`KVM_EXIT_SHUTDOWN`).
    #[error("a vCPU of the guest triple-faulted")]
    TripleFault,
    /// [`Request::Stop`], or the control socket was closed.
    #[error("the machine was stopped")]
    Stopped,
    /// KVM could not go on: an emulation failure or another internal error, with what is known of it.
    #[error("KVM gave up on the guest: {0}")]
    Kvm(String),
    /// The VMM failed on the host's side.
    #[error("the VMM failed: {0}")]
    Vmm(String),
}
