//! Files as read-only memory of the guest.
//!
//! A file is mapped into the window and gets a memory slot that is read-only: the vCPUs can read the host's own page cache, which
//! every machine that maps the file shares, and their writes are lost. The mapping itself is private and writable, for what a hostile guest
//! makes a device write there must neither reach the file nor end this process: it goes to a copy that only this process has.
//!
//! The file must keep its length: a page cut off ends the machine, by SIGBUS when a device touches it, and as an error of KVM when a vCPU
//! does. Whoever gives the file has made it, so that is a matter of trust, not of checks that a later truncation defeats.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use vm_memory::{Address, GuestAddress, GuestMemoryRegion};

use super::Region;
use super::reclaim::PAGE;
use super::slot::{self, MemorySlot, MemorySlots};
use crate::locked;

/// What the place of a file is a multiple of, in bytes: Linux maps a pmem device only if start and end are on boundaries of its subsections of
/// 2 MiB (Linux 6.12 drivers/nvdimm/claim.c and mm/memremap.c, memremap_compat_align()), and KVM maps huge pages only where guest and
/// host address agree modulo theirs, of the same size.
const ALIGN: u64 = 2 << 20;

/// A file cannot be memory of the guest.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// Neither pipe, directory nor device.
    #[error("it is not a regular file")]
    NotAFile,
    /// No bytes.
    #[error("the file is empty")]
    Empty,
    /// Too many, or too many beside those that are there.
    #[error("the machine has no room in its address space for a file of {0} bytes")]
    Full(u64),
    /// The file cannot be mapped.
    #[error("cannot map the file")]
    Map(#[source] io::Error),
    /// KVM refused.
    #[error("cannot add a read-only memory slot")]
    Slot(#[source] io::Error),
}

/// Where files appear.
pub struct Window {
    region: Region,
    slots: Arc<dyn MemorySlots>,
    /// By offset.
    taken: Mutex<BTreeMap<u64, Place>>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    /// In bytes, a multiple of [`ALIGN`].
    length: u64,
    number: u32,
}

impl Window {
    /// A window without files.
    pub fn new(region: Region, slots: Arc<dyn MemorySlots>) -> Self {
        Self { region, slots, taken: Mutex::default() }
    }

    /// Makes a file, open for reading, memory of the guest until the result is dropped.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn map(self: &Arc<Self>, file: OwnedFd) -> Result<MappedFile, WindowError> {
        let file = File::from(file);
        let metadata = file.metadata().map_err(WindowError::Map)?;
        if !metadata.is_file() {
            return Err(WindowError::NotAFile);
        }
        let bytes = metadata.len();
        if bytes == 0 {
            return Err(WindowError::Empty);
        }
        let full = WindowError::Full(bytes);
        let Some(length) = bytes.checked_next_multiple_of(ALIGN) else { return Err(full) };
        let Some((offset, number)) = self.take(length) else { return Err(full) };
        // Dropped, it undoes what has been done so far.
        let mut mapped = MappedFile { window: self.clone(), offset, bytes, length, slot: None };
        let Some(slot) = MemorySlot::part(number, &self.region, offset, length) else { return Err(full) };
        // What follows the end of the file up to the boundary stays what it was: pages of zeroes.
        self.map_fixed(offset, bytes.next_multiple_of(PAGE), Some(file.as_raw_fd()))
            .map_err(WindowError::Map)?;
        let slot = slot.read_only();
        self.slots.add(slot).map_err(WindowError::Slot)?;
        mapped.slot = Some(slot);
        Ok(mapped)
    }

    /// Takes the first place that is large enough, and a number.
    fn take(&self, length: u64) -> Option<(u64, u32)> {
        let mut taken = locked(self.taken.lock());
        let mut offset = 0;
        for (&start, place) in &*taken {
            if start - offset >= length {
                break;
            }
            offset = start + place.length;
        }
        if offset.checked_add(length)? > self.region.len() {
            return None;
        }
        let number = (slot::WINDOW..slot::HOTPLUG)
            .find(|&number| taken.values().all(|place| place.number != number))?;
        taken.insert(offset, Place { length, number });
        Some((offset, number))
    }

    /// Maps a file, or pages of zeroes, in place of what is at `offset`, which with `length` is in the region.
    fn map_fixed(&self, offset: u64, length: u64, file: Option<RawFd>) -> io::Result<()> {
        let at = self.region.as_ptr().wrapping_add(offset as usize).cast();
        let kind = if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | kind;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the place is in a mapping of ours that is accessed as guest memory only: volatile, and without Rust references to
        // it. So it may change under whoever looks at it.
        let mapped = unsafe { libc::mmap(at, length as usize, prot, flags, file.unwrap_or(-1), 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range has just been mapped; the advice does not change its contents.
        if unsafe { libc::madvise(at, length as usize, libc::MADV_DONTDUMP) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A file that is memory of the guest.
pub struct MappedFile {
    window: Arc<Window>,
    offset: u64,
    bytes: u64,
    length: u64,
    slot: Option<MemorySlot>,
}

impl MappedFile {
    /// Where it begins.
    pub fn start(&self) -> GuestAddress {
        // The window was laid out below 2^46.
        self.window.region.start_addr().unchecked_add(self.offset)
    }

    /// How long the memory is in bytes: the file, and zeroes up to a boundary of 2 MiB.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// How long the file is in bytes.
    pub fn file_length(&self) -> u64 {
        self.bytes
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        if let Some(slot) = self.slot
            && let Err(e) = self.window.slots.remove(slot)
        {
            // The guest keeps reading the file, so its place stays taken.
            log::error!("cannot remove the memory slot of a file: {e}");
            return;
        }
        match self.window.map_fixed(self.offset, self.length, None) {
            Ok(()) => {
                locked(self.window.taken.lock()).remove(&self.offset);
            }
            Err(e) => log::error!("cannot unmap a file: {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::memory::slot::testing::FakeSlots;
    use crate::memory::{Backing, map_region};

    const MIB: u64 = 1 << 20;
    const START: u64 = 1 << 33;

    struct Bench {
        slots: Arc<FakeSlots>,
        window: Arc<Window>,
        mem: GuestMemoryMmap<()>,
    }

    fn bench() -> Bench {
        let region = Arc::new(map_region(GuestAddress(START), 16 * MIB, Backing::Files).unwrap());
        let slots = Arc::new(FakeSlots::default());
        let mem = GuestMemoryMmap::from_arc_regions(vec![region.clone()]).unwrap();
        Bench { window: Arc::new(Window::new(region, slots.clone())), slots, mem }
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        file
    }

    fn of_length(length: u64) -> OwnedFd {
        let file = file(b"");
        file.set_len(length).unwrap();
        file.into()
    }

    #[test]
    fn file_appears_with_zeroes_behind_it_and_disappears() {
        let Bench { slots, window, mem } = bench();
        let bytes: Vec<u8> = (0..5000).map(|i| i as u8 | 1).collect();
        let mapped = window.map(file(&bytes).into()).unwrap();
        assert_eq!((mapped.start().0, mapped.length(), mapped.file_length()), (START, 2 * MIB, 5000));
        assert_eq!(slots.ranges(), [(START, 2 * MIB, true)]);
        let mut seen = vec![0xff; 2 * MIB as usize];
        mem.read_slice(&mut seen, GuestAddress(START)).unwrap();
        assert_eq!(&seen[..5000], bytes);
        assert!(seen[5000..].iter().all(|&byte| byte == 0));
        drop(mapped);
        assert_eq!(slots.ranges(), []);
        assert_eq!(mem.read_obj::<u64>(GuestAddress(START)).unwrap(), 0);
    }

    #[test]
    fn what_a_device_writes_reaches_neither_file_nor_another_machine() {
        let (one, two) = (bench(), bench());
        let mut image = file(b"content");
        let mapped = one.window.map(image.try_clone().unwrap().into()).unwrap();
        let same = two.window.map(image.try_clone().unwrap().into()).unwrap();
        one.mem.write_slice(b"garbage", mapped.start()).unwrap();
        one.mem.write_slice(b"garbage", GuestAddress(START + 2 * MIB - 8)).unwrap();
        let mut seen = [0; 7];
        two.mem.read_slice(&mut seen, same.start()).unwrap();
        assert_eq!(&seen, b"content");
        let mut text = String::new();
        image.rewind().unwrap();
        image.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
    }

    #[test]
    fn file_opened_for_reading_only_will_do() {
        let Bench { window, mem, .. } = bench();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"read only").unwrap();
        let mapped = window.map(File::open(file.path()).unwrap().into()).unwrap();
        mem.write_obj(0u8, mapped.start()).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"read only");
    }

    #[test]
    fn places_are_given_out_without_overlap_and_used_again() {
        let Bench { slots, window, .. } = bench();
        let first = window.map(of_length(3 * MIB)).unwrap();
        let second = window.map(of_length(2 * MIB)).unwrap();
        let third = window.map(of_length(2 * MIB + 1)).unwrap();
        let at = |offset: u64, length: u64| (START + offset * MIB, length * MIB, true);
        assert_eq!(slots.ranges(), [at(0, 4), at(4, 2), at(6, 4)]);
        drop(second);
        let longer = window.map(of_length(3 * MIB)).unwrap();
        assert_eq!(longer.start().0, START + 10 * MIB);
        let fits = window.map(of_length(1)).unwrap();
        assert_eq!(fits.start().0, START + 4 * MIB);
        assert!(matches!(window.map(of_length(2 * MIB + 1)), Err(WindowError::Full(_))));
        drop((first, third, longer, fits));
        assert_eq!(window.map(of_length(16 * MIB)).unwrap().length(), 16 * MIB);
    }

    #[test]
    fn what_is_not_a_file_with_bytes_is_refused() {
        let Bench { slots, window, .. } = bench();
        assert!(matches!(window.map(of_length(0)), Err(WindowError::Empty)));
        let directory = File::open("/").unwrap();
        assert!(matches!(window.map(directory.into()), Err(WindowError::NotAFile)));
        let device = File::open("/dev/null").unwrap();
        assert!(matches!(window.map(device.into()), Err(WindowError::NotAFile)));
        for length in [16 * MIB + 1, 1 << 62] {
            assert!(matches!(window.map(of_length(length)), Err(WindowError::Full(_))));
        }
        *slots.room.lock().unwrap() = Some(0);
        assert!(matches!(window.map(of_length(1)), Err(WindowError::Slot(_))));
        // A failed attempt leaves no place taken.
        *slots.room.lock().unwrap() = None;
        assert_eq!(window.map(of_length(16 * MIB)).unwrap().start().0, START);
    }
}
