//! The device driven as a guest would: FUSE requests over its queues, on a directory of the host.
//!
//! * this file - a FUSE client over the mock driver.
//! * [`read_write`] - what a guest does to a share.
//! * [`read_only`] - what it cannot do to one that is read-only.
//! * [`hostile`] - what it should not do.
//! * [`concurrency`] - requests that block, and resets and pauses meanwhile.
//! * [`settings`] - what the settings of a share change; what is counted.

mod concurrency;
mod hostile;
mod read_only;
mod read_write;
mod settings;

use std::os::fd::OwnedFd;

use tempfile::TempDir;

use kvrun_vmm_api::FsCache;

use super::descriptors::Allotment;
use super::{Fs, FsOptions, QUEUE_SIZES};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::MockDriver;
use crate::jail;

/// The number FUSE gives to the root of the share.
const ROOT: u64 = 1;
/// The request queue.
const REQUESTS: usize = 1;
/// Room for the longest answer without data.
const ROOM: usize = 256;

/// How many host descriptors a share may hold.
const DESCRIPTORS: u64 = 1000;

/// A device over a directory of its own, and a driver for it.
struct Guest {
    dir: TempDir,
    fs: Fs,
    driver: MockDriver,
    unique: u64,
}

fn share(root: OwnedFd, options: FsOptions, descriptors: u64) -> Fs {
    let share = jail::Share::unjailed(root);
    Fs::with_descriptors(&share, ".", "share", options, Allotment::of(descriptors)).unwrap()
}

/// The usual settings.
fn options(read_only: bool) -> FsOptions {
    FsOptions { read_only, cache: FsCache::Auto, writeback: false }
}

/// The answer to a FUSE request: data, or an error number.
type Answer = Result<Vec<u8>, i32>;

impl Guest {
    /// A share whose session has not begun.
    fn unmounted(read_only: bool) -> Self {
        Self::with(options(read_only), DESCRIPTORS)
    }

    /// The same with other settings, and as many host descriptors.
    fn with(options: FsOptions, descriptors: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        let mut fs = share(root, options, descriptors);
        let mut driver = MockDriver::new(&QUEUE_SIZES);
        fs.activate(driver.activation(0)).unwrap();
        Self { dir, fs, driver, unique: 0 }
    }

    /// A share ready for use.
    fn mounted(read_only: bool) -> Self {
        let mut guest = Self::unmounted(read_only);
        guest.init();
        guest
    }

    /// Begins a session the way Linux does.
    fn init(&mut self) -> Vec<u8> {
        let mut init = Vec::new();
        for field in [7u32, 40, 128 * 1024, u32::MAX, u32::MAX] {
            init.extend(field.to_le_bytes());
        }
        init.resize(64, 0);
        self.call(op::INIT, 0, &init).unwrap()
    }

    /// The bytes of a request from root in the guest.
    fn message(&mut self, opcode: u32, node: u64, args: &[u8]) -> Vec<u8> {
        self.message_from(0, opcode, node, args)
    }

    fn message_from(&mut self, uid: u32, opcode: u32, node: u64, args: &[u8]) -> Vec<u8> {
        self.unique += 2;
        let mut bytes = Vec::new();
        bytes.extend((40 + args.len() as u32).to_le_bytes());
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        for field in [uid, uid, 1, 0] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(args);
        bytes
    }

    fn call(&mut self, opcode: u32, node: u64, args: &[u8]) -> Answer {
        self.call_with_room(opcode, node, args, ROOM)
    }

    fn call_with_room(&mut self, opcode: u32, node: u64, args: &[u8], room: usize) -> Answer {
        let message = self.message(opcode, node, args);
        self.send(&message, room)
    }

    fn send(&mut self, message: &[u8], room: usize) -> Answer {
        let answer = self.driver.request(REQUESTS, message, room);
        parse(&answer, self.unique)
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.call(op::LOOKUP, parent, &c_str(name)).map(|answer| Entry::parse(&answer))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(op::OPEN, node, &fields(&[flags as u32, 0])).map(|answer| u64_at(&answer, 0))
    }

