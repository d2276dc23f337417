//! What differs between processor architectures: how a boot mark reaches the VMM.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::BootMarks;
