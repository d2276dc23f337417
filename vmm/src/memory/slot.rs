//! Memory slots: what of guest memory the vCPUs can reach (Linux Documentation/virt/kvm/api.rst, KVM_SET_USER_MEMORY_REGION).
//!
//! Numbers are given out once and for all: RAM has those from [`RAM`], registers have [`REGISTERS`], files in the window those from [`WINDOW`], blocks of plugged
//! memory those from [`HOTPLUG`] up to as many as KVM has.

use std::io;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use kvrun_vmm_api::config::MAX_SLOTS;
use vm_memory::{Address, GuestAddress, GuestMemoryRegion, GuestRegionMmap};

/// The first number of RAM.
pub const RAM: u32 = 0;
/// That of what the guest reads of devices.
pub const REGISTERS: u32 = WINDOW - 1;
/// The first number of files in the window: no more than there can be devices.
pub const WINDOW: u32 = 8;
/// The first number of plugged memory.
pub const HOTPLUG: u32 = WINDOW + MAX_SLOTS as u32;

/// Part of a region, as a memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    number: u32,
    start: GuestAddress,
    length: u64,
    host: u64,
    read_only: bool,
}

impl MemorySlot {
    /// All of a region of RAM.
    pub fn whole(number: u32, region: &GuestRegionMmap<()>) -> Self {
        let host = region.as_ptr() as u64;
        Self { number, start: region.start_addr(), length: region.len(), host, read_only: false }
    }

    /// `length` bytes at `offset` of a region; `None` if that is not in it, or nothing.
    pub fn part(number: u32, region: &GuestRegionMmap<()>, offset: u64, length: u64) -> Option<Self> {
        let whole = Self::whole(number, region);
        if length == 0 || offset.checked_add(length)? > whole.length {
            return None;
        }
        let start = whole.start.checked_add(offset)?;
        Some(Self { start, length, host: whole.host.checked_add(offset)?, ..whole })
    }

    /// The same, but what the vCPUs write to it is lost.
    #[must_use]
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }
}

/// A machine that memory slots can be added to and removed from while it runs.
pub trait MemorySlots: Send + Sync {
    /// Adds a slot. Its number must be free, and its addresses in no other.
    ///
    /// # Errors
    /// As the ioctl.
    fn add(&self, slot: MemorySlot) -> io::Result<()>;

    /// Removes a slot: when this returns, no vCPU can reach the memory.
    ///
    /// # Errors
    /// As the ioctl.
    fn remove(&self, slot: MemorySlot) -> io::Result<()>;
}

impl MemorySlots for VmFd {
    fn add(&self, slot: MemorySlot) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.start.0,
            memory_size: slot.length,
            userspace_addr: slot.host,
        };
        // SAFETY: a `MemorySlot` is made of a region or part of one, which is guest memory and mapped until the process ends.
        Ok(unsafe { self.set_user_memory_region(region) }?)
    }

    fn remove(&self, slot: MemorySlot) -> io::Result<()> {
        let region = kvm_userspace_memory_region { slot: slot.number, memory_size: 0, ..Default::default() };
        // SAFETY: a slot of no bytes, which is how one is removed.
        Ok(unsafe { self.set_user_memory_region(region) }?)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    /// Memory slots of no machine.
    #[derive(Debug, Default)]
    pub(crate) struct FakeSlots {
        slots: Mutex<BTreeMap<u32, MemorySlot>>,
        /// How many more can be added.
        pub(crate) room: Mutex<Option<usize>>,
    }

    impl FakeSlots {
        /// Start, length and whether it is read-only, of each slot.
        pub(crate) fn ranges(&self) -> Vec<(u64, u64, bool)> {
            let slots = self.slots.lock().unwrap();
            let mut ranges: Vec<_> = slots.values().map(|s| (s.start.0, s.length, s.read_only)).collect();
            ranges.sort_unstable();
            ranges
        }
    }

    impl MemorySlots for FakeSlots {
        fn add(&self, slot: MemorySlot) -> io::Result<()> {
            if let Some(room) = &mut *self.room.lock().unwrap() {
                *room = room.checked_sub(1).ok_or(io::ErrorKind::OutOfMemory)?;
            }
            let mut slots = self.slots.lock().unwrap();
            let end = slot.start.0 + slot.length;
            let overlaps = slots
                .values()
                .any(|other| other.start.0 < end && slot.start.0 < other.start.0 + other.length);
            assert!(!overlaps, "{slot:?} overlaps {slots:?}");
            assert!(slots.insert(slot.number, slot).is_none(), "{slot:?} is there already");
            Ok(())
        }

        fn remove(&self, slot: MemorySlot) -> io::Result<()> {
            assert_eq!(self.slots.lock().unwrap().remove(&slot.number), Some(slot));
            Ok(())
        }
    }
}
