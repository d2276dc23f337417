//! One thread per vCPU: run, exit, dispatch, pause.
//!
//! * this file - [`VcpuSet`], all vCPUs of the machine as the control thread sees them: pause, resume, stop.
//! * [`count`] - how often vCPUs left the guest, by kind of exit.
//! * [`exit`] - [`ExitSlot`], through which the end of the machine reaches the control thread.
//! * [`run`] - what the thread of a vCPU does.
//!
//! # How a vCPU is stopped
//!
//! The control thread sets what it wants (under [`Shared::want`]'s lock), then `immediate_exit` in the vCPU's `kvm_run`
//! page, then sends [`kick_signal`]. Wherever the vCPU is, it comes to look: in the guest, the signal ends
//! `KVM_RUN` with EINTR; between looking and `KVM_RUN`, `immediate_exit` makes the latter return EINTR at once; in a device,
//! the same happens on the way back. The vCPU clears `immediate_exit` *before* it looks at what is wanted, so a kick that
//! comes in between is seen by the next `KVM_RUN` (Linux Documentation/virt/kvm/api.rst, `immediate_exit`).

mod count;
pub mod exit;
mod run;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::arch::{StateError, StateLayout, VcpuState};
use crate::bus::Bus;
use crate::locked;
use crate::thread::{self, Class};

use count::Counters;
pub use count::ExitKind;
pub use exit::ExitSlot;
pub(crate) use run::internal_error;

/// The stack of a vCPU thread in bytes. Its deepest call is a device's activation, which starts workers; only what is
/// touched is paid for.
const STACK: usize = 256 * 1024;

/// vCPUs cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The handler of the kick signal.
    #[error("cannot install the handler of signal {signal}")]
    Signal {
        /// Its number.
        signal: i32,
        /// Why not.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
    /// A thread.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Thread {
        /// Which vCPU.
        vcpu: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The state of vCPUs cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// They are not held.
    #[error("the vCPUs are not held")]
    Running,
    /// One has ended, and the machine with it.
    #[error("the machine has ended")]
    Ended,
    /// KVM refuses.
    #[error("cannot read the state of vCPU {vcpu}")]
    State {
        /// Which vCPU.
        vcpu: usize,
        /// Why not.
        #[source]
        source: StateError,
    },
}

/// What the guest reaches by port and by address.
#[derive(Default)]
pub struct Buses {
    /// I/O ports.
    pub ports: Bus,
    /// Physical addresses outside memory.
    pub mmio: Bus,
}

/// The signal that interrupts `KVM_RUN`. Its handler does nothing; that it exists makes the call return.
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// What the control thread wants of the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Run,
    Park,
    Stop,
}

/// What the threads share.
struct Shared {
    state: Mutex<State>,
    /// Told when `state.want` changes.
    wanted: Condvar,
    /// Told when a vCPU parks or ends.
    parked: Condvar,
    exit: Arc<ExitSlot>,
    buses: Arc<Buses>,
    first_entry_ns: AtomicU64,
}

struct State {
    want: Want,
    /// How many vCPU threads are not in the guest and will not enter it: parked or ended.
    resting: usize,
    /// How many of them have ended.
    ended: usize,
    /// What parked vCPUs are to do, each once in each round, and how many have yet to.
    task: Option<Arc<Task>>,
    round: u64,
    unfinished: usize,
}

/// Something done by each vCPU's thread while the vCPU is held.
type Task = dyn Fn(usize, &VcpuFd) + Send + Sync;

struct Vcpu {
    /// Ends with the `VcpuFd`, so that the `kvm_run` page outlives every kick.
    thread: JoinHandle<VcpuFd>,
    immediate_exit: &'static AtomicU8,
    counters: Arc<Counters>,
}

/// All vCPUs of the machine. Dropping it stops them.
pub struct VcpuSet {
    vcpus: Vec<Vcpu>,
    shared: Arc<Shared>,
}

