//! The virtual machine of a pod.
//!
//! `kvrun-vmm` gets one inherited descriptor, the control socket, and runs one machine for as long as that socket is
//! open. In reading order:
//!
//! * [`jail`] - namespaces, an empty root, no privileges: what the process can still reach. Built before anything else.
//! * [`control`] - the control socket served: requests in, replies and events out. `main` calls these two.
//! * [`machine`] - a booted machine: memory, vCPUs, buses, slots; built from a `VmConfig`.
//! * [`state`] - all of it but its memory, to be saved and restored.
//! * [`arch`] - what is particular to the processor: boot protocol, CPUID, MSRs, interrupt tables.
//! * [`memory`] - guest memory.
//! * [`vcpu`] - one thread per vCPU: run, exit, dispatch, pause.
//! * [`bus`] - which device answers which port or address.
//! * [`devices`] - the devices: serial console, boot marks, reset port, and everything virtio.
//! * [`rate_limiter`] - token buckets of devices that have a limit.
//! * [`thread`] - where threads start, and the classes they belong to.
//! * [`event_loop`] - the one thread on which devices wait for descriptors.
//! * [`check`] - whether this host's KVM can run a guest kernel, found out with a tiny guest.
//!
//! Threads: main (control), the event loop, one per vCPU, one per disk, one per pair of queues of a link, and the workers that
//! file-system devices start when their driver comes up. Locks are held in one order: a slot's transport, then a device's own; the event loop takes no transport
//! lock, so a transport may wait for the loop (see [`event_loop::LoopHandle::remove`]).

pub mod arch;
pub mod bus;
pub mod check;
pub mod control;
pub mod devices;
pub mod event_loop;
pub mod jail;
pub mod machine;
pub mod memory;
pub mod rate_limiter;
pub mod state;
pub mod thread;
pub mod vcpu;

use std::sync::{LockResult, PoisonError};

/// The value of a lock, poisoned or not: this program aborts on panic, so no holder of a lock ever panicked.
pub(crate) fn locked<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

/// `CLOCK_MONOTONIC` now, in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Never negative, and nanoseconds wrap after 584 years.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
