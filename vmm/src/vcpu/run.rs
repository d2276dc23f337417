//! What the thread of a vCPU does.

use std::fmt::Write;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use kvrun_vmm_api::ExitReason;

use super::{Counters, ExitKind, Shared, Want};
use crate::{locked, monotonic_ns};

/// Runs the vCPU until it is told to stop, or the machine ends and this vCPU knows. Hands the descriptor back, for the
/// `kvm_run` page must outlive every kick.
pub(super) fn run(
    index: usize,
    mut fd: VcpuFd,
    immediate_exit: &AtomicU8,
    shared: &Shared,
    counters: &Counters,
) -> VcpuFd {
    let mut rounds = 0;
    let mut wanted = rest(index, &fd, shared, &mut rounds);
    if index == 0 {
        shared.first_entry_ns.store(monotonic_ns(), Ordering::Relaxed);
    }
    while wanted {
        let outcome = fd.run();
        counters.count(ExitKind::of(&outcome));
        let ended = match outcome {
            Ok(VcpuExit::IoOut(port, data)) => {
                shared.buses.ports.write(u64::from(port), data);
                // A port write is how the guest resets the machine; then it must not go on.
                if shared.exit.reason().is_some() {
                    break;
                }
                None
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                shared.buses.ports.read(u64::from(port), data);
                None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                shared.buses.mmio.write(address, data);
                None
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                shared.buses.mmio.read(address, data);
                None
            }
            Ok(VcpuExit::Intr) => None,
            Ok(VcpuExit::Shutdown) => Some(ExitReason::TripleFault),
            Ok(VcpuExit::SystemEvent(event, _)) => Some(match event {
                KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET => ExitReason::GuestReset,
                KVM_SYSTEM_EVENT_CRASH => ExitReason::Kvm("the guest reported a crash".into()),
                other => ExitReason::Kvm(format!("unknown system event {other}")),
            }),
            Ok(VcpuExit::InternalError) => Some(ExitReason::Kvm(internal_error(index, &mut fd))),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Some(ExitReason::Kvm(format!(
                "vCPU {index} cannot enter the guest: hardware reason {reason:#x} on host CPU {cpu}"
            ))),
            // With the interrupt controller in the kernel, HLT is the kernel's business, and so is everything else.
            Ok(other) => {
                let what = format!("{other:?}");
                Some(ExitReason::Kvm(format!("vCPU {index} left the guest for an unknown reason: {what}")))
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    // In this order: see the module's documentation.
                    immediate_exit.store(0, Ordering::Relaxed);
                    wanted = rest(index, &fd, shared, &mut rounds);
                    None
                }
                libc::EAGAIN => None,
                _ => Some(ExitReason::Kvm(format!("KVM_RUN of vCPU {index} failed: {error}{}", at(&fd)))),
            },
        };
        if let Some(reason) = ended {
            shared.exit.report(reason);
            break;
        }
    }
    // An ended vCPU is as good as held to whoever pauses the machine.
    let mut state = locked(shared.state.lock());
    state.resting += 1;
    state.ended += 1;
    shared.parked.notify_all();
    drop(state);
    fd
}

/// Waits until the vCPUs are wanted in the guest: `true`; or not any more: `false`. Does what is asked of a held vCPU meanwhile;
/// `rounds` is how often that was.
fn rest(index: usize, fd: &VcpuFd, shared: &Shared, rounds: &mut u64) -> bool {
    let mut state = locked(shared.state.lock());
    state.resting += 1;
    shared.parked.notify_all();
    let held = state.want == Want::Park;
    loop {
        if let Some(task) = state.task.clone()
            && *rounds != state.round
        {
            *rounds = state.round;
            drop(state);
            task(index, fd);
            state = locked(shared.state.lock());
            state.unfinished -= 1;
            shared.parked.notify_all();
        } else if state.want == Want::Park {
            state = locked(shared.wanted.wait(state));
        } else {
            break;
        }
    }
    state.resting -= 1;
    let wanted = state.want == Want::Run;
    drop(state);
    if held && wanted {
        // Tells the guest that it was held, so that its watchdogs do not take the time that has passed for a hang (Linux
        // Documentation/virt/kvm/api.rst, 4.70). Refused where the guest has no kvmclock (yet), which then has no need of it.
        let _ = fd.kvmclock_ctrl();
    }
    wanted
}

/// " at RIP ...", if that can be found out.
fn at(fd: &VcpuFd) -> String {
    fd.get_regs().map_or_else(|_| String::new(), |regs| format!(" at RIP {:#x}", regs.rip))
}

/// Describes a `KVM_EXIT_INTERNAL_ERROR` in words, with what KVM says about the instruction.
pub(crate) fn internal_error(index: usize, fd: &mut VcpuFd) -> String {
    let error = InternalError::read(fd.get_kvm_run());
    let mut text = format!("internal error {}", error.suberror);
    if error.suberror == KVM_INTERNAL_ERROR_EMULATION {
        text.push_str(" (this KVM cannot execute the instruction)");
    }
    // Writing to a String does not fail.
    let _ = write!(text, " on vCPU {index}{}", at(fd));
    if !error.instruction.is_empty() {
        text.push_str(", instruction bytes");
        for byte in &error.instruction {
            let _ = write!(text, " {byte:02x}");
        }
    }
    text
}

/// What `kvm_run` tells of an internal error.
#[derive(Debug, PartialEq, Eq)]
struct InternalError {
    suberror: u32,
    /// The bytes at RIP, as many as KVM fetched; empty if it does not say.
    instruction: Vec<u8>,
}

impl InternalError {
    fn read(run: &kvm_run) -> Self {
        debug_assert_eq!(run.exit_reason, KVM_EXIT_INTERNAL_ERROR);
        // SAFETY: `internal` and `emulation_failure` are the members for this exit reason; any bit pattern is valid for
        // either, they are integers.
        let (internal, failure) =
            unsafe { (run.__bindgen_anon_1.internal, run.__bindgen_anon_1.emulation_failure) };
        let mut instruction = Vec::new();
        // Linux include/uapi/linux/kvm.h: flags are there if ndata >= 1, the bytes (two more words) if the flag says so.
        if internal.suberror == KVM_INTERNAL_ERROR_EMULATION
            && internal.ndata >= 3
            && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0
        {
            // SAFETY: as above.
            let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let length = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
            instruction.extend_from_slice(&bytes.insn_bytes[..length]);
        }
        Self { suberror: internal.suberror, instruction }
    }
}
