//! What a guest reads of virtio-mmio slots: memory.
//!
//! Each slot has a page of registers (virtio 1.3 s4.2.2), and all pages are one memory slot that the guest can only read
//! (Linux Documentation/virt/kvm/api.rst, `KVM_MEM_READONLY`). So a read is a load, without an exit from the guest, while every write still exits, or
//! becomes the signal that KVM has been told to make of it. The price: a register must hold what it reads as before anyone can read it.

use std::mem::size_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress, VolatileMemory};

use super::mmio::{SLOT_SIZE, reg};
use crate::memory::slot::{self, MemorySlot};
use crate::memory::{Backing, MemoryError, Region, map_region};

/// The registers of all slots of a machine.
pub struct Registers(Region);

impl Registers {
    /// Registers of `slots` slots at `base`, all zero.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(base: u64, slots: u8) -> Result<Self, MemoryError> {
        let length = u64::from(slots) * SLOT_SIZE;
        Ok(Self(Arc::new(map_region(GuestAddress(base), length, Backing::Registers)?)))
    }

    /// What shows them to the guest.
    pub fn memory_slot(&self) -> MemorySlot {
        MemorySlot::whole(slot::REGISTERS, &self.0).read_only()
    }

    /// The registers of one slot; `None` if there is no such slot.
    pub fn page(&self, slot: u8) -> Option<RegisterPage> {
        let start = u64::from(slot) * SLOT_SIZE;
        (start < self.0.len()).then(|| RegisterPage { region: self.0.clone(), start })
    }
}

/// The registers of one slot, as the guest reads them.
#[derive(Clone, Debug)]
pub struct RegisterPage {
    region: Region,
    start: u64,
}

impl RegisterPage {
    /// The register at `offset`, which is one of [`reg`].
    pub(super) fn at(&self, offset: u64) -> &AtomicU32 {
        self.region
            .get_atomic_ref((self.start + offset) as usize)
            .expect("every register is an aligned word in the page of its slot")
    }

    /// Sets the register at `offset`.
    pub(super) fn set(&self, offset: u64, value: u32) {
        self.at(offset).store(value, Ordering::Release);
    }

    /// Zeroes all of it.
    pub(super) fn clear(&self) {
        for offset in (0..SLOT_SIZE).step_by(size_of::<u32>()) {
            self.set(offset, 0);
        }
    }

    /// Reads as a guest does; what is beyond the page reads as zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let length = data.len().min(SLOT_SIZE.saturating_sub(offset) as usize);
        let read = self.region.read_slice(&mut data[..length], MemoryRegionAddress(self.start + offset));
        debug_assert!(length == 0 || read.is_ok(), "{read:?}");
    }

    /// The configuration space of the device in the slot.
    pub(super) fn config_space(&self) -> ConfigSpace {
        ConfigSpace(self.clone())
    }
}

/// The configuration space of a device (virtio 1.3 s2.5), as drivers read it: zeroes where the device has written nothing.
#[derive(Clone, Debug)]
pub struct ConfigSpace(RegisterPage);

impl ConfigSpace {
    /// Writes `bytes` at `offset`, a multiple of four, word by word; the last word is filled up with zeroes.
    ///
    /// A driver that reads several words sees that they may not belong together, for the generation changes (s2.5.1), unless all of its reads
    /// fall between two writes in here: who changes what has more than one word, and matters, holds the vCPUs meanwhile.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        for (at, word) in (offset..).step_by(size_of::<u32>()).zip(bytes.chunks(size_of::<u32>())) {
            let mut value = [0; size_of::<u32>()];
            value[..word.len()].copy_from_slice(word);
            self.0.set(reg::CONFIG + at, u32::from_le_bytes(value));
        }
        self.0.at(reg::CONFIG_GENERATION).fetch_add(1, Ordering::AcqRel);
    }
    #[cfg(test)]
    pub(super) fn page(&self) -> &RegisterPage {
        &self.0
    }
}
