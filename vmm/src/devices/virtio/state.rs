//! What slots and devices are where they stopped: plain data, to be saved and restored.
//!
//! A device tells it once it is paused ([`VirtioDevice::save`](super::VirtioDevice::save)), so no request is under way and all that has been
//! used is in the rings: the rest of its state is in guest memory. What comes from the host (files, sockets, taps, limits of
//! the moment) is not here; whoever restores gives it anew.

use serde::{Deserialize, Serialize};

use super::balloon::BalloonState;
use super::blk::BlkState;
use super::fs::FsState;
use super::mem::MemState;
use super::net::NetState;
use super::pmem::PmemState;
use super::rng::RngState;
use super::vsock::VsockState;

/// How far a device has come in a queue. All modulo 2^16 (virtio 1.3 s2.7.6, s2.7.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// The entry of the available ring that is taken next.
    pub next_avail: u16,
    /// The entry of the used ring that is written next.
    pub next_used: u16,
}

/// A device where it stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDevice {
    /// Every queue, in order; `None` for one the driver did not make ready. Empty if the driver has not started the device.
    pub queues: Vec<Option<QueuePosition>>,
    /// What is particular to its kind.
    pub state: DeviceState,
}

/// What is particular to a kind of device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum DeviceState {
    /// virtio-blk.
    Blk(BlkState),
    /// virtio-net.
    Net(NetState),
    /// virtio-fs.
    Fs(FsState),
    /// virtio-mem.
    Mem(MemState),
    /// virtio-balloon.
    Balloon(BalloonState),
    /// virtio-pmem.
    Pmem(PmemState),
    /// virtio-rng.
    Rng(RngState),
    /// virtio-vsock.
    Vsock(VsockState),
}

/// A filled slot: the registers of its transport, and its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotState {
    /// The register `Status`, without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// The device has given up on its driver: `DEVICE_NEEDS_RESET`.
    pub broken: bool,
    /// The register `InterruptStatus`. Where it is not 0, whoever restores the slot interrupts the driver: the device will not do so again
    /// before the driver has acknowledged it.
    pub interrupt_status: u32,
    /// The register `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// The register `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// The features the driver has accepted so far.
    pub driver_features: u64,
    /// The register `QueueSel`.
    pub queue_select: u32,
    /// What the driver has configured of each queue.
    pub queues: Vec<QueueConfig>,
    /// The device.
    pub device: SavedDevice,
}

/// What the driver has configured of a queue, as it wrote it: nothing is checked before the device starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueConfig {
    /// Number of entries.
    pub size: u32,
    /// The driver says it is ready.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
}
