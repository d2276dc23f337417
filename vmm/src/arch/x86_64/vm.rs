//! The KVM calls that make the machine, in the order KVM wants them: TSS address and interrupt controller before the first
//! vCPU, CPUID before MSRs (which MSRs exist depends on it).

use std::io;

use kvm_bindings::{CpuId, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL, Msrs, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemory};
use vmm_sys_util::errno;

use super::{cpuid, layout, registers};
use crate::devices::virtio::GuestRam;
use crate::memory::slot::{self, MemorySlot, MemorySlots};

/// KVM refused a call.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// An ioctl.
    #[error("KVM refuses to {what}")]
    Ioctl {
        /// What was attempted.
        what: &'static str,
        /// Why not.
        #[source]
        source: errno::Error,
    },
    /// An ioctl for one vCPU.
    #[error("KVM refuses to {what} of vCPU {vcpu}")]
    VcpuIoctl {
        /// What was attempted.
        what: &'static str,
        /// Which vCPU.
        vcpu: u8,
        /// Why not.
        #[source]
        source: errno::Error,
    },
    /// A model-specific register.
    #[error("KVM refuses to set MSR {index:#x} of vCPU {vcpu}")]
    Msr {
        /// Which register.
        index: u32,
        /// Which vCPU.
        vcpu: u8,
    },
    /// A memory slot.
    #[error("KVM refuses to map guest memory")]
    Memory(#[source] io::Error),
    /// The processor description.
    #[error("cannot describe the processor to the guest")]
    Cpuid(#[from] cpuid::CpuidError),
}

fn vm_error(what: &'static str) -> impl FnOnce(errno::Error) -> VmError {
    move |source| VmError::Ioctl { what, source }
}

/// Makes the virtual machine with its interrupt controllers (PIC, IOAPIC, local APICs) in the kernel. No PIT: a guest with
/// kvmclock and TSC deadline needs none, and it would cost a kernel thread of the host.
pub(crate) fn create(kvm: &Kvm) -> Result<VmFd, VmError> {
    let vm = loop {
        match kvm.create_vm() {
            // Starting the huge page recovery thread of the host can be interrupted.
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(vm_error("create a virtual machine"))?,
        }
    };
    vm.set_tss_address(layout::KVM_TSS).map_err(vm_error("set the TSS address"))?;
    vm.create_irq_chip().map_err(vm_error("create the interrupt controllers"))?;
    keep_other_slots_mapped(&vm)?;
    Ok(vm)
}

/// Has KVM forget what it has mapped of a memory slot that is removed, and no more. Without this, removing a block of memory
/// costs the guest a fault for every page it touches anew (Linux Documentation/virt/kvm/api.rst, KVM_X86_QUIRK_SLOT_ZAP_ALL;
/// a host before 6.12 knows no other way).
fn keep_other_slots_mapped(vm: &VmFd) -> Result<(), VmError> {
    let known = vm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    if known & KVM_X86_QUIRK_SLOT_ZAP_ALL as i32 == 0 {
        return Ok(());
    }
    let cap = kvm_enable_cap {
        cap: KVM_CAP_DISABLE_QUIRKS2,
        args: [KVM_X86_QUIRK_SLOT_ZAP_ALL.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).map_err(vm_error("keep memory slots apart"))
}

/// Makes `count` vCPUs, the first of which starts at the PVH entry point `entry`.
pub(super) fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    entry: GuestAddress,
) -> Result<Vec<VcpuFd>, VmError> {
    let cpuid = cpuid::Template::new(kvm, count)?;
    let msrs = registers::msrs();
    (0..count)
        .map(|index| {
            let error = |what| move |source| VmError::VcpuIoctl { what, vcpu: index, source };
            let (vcpu, _) = create_vcpu(vm, index, &cpuid, &msrs)?;
            if index == 0 {
                let mut sregs = vcpu.get_sregs().map_err(error("read the special registers"))?;
                registers::set_entry_sregs(&mut sregs);
                vcpu.set_sregs(&sregs).map_err(error("set the special registers"))?;
                vcpu.set_regs(&registers::entry_regs(entry)).map_err(error("set the registers"))?;
                vcpu.set_fpu(&registers::fpu()).map_err(error("set the FPU"))?;
            }
            Ok(vcpu)
        })
        .collect()
}

/// Makes the one vCPU of a machine that boots no kernel: in reset state, but for CPUID and MSRs.
pub(crate) fn create_bare_vcpu(kvm: &Kvm, vm: &VmFd) -> Result<(VcpuFd, CpuId), VmError> {
    create_vcpu(vm, 0, &cpuid::Template::new(kvm, 1)?, &registers::msrs())
}

/// Makes a vCPU and sets what is the same for all of them.
fn create_vcpu(
    vm: &VmFd,
    index: u8,
    cpuid: &cpuid::Template,
    msrs: &Msrs,
) -> Result<(VcpuFd, CpuId), VmError> {
    let error = |what| move |source| VmError::VcpuIoctl { what, vcpu: index, source };
    let vcpu = vm.create_vcpu(u64::from(index)).map_err(error("create the descriptor"))?;
    let cpuid = cpuid.for_vcpu(index)?;
    vcpu.set_cpuid2(&cpuid).map_err(error("set the CPUID"))?;
    set_msrs(&vcpu, index, msrs)?;
    let mut lapic = vcpu.get_lapic().map_err(error("read the local APIC"))?;
    registers::wire_lapic(&mut lapic, index == 0);
    vcpu.set_lapic(&lapic).map_err(error("set the local APIC"))?;
    Ok((vcpu, cpuid))
}

/// Gives the machine its memory: one slot per region.
pub(crate) fn add_memory(vm: &VmFd, mem: &GuestRam) -> Result<(), VmError> {
    for (number, region) in (slot::RAM..).zip(mem.iter()) {
        vm.add(MemorySlot::whole(number, region)).map_err(VmError::Memory)?;
    }
    Ok(())
}

fn set_msrs(vcpu: &VcpuFd, index: u8, msrs: &Msrs) -> Result<(), VmError> {
    let set = vcpu.set_msrs(msrs).map_err(|source| VmError::VcpuIoctl {
        what: "set the MSRs",
        vcpu: index,
        source,
    })?;
    // KVM stops at the first that it refuses and says how many it took.
    match msrs.as_slice().get(set) {
        Some(refused) => Err(VmError::Msr { index: refused.index, vcpu: index }),
        None => Ok(()),
    }
}

/// What KVM must be able to do for [`create`] and for the devices to work.
pub const NEEDED_CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
];
