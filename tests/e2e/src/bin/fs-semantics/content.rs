//! What is in files: sizes, holes, positions, copies.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::sys::{content, fallocate, file, open, open_with, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    truncation_cuts_and_fills_with_zeros,
    truncation_when_opened,
    reading_ends_at_the_end,
    large_file_beyond_32_bits,
    sparse_file_takes_no_room,
    holes_and_data_can_be_found,
    punched_hole_reads_as_zeros,
    allocation_keeps_content,
    ranges_are_copied,
    vectors_of_buffers,
    direct_access_is_what_others_see,
    odd_sizes_at_odd_places,
    status_flags_can_be_changed,
    statfs_tells_of_the_host,
];

/// A size and alignment that any O_DIRECT takes.
const BLOCK: usize = 4096;

fn truncation_cuts_and_fills_with_zeros(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = file(&path, &[7; 10_000])?;
    file.set_len(5_000)?;
    ensure!(fs::read(&path)? == [7; 5_000]);
    file.set_len(8_192)?;
    ensure!(fs::read(&path)? == [[7; 5_000].as_slice(), &[0; 3_192]].concat());
    file.set_len(0)?;
    file.set_len(10)?;
    ensure!(fs::read(&path)? == [0; 10]);
    rustix::fs::ftruncate(&file, 3)?;
    ensure!(path.metadata()?.len() == 3);
    refused(rustix::fs::ftruncate(File::open(&path)?, 0), Errno::INVAL)?;
    // Written where nothing is, past the end.
    file.write_all_at(b"end", 100)?;
    ensure!(path.metadata()?.len() == 103 && content(&file)?[..100] == [0; 100]);
    Ok(())
}

fn truncation_when_opened(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let before = file(&path, b"content")?;
    open_with(&path, libc::O_TRUNC)?;
    ensure!(before.metadata()?.len() == 0 && content(&before)? == b"");
    before.write_all_at(b"x", 5)?;
    ensure!(fs::read(&path)? == b"\0\0\0\0\0x");
    Ok(())
}

fn reading_ends_at_the_end(dir: &Path) -> Result<()> {
    let mut file = file(&dir.join("file"), b"0123456789")?;
    let mut buffer = [0; 100];
    ensure!(file.read_at(&mut buffer, 4)? == 6 && &buffer[..6] == b"456789");
    ensure!(file.read_at(&mut buffer, 10)? == 0 && file.read_at(&mut buffer, 1 << 40)? == 0);
    file.seek(SeekFrom::Start(0))?;
    let mut all = Vec::new();
    file.read_to_end(&mut all)?;
    ensure!(all == b"0123456789" && file.stream_position()? == 10);
    file.seek(SeekFrom::End(-3))?;
    ensure!(file.read(&mut buffer)? == 3);
    refused(file.seek(SeekFrom::Current(-100)), Errno::INVAL)
}

fn large_file_beyond_32_bits(dir: &Path) -> Result<()> {
    let file = file(&dir.join("file"), b"")?;
    let places = [(1u64 << 31) - 2, (1 << 32) - 2, (1 << 33) + 5, (1 << 40) + 1];
    for place in places {
        file.write_all_at(b"here", place)?;
    }
    ensure!(dir.join("file").metadata()?.len() == (1 << 40) + 5);
    for place in places {
        let mut bytes = [1; 8];
        let got = file.read_at(&mut bytes, place - 2)?;
        ensure!(got >= 6 && &bytes[..6] == b"\0\0here", "{place}");
    }
    Ok(())
}

fn sparse_file_takes_no_room(dir: &Path) -> Result<()> {
    let file = file(&dir.join("file"), b"")?;
    file.set_len(1 << 30)?;
    file.write_all_at(&[1; BLOCK], 512 << 20)?;
    file.sync_all()?;
    let metadata = dir.join("file").metadata()?;
    ensure!(metadata.len() == 1 << 30 && metadata.blocks() * 512 <= 4 << 20, "{} blocks", metadata.blocks());
    Ok(())
}

