//! x86_64: a PC without firmware, PCI and ACPI, entered by the PVH boot protocol.
//!
//! In the order of [`build`]:
//!
//! * [`layout`] - where everything is in the guest's physical address space.
//! * [`kernel`] - the kernel image: an ELF `vmlinux` with a PVH note, checked and loaded.
//! * [`boot`] - what the kernel is given: memory map, initramfs, command line.
//! * [`mptable`] - the Intel MP table: which processors and interrupt lines there are.
//! * [`vm`] - the KVM calls that make the machine, in the order KVM wants them.
//! * [`cpuid`] - what the processor says it is.
//! * [`registers`] - the state a vCPU starts in.
//! * [`state`] - the state a vCPU and its surroundings are in, to be saved and restored.
//! * [`syscalls`] - what the host's system calls are called.

pub mod boot;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod registers;
pub mod state;
pub mod syscalls;
pub mod vm;

use std::fs::File;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use kvrun_vmm_api::VcpuConfig;

use crate::devices::virtio::GuestRam;

pub use state::{PlatformState, StateError, StateLayout, VcpuState};

pub use layout::{
    AddressSpaceTooSmall, CMDLINE_CAPACITY, FIRST_GSI, GSIS, MMIO_BASE, MMIO_END, MemoryLayout,
    memory_layout, memory_regions,
};

/// What the guest boots from.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// An uncompressed ELF `vmlinux` with a PVH note.
    pub kernel: &'a File,
    /// An uncompressed cpio archive.
    pub initramfs: &'a File,
    /// The whole kernel command line, at most [`CMDLINE_CAPACITY`] bytes, without a NUL byte.
    pub cmdline: &'a str,
}

/// A machine ready to run.
#[derive(Debug)]
pub struct Built {
    /// For irqfds and ioeventfds.
    pub vm: Arc<VmFd>,
    /// All possible vCPUs; the first is the one that boots.
    pub vcpus: Vec<VcpuFd>,
    /// What there is to save of each.
    pub layout: StateLayout,
}

/// A machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ArchError {
    /// The kernel image.
    #[error("cannot load the guest kernel")]
    Kernel(#[from] kernel::KernelError),
    /// Initramfs, command line or memory.
    #[error("cannot prepare the boot of the guest")]
    Boot(#[from] boot::BootError),
    /// KVM refused.
    #[error("cannot set up the virtual machine")]
    Vm(#[from] vm::VmError),
    /// The state of vCPUs.
    #[error(transparent)]
    State(#[from] StateError),
}

/// How many bits a physical address has in a guest on this host.
///
/// # Errors
/// [`ArchError::Vm`] if KVM does not tell.
pub fn address_bits(kvm: &Kvm) -> Result<u8, ArchError> {
    Ok(cpuid::address_bits(kvm).map_err(vm::VmError::from)?)
}

/// Loads the guest into `mem` (RAM only) and builds the machine around it: virtual machine, interrupt controller, memory slots and all
/// `vcpus.max` vCPUs.
///
/// # Errors
/// [`ArchError`]; with [`ArchError::Kernel`] and most of [`ArchError::Boot`] the files given are at fault.
pub fn build(
    kvm: &Kvm,
    mem: &GuestRam,
    source: &BootSource<'_>,
    vcpus: VcpuConfig,
) -> Result<Built, ArchError> {
    // The files first: what a user can have got wrong is told before anything is asked of KVM.
    let kernel = kernel::load(source.kernel, mem)?;
    boot::write(mem, &kernel, source)?;
    mptable::write(mem, vcpus.max).map_err(boot::BootError::from)?;
    registers::write_gdt(mem).map_err(boot::BootError::from)?;

    let vm = vm::create(kvm)?;
    let fds = vm::create_vcpus(kvm, &vm, vcpus.max, kernel.entry)?;
    vm::add_memory(&vm, mem)?;
    let layout = StateLayout::new(kvm, &vm)?;
    Ok(Built { vm: Arc::new(vm), vcpus: fds, layout })
}

/// What the guest kernel must be told on its command line about its vCPUs: the MP table names all `max` of them, for a
/// processor it calls disabled can never be brought online; so the kernel is told to start only `boot` of them. The others
/// wait for `echo 1 > /sys/devices/system/cpu/cpuN/online`.
pub fn cmdline_for_vcpus(vcpus: VcpuConfig) -> Option<String> {
    // Linux 6.12 Documentation/admin-guide/kernel-parameters.txt: maxcpus.
    (vcpus.boot < vcpus.max).then(|| format!("maxcpus={}", vcpus.boot))
}
