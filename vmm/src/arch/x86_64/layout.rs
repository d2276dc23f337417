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

/// Cuts guest memory of `bytes` bytes into the part below the gap and the part above it. Addresses stay below 2^46 for any
/// size a machine may have.
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
