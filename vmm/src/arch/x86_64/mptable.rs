//! The MP table: which processors and interrupt lines there are (Intel MultiProcessor Specification 1.4, chapter 4). The
//! guest has no ACPI, so this is how it learns of them.

use vm_memory::{Bytes, GuestMemoryError};

use super::layout;
use crate::devices::virtio::GuestRam;

const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
const REVISION_1_4: u8 = 4;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const IOAPIC_USABLE: u8 = 1;

const ISA_BUS: u8 = 0;
const TYPE_INT: u8 = 0;
const TYPE_NMI: u8 = 1;
const TYPE_EXTINT: u8 = 3;
/// Polarity active high (bits 0..2 = 1), edge-triggered (bits 2..4 = 1): irqfds pulse the line.
const EDGE_HIGH: u16 = 1 | 1 << 2;
const ALL_LOCAL_APICS: u8 = 0xff;
/// The line through which the second legacy interrupt controller reports to the first; never a device's.
const CASCADE: u32 = 2;

/// Writes the table for `vcpus` processors, APIC IDs 0 and up.
pub(super) fn write(mem: &GuestRam, vcpus: u8) -> Result<(), GuestMemoryError> {
    let table = table(vcpus);
    debug_assert!(table.len() <= layout::MP_TABLE_CAPACITY);
    mem.write_slice(&table, layout::MP_TABLE)
}

/// Floating pointer (s4.1) and, right behind it, the configuration table (s4.2, s4.3).
fn table(vcpus: u8) -> Vec<u8> {
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        let flags = if id == 0 { CPU_ENABLED | CPU_BOOT } else { CPU_ENABLED };
        // Signature and feature flags (8 bytes) and what is reserved (8): a guest asks CPUID.
        entries.push([&[ENTRY_PROCESSOR, id, LOCAL_APIC_VERSION, flags][..], &[0; 16]].concat());
    }
    entries.push([&[ENTRY_BUS, ISA_BUS][..], b"ISA   "].concat());
    // A number no local APIC has.
    let ioapic = vcpus;
    let usable = [ENTRY_IOAPIC, ioapic, IOAPIC_VERSION, IOAPIC_USABLE];
    entries.push([&usable[..], &layout::IOAPIC.to_le_bytes()].concat());
    // Every line: the kernel gives line N of the first IOAPIC the interrupt number N only for lines named here
    // (Linux 6.12 arch/x86/kernel/apic/io_apic.c: setup_IO_APIC_irqs).
    for line in (0..layout::GSIS).filter(|&line| line != CASCADE) {
        let [low, high] = EDGE_HIGH.to_le_bytes();
        entries.push(vec![ENTRY_IO_INTERRUPT, TYPE_INT, low, high, ISA_BUS, line as u8, ioapic, line as u8]);
    }
    // Bus, line, local APIC, its LINT pin.
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, TYPE_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, TYPE_NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let body = entries.concat();
    let mut header = Vec::with_capacity(HEADER_SIZE);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&((HEADER_SIZE + body.len()) as u16).to_le_bytes());
    header.extend_from_slice(&[REVISION_1_4, 0 /* checksum, below */]);
    header.extend_from_slice(b"KVRUN   ");
    header.extend_from_slice(b"MICROVM     ");
    header.extend_from_slice(&[0; 6]); // no OEM table
    header.extend_from_slice(&(entries.len() as u16).to_le_bytes());
    header.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]); // no extended table
    let mut table = [header, body].concat();
    table[7] = checksum(&table);

    let mut pointer = Vec::with_capacity(POINTER_SIZE + table.len());
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(layout::MP_TABLE.0 as u32 + POINTER_SIZE as u32).to_le_bytes());
    pointer.extend_from_slice(&[
        (POINTER_SIZE / 16) as u8,
        REVISION_1_4,
        0, /* checksum */
        0,
        0,
        0,
        0,
        0,
    ]);
    pointer[10] = checksum(&pointer);
    pointer.append(&mut table);
    pointer
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use kvrun_vmm_api::config::MAX_VCPUS;

    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
    }

    /// Walks the table as Linux 6.12 arch/x86/kernel/mpparse.c does.
    #[test]
    fn table_is_what_a_kernel_accepts() {
        for vcpus in [1, 2, 3, MAX_VCPUS] {
            let table = table(vcpus);
            assert!(table.len() <= layout::MP_TABLE_CAPACITY, "{vcpus} vCPUs: {} bytes", table.len());
            let (pointer, config) = table.split_at(POINTER_SIZE);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(sum(pointer), 0);
            assert_eq!(pointer[4..8], (layout::MP_TABLE.0 as u32 + 16).to_le_bytes());
            assert_eq!(&config[..4], b"PCMP");
            assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());
            assert_eq!(sum(config), 0);

            let (mut rest, mut ids, mut lines, mut count) = (&config[HEADER_SIZE..], vec![], vec![], 0u16);
            while let Some(&kind) = rest.first() {
                let (entry, tail) = rest.split_at(if kind == ENTRY_PROCESSOR { 20 } else { 8 });
                match kind {
                    ENTRY_PROCESSOR => {
                        assert_eq!(
                            entry[3] & CPU_ENABLED,
                            CPU_ENABLED,
                            "a disabled CPU can never come online"
                        );
                        assert_eq!(entry[3] & CPU_BOOT != 0, entry[1] == 0);
                        ids.push(entry[1]);
                    }
                    ENTRY_IOAPIC => assert!(!ids.contains(&entry[1])),
                    ENTRY_IO_INTERRUPT => {
                        assert_eq!(entry[5], entry[7]);
                        lines.push(u32::from(entry[7]));
                    }
                    ENTRY_BUS | ENTRY_LOCAL_INTERRUPT => {}
                    other => panic!("entry of type {other}"),
                }
                (rest, count) = (tail, count + 1);
            }
            assert_eq!(u16::from_le_bytes([config[34], config[35]]), count);
            assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
            assert!((layout::FIRST_GSI..layout::GSIS).all(|gsi| lines.contains(&gsi)));
        }
    }
}
