//! Guest memory: where it comes from, and how the host backs it.

use std::io;
use std::ptr;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};

use crate::arch;
use crate::devices::virtio::GuestRam;

/// Size and alignment of a huge page of the host, and of the largest page KVM maps for ordinary memory.
const HUGE_PAGE: usize = 2 << 20;

/// Whether the host is asked to back guest memory with transparent huge pages.
///
/// See [`advise`] for what was measured.
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
    /// `vm-memory` refuses the region.
    #[error("cannot use the mapping as guest memory")]
    Region(#[from] MmapRegionError),
    /// The regions do not form a guest memory.
    #[error("cannot lay out guest memory")]
    Layout(#[from] GuestRegionCollectionError),
}

/// Maps `memory_mib` MiB of zeroed guest memory, laid out as [`arch::memory_regions`] says.
///
/// Only address space is taken; the host hands out pages as the guest (or the loader) touches them. The mapping lives until
/// the process ends, as the one machine in it does.
///
/// # Errors
/// [`MemoryError`] if the host has not the address space.
pub fn allocate(memory_mib: u32) -> Result<GuestRam, MemoryError> {
    let regions = arch::memory_regions(u64::from(memory_mib) << 20)
        .into_iter()
        .map(|(base, length)| map_region(base, length))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Arc::new(GuestMemoryMmap::from_regions(regions)?))
}

fn map_region(base: GuestAddress, length: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
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
    advise(aligned, size).map_err(map_error)?;
    // SAFETY: `aligned` and `size` lie within the mapping just made, which is never unmapped.
    let region = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(aligned) }
        .with_mmap_prot(prot)
        .with_mmap_flags(flags)
        .build()?;
    // `length` plus a base below 2^46 does not wrap: see `arch::memory_regions`.
    GuestRegionMmap::new(region, base).ok_or_else(|| map_error(io::ErrorKind::InvalidInput.into()))
}

/// Tells the host how a region is used.
fn advise(start: *mut u8, size: usize) -> io::Result<()> {
    // A core dump of the VMM must not hold the guest's secrets.
    let mut advice = vec![libc::MADV_DONTDUMP];
    if HUGE_PAGES {
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