impl VcpuSet {
    /// Starts one thread per vCPU (`vcpu0`, `vcpu1`, ...), parked: [`VcpuSet::resume`] lets them run. What ends the machine
    /// is reported to `exit`; the vCPU that found it has left the guest for good, the others run until
    /// [`VcpuSet::stop`].
    ///
    /// # Errors
    /// [`VcpuError`]; threads that were started have ended.
    pub fn spawn(fds: Vec<VcpuFd>, buses: Arc<Buses>, exit: Arc<ExitSlot>) -> Result<Self, VcpuError> {
        extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        let signal = kick_signal();
        register_signal_handler(signal, ignore).map_err(|source| VcpuError::Signal { signal, source })?;

        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                want: Want::Park,
                resting: 0,
                ended: 0,
                task: None,
                round: 0,
                unfinished: 0,
            }),
            wanted: Condvar::new(),
            parked: Condvar::new(),
            exit,
            buses,
            first_entry_ns: AtomicU64::new(0),
        });
        // On error, dropping the set ends the threads started so far.
        let mut set = Self { vcpus: Vec::with_capacity(fds.len()), shared };
        for (index, mut fd) in fds.into_iter().enumerate() {
            // SAFETY: the byte is in the `kvm_run` page, which is mapped until `fd` is dropped. Its thread hands `fd` back
            // when it ends and `Vcpu` drops it with everything else, so no use of the reference comes later. The
            // kernel and both threads access the byte concurrently, all of them atomically.
            let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut fd.get_kvm_run().immediate_exit) };
            let counters = Arc::new(Counters::default());
            let thread = {
                let (shared, counters) = (set.shared.clone(), counters.clone());
                thread::spawn(Class::Vcpu, &format!("vcpu{index}"), STACK, move || {
                    run::run(index, fd, immediate_exit, &shared, &counters)
                })
                .map_err(|source| VcpuError::Thread { vcpu: index, source })?
            };
            set.vcpus.push(Vcpu { thread, immediate_exit, counters });
        }
        Ok(set)
    }

    /// Holds every vCPU at an instruction boundary; returns when all are held. Idempotent.
    pub fn pause(&self) {
        let mut state = locked(self.shared.state.lock());
        if state.want == Want::Stop {
            return;
        }
        self.want(&mut state, Want::Park);
        while state.resting < self.vcpus.len() {
            state = locked(self.shared.parked.wait(state));
        }
    }

    /// Lets held vCPUs run. Idempotent.
    pub fn resume(&self) {
        let mut state = locked(self.shared.state.lock());
        if state.want == Want::Park {
            self.want(&mut state, Want::Run);
        }
    }

    /// Whether the vCPUs are held.
    pub fn is_paused(&self) -> bool {
        locked(self.shared.state.lock()).want == Want::Park
    }

    /// Takes every vCPU out of the guest for good; returns when all threads have ended. Idempotent.
    pub fn stop(&mut self) {
        {
            let mut state = locked(self.shared.state.lock());
            self.want(&mut state, Want::Stop);
        }
        for vcpu in self.vcpus.drain(..) {
            // An error would be a panic of the thread, and this program aborts on panic.
            let _ = vcpu.thread.join();
        }
    }

    /// Reads the state of every vCPU, in order; they must be held.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(&self, layout: &StateLayout) -> Result<Vec<VcpuState>, SaveError> {
        let states = Arc::new(Mutex::new(BTreeMap::new()));
        let task = {
            let (states, layout) = (states.clone(), layout.clone());
            move |index: usize, fd: &VcpuFd| {
                let state = VcpuState::save(fd, &layout);
                locked(states.lock()).insert(index, state);
            }
        };
        self.on_each_held(Arc::new(task))?;
        let states = std::mem::take(&mut *locked(states.lock()));
        states
            .into_iter()
            .map(|(vcpu, state)| state.map_err(|source| SaveError::State { vcpu, source }))
            .collect()
    }

    /// Has the thread of every vCPU do something, for which the vCPU must be held.
    fn on_each_held(&self, task: Arc<Task>) -> Result<(), SaveError> {
        let mut state = locked(self.shared.state.lock());
        if state.want != Want::Park {
            return Err(SaveError::Running);
        }
        // One that has only just been spawned is still on its way there.
        while state.resting < self.vcpus.len() {
            state = locked(self.shared.parked.wait(state));
        }
        if state.ended > 0 {
            return Err(SaveError::Ended);
        }
        state.task = Some(task);
        state.round += 1;
        state.unfinished = self.vcpus.len();
        self.shared.wanted.notify_all();
        while state.unfinished > 0 {
            state = locked(self.shared.parked.wait(state));
        }
        state.task = None;
        Ok(())
    }

    /// How often each vCPU left the guest: returns of `KVM_RUN`, whatever for.
    pub fn exits(&self) -> Vec<u64> {
        self.vcpus.iter().map(|vcpu| vcpu.counters.total()).collect()
    }

    /// How often all vCPUs together left the guest, by kind of exit; every kind is there.
    pub fn exits_by_kind(&self) -> BTreeMap<String, u64> {
        let sum = |kind| self.vcpus.iter().map(|vcpu| vcpu.counters.get(kind)).sum();
        ExitKind::ALL.into_iter().map(|kind| (kind.name().to_owned(), sum(kind))).collect()
    }

    /// `CLOCK_MONOTONIC` in nanoseconds right before vCPU 0 entered the guest for the first time; 0 before that.
    pub fn first_entry_ns(&self) -> u64 {
        self.shared.first_entry_ns.load(Ordering::Relaxed)
    }

    fn want(&self, state: &mut State, want: Want) {
        state.want = want;
        self.shared.wanted.notify_all();
        if want != Want::Run {
            for vcpu in &self.vcpus {
                // Release: who sees the kick sees what is wanted. (The lock orders that too; this is for the reader.)
                vcpu.immediate_exit.store(1, Ordering::Release);
                // SAFETY: the thread has not been joined, so its pthread_t is valid, even if it has ended.
                unsafe { libc::pthread_kill(vcpu.thread.as_pthread_t(), kick_signal()) };
            }
        }
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.stop();
    }
}
