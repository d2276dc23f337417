//! Where everything is in the guest's physical address space.
//!
//! ```text
//!          0 +--------------------------------+
//!      0x500 | GDT                            |
//!     0x6000 | PVH start_info, module list    |
//!     0x7000 | PVH memory map                 |
//!    0x20000 | kernel command line            |
//!    0x9fc00 | MP table                       | reserved up to 1 MiB
//!  0x100000  | kernel, wherever its ELF wants |
//!        ... | initramfs, at the top of RAM   |
//!      3 GiB +--------------------------------+
//!            | virtio-mmio slots              |
//!  0xfec00000| IOAPIC, local APIC, KVM's TSS  |
//!      4 GiB +--------------------------------+
//!            | the rest of RAM                |
//!   n * 2 GiB+--------------------------------+
//!            | where memory may be plugged    |
//!   n * 2 GiB+--------------------------------+
//!            | where files may appear         |
//!            +--------------------------------+
//! ```
//!
//! All of the first 3 GiB is memory slot, the reserved part below 1 MiB too: kernels look for firmware tables there, and
//! finding zeroes costs no exit.

use vm_memory::GuestAddress;

/// The global descriptor table in force at entry.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// PVH `hvm_start_info`.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// PVH `hvm_modlist_entry` of the initramfs.
pub const MODULE_LIST: GuestAddress = GuestAddress(0x6040);
/// PVH `hvm_memmap_table_entry`s.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// The kernel command line, with a NUL at its end.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The longest command line in bytes without the NUL. Linux 6.12 arch/x86/include/asm/setup.h: COMMAND_LINE_SIZE is 2048, and
/// what is longer is cut off in silence.
pub const CMDLINE_CAPACITY: usize = 2047;
/// The MP table: the last KiB of conventional memory, where Linux looks for it second (mpparse.c).
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// How long the MP table may be in bytes.
pub const MP_TABLE_CAPACITY: usize = 0x400;
/// Where RAM proper begins; below is what this program puts there.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);
/// The end of memory below the gap, and the beginning of the gap.
pub const GAP_START: u64 = 3 << 30;
/// The end of the gap.
pub const GAP_END: u64 = 4 << 30;

/// Where virtio-mmio slots may be put.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Where the space for them ends.
pub const MMIO_END: u64 = 0xe000_0000;
/// The IOAPIC (KVM's, fixed).
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs (KVM's default).
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM uses on Intel processors without unrestricted guest mode.
pub const KVM_TSS: usize = 0xfffb_d000;

/// How many interrupt lines the IOAPIC has.
pub const GSIS: u32 = 24;
/// The first that no legacy device has: slots take this one and those up to [`GSIS`].
pub const FIRST_GSI: u32 = 5;

/// Where what comes after RAM begins and ends: Linux can plug whole memory blocks only, of 128 MiB in a machine of less than 64 GiB and
/// of at most 2 GiB in a larger one (Linux 6.12 arch/x86/mm/init_64.c, probe_memory_block_size()).
const BLOCK: u64 = 2 << 30;
/// How much address space there is for files, if the processor has as much: more than the images of any pod, yet a bound on what
/// a hostile guest can make its devices fill with garbage.
const WINDOW: u64 = 256 << 30;
/// Linux 6.12 arch/x86/include/asm/sparsemem.h: MAX_PHYSMEM_BITS of a kernel with four levels of page tables.
const MAX_ADDRESS_BITS: u8 = 46;

/// Where guest memory is and may come to be, as start and length in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    /// What the machine boots with.
    pub ram: Vec<(GuestAddress, u64)>,
    /// Where memory may be plugged.
    pub hotplug: Option<(GuestAddress, u64)>,
    /// Where files may appear. None if the processor cannot address so much.
    pub window: Option<(GuestAddress, u64)>,
}

/// The processor cannot address as much memory as the machine is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory would end at {end:#x}; processor and guest kernel can address {address_bits} bits")]
pub struct AddressSpaceTooSmall {
    end: u64,
    address_bits: u8,
}

