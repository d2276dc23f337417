//! vCPUs driven for real: tiny guests in real mode, run by this host's KVM. Skipped, and said so, where that cannot run a guest.

use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VmFd};
use kvrun_vmm_api::ExitReason;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::arch::PlatformState;
use crate::arch::x86_64::state::Msr;
use crate::arch::x86_64::vm;
use crate::check;
use crate::devices::legacy::{BootMarks, KeyboardController, boot_marks, keyboard};
use crate::devices::virtio::GuestRam;
use crate::memory;

const CODE: u64 = 0x1000;
const COUNTER: GuestAddress = GuestAddress(0x2000);

/// Far more than any of this takes, even under emulation.
const PATIENCE: Duration = Duration::from_secs(30);

/// `/dev/kvm`, if it can run guests.
pub(crate) fn kvm() -> Option<Kvm> {
    if let Some(finding) = check::run().into_iter().find(|finding| !finding.ok) {
        let reason = format!("this host's KVM cannot run a guest: {}: {}", finding.name, finding.detail);
        // Set where these tests are run because of their need of KVM (tests/e2e).
        assert!(std::env::var_os("KVRUN_E2E_REQUIRED").is_none_or(|v| v != "1"), "{reason}");
        println!("skipped: {reason}");
        return None;
    }
    Some(Kvm::new().unwrap())
}

struct Guest {
    set: VcpuSet,
    mem: GuestRam,
    exit: Arc<ExitSlot>,
    marks: Arc<BootMarks>,
    vm: VmFd,
    layout: StateLayout,
}

/// A machine with one vCPU that runs `code` in real mode.
fn guest(kvm: &Kvm, code: &[u8]) -> Guest {
    let mem = memory::allocate(2).unwrap();
    mem.write_slice(code, GuestAddress(CODE)).unwrap();
    guest_with(kvm, mem, |vcpu, _| start_at_code(vcpu))
}

fn start_at_code(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
}

/// A machine with one vCPU, made ready by `prepare`.
fn guest_with(kvm: &Kvm, mem: GuestRam, prepare: impl FnOnce(&VcpuFd, &StateLayout)) -> Guest {
    let vm = vm::create(kvm).unwrap();
    let (vcpu, _) = vm::create_bare_vcpu(kvm, &vm).unwrap();
    let layout = StateLayout::new(kvm, &vm).unwrap();
    vm::add_memory(&vm, &mem).unwrap();
    prepare(&vcpu, &layout);

    let exit = Arc::new(ExitSlot::new().unwrap());
    let marks = Arc::new(BootMarks::new());
    let mut buses = Buses::default();
    buses.ports.insert(boot_marks::BASE, 1, marks.clone()).unwrap();
    let keyboard = Arc::new(KeyboardController::new(exit.clone()));
    buses.ports.insert(keyboard::BASE, keyboard::LENGTH, keyboard).unwrap();
    let set = VcpuSet::spawn(vec![vcpu], Arc::new(buses), exit.clone()).unwrap();
    Guest { set, mem, exit, marks, vm, layout }
}

impl Guest {
    fn counter(&self) -> u64 {
        self.mem.read_obj(COUNTER).unwrap()
    }

    fn wait_for_count_above(&self, count: u64) {
        let start = Instant::now();
        while self.counter() <= count {
            assert!(start.elapsed() < PATIENCE, "the guest does not run");
            std::thread::yield_now();
        }
    }

    fn wait_for_exit(&self) -> ExitReason {
        let mut fds = [PollFd::from_borrowed_fd(self.exit.as_fd(), PollFlags::IN)];
        let patience = Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "the guest does not end");
        self.exit.reason().cloned().unwrap()
    }
}

/// `l: inc dword [0x2000]; jmp l`
const SPIN: [u8; 7] = [0x66, 0xff, 0x06, 0x00, 0x20, 0xeb, 0xf9];