fn seek(file: &File, offset: i64, whence: i32) -> std::io::Result<u64> {
    // SAFETY: a plain system call.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(at).map_err(|_| std::io::Error::last_os_error())
}

fn holes_and_data_can_be_found(dir: &Path) -> Result<()> {
    let file = file(&dir.join("file"), b"")?;
    file.set_len(8 << 20)?;
    file.write_all_at(&[1; BLOCK], 2 << 20)?;
    file.sync_all()?;
    let data = seek(&file, 0, libc::SEEK_DATA)?;
    let hole = seek(&file, 2 << 20, libc::SEEK_HOLE)?;
    // A file system may round.
    ensure!(data <= 2 << 20 && data > 1 << 20, "data at {data}");
    ensure!(hole >= (2 << 20) + BLOCK as u64 && hole < 4 << 20, "hole at {hole}");
    ensure!(seek(&file, 0, libc::SEEK_HOLE)? == 0);
    refused(seek(&file, 4 << 20, libc::SEEK_DATA), Errno::NXIO)?;
    refused(seek(&file, 8 << 20, libc::SEEK_HOLE), Errno::NXIO)
}

fn punched_hole_reads_as_zeros(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = file(&path, &[7; 256 * 1024])?;
    // What is cached of it must not be seen any more.
    ensure!(fs::read(&path)?.iter().all(|byte| *byte == 7));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 10_000, 100_000)?;
    let bytes = fs::read(&path)?;
    ensure!(bytes.len() == 256 * 1024);
    ensure!(bytes.iter().enumerate().all(|(i, byte)| (*byte == 0) == (10_000..110_000).contains(&i)));
    ensure!(path.metadata()?.blocks() * 512 < 256 * 1024);
    Ok(())
}

fn allocation_keeps_content(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = file(&path, b"content")?;
    fallocate(&file, FallocateFlags::empty(), 0, 100_000)?;
    ensure!(path.metadata()?.len() == 100_000 && fs::read(&path)?.starts_with(b"content\0"));
    ensure!(path.metadata()?.blocks() * 512 >= 100_000);
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 200_000)?;
    ensure!(path.metadata()?.len() == 100_000);
    refused(fallocate(&file, FallocateFlags::empty(), 0, 0), Errno::INVAL)?;
    refused(fallocate(File::open(&path)?, FallocateFlags::empty(), 0, 10), Errno::BADF)
}

fn ranges_are_copied(dir: &Path) -> Result<()> {
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i / 7) as u8).collect();
    let from = file(&dir.join("from"), &bytes)?;
    let to = file(&dir.join("to"), b"")?;
    let (mut at, mut put) = (100, 50);
    while at < 200_100 {
        let left = 200_100 - at as usize;
        ensure!(rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut put), left)? > 0);
    }
    let copy = fs::read(dir.join("to"))?;
    ensure!(copy.len() == 200_050 && copy[50..] == bytes[100..200_100] && copy[..50] == [0; 50]);
    // At the end there is nothing to copy.
    let mut end = 300_000;
    ensure!(rustix::fs::copy_file_range(&from, Some(&mut end), &to, Some(&mut 0), 100)? == 0);
    // From what another process may have written just now, to what is cached here.
    from.write_all_at(b"NEW", 0)?;
    rustix::fs::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), 3)?;
    ensure!(fs::read(dir.join("to"))?.starts_with(b"NEW\0"));
    fs::copy(dir.join("from"), dir.join("third"))?;
    ensure!(fs::read(dir.join("third"))? == fs::read(dir.join("from"))?);
    Ok(())
}

fn vectors_of_buffers(dir: &Path) -> Result<()> {
    use std::io::{IoSlice, IoSliceMut};
    let file = file(&dir.join("file"), b"")?;
    let parts: Vec<Vec<u8>> = (0..100u8).map(|i| vec![i; 1 + usize::from(i) * 13]).collect();
    let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let total: usize = parts.iter().map(Vec::len).sum();
    ensure!(rustix::io::pwritev(&file, &slices, 3)? == total);
    let mut back: Vec<Vec<u8>> = parts.iter().map(|part| vec![0; part.len()]).collect();
    let mut slices: Vec<_> = back.iter_mut().map(|part| IoSliceMut::new(part)).collect();
    ensure!(rustix::io::preadv(&file, &mut slices, 3)? == total);
    ensure!(back == parts);
    Ok(())
}

