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
    /// Guest memory in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
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
    /// virtio-fs over a directory. One descriptor: the directory.
    Fs {
        /// The tag by which the guest mounts it, at most [`MAX_FS_TAG`] bytes.
        tag: String,
        /// Refuse every change, whatever the guest's mount options say.
        read_only: bool,
    },
    /// virtio-blk over a raw image. One descriptor: the file or block device, opened for writing too unless
    /// `read_only`. The format is raw by declaration; it is never probed.
    Blk {
        /// Refuse every change, in the device.
        read_only: bool,
        /// Serial number the guest reads, at most [`MAX_BLK_SERIAL`] bytes; may be empty.
        serial: String,
    },
}
