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
    #[error("the kernel needs memory up to {end:#x}, the guest has memory up to {memory_end:#x}; give it more memory")]
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
    let size = usize::try_from(segment.file_size).map_err(|_| KernelError::Corrupt("a segment is too large"))?;
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
        Ok((
            segments,
            LoadedKernel { entry: GuestAddress(u64::from(entry)), end: GuestAddress(end) },
        ))
    }

    fn check(&self, offset: u64, size: u64, what: &'static str) -> Result<(), KernelError> {
        let end = offset.checked_add(size).ok_or(KernelError::Corrupt("an offset in the file wraps around"))?;
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
