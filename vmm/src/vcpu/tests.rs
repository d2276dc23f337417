//! vCPUs driven for real: tiny guests in real mode, run by this host's KVM. Skipped, and said so, where that cannot run a guest.

use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VmFd};
use kvrun_vmm_api::ExitReason;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use vm_memory::{Bytes, GuestAddress};

use super::*;
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
fn kvm() -> Option<Kvm> {
    if let Some(finding) = check::run().into_iter().find(|finding| !finding.ok) {
        println!("skipped: this host's KVM cannot run a guest: {}: {}", finding.name, finding.detail);
        return None;
    }
    Some(Kvm::new().unwrap())
}

struct Guest {
    set: VcpuSet,
    mem: GuestRam,
    exit: Arc<ExitSlot>,
    marks: Arc<BootMarks>,
    _vm: VmFd,
}

/// A machine with one vCPU that runs `code` in real mode.
fn guest(kvm: &Kvm, code: &[u8]) -> Guest {
    let mem = memory::allocate(2).unwrap();
    mem.write_slice(code, GuestAddress(CODE)).unwrap();
    let vm = vm::create(kvm).unwrap();
    let (vcpu, _) = vm::create_bare_vcpu(kvm, &vm).unwrap();
    vm::add_memory(&vm, &mem).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();

    let exit = Arc::new(ExitSlot::new().unwrap());
    let marks = Arc::new(BootMarks::new());
    let mut buses = Buses::default();
    buses.ports.insert(boot_marks::BASE, 1, marks.clone()).unwrap();
    let keyboard = Arc::new(KeyboardController::new(exit.clone()));
    buses.ports.insert(keyboard::BASE, keyboard::LENGTH, keyboard).unwrap();
    let set = VcpuSet::spawn(vec![vcpu], Arc::new(buses), exit.clone()).unwrap();
    Guest { set, mem, exit, marks, _vm: vm }
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
}

#[test]
fn a_triple_fault_is_reported_as_such() {
    let Some(kvm) = kvm() else { return };
    // lidt [0x3000], which is zeroes: no interrupt table; then int3, through nothing.
    let guest = guest(&kvm, &[0x0f, 0x01, 0x1e, 0x00, 0x30, 0xcc]);
    guest.set.resume();
    assert_eq!(guest.wait_for_exit(), ExitReason::TripleFault);
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
