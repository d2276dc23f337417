//! The kernel image: an uncompressed ELF with a PVH note, checked and loaded.
//!
//! Every number of the file is checked against the length of the file and the size of the memory before it is used.
//! Layout: System V ABI, "Object Files"; the note: Xen docs/misc/pvh.pandoc and include/public/elfnote.h.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemory};

use super::layout;
use crate::devices::virtio::GuestRam;

const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const NHDR_SIZE: usize = 12;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// "Address of the 32-bit entry point", in notes of the name "Xen".
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// The longest note segment that is read: Linux's takes under 1 KiB.
const MAX_NOTES: u64 = 64 * 1024;

/// A kernel image cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It does not begin as an ELF does.
    #[error("the kernel image is not an ELF file; kvrun needs an uncompressed vmlinux, not a bzImage")]
    NotElf,
    /// An ELF for something else.
    #[error("the kernel image is not a 64-bit little-endian x86 ELF file")]
    WrongMachine,
    /// The file ends before what it announces.
    #[error("the kernel image is truncated: {what} ends at byte {end}, the file at byte {length}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// Where the file ends.
        length: u64,
    },
    /// A number in it makes no sense.
    #[error("the kernel image is corrupt: {0}")]
    Corrupt(&'static str),
    /// No PVH note.
    #[error("the kernel has no PVH entry point; build it with CONFIG_PVH=y")]
    NoPvhNote,
    /// The guest has too little memory for it.
    #[error(
        "the kernel needs memory up to {end:#x}, the guest has memory up to {memory_end:#x}; give it more memory"
    )]
    DoesNotFit {
        /// Its last byte.
        end: u64,
        /// The end of memory below the gap.
        memory_end: u64,
    },
    /// The file cannot be read.
    #[error("cannot read the kernel image")]
    Read(#[source] io::Error),
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedKernel {
    /// The PVH entry point.
    pub entry: GuestAddress,
    /// The first address after it, its zeroed data included.
    pub end: GuestAddress,
}

/// A part of the file and where it goes. Checked: the part is in the file, its place is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    file_size: u64,
    address: u64,
}

/// Loads a kernel.
///
/// # Errors
/// [`KernelError`]; guest memory may then hold parts of the kernel.
pub fn load(file: &File, mem: &GuestRam) -> Result<LoadedKernel, KernelError> {
    let length = file.metadata().map_err(KernelError::Read)?.len();
    let memory_end = layout::GAP_START.min(mem.last_addr().0 + 1);
    let image = Image { file, length };
    let (segments, kernel) = image.parse(memory_end)?;
    for segment in segments {
        place(file, segment, mem)?;
    }
    Ok(kernel)
}

/// Puts one segment into guest memory. What follows it, up to its size in memory, is zero already.
fn place(file: &File, segment: Segment, mem: &GuestRam) -> Result<(), KernelError> {
    let size =
        usize::try_from(segment.file_size).map_err(|_| KernelError::Corrupt("a segment is too large"))?;
    super::boot::read_into(file, segment.offset, mem, GuestAddress(segment.address), size)
        .map_err(KernelError::Read)
}

struct Image<'a> {
    file: &'a File,
    length: u64,
}

