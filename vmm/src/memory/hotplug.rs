//! Memory that is plugged and unplugged block by block.
//!
//! Each plugged block has a memory slot of its own, and an unplugged one has none: so what is unplugged, the guest cannot use, and
//! blocks come and go without a moment in which a vCPU would miss another. KVM has some 32,000 slots (509 on old hosts); where the
//! region has more blocks of the smallest size, blocks are larger.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use kvrun_vmm_api::config::MEM_BLOCK_MIB;
use vm_memory::{Address, GuestAddress, GuestMemoryRegion};

use super::Region;
use super::reclaim::Reclaimable;
use super::slot::{self, MemorySlot, MemorySlots};
use crate::locked;

/// The smallest block in bytes: a huge page.
const MIN_BLOCK: u64 = (MEM_BLOCK_MIB as u64) << 20;

/// Where memory can be plugged.
pub struct Hotplug {
    region: Region,
    slots: Arc<dyn MemorySlots>,
    reclaimable: Reclaimable,
    block: u64,
    /// Whether each block is plugged.
    blocks: Mutex<Vec<bool>>,
    /// In bytes.
    plugged: AtomicU64,
}

/// What a range of blocks is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// All are.
    All,
    /// None is.
    None,
    /// Some are.
    Some,
}

impl Hotplug {
    /// Nothing is plugged in `region`, of which `reclaimable` is to contain all. KVM has `max_slots` memory slots altogether.
    pub fn new(
        region: Region,
        slots: Arc<dyn MemorySlots>,
        reclaimable: Reclaimable,
        max_slots: usize,
    ) -> Self {
        let most = (max_slots as u64).saturating_sub(slot::HOTPLUG.into()).max(1);
        let mut block = MIN_BLOCK;
        while region.len().div_ceil(block) > most {
            block *= 2;
        }
        // A rest that is no whole block is not used; there is none unless the host is old and the region huge, for its length is a multiple
        // of 2 GiB.
        let blocks = Mutex::new(vec![false; (region.len() / block) as usize]);
        Self { region, slots, reclaimable, block, blocks, plugged: AtomicU64::new(0) }
    }

    /// The size of a block in bytes, a power of two.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Where the region begins.
    pub fn start(&self) -> GuestAddress {
        self.region.start_addr()
    }

    /// How long it is in bytes.
    pub fn length(&self) -> u64 {
        self.blocks().end * self.block
    }

