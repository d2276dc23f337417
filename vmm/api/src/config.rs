//! What a virtual machine is made of.

use serde::{Deserialize, Serialize};

/// The most virtual CPUs a machine can have.
pub const MAX_VCPUS: u8 = 32;
/// The most virtio-mmio slots a machine can have.
pub const MAX_SLOTS: u8 = 64;
/// The smallest memory, in MiB, in which the guest kernel and its initramfs start.
pub const MIN_MEMORY_MIB: u32 = 48;
/// The largest memory in MiB.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;
/// The longest tag of a virtio-fs device in bytes (virtio 1.3 s5.11.4).
pub const MAX_FS_TAG: usize = 36;
/// The longest serial number of a virtio-blk device in bytes (virtio 1.3 s5.2.6.1).
pub const MAX_BLK_SERIAL: usize = 20;
/// The most request queues of a virtio-blk device.
pub const MAX_BLK_QUEUES: u8 = 32;
/// The most pairs of queues of a virtio-net device.
pub const MAX_NET_QUEUE_PAIRS: u8 = 8;
/// The smallest MTU of a virtio-net device in bytes (that of IPv4, RFC 791).
pub const MIN_NET_MTU: u16 = 68;
/// The largest MTU of a virtio-net device in bytes.
pub const MAX_NET_MTU: u16 = 65_521;
/// The unit in MiB in which memory is plugged and unplugged.
pub const MEM_BLOCK_MIB: u32 = 2;
/// The slot of the vsock device, there from boot.
pub const VSOCK_SLOT: u8 = 0;
/// The slot of the entropy device, there from boot.
pub const RNG_SLOT: u8 = 1;
/// The first slot that [`Request::Attach`](crate::Request::Attach) may fill.
pub const FIRST_FREE_SLOT: u8 = 2;
/// The context identifier of every guest: 0..=2 are reserved (virtio 1.3 s5.10.4), and no two guests ever see
/// each other, so all share one.
pub const GUEST_CID: u32 = 3;

/// The machine to boot. Accompanied by three descriptors, in this order: `/dev/kvm`, the kernel image (an
/// uncompressed ELF `vmlinux` with a PVH note), the initramfs (an uncompressed cpio archive).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Guest memory at boot in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// By how many MiB a [`DeviceConfig::Mem`] may make it grow; 0 if it never will. A multiple of [`MEM_BLOCK_MIB`], and with
    /// `memory_mib` at most [`MAX_MEMORY_MIB`]. What is not plugged costs address space only.
    pub hotplug_mib: u32,
    /// Virtual CPUs.
    pub vcpus: VcpuConfig,
    /// Kernel command line; the VMM appends the declaration of its slots.
    pub cmdline: String,
    /// How many virtio-mmio slots the machine has, vsock and rng included; at most [`MAX_SLOTS`].
    pub slots: u8,
    /// Host ports the guest may connect to over vsock, each once; [`Event::VsockAccepted`](crate::Event) tells of it.
    pub vsock_listen: Vec<u32>,
}

/// Virtual CPUs of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuConfig {
    /// Started by the guest kernel at boot, 1 to `max`.
    pub boot: u8,
    /// Created, so that the agent can bring them online later; at most [`MAX_VCPUS`].
    pub max: u8,
}

/// A device to put into a slot, with the descriptors it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "type", rename_all = "snake_case")]
pub enum DeviceConfig {
    /// virtio-fs over a directory of the share ([`SHARE_FD`](crate::SHARE_FD)). No descriptor: one of the engine's mount namespace
    /// would lead out of the VMM's jail, by `..`.
    Fs {
        /// Its path from there, `.` for the share itself. Without `..` and symbolic links.
        directory: String,
        /// The tag by which the guest mounts it, at most [`MAX_FS_TAG`] bytes.
        tag: String,
        /// Refuse every change, whatever the guest's mount options say.
        read_only: bool,
        /// What the guest may keep of files and directories without asking again.
        cache: FsCache,
        /// Let the guest keep written data back and write it out later. Only for a share nobody else writes to.
        writeback: bool,
    },
    /// virtio-blk over a raw image. One descriptor: the file or block device, opened for writing too unless
    /// `read_only`. The format is raw by declaration; it is never probed.
    Blk {
        /// Refuse every change, in the device.
        read_only: bool,
        /// Serial number the guest reads, at most [`MAX_BLK_SERIAL`] bytes; may be empty.
        serial: String,
        /// Request queues, 1 to [`MAX_BLK_QUEUES`]; one per vCPU is best.
        queues: u8,
        /// How fast it may be.
        limit: RateLimit,
    },
    /// virtio-net over a tap device. Descriptors: the tap once per pair of queues (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and
    /// `IFF_MULTI_QUEUE` if there are several); then, optionally, as many of `/dev/vhost-net`, which then carries the packets
    /// in the host's kernel, where no limit is enforced: with limits, leave them out.
    Net {
        /// The guest's Ethernet address.
        mac: [u8; 6],
        /// The link's MTU in bytes, [`MIN_NET_MTU`] to [`MAX_NET_MTU`].
        mtu: u16,
        /// Pairs of queues, 1 to [`MAX_NET_QUEUE_PAIRS`]; one per vCPU is best.
        queue_pairs: u8,
        /// How fast the guest may receive.
        rx_limit: RateLimit,
        /// How fast the guest may send.
        tx_limit: RateLimit,
    },
    /// virtio-pmem, read-only: a file as memory of the guest, shared with every other machine that maps it. One descriptor: the
    /// file, which must not be changed or cut while it is attached.
    Pmem,
    /// virtio-mem: memory that grows and shrinks within [`VmConfig::hotplug_mib`], by [`Request::ResizeMemory`](crate::Request). No
    /// descriptor. One per machine.
    Mem,
    /// virtio-balloon: takes memory back from the guest, by [`Request::SetBalloon`](crate::Request), and is told of memory the
    /// guest has no use for. No descriptor. One per machine.
    Balloon {
        /// Give free pages back to the host as they become free (virtio 1.3 s5.5.6.7).
        free_page_reporting: bool,
    },
}

/// What the guest's kernel may keep of a shared directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsCache {
    /// Nothing: each look-up and each read asks. For a directory others change all the time.
    Never,
    /// Names and attributes for a second, data until the file is opened anew.
    Auto,
    /// Everything until memory is short. For a directory that nobody else changes.
    Always,
}

/// A bound on bandwidth and on operations; 0 means unbounded. Enforced by token buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes per second.
    pub bytes_per_second: u64,
    /// How many bytes may go at once after a rest. 0: as many as go in 100 ms.
    pub bytes_burst: u64,
    /// Operations (requests or packets) per second.
    pub ops_per_second: u64,
    /// How many operations may go at once after a rest. 0: as many as go in 100 ms.
    pub ops_burst: u64,
}
