//! Guest memory: where it comes from, and how the host backs it.
//!
//! The guest's physical address space is fixed at boot ([`AddressSpace`]): RAM, where memory may be plugged, where files may
//! appear. All of it is mapped, as address space that costs nothing until it is touched, so whatever address a device finds in a
//! queue stays what it was. What the guest can reach of it is a matter of KVM's memory slots:
//!
//! * [`slot`] - memory slots, and who has which numbers.
//! * [`hotplug`] - memory that is plugged and unplugged, for virtio-mem.
//! * [`window`] - files as read-only memory, for virtio-pmem.
//! * [`devices`] - virtio-mem, virtio-pmem and virtio-balloon, made of all this.
//! * [`reclaim`] - pages given back to the host, for virtio-balloon and virtio-mem.
//!
//! A hostile guest can have its devices write where it has no memory slot. That gains it nothing but pages of zeroes or private
//! copies of file pages, charged to its pod, which it cannot reach.

pub mod devices;
pub mod hotplug;
pub mod reclaim;
pub mod slot;
pub mod window;

use std::io;
use std::ptr;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};

use crate::arch::{self, AddressSpaceTooSmall, MemoryLayout};
use crate::devices::virtio::GuestRam;

/// Size and alignment of a huge page of the host, and of the largest page KVM maps for ordinary memory.
const HUGE_PAGE: usize = 2 << 20;

/// Whether the host is asked to back guest memory with transparent huge pages.
///
/// Booting to the guest's init touches some 35 MiB. In pages of 4 KiB that is thousands of nested page faults, and they
/// are what costs. Measured with the lab's deterministic clock (CPU without ERMS, whose byte-wise string instructions it
/// overcharges), 128 MiB, kernel of 13 MiB, in ms from start to the guest's init (and
/// resident MiB): huge pages with the kernel read into them 84 (36); the same in small pages 123 (30); kernel and initramfs mapped
/// privately from their files instead of read, 132 with huge pages elsewhere (32), 150 with small pages only (27).
/// So mapping the files saves the copy and pays for it twice over in faults, most of them copies on write, for the kernel
/// patches its own text as it boots.
const HUGE_PAGES: bool = true;

/// Guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refuses the address space.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// How many were wanted.
        bytes: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// More than the processor can address.
    #[error(transparent)]
    TooLarge(#[from] AddressSpaceTooSmall),
    /// `vm-memory` refuses the region.
    #[error("cannot use the mapping as guest memory")]
    Region(#[from] MmapRegionError),
    /// The regions do not form a guest memory.
    #[error("cannot lay out guest memory")]
    Layout(#[from] GuestRegionCollectionError),
}

/// A stretch of guest physical addresses and what is behind them in this process. Never unmapped: the one machine of the process
/// ends with it.
pub type Region = Arc<GuestRegionMmap<()>>;

/// All that may ever be guest memory.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    /// What the machine boots with.
    pub ram: GuestRam,
    /// RAM and where memory may be plugged: all that is no file.
    pub anonymous: GuestRam,
    /// Everything, for devices.
    pub all: GuestRam,
    /// Where memory may be plugged.
    pub hotplug: Option<Region>,
    /// Where files may appear.
    pub window: Option<Region>,
}

impl AddressSpace {
    /// Maps what `layout` says. Only address space is taken; the host hands out pages of zeroes as they are touched.
    ///
    /// # Errors
    /// [`MemoryError`] if the host has not the address space for RAM. That it has none for what may be plugged, or for files, is no
    /// error: there is none, then.
    pub fn map(layout: &MemoryLayout) -> Result<Self, MemoryError> {
        let map =
            |&(base, length): &(GuestAddress, u64), backing| map_region(base, length, backing).map(Arc::new);
        let ram: Vec<Region> =
            layout.ram.iter().map(|range| map(range, Backing::Memory)).collect::<Result<_, _>>()?;
        // A host that accounts for address space (vm.overcommit_memory=2) may refuse these.
        let hotplug = layout.hotplug.as_ref().and_then(|range| map(range, Backing::Memory).ok());
        let window = layout.window.as_ref().and_then(|range| map(range, Backing::Files).ok());
        let anonymous: Vec<Region> = ram.iter().chain(&hotplug).cloned().collect();
        let all = anonymous.iter().chain(&window).cloned().collect();
        Ok(Self {
            ram: Arc::new(GuestMemoryMmap::from_arc_regions(ram)?),
            anonymous: Arc::new(GuestMemoryMmap::from_arc_regions(anonymous)?),
            all: Arc::new(GuestMemoryMmap::from_arc_regions(all)?),
            hotplug,
            window,
        })
    }
}

/// Maps `memory_mib` MiB of RAM and nothing else, for a machine that is not for a pod.
///
/// # Errors
/// As [`AddressSpace::map`].
pub fn allocate(memory_mib: u32) -> Result<GuestRam, MemoryError> {
    let ram = arch::memory_regions(u64::from(memory_mib) << 20);
    Ok(AddressSpace::map(&MemoryLayout { ram, hotplug: None, window: None })?.ram)
}

/// What will be in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// The guest's memory.
    Memory,
    /// Files.
    Files,
    /// What the guest reads of devices.
    Registers,
}