/// Lays out a machine with `ram` bytes of RAM and room for `hotplug` more (rounded up to whole memory blocks of the guest), on a
/// processor with that many physical address bits. Addresses stay below 2^46.
///
/// # Errors
/// [`AddressSpaceTooSmall`].
pub fn memory_layout(ram: u64, hotplug: u64, address_bits: u8) -> Result<MemoryLayout, AddressSpaceTooSmall> {
    let address_bits = address_bits.min(MAX_ADDRESS_BITS);
    let limit = 1 << address_bits;
    let ram = memory_regions(ram);
    let ram_end = ram.iter().map(|(start, length)| start.0 + length).max().unwrap_or(0);
    let mut end = ram_end.max(GAP_END).next_multiple_of(BLOCK);
    let hotplug = (hotplug > 0).then(|| {
        let region = (GuestAddress(end), hotplug.next_multiple_of(BLOCK));
        end += region.1;
        region
    });
    let needed = if hotplug.is_some() { end } else { ram_end };
    if needed > limit {
        return Err(AddressSpaceTooSmall { end: needed, address_bits });
    }
    let window = Some((GuestAddress(end), limit.saturating_sub(end).min(WINDOW))).filter(|range| range.1 > 0);
    Ok(MemoryLayout { ram, hotplug, window })
}

/// Cuts guest memory of `bytes` bytes into the part below the gap and the part above it.
pub fn memory_regions(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(GAP_START);
    let mut regions = vec![(GuestAddress(0), low)];
    if bytes > low {
        regions.push((GuestAddress(GAP_END), bytes - low));
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_split_around_the_gap() {
        const MIB: u64 = 1 << 20;
        for (mib, low, high) in [
            (48, 48, 0),
            (3071, 3071, 0),
            (3072, 3072, 0),
            (3073, 3072, 1),
            (4096, 3072, 1024),
            (1024 * 1024, 3072, 1024 * 1024 - 3072),
        ] {
            let mut expected = vec![(GuestAddress(0), low * MIB)];
            if high > 0 {
                expected.push((GuestAddress(GAP_END), high * MIB));
            }
            assert_eq!(memory_regions(mib * MIB), expected, "{mib} MiB");
        }
    }

    #[test]
    fn what_comes_after_ram_is_aligned_to_the_guests_memory_blocks() {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        for (ram, hotplug, at, length) in [
            (128 * MIB, 2 * MIB, 4 * GIB, 2 * GIB),
            (3 * GIB, 2 * GIB, 4 * GIB, 2 * GIB),
            (3 * GIB + MIB, 3 * GIB, 6 * GIB, 4 * GIB),
            (100 * GIB, 1 << 39, 102 * GIB, 1 << 39),
        ] {
            let layout = memory_layout(ram, hotplug, 48).unwrap();
            assert_eq!(layout.ram, memory_regions(ram));
            assert_eq!(layout.hotplug, Some((GuestAddress(at), length)));
            assert_eq!(layout.window, Some((GuestAddress(at + length), WINDOW)));
        }
        let layout = memory_layout(128 * MIB, 0, 48).unwrap();
        assert_eq!((layout.hotplug, layout.window), (None, Some((GuestAddress(4 * GIB), WINDOW))));
    }

    #[test]
    fn memory_ends_where_the_processors_addresses_do() {
        const GIB: u64 = 1 << 30;
        let small = memory_layout(GIB, 60 * GIB, 36).unwrap();
        assert_eq!(small.hotplug, Some((GuestAddress(4 * GIB), 60 * GIB)));
        assert_eq!(small.window, None);
        assert_eq!(memory_layout(GIB, 58 * GIB, 36).unwrap().window, Some((GuestAddress(62 * GIB), 2 * GIB)));
        for (ram, hotplug) in [(GIB, 61 * GIB), (64 * GIB, 0)] {
            let error = memory_layout(ram, hotplug, 36).unwrap_err();
            assert!(error.to_string().ends_with("can address 36 bits"), "{error}");
        }
        assert!(memory_layout(63 * GIB, 0, 36).unwrap().window.is_none());
        // Whatever the processor can do, Linux cannot do more.
        assert!(memory_layout(GIB, 1 << 46, 52).is_err());
    }

    #[test]
    fn nothing_overlaps() {
        let areas = [
            (GDT.0, 32),
            (START_INFO.0, 0x40),
            (MODULE_LIST.0, 32),
            (MEMORY_MAP.0, 24 * 8),
            (CMDLINE.0, CMDLINE_CAPACITY as u64 + 1),
            (MP_TABLE.0, MP_TABLE_CAPACITY as u64),
            (HIGH_RAM.0, GAP_START - HIGH_RAM.0),
            (MMIO_BASE, MMIO_END - MMIO_BASE),
            (u64::from(IOAPIC), 4096),
            (u64::from(LOCAL_APIC), 4096),
            (KVM_TSS as u64, 3 * 4096),
            (GAP_END, 1),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:#x?}");
        }
        const { assert!(MMIO_BASE >= GAP_START) };
    }
}