    /// How many bytes are plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged.load(Ordering::Relaxed)
    }

    /// All blocks.
    pub fn blocks(&self) -> Range<u64> {
        0..locked(self.blocks.lock()).len() as u64
    }

    /// What a range of blocks, all of which exist, is like.
    pub fn state(&self, range: &Range<u64>) -> Plugged {
        let blocks = locked(self.blocks.lock());
        let range = &blocks[range.start as usize..range.end as usize];
        match range.iter().filter(|&&plugged| plugged).count() {
            0 => Plugged::None,
            count if count == range.len() => Plugged::All,
            _ => Plugged::Some,
        }
    }

    /// Whether each block is plugged, for saving.
    pub fn save(&self) -> Vec<bool> {
        locked(self.blocks.lock()).clone()
    }

    /// Plugs a block; one that is plugged stays so.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn plug(&self, block: u64) -> io::Result<()> {
        self.change(block, true)
    }

    /// Unplugs a block and gives its memory back; one that is unplugged stays so.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn unplug(&self, block: u64) -> io::Result<()> {
        self.change(block, false)
    }

    fn change(&self, block: u64, plug: bool) -> io::Result<()> {
        let mut blocks = locked(self.blocks.lock());
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let state = blocks.get_mut(block as usize).ok_or_else(invalid)?;
        if *state == plug {
            return Ok(());
        }
        let offset = block * self.block;
        let number = slot::HOTPLUG + block as u32;
        let memory = MemorySlot::part(number, &self.region, offset, self.block).ok_or_else(invalid)?;
        if plug {
            self.slots.add(memory)?;
            self.plugged.fetch_add(self.block, Ordering::Relaxed);
        } else {
            self.slots.remove(memory)?;
            self.plugged.fetch_sub(self.block, Ordering::Relaxed);
            let start = self.start().unchecked_add(offset);
            self.reclaimable.give_back(start, self.block).map_err(io::Error::other)?;
        }
        *state = plug;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::devices::virtio::GuestRam;
    use crate::memory::slot::testing::FakeSlots;
    use crate::memory::{Backing, map_region};

    /// Where the region of [`hotplug`] begins.
    pub(crate) const START: u64 = 4 << 30;

    /// A region of so many blocks of 2 MiB, with its slots and its memory.
    pub(crate) fn hotplug(blocks: u64) -> (Arc<Hotplug>, Arc<FakeSlots>, GuestRam) {
        let region = Arc::new(map_region(GuestAddress(START), blocks * MIN_BLOCK, Backing::Memory).unwrap());
        let mem = Arc::new(GuestMemoryMmap::from_arc_regions(vec![region.clone()]).unwrap());
        let slots = Arc::new(FakeSlots::default());
        let hotplug = Hotplug::new(region, slots.clone(), Reclaimable::new(mem.clone()), 32_764);
        (Arc::new(hotplug), slots, mem)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::testing::{START, hotplug};
    use super::*;
    use crate::memory::slot::testing::FakeSlots;
    use crate::memory::{Backing, map_region};

    const MIB: u64 = 1 << 20;

    #[test]
    fn plugged_blocks_and_no_others_have_memory_slots() {
        let (hotplug, slots, _) = hotplug(8);
        assert_eq!((hotplug.start().0, hotplug.length(), hotplug.block()), (START, 16 * MIB, 2 * MIB));
        for block in [1, 2, 7, 2] {
            hotplug.plug(block).unwrap();
        }
        let at = |block: u64| (START + block * 2 * MIB, 2 * MIB, false);
        assert_eq!(slots.ranges(), [at(1), at(2), at(7)]);
        assert_eq!(hotplug.plugged(), 6 * MIB);
        assert_eq!(hotplug.state(&(1..3)), Plugged::All);
        assert_eq!(hotplug.state(&(0..8)), Plugged::Some);
        assert_eq!(hotplug.state(&(3..7)), Plugged::None);
        for block in [2, 1, 0] {
            hotplug.unplug(block).unwrap();
        }
        assert_eq!(slots.ranges(), [at(7)]);
        assert_eq!(hotplug.plugged(), 2 * MIB);
        assert_eq!(hotplug.save(), [false, false, false, false, false, false, false, true]);
        assert!(hotplug.plug(8).is_err());
    }

    #[test]
    fn memory_that_comes_back_is_zero() {
        let (hotplug, _, mem) = hotplug(2);
        hotplug.plug(0).unwrap();
        mem.write_slice(&vec![7; 4 << 20], GuestAddress(START)).unwrap();
        hotplug.unplug(0).unwrap();
        assert_eq!(mem.read_obj::<u64>(GuestAddress(START)).unwrap(), 0);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(START + 2 * MIB)).unwrap(), 7);
    }

    #[test]
    fn block_stays_unplugged_when_kvm_refuses() {
        let (hotplug, slots, _) = hotplug(2);
        *slots.room.lock().unwrap() = Some(0);
        assert!(hotplug.plug(0).is_err());
        assert_eq!((hotplug.plugged(), hotplug.state(&(0..2))), (0, Plugged::None));
    }

    #[test]
    fn blocks_are_as_large_as_the_number_of_slots_demands() {
        const GIB: u64 = 1 << 30;
        for (length, max_slots, block) in [
            (2 * GIB, 32_764, 2 * MIB),
            (62 * GIB, 32_764, 2 * MIB),
            (64 * GIB, 32_764, 4 * MIB),
            (1024 * GIB, 32_764, 64 * MIB),
            (2 * GIB, 509, 8 * MIB),
            (1024 * GIB, 509, 4 * GIB),
        ] {
            let region = Arc::new(map_region(GuestAddress(START), length, Backing::Memory).unwrap());
            let slots = Arc::new(FakeSlots::default());
            let mem = vm_memory::GuestMemoryMmap::from_arc_regions(vec![region.clone()]).unwrap();
            let hotplug = Hotplug::new(region, slots.clone(), Reclaimable::new(mem.into()), max_slots);
            assert_eq!(hotplug.block(), block, "{length:#x} {max_slots}");
            assert_eq!(hotplug.length(), length);
            hotplug.plug(hotplug.blocks().end - 1).unwrap();
            assert_eq!(slots.ranges(), [(START + length - block, block, false)]);
        }
    }
}