impl Image<'_> {
    fn parse(&self, memory_end: u64) -> Result<(Vec<Segment>, LoadedKernel), KernelError> {
        let mut header = [0; EHDR_SIZE];
        if self.length < 4 {
            return Err(KernelError::NotElf);
        }
        self.read(&mut header[..4], 0, "the ELF magic")?;
        if header[..4] != *b"\x7fELF" {
            return Err(KernelError::NotElf);
        }
        self.read(&mut header, 0, "the ELF header")?;
        if header[4] != ELFCLASS64 || header[5] != ELFDATA2LSB || u16_at(&header, 18) != EM_X86_64 {
            return Err(KernelError::WrongMachine);
        }
        if usize::from(u16_at(&header, 54)) != PHDR_SIZE {
            return Err(KernelError::Corrupt("its program headers have the wrong size"));
        }
        // At most 65535 headers of 56 bytes.
        let mut headers = vec![0; usize::from(u16_at(&header, 56)) * PHDR_SIZE];
        self.read(&mut headers, u64_at(&header, 32), "the program header table")?;

        let (mut segments, mut entry, mut end) = (Vec::new(), None, 0);
        for header in headers.chunks_exact(PHDR_SIZE) {
            let (offset, file_size) = (u64_at(header, 8), u64_at(header, 32));
            match u32_at(header, 0) {
                PT_LOAD => {
                    let (address, memory_size) = (u64_at(header, 24), u64_at(header, 40));
                    self.check(offset, file_size, "a segment")?;
                    if memory_size < file_size {
                        return Err(KernelError::Corrupt("a segment is larger in the file than in memory"));
                    }
                    if address < layout::HIGH_RAM.0 {
                        return Err(KernelError::Corrupt("a segment lies below 1 MiB"));
                    }
                    let segment_end = address
                        .checked_add(memory_size)
                        .ok_or(KernelError::Corrupt("a segment wraps around the address space"))?;
                    if segment_end > memory_end {
                        return Err(KernelError::DoesNotFit { end: segment_end, memory_end });
                    }
                    end = end.max(segment_end);
                    segments.push(Segment { offset, file_size, address });
                }
                PT_NOTE if entry.is_none() => {
                    self.check(offset, file_size, "a note segment")?;
                    let mut notes = vec![0; file_size.min(MAX_NOTES) as usize];
                    self.read(&mut notes, offset, "a note segment")?;
                    entry = pvh_entry(&notes);
                }
                _ => {}
            }
        }
        let entry = entry.ok_or(KernelError::NoPvhNote)?;
        let in_file = |s: &Segment| (s.address..s.address + s.file_size).contains(&u64::from(entry));
        if !segments.iter().any(in_file) {
            return Err(KernelError::Corrupt("its PVH entry point lies outside its segments"));
        }
        Ok((segments, LoadedKernel { entry: GuestAddress(u64::from(entry)), end: GuestAddress(end) }))
    }

    fn check(&self, offset: u64, size: u64, what: &'static str) -> Result<(), KernelError> {
        let end =
            offset.checked_add(size).ok_or(KernelError::Corrupt("an offset in the file wraps around"))?;
        if end > self.length {
            return Err(KernelError::Truncated { what, end, length: self.length });
        }
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], offset: u64, what: &'static str) -> Result<(), KernelError> {
        self.check(offset, buffer.len() as u64, what)?;
        self.file.read_exact_at(buffer, offset).map_err(KernelError::Read)
    }
}

