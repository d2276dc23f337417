//! Virtual machines that never run, so that KVM's static keys do not change while the lab is up.
//!
//! KVM patches its own code when the first virtual machine comes and the last one goes (`preempt_notifier_key`, Linux
//! virt/kvm/kvm_main.c), and when the first vCPU comes and the last one goes whose local APIC is disabled or missing
//! (`apic_sw_disabled`, `kvm_has_noapic_vcpu`, arch/x86/kvm/lapic.c). While it does, a breakpoint stands in for the
//! instruction (`text_poke_bp`). With one thread per CPU, QEMU can still run a block of code that it translated with the
//! breakpoint after the kernel has synchronised all CPUs and forgotten it, and the kernel dies of "Oops: int3": here,
//! within some tens of virtual machines. One VM with and one without APIC hold all three keys where they are.

use anyhow::{Context, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// The keys change again when this is dropped.
pub(crate) struct Held {
    _vms: [(VmFd, VcpuFd); 2],
}

/// Holds the keys.
pub(crate) fn hold() -> Result<Held> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    let with_apic = kvm.create_vm().context("create a VM")?;
    with_apic.create_irq_chip().context("create an interrupt controller")?;
    // Local APICs start disabled (Intel SDM vol. 3, 12.4.7.1), and this one is never told otherwise.
    let disabled_apic = with_apic.create_vcpu(0).context("create a vCPU with a local APIC")?;
    let without_apic = kvm.create_vm().context("create a VM")?;
    let no_apic = without_apic.create_vcpu(0).context("create a vCPU without a local APIC")?;
    Ok(Held { _vms: [(with_apic, disabled_apic), (without_apic, no_apic)] })
}
