//! Guests without an operating system: a few instructions in an ELF file with a PVH note, which the VMM boots as it boots Linux.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::Result;

/// Where the code is loaded and entered, in 32-bit protected mode without paging.
const BASE: u64 = 1 << 20;
/// Where the code is in the file.
const OFFSET: u64 = 0x1000;

/// Writes a kernel of these instructions to a file.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, code: &[u8]) -> Result<()> {
    // ELF-64: file header, then program headers for the code and for the note, then the note.
    let mut header = [0; 64];
    header[..6].copy_from_slice(b"\x7fELF\x02\x01");
    header[18] = 62; // e_machine: EM_X86_64
    header[32] = 64; // e_phoff
    header[54] = 56; // e_phentsize
    header[56] = 2; // e_phnum
    let note = [&[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0][..], b"Xen\0", &BASE.to_le_bytes()].concat();
    let size = code.len() as u64;
    let mut image = header.to_vec();
    image.extend(program_header(1, OFFSET, BASE, size));
    image.extend(program_header(4, 64 + 2 * 56, 0, note.len() as u64));
    image.extend(note);
    image.resize(usize::try_from(OFFSET)?, 0);
    image.extend_from_slice(code);
    Ok(File::create(path)?.write_all(&image)?)
}

/// A program header: type, offset, address (virtual and physical), size (in the file and in memory), alignment.
fn program_header(kind: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(7_u32.to_le_bytes());
    for word in [offset, address, address, size, size, 4] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}
