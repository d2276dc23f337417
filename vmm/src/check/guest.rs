//! The tiny guest: the instructions a kernel needs in ring 0, each tried on a virtual machine of its own.

use std::arch::global_asm;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::signal::register_signal_handler;

use super::Finding;
use crate::arch::x86_64::vm::{self, VmError};
use crate::devices::virtio::GuestRam;
use crate::memory::{self, MemoryError};
use crate::thread::{self, Class};
use crate::vcpu::{internal_error, kick_signal};

global_asm!(include_str!("probes.s"));

/// The code of a probe.
macro_rules! code {
    ($name:literal) => {{
        unsafe extern "C" {
            #[link_name = concat!("kvrun_probe_", $name)]
            static START: u8;
            #[link_name = concat!("kvrun_probe_", $name, "_end")]
            static END: u8;
        }
        // SAFETY: probes.s defines both, END after START, and only bytes of a read-only section between them.
        unsafe {
            std::slice::from_raw_parts(
                &raw const START,
                (&raw const END).offset_from(&raw const START) as usize,
            )
        }
    }};
}

/// How long a probe may take. The slowest takes microseconds on hardware, and milliseconds under emulation.
const LIMIT: Duration = Duration::from_secs(3);

/// The stack of a probe's thread in bytes.
const STACK: usize = 128 * 1024;

/// Where a probe says whether it went as it should.
const PORT_RESULT: u16 = 0x10;
/// Where an exception that no probe expects says which it is.
const PORT_EXCEPTION: u16 = 0x11;

/// Where a probe leaves the guest for a moment.
const PORT_NOTHING: u16 = 0x12;

/// The tiny guest's memory, in MiB: the least `arch` can lay out.
const MEMORY_MIB: u32 = 2;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const HANDLERS: u64 = 0x7000;
const COUNT_HANDLER: u64 = 0x7800;
const FAULT_HANDLER: u64 = 0x7c00;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;
const STACK_TOP: u64 = 0x1_0000;

const SELECTOR_CODE: u16 = 0x08;
const SELECTOR_DATA: u16 = 0x10;
const SELECTOR_TSS: u16 = 0x28;
const VECTOR_BREAKPOINT: u64 = 3;
const VECTOR_PAGE_FAULT: u64 = 14;
const VECTOR_TIMER: u64 = 0x40;
const VECTORS: u64 = VECTOR_TIMER + 1;
const EXCEPTIONS: u64 = 32;

/// A bit of the supported CPUID: leaf, subleaf, register (0 to 3 for EAX to EDX), bit.
type Feature = (u32, u32, usize, u32);

struct Probe {
    name: &'static str,
    code: &'static [u8],
    /// A kernel uses the instruction only if the processor has this; a probe without is one that every kernel runs.
    only_with: Option<Feature>,
}

fn probes() -> [Probe; 23] {
    let always = |name, code| Probe { name, code, only_with: None };
    let with = |feature, name, code| Probe { name, code, only_with: Some(feature) };
    [
        always("enter 64-bit mode, OUT", code!("nothing")),
        always("CPUID", code!("cpuid")),
        always("RDTSC", code!("rdtsc")),
        always("MFENCE, LFENCE, SFENCE, PAUSE", code!("fences")),
        always("REP STOSQ, REP MOVSB", code!("string")),
        always("LOCK XADD, LOCK BTS", code!("lock_xadd")),
        always("LOCK CMPXCHG16B", code!("cmpxchg16b")),
        always("POPCNT", code!("popcnt")),
        always("FXSAVE, FXRSTOR", code!("fxsave")),
        always("SSE2", code!("sse2")),
        with((1, 0, 2, 26), "XSETBV, XSAVE, XRSTOR", code!("xsave")),
        with((0xd, 1, 0, 3), "XSAVES, XRSTORS", code!("xsaves")),
        always("INT3 through a gate", code!("int3")),
        always("page fault through a gate", code!("page_fault")),
        always("IRETQ", code!("iretq")),
        always("RDMSR, WRMSR", code!("msr")),
        always("SWAPGS", code!("swapgs")),
        always("MOV to and from CR0, CR3, CR4, CR8", code!("control_registers")),
        always("INVLPG", code!("invlpg")),
        always("LGDT, LIDT, LTR", code!("descriptor_tables")),
        with((7, 0, 1, 20), "STAC, CLAC", code!("smap")),
        always("ring 3 and back by SYSCALL", code!("syscall")),
        always("TSC deadline interrupt", code!("timer")),
    ]
}

/// How a probe ended.
#[derive(Debug)]
enum Outcome {
    Right,
    Wrong,
    Exception(u8),
    Failed(String),
    Hung,
}

