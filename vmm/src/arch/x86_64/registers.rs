//! The state a vCPU starts in: for the first, that of the PVH entry point (Xen docs/misc/pvh.pandoc, "Domain builder start"); for
//! the others, that after INIT, which KVM has set up: they wait for a start-up interrupt.

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::devices::virtio::GuestRam;

/// Selectors: index in the GDT times its entries' size.
const CODE: u16 = 8;
const DATA: u16 = 16;
const TSS: u16 = 24;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
/// Bit 1 always reads as one (Intel SDM volume 1, 3.4.3).
const RFLAGS_FIXED: u64 = 2;

/// Intel SDM volume 3, table 12-1 (local APIC register addresses).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
/// Delivery modes, in bits 8..11 (figure 12-8).
const APIC_MODE_NMI: u32 = 0b100 << 8;
const APIC_MODE_EXTINT: u32 = 0b111 << 8;
const APIC_MODE_MASK: u32 = 0b111 << 8;
const APIC_LVT_MASKED: u32 = 1 << 16;

/// A descriptor as it is in the GDT: base 0 but for what is given (Intel SDM volume 3, figure 3-8).
const fn descriptor(attributes: u16, limit: u32) -> u64 {
    (limit as u64 & 0xffff) | (limit as u64 >> 16 & 0xf) << 48 | (attributes as u64) << 40
}

/// Null, 32-bit code, 32-bit data, 32-bit TSS. Attributes: G, D/B, then P, DPL, S, type.
const GDT: [u64; 4] =
    [0, descriptor(0xc09b, 0xf_ffff), descriptor(0xc093, 0xf_ffff), descriptor(0x008b, 0x67)];

/// Writes the GDT in force at entry.
pub(super) fn write_gdt(mem: &GuestRam) -> Result<(), GuestMemoryError> {
    for (index, entry) in GDT.into_iter().enumerate() {
        mem.write_obj(entry, GuestAddress(layout::GDT.0 + 8 * index as u64))?;
    }
    Ok(())
}

/// What the segment register holds after loading `selector` from [`GDT`].
fn segment(selector: u16) -> kvm_segment {
    let entry = GDT[usize::from(selector / 8)];
    let bit = |n: u32| (entry >> n & 1) as u8;
    let limit = (entry & 0xffff | (entry >> 48 & 0xf) << 16) as u32;
    kvm_segment {
        base: 0,
        // With G, the limit counts pages.
        limit: if bit(55) == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: (entry >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: (entry >> 45 & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: bit(52),
        unusable: u8::from(entry == 0),
        padding: 0,
    }
}

/// General registers at the PVH entry point.
pub(super) fn entry_regs(entry: GuestAddress) -> kvm_regs {
    kvm_regs { rip: entry.0, rbx: layout::START_INFO.0, rflags: RFLAGS_FIXED, ..Default::default() }
}

/// Makes `sregs` (as KVM has set them up) those of the PVH entry point: flat 32-bit protected mode, no paging.
pub(super) fn set_entry_sregs(sregs: &mut kvm_sregs) {
    let data = segment(DATA);
    sregs.cs = segment(CODE);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS);
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// FPU and SSE state as FNINIT and reset leave it: all exceptions masked.
pub(super) fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Model-specific registers that differ from what KVM sets up, or that must not depend on it.
pub(super) fn msrs() -> Msrs {
    // Intel SDM volume 4, table 2-2; AMD APM volume 2, appendix A.
    const IA32_TSC: u32 = 0x10;
    const IA32_SYSENTER_CS: u32 = 0x174;
    const IA32_SYSENTER_ESP: u32 = 0x175;
    const IA32_SYSENTER_EIP: u32 = 0x176;
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const STAR: u32 = 0xc000_0081;
    const LSTAR: u32 = 0xc000_0082;
    const CSTAR: u32 = 0xc000_0083;
    const SYSCALL_MASK: u32 = 0xc000_0084;
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    const FAST_STRINGS: u64 = 1;
    /// MTRRs on, all memory write-back: without firmware nobody else does it.
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

    let entries = [
        (IA32_SYSENTER_CS, 0),
        (IA32_SYSENTER_ESP, 0),
        (IA32_SYSENTER_EIP, 0),
        (STAR, 0),
        (LSTAR, 0),
        (CSTAR, 0),
        (SYSCALL_MASK, 0),
        (KERNEL_GS_BASE, 0),
        (IA32_TSC, 0),
        (IA32_MISC_ENABLE, FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, ENABLED_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    const { assert!(11 <= KVM_MAX_MSR_ENTRIES) };
    Msrs::from_entries(&entries).expect("11 is not more than KVM_MAX_MSR_ENTRIES")
}

/// Wires the two local interrupt pins as on a PC: LINT0 of the first processor to the legacy interrupt controller, LINT1 to NMI.
///
/// The others keep LINT0 masked, as after a reset. KVM gives each interrupt of a line below 16 to the legacy controller, too, and wakes the first vCPU
/// whose LINT0 is open: that would be one that is not even online, once the guest has closed the first one's.
pub(super) fn wire_lapic(lapic: &mut kvm_lapic_state, is_first: bool) {
    let first = is_first.then_some((APIC_LVT_LINT0, APIC_MODE_EXTINT));
    for (offset, mode) in first.into_iter().chain([(APIC_LVT_LINT1, APIC_MODE_NMI)]) {
        let register = &mut lapic.regs[offset..offset + 4];
        let value = register.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte as u8));
        let value = (value & !(APIC_MODE_MASK | APIC_LVT_MASKED) | mode).to_le_bytes();
        register.copy_from_slice(&value.map(|byte| byte as i8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_those_pvh_asks_for() {
        let code = segment(CODE);
        assert_eq!((code.base, code.limit, code.selector), (0, 0xffff_ffff, 8));
        assert_eq!((code.type_, code.s, code.db, code.l, code.g, code.present), (0xb, 1, 1, 0, 1, 1));
        let data = segment(DATA);
        assert_eq!((data.limit, data.type_, data.s, data.db, data.g), (0xffff_ffff, 3, 1, 1, 1));
        let tss = segment(TSS);
        assert_eq!((tss.limit, tss.type_, tss.s, tss.g, tss.present), (0x67, 0xb, 0, 0, 1));
    }

    #[test]
    fn lapic_pins_are_wired_and_unmasked() {
        for (is_first, lint0) in [(true, [0, 7, 0, 0]), (false, [0, 0, 1, 0])] {
            let mut lapic = kvm_lapic_state::default();
            // As after reset: masked.
            lapic.regs[APIC_LVT_LINT0 + 2] = 1;
            lapic.regs[APIC_LVT_LINT1 + 2] = 1;
            wire_lapic(&mut lapic, is_first);
            assert_eq!(lapic.regs[APIC_LVT_LINT0..APIC_LVT_LINT0 + 4], lint0);
            assert_eq!(lapic.regs[APIC_LVT_LINT1..APIC_LVT_LINT1 + 4], [0, 4, 0, 0]);
        }
    }
}
