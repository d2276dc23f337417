//! What is particular to the processor. The rest of the crate uses the names re-exported here and no others, so that another
//! architecture is another folder with the same names:
//!
//! * [`memory_layout`] - where guest memory is and may come to be, within the addresses [`address_bits`] says there are;
//!   [`memory_regions`] - RAM alone.
//! * [`build`] - a virtual machine with everything KVM needs to know, its guest loaded, its vCPUs ready to run.
//! * [`cmdline_for_vcpus`] - what the guest kernel must be told about its vCPUs.
//! * [`VcpuState`], [`PlatformState`] - what vCPUs and what they share are where they stopped.
//! * [`NEEDED_CAPABILITIES`] - what KVM must be able to do for all this.
//! * [`syscall_name`], [`syscall_arguments`] - system calls, as people and as signal handlers see them.
//! * [`MMIO_BASE`], [`MMIO_END`], [`FIRST_GSI`], [`GSIS`] - where virtio-mmio slots go and which interrupts they have.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    AddressSpaceTooSmall, ArchError, BootSource, Built, CMDLINE_CAPACITY, FIRST_GSI, GSIS, MMIO_BASE,
    MMIO_END, MemoryLayout, PlatformState, StateError, StateLayout, VcpuState, address_bits, build,
    cmdline_for_vcpus, memory_layout, memory_regions,
    syscalls::{syscall_arguments, syscall_name},
    vm::NEEDED_CAPABILITIES,
};
