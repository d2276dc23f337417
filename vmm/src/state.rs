//! A machine where it stopped: everything of it but its memory, as plain data.
//!
//! What the machine was made of on the host (its configuration, its descriptors) is not in here: whoever restores it brings that again.

use serde::{Deserialize, Serialize};

use crate::arch::{PlatformState, StateError, VcpuState};
use crate::devices::legacy::ConsoleState;
use crate::devices::virtio::SlotState;
use crate::vcpu;

/// Everything of a machine but its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Every slot, in order; `None` where it is empty.
    pub slots: Vec<Option<SlotState>>,
    /// The serial console.
    pub console: ConsoleState,
    /// Every vCPU, in order.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers and clock.
    pub platform: PlatformState,
}

/// The state of a machine cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The vCPUs, which must be held.
    #[error(transparent)]
    Vcpus(#[from] vcpu::SaveError),
    /// Interrupt controllers and clock.
    #[error(transparent)]
    Platform(#[from] StateError),
    /// A device that knows nothing of being saved.
    #[error("the device in slot {0} cannot be saved")]
    Device(u8),
}
