//! How often a vCPU left the guest, by kind of exit.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::VcpuExit;
use vmm_sys_util::errno;

/// Why a vCPU left the guest for the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// It read from an I/O port.
    IoIn,
    /// It wrote to an I/O port.
    IoOut,
    /// It read from an address that is not memory.
    MmioRead,
    /// It wrote to an address that is not memory.
    MmioWrite,
    /// The VMM asked for it (pause, stop), or the host's scheduler or debugger.
    Interrupted,
    /// It ended, or KVM could not go on.
    Ended,
}

impl ExitKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::IoIn, Self::IoOut, Self::MmioRead, Self::MmioWrite, Self::Interrupted, Self::Ended];

    /// What it is called in [`VmMetrics`](kvrun_vmm_api::VmMetrics).
    pub fn name(self) -> &'static str {
        match self {
            Self::IoIn => "io_in",
            Self::IoOut => "io_out",
            Self::MmioRead => "mmio_read",
            Self::MmioWrite => "mmio_write",
            Self::Interrupted => "interrupted",
            Self::Ended => "ended",
        }
    }

    /// That of a return of `KVM_RUN`.
    pub(super) fn of(outcome: &Result<VcpuExit<'_>, errno::Error>) -> Self {
        match outcome {
            Ok(VcpuExit::IoIn(..)) => Self::IoIn,
            Ok(VcpuExit::IoOut(..)) => Self::IoOut,
            Ok(VcpuExit::MmioRead(..)) => Self::MmioRead,
            Ok(VcpuExit::MmioWrite(..)) => Self::MmioWrite,
            Ok(VcpuExit::Intr) => Self::Interrupted,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Self::Interrupted,
            Ok(_) | Err(_) => Self::Ended,
        }
    }
}

/// Written by the vCPU's thread only.
#[derive(Debug, Default)]
pub(super) struct Counters([AtomicU64; ExitKind::ALL.len()]);

impl Counters {
    /// Counts one. A plain load and store: there is one writer.
    pub(super) fn count(&self, kind: ExitKind) {
        let counter = &self.0[kind as usize];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    pub(super) fn get(&self, kind: ExitKind) -> u64 {
        self.0[kind as usize].load(Ordering::Relaxed)
    }

    pub(super) fn total(&self) -> u64 {
        ExitKind::ALL.into_iter().map(|kind| self.get(kind)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_a_counter_of_its_own() {
        let counters = Counters::default();
        for (times, kind) in ExitKind::ALL.into_iter().enumerate() {
            (0..=times).for_each(|_| counters.count(kind));
        }
        assert_eq!(ExitKind::ALL.map(|kind| counters.get(kind)), [1, 2, 3, 4, 5, 6]);
        assert_eq!(counters.total(), 21);
    }
}
