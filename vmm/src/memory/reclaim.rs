//! Pages of guest memory given back to the host.

use std::io;

use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryRegion};

use crate::devices::virtio::GuestRam;

/// The unit in which memory is given back, in bytes.
pub const PAGE: u64 = 4096;

/// A range is not all in memory that can be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length:#x} bytes at {start:#x} are not memory that can be given back")]
pub struct NotReclaimable {
    start: u64,
    length: u64,
}

/// Guest memory whose pages can be given back: RAM, and where memory may be plugged, but no file.
#[derive(Clone, Debug)]
pub struct Reclaimable {
    memory: GuestRam,
}

impl Reclaimable {
    /// `memory` must be private and anonymous, as [`AddressSpace::anonymous`](super::AddressSpace::anonymous) is.
    pub fn new(memory: GuestRam) -> Self {
        Self { memory }
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> u64 {
        self.memory.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Gives back the whole pages among `length` bytes at `start`: they read as zero from now on, and cost nothing until
    /// they are touched again. Returns how many bytes that are.
    ///
    /// This is one madvise(2); it takes as long as freeing the pages does, some milliseconds for 128 MiB in small pages.
    ///
    /// # Errors
    /// [`NotReclaimable`]; nothing has happened.
    pub fn give_back(&self, start: GuestAddress, length: u64) -> Result<u64, NotReclaimable> {
        let refused = NotReclaimable { start: start.0, length };
        let end = start.0.checked_add(length).ok_or(refused)?;
        let region = self.memory.find_region(start).ok_or(refused)?;
        let base = region.start_addr();
        if end > base.unchecked_add(region.len()).0 {
            return Err(refused);
        }
        let first = start.0.next_multiple_of(PAGE);
        let bytes = (end / PAGE * PAGE).saturating_sub(first);
        if bytes == 0 {
            return Ok(0);
        }
        // A region starts and ends on page boundaries, so rounding stays inside.
        let host = region.as_ptr().wrapping_add((first - base.0) as usize);
        // SAFETY: the range lies in a private anonymous mapping of guest memory. Its bytes become zero, which is what guest memory can
        // do at any time as far as this program is concerned: it holds no Rust reference to any of it.
        let outcome = unsafe { libc::madvise(host.cast(), bytes as usize, libc::MADV_DONTNEED) };
        if outcome != 0 {
            // madvise(2): only a range that is not mapped, or locked, and neither is.
            log::error!("cannot give memory back: {}", io::Error::last_os_error());
            return Ok(0);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::arch::MemoryLayout;
    use crate::memory::{AddressSpace, Region};

    const MIB: u64 = 1 << 20;

    fn space() -> AddressSpace {
        AddressSpace::map(&MemoryLayout {
            ram: vec![(GuestAddress(0), 4 * MIB)],
            hotplug: Some((GuestAddress(1 << 32), 4 * MIB)),
            window: Some((GuestAddress((1 << 32) + 4 * MIB), 4 * MIB)),
        })
        .unwrap()
    }

    /// How many bytes of a region have pages of the host.
    fn resident(region: &Region) -> usize {
        let mut pages = vec![0u8; (region.len() / PAGE) as usize];
        // SAFETY: the region is mapped, and the vector has a byte for each of its pages.
        let outcome =
            unsafe { libc::mincore(region.as_ptr().cast(), region.len() as usize, pages.as_mut_ptr()) };
        assert_eq!(outcome, 0);
        pages.iter().filter(|&&page| page & 1 == 1).count() * PAGE as usize
    }

    #[test]
    fn pages_given_back_cost_nothing_and_read_as_zero() {
        let space = space();
        let reclaimable = Reclaimable::new(space.anonymous.clone());
        let plugged = space.hotplug.clone().unwrap();
        let start = plugged.start_addr();
        space.all.write_slice(&vec![7; 4 << 20], start).unwrap();
        assert_eq!(resident(&plugged), 4 << 20);
        assert_eq!(reclaimable.give_back(start, 4 * MIB), Ok(4 * MIB));
        assert_eq!(resident(&plugged), 0);
        assert_eq!(space.all.read_obj::<u64>(start).unwrap(), 0);
    }

    #[test]
    fn only_whole_pages_are_given_back() {
        let space = space();
        let reclaimable = Reclaimable::new(space.anonymous.clone());
        space.all.write_slice(&[7; 3 * 4096], GuestAddress(0)).unwrap();
        assert_eq!(reclaimable.give_back(GuestAddress(1), 2 * 4096 + 4094), Ok(4096));
        assert_eq!(reclaimable.give_back(GuestAddress(1), 4096), Ok(0));
        assert_eq!(reclaimable.give_back(GuestAddress(0), 0), Ok(0));
        let bytes: Vec<u8> = [0u64, 4095, 4096, 8191, 8192]
            .iter()
            .map(|&at| space.all.read_obj(GuestAddress(at)).unwrap())
            .collect();
        assert_eq!(bytes, [7, 7, 0, 0, 7]);
    }

    #[test]
    fn what_is_not_all_memory_is_refused() {
        let space = space();
        let reclaimable = Reclaimable::new(space.anonymous.clone());
        assert_eq!(reclaimable.bytes(), 8 * MIB);
        let window = space.window.as_ref().unwrap().start_addr().0;
        for (start, length) in [
            (4 * MIB, 4096),
            (4 * MIB - 4096, 8192),
            (0, u64::MAX),
            (u64::MAX - 4095, 4096),
            (1 << 32, 4 * MIB + 1),
            (window, 4096),
            (window - 4096, 8192),
        ] {
            assert!(reclaimable.give_back(GuestAddress(start), length).is_err(), "{start:#x} {length:#x}");
        }
    }
}