#[test]
fn a_vcpu_that_spins_is_paused_resumed_and_stopped() {
    let Some(kvm) = kvm() else { return };
    let mut guest = guest(&kvm, &SPIN);
    assert!(guest.set.is_paused());
    assert_eq!((guest.set.first_entry_ns(), guest.counter()), (0, 0), "spawned vCPUs do not run");
    guest.set.resume();
    guest.wait_for_count_above(0);
    assert_ne!(guest.set.first_entry_ns(), 0);
    for _ in 0..100 {
        guest.set.pause();
        guest.set.pause();
        let (held, exits) = (guest.counter(), guest.set.exits());
        std::thread::yield_now();
        assert_eq!((guest.counter(), guest.set.exits()), (held, exits), "a paused vCPU runs");
        guest.set.resume();
        guest.set.resume();
        guest.wait_for_count_above(held);
    }
    guest.set.stop();
    let stopped = guest.counter();
    std::thread::yield_now();
    assert_eq!(guest.counter(), stopped);
    assert_eq!(guest.exit.reason(), None);
}

#[test]
fn a_paused_vcpu_is_stopped() {
    let Some(kvm) = kvm() else { return };
    let mut guest = guest(&kvm, &SPIN);
    guest.set.stop();
    guest.set.stop();
    guest.set.pause();
    guest.set.resume();
    assert_eq!(guest.counter(), 0);
}

#[test]
fn a_guest_that_resets_itself_is_reported_and_can_still_be_paused() {
    let Some(kvm) = kvm() else { return };
    // mov al, 'I'; out 0xe9, al; mov al, 0xfe; out 0x64, al; then spin.
    let code = [&[0xb0, b'I', 0xe6, 0xe9, 0xb0, 0xfe, 0xe6, 0x64][..], &SPIN].concat();
    let guest = guest(&kvm, &code);
    guest.set.resume();
    assert_eq!(guest.wait_for_exit(), ExitReason::GuestReset);
    guest.set.pause();
    assert_eq!(guest.counter(), 0, "the guest went on after its reset");
    assert_eq!(guest.marks.marks().len(), 1);
    assert_eq!(guest.set.exits(), [2]);
    assert_eq!(guest.set.exits_by_kind()["io_out"], 2);
}

#[test]
fn a_triple_fault_is_reported_as_such() {
    let Some(kvm) = kvm() else { return };
    // lidt [0x3000], which is zeroes: no interrupt table; then int3, through nothing.
    let guest = guest(&kvm, &[0x0f, 0x01, 0x1e, 0x00, 0x30, 0xcc]);
    guest.set.resume();
    assert_eq!(guest.wait_for_exit(), ExitReason::TripleFault);
}

/// Leaves traces in an MSR and the FPU, then counts in EAX, of which memory only has a copy.
#[rustfmt::skip]
const COUNT_IN_REGISTER: [u8; 30] = [
    0x66, 0xb9, 0x02, 0x01, 0x00, 0xc0, // mov ecx, KERNEL_GS_BASE
    0x66, 0xb8, 0x34, 0x12, 0x00, 0x00, // mov eax, 0x1234
    0x66, 0x31, 0xd2,                   // xor edx, edx
    0x0f, 0x30,                         // wrmsr
    0xd9, 0xe8,                         // fld1
    0x66, 0x31, 0xc0,                   // xor eax, eax
    0x66, 0x40,                         // l: inc eax
    0x66, 0xa3, 0x00, 0x20,             // mov [0x2000], eax
    0xeb, 0xf8,                         // jmp l
];