pub(crate) fn map_region(
    base: GuestAddress,
    length: u64,
    backing: Backing,
) -> Result<GuestRegionMmap<()>, MemoryError> {
    let map_error = |source| MemoryError::Map { bytes: length, source };
    let size = usize::try_from(length)
        .ok()
        .filter(|size| size.checked_add(HUGE_PAGE).is_some())
        .ok_or_else(|| map_error(io::ErrorKind::OutOfMemory.into()))?;
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // One huge page more than asked for, to place the region on a huge page boundary: KVM maps a huge page only where
    // guest physical and host virtual address agree modulo its size. The rest is never touched, so it costs nothing.
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(ptr::null_mut(), size + HUGE_PAGE, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(map_error(io::Error::last_os_error()));
    }
    let start = start.cast::<u8>();
    let aligned = start.wrapping_add(start.align_offset(HUGE_PAGE));
    advise(aligned, size, backing).map_err(map_error)?;
    // SAFETY: `aligned` and `size` lie within the mapping just made, which is never unmapped.
    let region = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(aligned) }
        .with_mmap_prot(prot)
        .with_mmap_flags(flags)
        .build()?;
    // `length` plus a base below 2^46 does not wrap: see `arch::memory_layout`.
    GuestRegionMmap::new(region, base).ok_or_else(|| map_error(io::ErrorKind::InvalidInput.into()))
}

/// Tells the host how a region is used.
fn advise(start: *mut u8, size: usize, backing: Backing) -> io::Result<()> {
    // A core dump of the VMM must not hold the guest's secrets.
    let mut advice = vec![libc::MADV_DONTDUMP];
    if HUGE_PAGES && backing == Backing::Memory {
        advice.push(libc::MADV_HUGEPAGE);
    }
    for advice in advice {
        // SAFETY: the range is a mapping of ours; neither advice changes its contents.
        if unsafe { libc::madvise(start.cast(), size, advice) } != 0 {
            let error = io::Error::last_os_error();
            // A host kernel without transparent huge pages.
            if advice == libc::MADV_HUGEPAGE && error.raw_os_error() == Some(libc::EINVAL) {
                continue;
            }
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemory, GuestMemoryRegion};

    use super::*;

    #[test]
    fn memory_is_zero_writable_and_aligned_to_huge_pages() {
        let mem = allocate(64).unwrap();
        let region = mem.iter().next().unwrap();
        assert_eq!(region.len(), 64 << 20);
        assert_eq!(region.as_ptr() as usize % HUGE_PAGE, 0);
        let last = GuestAddress((64 << 20) - 8);
        assert_eq!(mem.read_obj::<u64>(last).unwrap(), 0);
        mem.write_obj(42u64, last).unwrap();
        assert_eq!(mem.read_obj::<u64>(last).unwrap(), 42);
        assert!(mem.write_obj(0u8, GuestAddress(64 << 20)).is_err());
    }

    #[test]
    fn memory_beyond_the_gap_is_its_own_region() {
        let mem = allocate(4096).unwrap();
        let regions: Vec<_> = mem.iter().map(|region| (region.start_addr().0, region.len())).collect();
        assert_eq!(regions, [(0, 3 << 30), (4 << 30, 1 << 30)]);
        assert!(mem.iter().all(|region| (region.as_ptr() as usize).is_multiple_of(HUGE_PAGE)));
        assert!(mem.write_obj(1u8, GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn devices_see_all_of_the_address_space_and_the_loader_only_ram() {
        const MIB: u64 = 1 << 20;
        let layout = MemoryLayout {
            ram: vec![(GuestAddress(0), 64 * MIB)],
            hotplug: Some((GuestAddress(1 << 32), 256 * MIB)),
            window: Some((GuestAddress(2 << 32), 1 << 40)),
        };
        let space = AddressSpace::map(&layout).unwrap();
        assert_eq!(space.ram.last_addr(), GuestAddress(64 * MIB - 1));
        for address in [0, 1 << 32, 2 << 32, (2 << 32) + (1 << 40) - 1] {
            assert!(space.all.write_obj(1u8, GuestAddress(address)).is_ok(), "{address:#x}");
        }
        assert!(space.all.write_obj(1u8, GuestAddress((1 << 32) + 256 * MIB)).is_err());
        assert_eq!(space.hotplug.unwrap().start_addr(), GuestAddress(1 << 32));
        // These are too large for any host; the machine does without.
        let too_large = Some((GuestAddress(2 << 32), 1 << 47));
        let layout = MemoryLayout { window: too_large, hotplug: too_large, ..layout };
        let space = AddressSpace::map(&layout).unwrap();
        assert!(space.window.is_none() && space.hotplug.is_none());
    }

    #[test]
    fn more_than_the_host_has_addresses_for_is_an_error() {
        // 2^47 bytes: all of the user's half of the address space.
        assert!(matches!(
            map_region(GuestAddress(0), 1 << 47, Backing::Memory),
            Err(MemoryError::Map { .. })
        ));
        assert!(matches!(
            map_region(GuestAddress(0), u64::MAX, Backing::Memory),
            Err(MemoryError::Map { .. })
        ));
    }
}
