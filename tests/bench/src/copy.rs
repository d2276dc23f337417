//! Many bytes, a chunk at a time.

use std::io::{self, Read, Write};

/// Writes so many bytes, all out of the chunk.
///
/// # Errors
/// As write(2).
pub fn write(to: &mut impl Write, bytes: usize, chunk: &[u8]) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let now = left.min(chunk.len());
        to.write_all(&chunk[..now])?;
        left -= now;
    }
    Ok(())
}

/// Reads up to the end, each time into the chunk; how many bytes.
///
/// # Errors
/// As read(2).
pub fn read(from: &mut impl Read, chunk: &mut [u8]) -> io::Result<usize> {
    let mut received = 0;
    loop {
        match from.read(chunk)? {
            0 => return Ok(received),
            count => received += count,
        }
    }
}