/// The tiny guest could not be set up.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error("cannot set up a virtual machine")]
    Vm(#[from] VmError),
    #[error("cannot set up the memory of a virtual machine")]
    Memory(#[from] MemoryError),
    #[error("cannot write the memory of a virtual machine")]
    Write(#[from] GuestMemoryError),
    #[error("cannot set up a vCPU")]
    Kvm(#[from] vmm_sys_util::errno::Error),
    #[error("cannot start a thread for a vCPU")]
    Thread(#[source] io::Error),
}

/// Tries every probe.
pub(super) fn run(kvm: &Kvm) -> Vec<Finding> {
    try_all(kvm, &probes())
}

fn try_all(kvm: &Kvm, probes: &[Probe]) -> Vec<Finding> {
    let mem = match memory::allocate(MEMORY_MIB) {
        Ok(mem) => mem,
        Err(error) => return vec![Finding::new("guest memory", false, error.to_string())],
    };
    let mut findings = Vec::new();
    for probe in probes {
        match try_one(kvm, &mem, probe) {
            Ok(Some(Outcome::Right)) => {
                findings.push(Finding::new(probe.name, true, "executed in the guest"));
            }
            // The processor does not have it, so no kernel uses it.
            Ok(None) => {}
            Ok(Some(outcome)) => {
                let detail = match &outcome {
                    Outcome::Wrong => "executed with a wrong result".into(),
                    Outcome::Exception(vector) => format!("raised exception {vector}"),
                    Outcome::Hung => format!("did not end within {} s", LIMIT.as_secs()),
                    Outcome::Failed(reason) => reason.clone(),
                    Outcome::Right => continue,
                };
                findings.push(Finding::new(probe.name, false, detail));
                if matches!(outcome, Outcome::Hung) {
                    findings.push(Finding::new(
                        "the other instructions",
                        false,
                        "not tried after one that hung",
                    ));
                    break;
                }
            }
            Err(error) => {
                let detail =
                    std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source())
                        .map(ToString::to_string)
                        .collect::<Vec<_>>()
                        .join(": ");
                findings.push(Finding::new(probe.name, false, detail));
                break;
            }
        }
    }
    findings
}

/// Runs one probe; `None` if the processor does not have what it tries.
fn try_one(kvm: &Kvm, mem: &GuestRam, probe: &Probe) -> Result<Option<Outcome>, SetupError> {
    let vm = vm::create(kvm)?;
    let (vcpu, cpuid) = vm::create_bare_vcpu(kvm, &vm)?;
    if probe.only_with.is_some_and(|feature| !has(cpuid.as_slice(), feature)) {
        return Ok(None);
    }
    write_memory(mem, probe.code)?;
    vm::add_memory(&vm, mem)?;
    let mut sregs = vcpu.get_sregs()?;
    set_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK_TOP, rdi: DATA, rflags: 2, ..Default::default() })?;
    run_bounded(vcpu).map(Some)
}

fn has(cpuid: &[kvm_cpuid_entry2], (function, index, register, bit): Feature) -> bool {
    cpuid
        .iter()
        .find(|leaf| leaf.function == function && leaf.index == index)
        .is_some_and(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][register] >> bit & 1 == 1)
}

/// Page tables, descriptor tables, handlers and the probe. Everything a probe may have changed is written anew.
fn write_memory(mem: &GuestRam, code: &[u8]) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const USER: u64 = 4;
    const LARGE: u64 = 1 << 7;
    mem.write_slice(&[0; STACK_TOP as usize], GuestAddress(0))?;
    mem.write_obj(PDPT | PRESENT_WRITABLE | USER, GuestAddress(PML4))?;
    mem.write_obj(PD | PRESENT_WRITABLE | USER, GuestAddress(PDPT))?;
    mem.write_obj(LARGE | PRESENT_WRITABLE, GuestAddress(PD))?;
    mem.write_obj(LARGE | PRESENT_WRITABLE | USER, GuestAddress(PD + 2 * 8))?;

    // Null, code, data, user data, user code, TSS (16 bytes; Intel SDM volume 3, figure 8-4), busy as it is loaded.
    let limit = size_of::<[u8; 0x68]>() as u64 - 1;
    let gdt = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        limit | TSS << 16 | 0x8b << 40,
        0,
    ];
    for (index, entry) in gdt.into_iter().enumerate() {
        mem.write_obj(entry, GuestAddress(GDT + 8 * index as u64))?;
    }
    // RSP0 (figure 8-11).
    mem.write_obj(STACK_TOP, GuestAddress(TSS + 4))?;
    for vector in (0..EXCEPTIONS).chain([VECTOR_TIMER]) {
        let handler = match vector {
            VECTOR_BREAKPOINT | VECTOR_TIMER => COUNT_HANDLER,
            VECTOR_PAGE_FAULT => FAULT_HANDLER,
            other => HANDLERS + 8 * other,
        };
        // A 64-bit interrupt gate (figure 6-8); handlers are below 64 KiB.
        const PRESENT_INTERRUPT_GATE: u64 = 0x8e << 40;
        let gate = handler | u64::from(SELECTOR_CODE) << 16 | PRESENT_INTERRUPT_GATE;
        mem.write_obj(gate, GuestAddress(IDT + 16 * vector))?;
    }
    mem.write_slice(code!("handlers"), GuestAddress(HANDLERS))?;
    mem.write_slice(code!("count_handler"), GuestAddress(COUNT_HANDLER))?;
    mem.write_slice(code!("fault_handler"), GuestAddress(FAULT_HANDLER))?;
    mem.write_slice(code, GuestAddress(CODE))
}