#[test]
fn a_saved_vcpu_goes_on_in_another_machine() {
    let Some(kvm) = kvm() else { return };
    let mut first = guest(&kvm, &COUNT_IN_REGISTER);
    first.set.resume();
    first.wait_for_count_above(0);
    assert!(matches!(first.set.save(&first.layout), Err(SaveError::Running)));
    first.set.pause();
    let mut saved = first.set.save(&first.layout).unwrap();
    let platform = PlatformState::save(&first.vm).unwrap();
    first.set.stop();
    let text = serde_json::to_string(&saved).unwrap();
    assert!(serde_json::from_str::<Vec<VcpuState>>(&text).unwrap() == saved);
    let saved = saved.remove(0);
    assert!(saved.msrs.contains(&Msr { index: 0xc000_0102, value: 0x1234 }), "{:x?}", saved.msrs);
    let memory_types = saved.msrs.iter().find(|msr| msr.index == 0x2ff);
    assert_eq!(memory_types.map(|msr| msr.value), Some(1 << 11 | 6));

    let mem = first.mem.clone();
    mem.write_obj(0u64, COUNTER).unwrap();
    let mut second = guest_with(&kvm, mem, |vcpu, layout| saved.restore(vcpu, layout).unwrap());
    let text = serde_json::to_string(&platform).unwrap();
    serde_json::from_str::<PlatformState>(&text).unwrap().restore(&second.vm).unwrap();
    assert_eq!(
        serde_json::to_string(&PlatformState::save(&second.vm).unwrap().irqchips).unwrap(),
        serde_json::to_string(&platform.irqchips).unwrap()
    );
    let restored = second.set.save(&second.layout).unwrap().remove(0);
    assert!(without_time(restored) == without_time(saved.clone()), "read again before it runs");
    second.set.resume();
    second.wait_for_count_above(0);
    assert!(
        second.counter() > saved.regs.rax,
        "it counts from {}, not from {}",
        second.counter(),
        saved.regs.rax
    );
    second.set.stop();
}

/// Without the registers that change by themselves.
fn without_time(mut state: VcpuState) -> VcpuState {
    state.msrs.retain(|msr| ![0x10, 0x6e0].contains(&msr.index));
    // The timer's current count.
    state.lapic.regs[0x390..0x394].fill(0);
    state
}

#[test]
fn a_state_from_a_host_with_a_longer_extended_state_is_refused() {
    let Some(kvm) = kvm() else { return };
    let guest = guest(&kvm, &SPIN);
    guest.set.pause();
    let mut saved = guest.set.save(&guest.layout).unwrap().remove(0);
    saved.xsave.push(0);
    guest_with(&kvm, guest.mem.clone(), |vcpu, layout| {
        assert!(matches!(saved.restore(vcpu, layout), Err(StateError::Xsave { .. })));
    });
}

#[test]
fn a_guest_with_kvmclock_is_told_that_it_was_held() {
    const CLOCK: u64 = 0x3000;
    // struct pvclock_vcpu_time_info (Linux 6.12 arch/x86/include/asm/pvclock-abi.h): flags, and in them PVCLOCK_GUEST_STOPPED.
    const FLAGS: GuestAddress = GuestAddress(CLOCK + 29);
    const GUEST_STOPPED: u8 = 2;
    let Some(kvm) = kvm() else { return };
    #[rustfmt::skip]
    let enable = [
        0x66, 0xb9, 0x01, 0x4d, 0x56, 0x4b, // mov ecx, MSR_KVM_SYSTEM_TIME_NEW
        0x66, 0xb8, 0x01, 0x30, 0x00, 0x00, // mov eax, CLOCK | enable
        0x66, 0x31, 0xd2,                   // xor edx, edx
        0x0f, 0x30,                         // wrmsr
    ];
    let guest = guest(&kvm, &[&enable[..], &SPIN].concat());
    guest.set.resume();
    guest.wait_for_count_above(0);
    let flags = || guest.mem.read_obj::<u8>(FLAGS).unwrap();
    assert_eq!(flags() & GUEST_STOPPED, 0);
    guest.set.pause();
    let held = guest.counter();
    guest.set.resume();
    guest.wait_for_count_above(held);
    assert_eq!(flags() & GUEST_STOPPED, GUEST_STOPPED);
}

#[test]
fn the_first_reason_for_the_end_is_kept() {
    let exit = ExitSlot::new().unwrap();
    let mut fds = [PollFd::from_borrowed_fd(exit.as_fd(), PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec::default())), Ok(0));
    exit.report(ExitReason::TripleFault);
    exit.report(ExitReason::Stopped);
    assert_eq!(exit.reason(), Some(&ExitReason::TripleFault));
    assert_eq!(poll(&mut fds, Some(&Timespec::default())), Ok(1));
}