/// Looks for the PVH note among `notes`.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    // Name and descriptor are padded to 4 bytes each.
    let padded = |size: u32| usize::try_from(size).ok()?.checked_next_multiple_of(4);
    while let Some((header, rest)) = notes.split_at_checked(NHDR_SIZE) {
        let (name_size, value_size, kind) = (u32_at(header, 0), u32_at(header, 4), u32_at(header, 8));
        let (name, rest) = rest.split_at_checked(padded(name_size)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // Linux writes 4 or 8 bytes; the address is of 32 bits by definition.
            return (value_size >= 4 && rest.len() >= 4).then(|| u32_at(rest, 0));
        }
        // The last note's padding may be missing.
        notes = rest.get(padded(value_size)?..)?;
    }
    None
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::Bytes;

    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;
    const MEMORY_MIB: u32 = 48;

    /// An image with one segment of 32 bytes at 1 MiB, which is its entry point, and one of zeroes behind it.
    struct Builder {
        header: [u8; EHDR_SIZE],
        segments: Vec<[u8; PHDR_SIZE]>,
        notes: Vec<u8>,
    }

    const CODE: [u8; 32] = [0x90; 32];
    const CODE_OFFSET: u64 = 0x400;
    const NOTES_OFFSET: u64 = 0x300;

    fn phdr(kind: u32, offset: u64, address: u64, file_size: u64, memory_size: u64) -> [u8; PHDR_SIZE] {
        let mut header = [0; PHDR_SIZE];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        for (at, value) in [(8, offset), (24, address), (32, file_size), (40, memory_size)] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        header
    }

    fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, value.len() as u32, kind] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        for part in [name, value] {
            note.extend_from_slice(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    impl Builder {
        fn new() -> Self {
            let mut header = [0; EHDR_SIZE];
            header[..6].copy_from_slice(b"\x7fELF\x02\x01");
            header[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
            header[32..40].copy_from_slice(&(EHDR_SIZE as u64).to_le_bytes());
            header[54..56].copy_from_slice(&(PHDR_SIZE as u16).to_le_bytes());
            let notes = [
                note(b"GNU\0", 3, &[7; 20]),
                note(b"Xen\0", 19, &[1; 3]),
                note(b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY, &MIB.to_le_bytes()),
            ]
            .concat();
            let segments = vec![
                phdr(PT_LOAD, CODE_OFFSET, MIB, CODE.len() as u64, CODE.len() as u64),
                phdr(PT_LOAD, 0, MIB + 0x1000, 0, 0x2000),
                phdr(PT_NOTE, NOTES_OFFSET, 0, notes.len() as u64, 0),
            ];
            Self { header, segments, notes }
        }

        fn bytes(&self) -> Vec<u8> {
            let mut header = self.header;
            header[56..58].copy_from_slice(&(self.segments.len() as u16).to_le_bytes());
            let mut bytes = [&header[..], &self.segments.concat()].concat();
            bytes.resize(NOTES_OFFSET as usize, 0);
            bytes.extend_from_slice(&self.notes);
            bytes.resize(CODE_OFFSET as usize, 0);
            bytes.extend_from_slice(&CODE);
            bytes
        }

        fn load(&self) -> Result<LoadedKernel, KernelError> {
            load_bytes(&self.bytes())
        }
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        file
    }

    fn load_bytes(bytes: &[u8]) -> Result<LoadedKernel, KernelError> {
        load(&file(bytes), &memory::allocate(MEMORY_MIB).unwrap())
    }

    #[test]
    fn segments_are_loaded_where_they_say() {
        let mem = memory::allocate(MEMORY_MIB).unwrap();
        let kernel = load(&file(&Builder::new().bytes()), &mem).unwrap();
        assert_eq!(kernel, LoadedKernel { entry: GuestAddress(MIB), end: GuestAddress(MIB + 0x3000) });
        let mut code = [0; 33];
        mem.read_slice(&mut code, GuestAddress(MIB)).unwrap();
        assert_eq!(code[..32], CODE);
        assert_eq!(code[32], 0);
    }

    #[test]
    fn an_image_cut_off_anywhere_is_refused() {
        let bytes = Builder::new().bytes();
        for length in 0..bytes.len() {
            match load_bytes(&bytes[..length]).unwrap_err() {
                KernelError::NotElf if length < 4 => {}
                KernelError::Truncated { end, length: told, .. } => {
                    assert!(end > told && told == length as u64);
                }
                other => panic!("{length}: {other}"),
            }
        }
    }

    #[test]
    fn no_single_byte_makes_the_loader_fail_otherwise_than_by_an_error() {
        let mem = memory::allocate(MEMORY_MIB).unwrap();
        let bytes = Builder::new().bytes();
        for index in 0..CODE_OFFSET as usize {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[index] = value;
                // Whatever it is called, what is loaded lies in memory.
                if let Ok(kernel) = load(&file(&bytes), &mem) {
                    assert!(kernel.entry < kernel.end && kernel.end.0 <= u64::from(MEMORY_MIB) * MIB);
                }
            }
        }
    }

    #[test]
    fn what_is_no_kernel_is_told_apart() {
        let refuse = |change: fn(&mut Builder)| {
            let mut builder = Builder::new();
            change(&mut builder);
            builder.load().unwrap_err()
        };
        assert!(matches!(load_bytes(b"").unwrap_err(), KernelError::NotElf));
        assert!(matches!(load_bytes(b"MZ\0\0 a bzImage").unwrap_err(), KernelError::NotElf));
        assert!(matches!(refuse(|b| b.header[4] = 1), KernelError::WrongMachine));
        assert!(matches!(refuse(|b| b.header[5] = 2), KernelError::WrongMachine));
        assert!(matches!(refuse(|b| b.header[18] = 183), KernelError::WrongMachine));
        assert!(matches!(refuse(|b| b.header[54] = 57), KernelError::Corrupt(_)));
        assert!(matches!(refuse(|b| b.segments.truncate(2)), KernelError::NoPvhNote));
        assert!(matches!(refuse(|b| b.segments.clear()), KernelError::NoPvhNote));
        // The PVH note under another name.
        assert!(matches!(
            refuse(|b| *b.notes.iter_mut().rfind(|byte| **byte == b'X').unwrap() = b'Y'),
            KernelError::NoPvhNote
        ));
    }

    #[test]
    fn segments_outside_memory_are_refused() {
        let load_at = |address, file_size, memory_size| {
            let mut builder = Builder::new();
            builder.segments.push(phdr(PT_LOAD, CODE_OFFSET, address, file_size, memory_size));
            builder.load()
        };
        let end = u64::from(MEMORY_MIB) * MIB;
        assert!(load_at(end - 32, 32, 32).is_ok());
        assert!(matches!(load_at(end - 31, 32, 32), Err(KernelError::DoesNotFit { .. })));
        assert!(matches!(load_at(end - 32, 32, 33), Err(KernelError::DoesNotFit { .. })));
        assert!(matches!(load_at(u64::MAX - 31, 32, 32), Err(KernelError::Corrupt(_))));
        assert!(matches!(load_at(2 * MIB, 0, u64::MAX), Err(KernelError::Corrupt(_))));
        assert!(matches!(load_at(MIB - 1, 32, 32), Err(KernelError::Corrupt(_))));
        assert!(matches!(load_at(0, 32, 32), Err(KernelError::Corrupt(_))));
        assert!(matches!(load_at(2 * MIB, 32, 31), Err(KernelError::Corrupt(_))));
        assert!(matches!(load_at(2 * MIB, 33, 33), Err(KernelError::Truncated { .. })));
        assert!(matches!(load_at(2 * MIB, u64::MAX, u64::MAX), Err(KernelError::Corrupt(_))));
    }

    #[test]
    fn an_entry_point_outside_the_kernel_is_refused() {
        for entry in [0u32, MIB as u32 - 1, MIB as u32 + 32, MIB as u32 + 0x1000, u32::MAX] {
            let mut builder = Builder::new();
            builder.notes = note(b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY, &entry.to_le_bytes());
            builder.segments[2] = phdr(PT_NOTE, NOTES_OFFSET, 0, builder.notes.len() as u64, 0);
            assert!(matches!(builder.load(), Err(KernelError::Corrupt(_))), "{entry:#x}");
        }
    }

    #[test]
    fn hostile_notes_end_the_search() {
        let lengths = [0, 1, 4, 0x7fff_fffd, 0xffff_fffd, u32::MAX];
        for name in lengths {
            for value in lengths {
                let mut notes = [name.to_le_bytes(), value.to_le_bytes(), 18u32.to_le_bytes()].concat();
                notes.extend_from_slice(b"Xen\0\x01");
                for length in 0..=notes.len() {
                    assert_eq!(pvh_entry(&notes[..length]), None);
                }
            }
        }
        let good = note(b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY, &7u32.to_le_bytes());
        assert_eq!(pvh_entry(&good), Some(7));
        assert_eq!(pvh_entry(&[note(b"a", 18, b"bcdef"), good].concat()), Some(7));
    }
}