    fn create(&mut self, parent: u64, name: &str, flags: i32, mode: u32) -> Result<(Entry, u64), i32> {
        let mut args = fields(&[flags as u32, mode, 0, 0]);
        args.extend(c_str(name));
        self.call(op::CREATE, parent, &args).map(|answer| (Entry::parse(&answer), u64_at(&answer, 128)))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        self.call_with_room(op::READ, node, &io_args(handle, offset, size), 16 + size as usize)
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let mut args = io_args(handle, offset, data.len() as u32);
        args.extend(data);
        self.call(op::WRITE, node, &args).map(|answer| u32_at(&answer, 0))
    }

    /// All names in a directory but `.` and `..`, sorted.
    fn list(&mut self, node: u64) -> Vec<String> {
        let handle = u64_at(&self.call(op::OPENDIR, node, &fields(&[0, 0])).unwrap(), 0);
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let chunk =
                self.call_with_room(op::READDIR, node, &io_args(handle, offset, 4096), 16 + 4096).unwrap();
            if chunk.is_empty() {
                break;
            }
            let mut at = 0;
            while at < chunk.len() {
                offset = u64_at(&chunk, at + 8);
                let length = u32_at(&chunk, at + 16) as usize;
                names.push(String::from_utf8(chunk[at + 24..at + 24 + length].to_vec()).unwrap());
                at += (24 + length).next_multiple_of(8);
            }
        }
        self.call(op::RELEASEDIR, node, &release_args(handle)).unwrap();
        names.retain(|name| name != "." && name != "..");
        names.sort();
        names
    }
}

/// `struct fuse_entry_out`, as far as tests look at it.
#[derive(Debug)]
struct Entry {
    node: u64,
    size: u64,
    mode: u32,
    uid: u32,
}

impl Entry {
    fn parse(bytes: &[u8]) -> Self {
        let Attr { size, mode, uid } = Attr::parse(&bytes[40..]);
        Self { node: u64_at(bytes, 0), size, mode, uid }
    }
}

/// `struct fuse_attr`, as far as tests look at it.
#[derive(Debug)]
struct Attr {
    size: u64,
    mode: u32,
    uid: u32,
}

impl Attr {
    fn parse(bytes: &[u8]) -> Self {
        Self { size: u64_at(bytes, 8), mode: u32_at(bytes, 60), uid: u32_at(bytes, 68) }
    }
}

/// Checks the header of an answer and takes it off.
fn parse(answer: &[u8], unique: u64) -> Answer {
    assert!(answer.len() >= 16, "no answer");
    assert_eq!(u32_at(answer, 0) as usize, answer.len());
    assert_eq!(u64_at(answer, 8), unique);
    match u32_at(answer, 4) as i32 {
        0 => Ok(answer[16..].to_vec()),
        error => Err(-error),
    }
}

/// `struct fuse_read_in` and `struct fuse_write_in`.
fn io_args(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut args = Vec::new();
    args.extend(handle.to_le_bytes());
    args.extend(offset.to_le_bytes());
    args.extend(size.to_le_bytes());
    args.resize(40, 0);
    args
}

/// `struct fuse_release_in`.
fn release_args(handle: u64) -> Vec<u8> {
    let mut args = handle.to_le_bytes().to_vec();
    args.resize(24, 0);
    args
}

fn fields(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn fields64(fields: &[u64]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn c_str(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// An argument and the names after it.
fn with_names(mut args: Vec<u8>, names: &[&str]) -> Vec<u8> {
    for name in names {
        args.extend(c_str(name));
    }
    args
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// `enum fuse_opcode` (Linux include/uapi/linux/fuse.h).
mod op {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const READLINK: u32 = 5;
    pub(super) const SYMLINK: u32 = 6;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const MKDIR: u32 = 9;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const RMDIR: u32 = 11;
    pub(super) const RENAME: u32 = 12;
    pub(super) const LINK: u32 = 13;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const SETXATTR: u32 = 21;
    pub(super) const GETXATTR: u32 = 22;
    pub(super) const REMOVEXATTR: u32 = 24;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const READDIR: u32 = 28;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const SETLKW: u32 = 33;
    pub(super) const CREATE: u32 = 35;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const FALLOCATE: u32 = 43;
    pub(super) const READDIRPLUS: u32 = 44;
    pub(super) const RENAME2: u32 = 45;
    pub(super) const COPY_FILE_RANGE: u32 = 47;
    pub(super) const TMPFILE: u32 = 51;
}
