//! What the kernel is given at its PVH entry point: memory map, initramfs, command line (Xen docs/misc/pvh.pandoc,
//! include/public/arch-x86/hvm/start_info.h).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{self, BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion};

use super::kernel::LoadedKernel;
use super::{BootSource, layout};
use crate::devices::virtio::GuestRam;

const START_MAGIC: u32 = 0x336e_c578;
/// Version 1 is the first with a memory map.
const START_VERSION: u32 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PAGE: u64 = 4096;

/// The boot of the guest cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The command line is too long.
    #[error("the kernel command line is {length} bytes long, the limit is {}", layout::CMDLINE_CAPACITY)]
    CmdlineTooLong {
        /// Its length.
        length: usize,
    },
    /// The command line would be cut off.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// Kernel and initramfs together need more memory than there is.
    #[error(
        "the initramfs of {size} bytes does not fit between the kernel's end at {kernel_end:#x} and the end of memory at \
         {memory_end:#x}; give the guest more memory"
    )]
    InitramfsDoesNotFit {
        /// The size of the initramfs.
        size: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where memory below the gap ends.
        memory_end: u64,
    },
    /// The initramfs file holds nothing.
    #[error("the initramfs is empty")]
    InitramfsEmpty,
    /// The initramfs cannot be read.
    #[error("cannot read the initramfs")]
    InitramfsRead(#[source] io::Error),
    /// Guest memory cannot be written.
    #[error("cannot write boot data to guest memory")]
    Memory(#[from] GuestMemoryError),
    /// The start_info structure cannot be written.
    #[error("cannot write the PVH start_info to guest memory")]
    StartInfo(#[from] configurator::Error),
}

/// Loads the initramfs and writes command line and start_info.
///
/// # Errors
/// [`BootError`].
pub fn write(mem: &GuestRam, kernel: &LoadedKernel, source: &BootSource<'_>) -> Result<(), BootError> {
    let (initramfs, size) = load_initramfs(mem, kernel, source.initramfs)?;
    write_cmdline(mem, source.cmdline)?;

    let memory_map = memory_map(mem.iter().map(|region| (region.start_addr().0, region.len())));
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: 1,
        modlist_paddr: layout::MODULE_LIST.0,
        cmdline_paddr: layout::CMDLINE.0,
        memmap_paddr: layout::MEMORY_MAP.0,
        memmap_entries: memory_map.len() as u32,
        ..Default::default()
    };
    let module = hvm_modlist_entry { paddr: initramfs.0, size, ..Default::default() };
    let mut params = BootParams::new(&start_info, layout::START_INFO);
    params.set_sections(&memory_map, layout::MEMORY_MAP);
    params.set_modules(&[module], layout::MODULE_LIST);
    Ok(PvhBootConfigurator::write_bootparams(&params, &**mem)?)
}

/// The memory map of a machine whose memory slots are `regions` (start and length each): all RAM, but for what lies
/// between conventional memory and 1 MiB.
fn memory_map(regions: impl Iterator<Item = (u64, u64)>) -> Vec<hvm_memmap_table_entry> {
    let entry = |start: u64, end: u64, type_| hvm_memmap_table_entry {
        addr: start,
        size: end - start,
        type_,
        reserved: 0,
    };
    let (table, high) = (layout::MP_TABLE.0, layout::HIGH_RAM.0);
    let mut map = Vec::new();
    for (start, length) in regions {
        if start == 0 {
            map.push(entry(0, table, E820_RAM));
            map.push(entry(table, high, E820_RESERVED));
            map.push(entry(high, length, E820_RAM));
        } else {
            map.push(entry(start, start + length, E820_RAM));
        }
    }
    map
}

/// Puts the initramfs at the top of the memory below the gap, out of the kernel's way while it sets itself up.
fn load_initramfs(
    mem: &GuestRam,
    kernel: &LoadedKernel,
    file: &File,
) -> Result<(GuestAddress, u64), BootError> {
    let size = file.metadata().map_err(BootError::InitramfsRead)?.len();
    if size == 0 {
        return Err(BootError::InitramfsEmpty);
    }
    let memory_end = layout::GAP_START.min(mem.last_addr().0 + 1);
    let does_not_fit = || BootError::InitramfsDoesNotFit { size, kernel_end: kernel.end.0, memory_end };
    let start = memory_end.checked_sub(size).ok_or_else(does_not_fit)? & !(PAGE - 1);
    if start < kernel.end.0 {
        return Err(does_not_fit());
    }
    // It fits below 3 GiB.
    read_into(file, 0, mem, GuestAddress(start), size as usize).map_err(BootError::InitramfsRead)?;
    Ok((GuestAddress(start), size))
}

fn write_cmdline(mem: &GuestRam, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() > layout::CMDLINE_CAPACITY {
        return Err(BootError::CmdlineTooLong { length: cmdline.len() });
    }
    if cmdline.bytes().any(|byte| byte == 0) {
        return Err(BootError::CmdlineNul);
    }
    mem.write_slice(cmdline.as_bytes(), layout::CMDLINE)?;
    // The NUL; memory is zero, but not everybody need know that.
    Ok(mem.write_obj(0u8, layout::CMDLINE.unchecked_add(cmdline.len() as u64))?)
}

/// Reads `size` bytes at `offset` of `file` into guest memory.
///
/// # Errors
/// As `pread(2)`; `UnexpectedEof` if the file has become shorter; `InvalidInput` if the place is not all in memory.
pub(super) fn read_into(
    file: &File,
    offset: u64,
    mem: &GuestRam,
    address: GuestAddress,
    size: usize,
) -> io::Result<()> {
    let slice =
        mem.get_slice(address, size).map_err(|source| io::Error::new(io::ErrorKind::InvalidInput, source))?;
    let mut done = 0;
    while done < size {
        let at = i64::try_from(offset + done as u64).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the slice is of guest memory, `size` bytes long, and stays mapped; the guest does not run yet, and no
        // Rust reference to these bytes exists.
        let got = unsafe {
            libc::pread(file.as_raw_fd(), slice.ptr_guard_mut().as_ptr().add(done).cast(), size - done, at)
        };
        match got {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            got => done += got as usize,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;
    const KERNEL: LoadedKernel = LoadedKernel { entry: GuestAddress(MIB), end: GuestAddress(16 * MIB) };

    fn file(length: usize) -> File {
        let mut file = File::from(memfd_create("initramfs", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&vec![b'i'; length]).unwrap();
        file
    }

    fn map(mib: u64) -> Vec<(u64, u64, u32)> {
        let regions = layout::memory_regions(mib * MIB);
        memory_map(regions.into_iter().map(|(start, length)| (start.0, length)))
            .into_iter()
            .map(|entry| (entry.addr, entry.addr + entry.size, entry.type_))
            .collect()
    }

    #[test]
    fn memory_map_covers_memory_and_nothing_else() {
        const LOW: [(u64, u64, u32); 2] = [(0, 0x9_fc00, E820_RAM), (0x9_fc00, MIB, E820_RESERVED)];
        const GIB: u64 = 1024;
        for (mib, tail) in [
            (48, vec![(MIB, 48 * MIB)]),
            (3 * GIB - 1, vec![(MIB, (3 * GIB - 1) * MIB)]),
            (3 * GIB, vec![(MIB, 3 * GIB * MIB)]),
            (3 * GIB + 1, vec![(MIB, 3 * GIB * MIB), (4 * GIB * MIB, (4 * GIB + 1) * MIB)]),
            (8 * GIB, vec![(MIB, 3 * GIB * MIB), (4 * GIB * MIB, 9 * GIB * MIB)]),
        ] {
            let tail = tail.into_iter().map(|(start, end)| (start, end, E820_RAM));
            assert_eq!(map(mib), LOW.into_iter().chain(tail).collect::<Vec<_>>(), "{mib} MiB");
        }
    }

    #[test]
    fn start_info_tells_where_everything_is() {
        let mem = memory::allocate(64).unwrap();
        let initramfs = file(5000);
        let source = BootSource { kernel: &initramfs, initramfs: &initramfs, cmdline: "a=b c" };
        write(&mem, &KERNEL, &source).unwrap();
        let info: hvm_start_info = mem.read_obj(layout::START_INFO).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules, info.memmap_entries), (0x336e_c578, 1, 1, 3));
        let module: hvm_modlist_entry = mem.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (64 * MIB - 8192, 5000));
        assert_eq!(mem.read_obj::<[u8; 2]>(GuestAddress(module.paddr + 4998)).unwrap(), *b"ii");
        assert_eq!(mem.read_obj::<[u8; 6]>(GuestAddress(info.cmdline_paddr)).unwrap(), *b"a=b c\0");
        let first: hvm_memmap_table_entry = mem.read_obj(GuestAddress(info.memmap_paddr)).unwrap();
        assert_eq!((first.addr, first.size, first.type_), (0, 0x9_fc00, E820_RAM));
    }

    #[test]
    fn initramfs_fits_exactly_or_is_refused() {
        let mem = memory::allocate(17).unwrap();
        assert!(load_initramfs(&mem, &KERNEL, &file(MIB as usize)).is_ok());
        for length in [MIB as usize + 1, 18 << 20] {
            let error = load_initramfs(&mem, &KERNEL, &file(length)).unwrap_err();
            assert!(matches!(error, BootError::InitramfsDoesNotFit { .. }), "{error}");
        }
        assert!(matches!(load_initramfs(&mem, &KERNEL, &file(0)), Err(BootError::InitramfsEmpty)));
    }

    #[test]
    fn initramfs_of_a_machine_with_memory_above_the_gap_lies_below_it() {
        let mem = memory::allocate(5 * 1024).unwrap();
        let (start, size) = load_initramfs(&mem, &KERNEL, &file(100)).unwrap();
        assert_eq!((start.0, size), (layout::GAP_START - 4096, 100));
    }

    #[test]
    fn command_line_is_bounded() {
        let mem = memory::allocate(2).unwrap();
        let longest = "x".repeat(layout::CMDLINE_CAPACITY);
        write_cmdline(&mem, &longest).unwrap();
        let too_long = write_cmdline(&mem, &format!("{longest}y")).unwrap_err();
        assert!(matches!(too_long, BootError::CmdlineTooLong { length: 2048 }));
        assert!(matches!(write_cmdline(&mem, "a\0b"), Err(BootError::CmdlineNul)));
    }

    #[test]
    fn a_file_that_shrinks_while_it_is_read_is_an_error() {
        let mem = memory::allocate(2).unwrap();
        let error = read_into(&file(100), 0, &mem, GuestAddress(0), 101).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let outside = read_into(&file(100), 0, &mem, GuestAddress(2 * MIB - 99), 100).unwrap_err();
        assert_eq!(outside.kind(), io::ErrorKind::InvalidInput);
    }
}
