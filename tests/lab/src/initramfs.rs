//! The lab's initramfs: this very program as `/init`, the modules it loads, and its configuration. It is made anew for each
//! boot, in memory: that takes milliseconds and leaves no file.

use crate::guest::init::{CONFIG, MODULES};
use anyhow::{Context, Result};
use rustix::fs::MemfdFlags;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// Makes the initramfs in a memory file that QEMU will inherit.
pub(crate) fn build(image: &Path, config: &str) -> Result<OwnedFd> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "root", MODULES] {
        archive.add(directory, DIRECTORY, &[]);
    }
    // The kernel opens it as init's standard streams before anything is mounted.
    archive.add_console();
    archive.add("init", PROGRAM, &fs::read("/proc/self/exe").context("read this program")?);
    archive.add(CONFIG, FILE, config.as_bytes());
    let modules = image.join("boot-modules");
    let listing = fs::read_dir(&modules).with_context(|| format!("read {}", modules.display()))?;
    for entry in listing {
        let path = entry?.path();
        let name = path.file_name().context("a module has a name")?.to_string_lossy();
        let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        archive.add(&format!("{MODULES}/{name}"), FILE, &content);
    }
    let fd = rustix::fs::memfd_create("lab-initramfs", MemfdFlags::empty()).context("make a memory file")?;
    let mut file = File::from(fd);
    file.write_all(&archive.finish()).context("write the initramfs")?;
    Ok(file.into())
}

/// An archive in the "newc" format (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.add_entry(name, mode, content, (0, 0));
    }

    fn add_console(&mut self) {
        self.add_entry("dev/console", 0o020_600, &[], (5, 1));
    }

    fn add_entry(&mut self, name: &str, mode: u32, content: &[u8], (major, minor): (u32, u32)) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a file of the initramfs is far below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_starts_on_four_bytes() {
        let mut archive = Archive::default();
        archive.add("a", FILE, b"12345");
        let first = archive.bytes.len();
        archive.add("dir", DIRECTORY, &[]);
        assert_eq!(first % 4, 0);
        // 110 bytes of header, "a\0" fill 112; the content ends at 117 and is padded to 120.
        assert_eq!(first, 120);
        assert_eq!(&archive.bytes[..6], b"070701");
        assert_eq!(&archive.bytes[6 + 6 * 8..6 + 7 * 8], b"00000005");
        let bytes = archive.finish();
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
