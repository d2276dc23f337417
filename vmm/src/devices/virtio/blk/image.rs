//! What a disk is made of on the host: a regular file or a block device, raw by declaration. Nothing in it is ever looked at.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{
    FallocateFlags, FileType, OFlags, fallocate, fcntl_getfl, fdatasync, fstat, fstatfs, ioctl_blksszget,
};
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};

use super::io::{Io, Range, ZeroBy};

/// The unit of capacity, offsets and lengths, in bytes (virtio 1.3 s5.2.4).
pub(super) const SECTOR: u64 = 512;
/// The most bytes one request may move: what a driver reaches that keeps to [`super::SEG_MAX`] and [`super::SIZE_MAX`]. A reset and a
/// pause wait for requests, so none may take for ever.
pub(super) const MAX_TRANSFER: u64 = super::SEG_MAX as u64 * super::SIZE_MAX as u64;
/// `_IO(0x12, 119)` of Linux' include/uapi/linux/fs.h.
const BLKDISCARD: rustix::ioctl::Opcode = opcode::none(0x12, 119);
/// `TMPFS_MAGIC` of Linux' include/uapi/linux/magic.h.
const TMPFS: u64 = 0x0102_1994;

/// Why something cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The descriptor is of something else.
    #[error("disk image is neither a regular file nor a block device")]
    NotAnImage,
    /// The descriptor allows less than the disk is to do.
    #[error("disk image is not open for {0}")]
    Access(&'static str),
    /// The descriptor has a flag that cannot be. `O_DIRECT`: the host's rules of alignment would become the guest's, which knows nothing
    /// of them. `O_NONBLOCK`: a ring would fail what has to wait for the medium.
    #[error("disk image is open with {0}")]
    Flag(&'static str),
    /// The host refused.
    #[error("cannot {what} of the disk image")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// An open image.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    /// Capacity in sectors.
    sectors: u64,
    read_only: bool,
    /// The size of a logical block in bytes: 512 of a file, what the hardware says of a block device.
    block_size: u32,
    /// What space is given back in, in bytes.
    granularity: u32,
    is_block_device: bool,
    /// Whether its contents are in memory anyway.
    in_memory: bool,
}

impl Image {
    /// An image whose capacity is its size now; bytes after the last whole block are out of the guest's reach.
    pub(super) fn open(image: OwnedFd, read_only: bool) -> Result<Self, ImageError> {
        let failed = |what| move |source: Errno| ImageError::Host { what, source: source.into() };
        let stat = fstat(&image).map_err(failed("find out the type"))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err(ImageError::NotAnImage);
        }
        let flags = fcntl_getfl(&image).map_err(failed("find out the access mode"))?;
        let mode = flags & OFlags::ACCMODE;
        if flags.contains(OFlags::PATH) || mode == OFlags::WRONLY {
            return Err(ImageError::Access("reading"));
        }
        if !read_only && mode != OFlags::RDWR {
            return Err(ImageError::Access("writing"));
        }
        for (flag, name) in [(OFlags::DIRECT, "O_DIRECT"), (OFlags::NONBLOCK, "O_NONBLOCK")] {
            if flags.contains(flag) {
                return Err(ImageError::Flag(name));
            }
        }
        let is_block_device = kind == FileType::BlockDevice;
        let (block_size, granularity) = if is_block_device {
            let size = ioctl_blksszget(&image).map_err(failed("find out the block size"))?;
            (size.max(SECTOR as u32), size.max(SECTOR as u32))
        } else {
            (SECTOR as u32, u32::try_from(stat.st_blksize).unwrap_or(0).max(SECTOR as u32))
        };
        let file_system = fstatfs(&image).map_err(failed("find out the file system"))?;
        let mut file = File::from(image);
        // The end of a block device is its size too.
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|source| ImageError::Host { what: "find out the size", source })?;
        Ok(Self {
            file,
            sectors: size / u64::from(block_size) * u64::from(block_size) / SECTOR,
            read_only,
            block_size,
            granularity,
            is_block_device,
            in_memory: !is_block_device && file_system.f_type as u64 == TMPFS,
        })
    }

    /// Capacity in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether nothing may change it.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The size of a logical block in bytes.
    pub(super) fn block_size(&self) -> u32 {
        self.block_size
    }

    /// What space is given back in, in sectors.
    pub(super) fn granularity(&self) -> u32 {
        self.granularity / SECTOR as u32
    }

    /// Whether its contents are in memory, so that no read or write has a device to wait for.
    pub(super) fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// Whether `io` can only be carried out by [`Image::perform`]: no ring has an operation that discards on a block device before
    /// Linux 6.12.
    pub(super) fn must_block(&self, io: &Io) -> bool {
        self.is_block_device && matches!(io, Io::Discard(_))
    }

    /// The descriptor, for whoever has another way to carry out an [`Io`].
    pub(super) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The offset in the image of `len` bytes from `sector` on, if all of them are on the disk.
    pub(super) fn locate(&self, sector: u64, len: u64) -> Option<u64> {
        let end = sector.checked_add(len / SECTOR)?;
        (len.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    /// Carries `io` out with blocking system calls, once: as many bytes as the kernel takes at a time.
    pub(super) fn perform(&self, io: &Io) -> Result<u32, Errno> {
        match io {
            Io::Read(transfer) => {
                let (iov, len) = transfer.iov();
                // SAFETY: the buffers are guest memory, which stays mapped while the request is alive, and which nothing in this process
                // holds references into.
                moved(unsafe { libc::preadv(self.raw_fd(), iov, len as i32, transfer.offset()) })
            }
            Io::Write { transfer, durable } => {
                let (iov, len) = transfer.iov();
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above; the guest may change the bytes meanwhile, and gets what it deserves.
                moved(unsafe { libc::pwritev2(self.raw_fd(), iov, len as i32, transfer.offset(), flags) })
            }
            Io::Flush => fdatasync(&self.file).map(|()| 0),
            Io::Discard(range) if self.is_block_device => self.discard_blocks(*range).map(|()| 0),
            Io::Discard(range) => self.fallocate(ZeroBy::Hole, *range),
            Io::Zero { range, by, .. } => self.fallocate(*by, *range),
        }
    }

    fn fallocate(&self, by: ZeroBy, Range { offset, len }: Range) -> Result<u32, Errno> {
        fallocate(&self.file, by.flags(), offset, len).map(|()| 0)
    }

    fn discard_blocks(&self, Range { offset, len }: Range) -> Result<(), Errno> {
        // SAFETY: the request takes a pointer to two numbers, offset and length, and writes nothing to this process' memory.
        unsafe { ioctl(&self.file, Setter::<BLKDISCARD, [u64; 2]>::new([offset, len])) }
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl ZeroBy {
    /// The mode of fallocate(2).
    pub(super) fn flags(self) -> FallocateFlags {
        FallocateFlags::KEEP_SIZE
            | match self {
                Self::Hole => FallocateFlags::PUNCH_HOLE,
                Self::Extent => FallocateFlags::ZERO_RANGE,
            }
    }
}

/// The result of a system call that moves bytes.
fn moved(result: isize) -> Result<u32, Errno> {
    // Linux moves at most 0x7fff_f000 bytes at a time.
    u32::try_from(result).map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}