fn direct_access_is_what_others_see(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let cached = file(&path, &[1; 8 * BLOCK])?;
    let direct = open_with(&path, libc::O_DIRECT)?;
    // Room to align in.
    let mut room = vec![0u8; 5 * BLOCK];
    let start = room.as_ptr().align_offset(BLOCK);
    let buffer = &mut room[start..start + 4 * BLOCK];
    ensure!(direct.read_at(buffer, 0)? == 4 * BLOCK && buffer.iter().all(|byte| *byte == 1));
    buffer.fill(2);
    ensure!(direct.write_at(buffer, BLOCK as u64)? == 4 * BLOCK);
    let bytes = content(&cached)?;
    ensure!(bytes.iter().enumerate().all(|(i, byte)| (*byte == 2) == (BLOCK..5 * BLOCK).contains(&i)));
    cached.write_all_at(&[3; BLOCK], 0)?;
    ensure!(direct.read_at(buffer, 0)? == 4 * BLOCK && buffer[..BLOCK] == [3; BLOCK]);
    // At the end it comes short.
    ensure!(direct.read_at(buffer, 7 * BLOCK as u64)? == BLOCK);
    ensure!(direct.read_at(buffer, 8 * BLOCK as u64)? == 0);
    Ok(())
}

fn odd_sizes_at_odd_places(dir: &Path) -> Result<()> {
    // Against a model in memory.
    let path = dir.join("file");
    let file = file(&path, b"")?;
    let mut model: Vec<u8> = Vec::new();
    let mut seed = 12345u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for round in 0..400u32 {
        let (at, len) = (random(600_000), random(if round % 20 == 0 { 300_000 } else { 9_000 }));
        let (start, end) = (at as usize, (at + len) as usize);
        match random(10) {
            0 => {
                file.set_len(at)?;
                model.resize(start, 0);
            }
            1..=5 => {
                let bytes = vec![round as u8; len as usize];
                file.write_all_at(&bytes, at)?;
                if model.len() < end && len > 0 {
                    model.resize(end, 0);
                }
                if len > 0 {
                    model[start..end].copy_from_slice(&bytes);
                }
            }
            _ => {
                let mut bytes = vec![0; len as usize];
                let got = file.read_at(&mut bytes, at)?;
                let expected = &model[start.min(model.len())..end.min(model.len())];
                ensure!(bytes[..got] == *expected, "round {round}: {len} at {at}");
            }
        }
        ensure!(file.metadata()?.len() == model.len() as u64, "round {round}");
    }
    ensure!(fs::read(&path)? == model);
    Ok(())
}

fn status_flags_can_be_changed(dir: &Path) -> Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let path = dir.join("file");
    let mut file = file(&path, b"0123")?;
    fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::APPEND)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(b"45")?;
    ensure!(fs::read(&path)? == b"012345");
    fcntl_setfl(&file, fcntl_getfl(&file)?.difference(OFlags::APPEND))?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(b"x")?;
    ensure!(fs::read(&path)? == b"x12345");
    refused(open(&dir.join("missing")), Errno::NOENT)
}

fn statfs_tells_of_the_host(dir: &Path) -> Result<()> {
    let fs = rustix::fs::statvfs(dir)?;
    ensure!(fs.f_bsize > 0 && fs.f_blocks > 0 && fs.f_bfree <= fs.f_blocks && fs.f_bavail <= fs.f_bfree);
    ensure!(fs.f_namemax == 255, "{}", fs.f_namemax);
    let file = file(&dir.join("file"), b"")?;
    let of_file = rustix::fs::fstatvfs(&file)?;
    ensure!(of_file.f_blocks == fs.f_blocks && of_file.f_fsid == fs.f_fsid);
    Ok(())
}