/// 64-bit mode as a kernel sets it up.
fn set_long_mode(sregs: &mut kvm_sregs) {
    const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: SELECTOR_CODE,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: SELECTOR_DATA, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        selector: SELECTOR_TSS,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 7 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (IDT, (VECTORS * 16 - 1) as u16);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PE_MP_ET_NE_WP_PG, PML4, CR4_PAE_OSFXSR_OSXMMEXCPT);
    sregs.efer = EFER_LME_LMA;
}

/// Runs the vCPU until its probe ends, or [`LIMIT`] has passed.
fn run_bounded(mut vcpu: VcpuFd) -> Result<Outcome, SetupError> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), ignore)?;
    // SAFETY: the byte is in the `kvm_run` page, which is mapped until `vcpu` is dropped: here, after the thread that runs
    // it has given it back, or never.
    let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut vcpu.get_kvm_run().immediate_exit) };
    let (sender, receiver) = channel();
    let thread = thread::spawn(Class::Vcpu, "probe", STACK, move || {
        let outcome = run_to_end(&mut vcpu);
        let _ = sender.send((outcome, vcpu));
    })
    .map_err(SetupError::Thread)?;
    let (outcome, vcpu) = match receiver.recv_timeout(LIMIT) {
        Ok(ended) => ended,
        Err(RecvTimeoutError::Disconnected) => return Ok(Outcome::Hung),
        Err(RecvTimeoutError::Timeout) => {
            immediate_exit.store(1, Ordering::Release);
            // SAFETY: the thread has not been joined, so its pthread_t is valid.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
            match receiver.recv_timeout(LIMIT) {
                Ok(ended) => ended,
                // It does not even heed signals: left behind, with what it uses. The process ends after the check.
                Err(_) => return Ok(Outcome::Hung),
            }
        }
    };
    // An error would be a panic of the thread, and this program aborts on panic.
    let _ = thread.join();
    drop(vcpu);
    Ok(outcome)
}

fn run_to_end(vcpu: &mut VcpuFd) -> Outcome {
    loop {
        return match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT_RESULT, [1])) => Outcome::Right,
            Ok(VcpuExit::IoOut(PORT_RESULT, _)) => Outcome::Wrong,
            Ok(VcpuExit::IoOut(PORT_EXCEPTION, &[vector])) => Outcome::Exception(vector),
            Ok(VcpuExit::InternalError) => {
                Outcome::Failed(format!("KVM gave up: {}", internal_error(0, vcpu)))
            }
            Ok(VcpuExit::Shutdown) => Outcome::Failed("triple fault".into()),
            Ok(VcpuExit::IoOut(PORT_NOTHING, _) | VcpuExit::Intr) => continue,
            Ok(other) => Outcome::Failed(format!("unexpected exit {other:?}")),
            Err(error) if error.errno() == libc::EINTR => Outcome::Hung,
            Err(error) if error.errno() == libc::EAGAIN => continue,
            Err(error) => Outcome::Failed(format!("KVM_RUN failed: {error}")),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::tests::kvm;

    const fn bad(name: &'static str, code: &'static [u8]) -> Probe {
        Probe { name, code, only_with: None }
    }

    /// One for each way in which a host can fail; the last is the only one after which the others are not tried.
    const BAD: [Probe; 5] = [
        // mov al, 0; out 0x10, al
        bad("wrong", &[0xb0, 0, 0xe6, 0x10]),
        // ud2
        bad("exception", &[0x0f, 0x0b]),
        // lidt [rdi]; ud2
        bad("no handlers", &[0x0f, 0x01, 0x1f, 0x0f, 0x0b]),
        // mov al, 1; out 0x13, al
        bad("no such port", &[0xb0, 1, 0xe6, 0x13]),
        // jmp $
        bad("endless", &[0xeb, 0xfe]),
    ];

    #[test]
    fn every_way_to_fail_is_told() {
        let Some(kvm) = kvm() else { return };
        let [wrong, exception, no_handlers, no_port, endless] = BAD;
        let good = Probe { name: "good", code: code!("nothing"), only_with: None };
        // A feature no leaf has.
        let elsewhere = Probe { only_with: Some((0x4fff_ffff, 0, 0, 0)), ..bad("elsewhere", &[0x0f, 0x0b]) };
        let probes =
            [wrong, elsewhere, exception, good, no_handlers, no_port, endless, bad("never", &[0x0f])];
        let findings = try_all(&kvm, &probes);
        let found: Vec<_> = findings.iter().map(|it| (it.name.as_ref(), it.ok, it.detail.as_str())).collect();
        let port = found.get(4).map(|it| it.2).unwrap_or_default();
        assert!(port.starts_with("unexpected exit IoOut(19, "), "{found:?}");
        let expected = [
            ("wrong", false, "executed with a wrong result"),
            ("exception", false, "raised exception 6"),
            ("good", true, "executed in the guest"),
            ("no handlers", false, "triple fault"),
            ("no such port", false, port),
            ("endless", false, "did not end within 3 s"),
            ("the other instructions", false, "not tried after one that hung"),
        ];
        assert_eq!(found, expected);
    }
}
