//! The persistent memory device (virtio 1.3 s5.19), read-only: a file as memory of the guest, which Linux makes a block device of and
//! mounts with DAX, so that programs run from the host's page cache.
//!
//! Reading it is nothing this device hears of. Writing neither: the vCPUs' writes end at the memory slot, which is read-only
//! ([`window`](crate::memory::window)). What is left is to say where the memory is, and to answer requests to flush what was
//! written, which is nothing.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::Bytes;

use super::counter::Counter;
use super::queue::Chain;
use super::served::{Serve, ServedPart, Turn};
use super::{
    ActivateError, Activation, ConfigSpace, DeviceState, GuestRam, QueueError, SavedDevice, VirtQueue,
    VirtioDevice,
};
use crate::event_loop::LoopHandle;
use crate::memory::window::MappedFile;

/// Linux flushes one request at a time.
const QUEUE_SIZES: [u16; 1] = [32];
/// The most chains served in one turn.
const TURN: usize = 16;
/// virtio 1.3 s5.19.6: VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
/// virtio 1.3 s5.19.7: any other value of `ret` is an error.
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;

/// The persistent memory device.
pub struct Pmem {
    file: MappedFile,
    requests: ServedPart<Requests>,
    counters: Arc<Counters>,
}

/// What there is to save of it: where its file is, which must be there again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemState {
    /// Guest physical address.
    pub start: u64,
    /// Length of the memory in bytes.
    pub length: u64,
    /// Length of the file in bytes.
    pub file_length: u64,
}

#[derive(Default)]
struct Counters {
    flushes: Counter,
    errors: Counter,
}

impl Pmem {
    /// A device for a file that is in guest memory, on this event loop.
    pub fn new(events: LoopHandle, file: MappedFile) -> Self {
        Self { file, requests: ServedPart::new(events), counters: Arc::default() }
    }
}

impl VirtioDevice for Pmem {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn name(&self) -> &'static str {
        "pmem"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn place_config(&mut self, space: ConfigSpace) {
        // s5.19.4, struct virtio_pmem_config.
        let config = [self.file.start().0.to_le_bytes(), self.file.length().to_le_bytes()];
        space.write(0, config.as_flattened());
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.requests.start(activation, Requests { counters: self.counters.clone() })
    }

    fn reset(&mut self) {
        self.requests.stop();
    }

    fn pause(&mut self) {
        self.requests.pause();
    }

    fn resume(&mut self) {
        self.requests.resume();
    }

    fn save(&self) -> Option<SavedDevice> {
        let state = PmemState {
            start: self.file.start().0,
            length: self.file.length(),
            file_length: self.file.file_length(),
        };
        Some(SavedDevice { queues: self.requests.positions(), state: DeviceState::Pmem(state) })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("flushes", self.counters.flushes.get()), ("errors", self.counters.errors.get())]
    }
}

/// Answers requests.
struct Requests {
    counters: Arc<Counters>,
}

impl Serve for Requests {
    fn turn(&mut self, queue: &mut VirtQueue, mem: &GuestRam) -> Result<Turn, QueueError> {
        let mut answered = false;
        for _ in 0..TURN {
            let Some(chain) = queue.pop(mem)? else { return Ok(Turn { answered, more: false }) };
            let head = chain.head_index();
            let written = self.answer(mem, chain);
            queue.add_used(mem, head, written)?;
            answered = true;
        }
        Ok(Turn { answered, more: true })
    }
}

impl Requests {
    /// Answers one; how many bytes it wrote.
    fn answer(&self, mem: &GuestRam, chain: Chain<'_>) -> u32 {
        let mut request = [0xff; 4];
        for descriptor in chain {
            if !descriptor.is_write_only() {
                if descriptor.len() as usize >= request.len() {
                    // What cannot be read is no flush.
                    let _ = mem.read_slice(&mut request, descriptor.addr());
                }
                continue;
            }
            let flush = u32::from_le_bytes(request) == FLUSH;
            let counter = if flush { &self.counters.flushes } else { &self.counters.errors };
            counter.add(1);
            let answer = if flush { DONE } else { FAILED }.to_le_bytes();
            let fits = descriptor.len() as usize >= answer.len();
            return if fits && mem.write_slice(&answer, descriptor.addr()).is_ok() { 4 } else { 0 };
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::devices::virtio::QueuePosition;
    use crate::devices::virtio::testing::{Hostile, MockDriver, config_of};
    use crate::event_loop::EventLoop;
    use crate::memory::slot::testing::FakeSlots;
    use crate::memory::window::Window;
    use crate::memory::{Backing, map_region};

    const START: u64 = 1 << 33;
    const MIB: u64 = 1 << 20;

    /// Runs `test` with a device of a file of 3 MiB and a byte, whose event loop runs beside it.
    fn with_pmem(test: impl FnOnce(&mut Pmem, &mut MockDriver)) {
        let (events, handle) = EventLoop::new().unwrap();
        let thread = std::thread::spawn(move || events.run());
        let region = map_region(GuestAddress(START), 16 * MIB, Backing::Files).unwrap();
        let slots = Arc::new(FakeSlots::default());
        let window = Arc::new(Window::new(Arc::new(region), slots.clone()));
        let file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(3 * MIB + 1).unwrap();
        let mut pmem = Pmem::new(handle.clone(), window.map(OwnedFd::from(file)).unwrap());
        test(&mut pmem, &mut MockDriver::new(&QUEUE_SIZES));
        pmem.reset();
        drop(pmem);
        assert_eq!(slots.ranges(), []);
        handle.quit();
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn tells_where_the_memory_is() {
        with_pmem(|pmem, _| {
            let config: [u8; 20] = config_of(pmem);
            assert_eq!(config[..8], START.to_le_bytes());
            assert_eq!(config[8..16], (4 * MIB).to_le_bytes());
            assert_eq!(config[16..], [0; 4]);
        });
    }

    #[test]
    fn flush_succeeds_and_anything_else_fails() {
        with_pmem(|pmem, driver| {
            pmem.activate(driver.activation(0)).unwrap();
            assert_eq!(driver.request(0, &0u32.to_le_bytes(), 4), 0u32.to_le_bytes());
            assert_eq!(driver.request(0, &1u32.to_le_bytes(), 4), u32::MAX.to_le_bytes());
            assert_eq!(driver.request(0, b"abc", 4), u32::MAX.to_le_bytes());
            assert!(driver.request(0, &0u32.to_le_bytes(), 3).is_empty());
            assert_eq!(pmem.counters(), [("flushes", 2), ("errors", 2)]);
        });
    }

    #[test]
    fn hostile_chains_get_an_answer_or_end_the_device() {
        with_pmem(|pmem, driver| {
            for kind in Hostile::ALL {
                for writable in [true, false] {
                    pmem.activate(driver.activation(0)).unwrap();
                    let head = driver.add_hostile(0, kind, writable);
                    driver.kick(0);
                    if matches!(kind, Hostile::HeadBeyondTable) {
                        driver.interrupt.wait_reset();
                    } else {
                        assert_eq!(driver.wait_used(0).0, head, "{kind:?}");
                        assert_eq!(driver.request(0, &[0; 4], 4), [0; 4], "{kind:?}");
                    }
                    pmem.reset();
                }
            }
        });
    }

    #[test]
    fn paused_device_waits_and_tells_what_to_save() {
        with_pmem(|pmem, driver| {
            let state = PmemState { start: START, length: 4 * MIB, file_length: 3 * MIB + 1 };
            let state = DeviceState::Pmem(state);
            assert_eq!(pmem.save(), Some(SavedDevice { queues: vec![], state: state.clone() }));
            pmem.activate(driver.activation(0)).unwrap();
            driver.request(0, &[0; 4], 4);
            pmem.pause();
            let (request, answer) = (driver.readable(&[0; 4]), driver.writable(4));
            driver.add(0, &[request, answer]);
            driver.kick(0);
            let position = QueuePosition { next_avail: 1, next_used: 1 };
            let saved = SavedDevice { queues: vec![Some(position)], state };
            assert_eq!(pmem.save(), Some(saved.clone()));
            let json = serde_json::to_string(&saved).unwrap();
            assert_eq!(serde_json::from_str::<SavedDevice>(&json).unwrap(), saved);
            assert!(driver.pop_used(0).is_none());
            pmem.resume();
            assert_eq!(driver.wait_used(0).1, 4);
        });
    }

    #[test]
    fn one_kick_is_enough_for_more_requests_than_a_turn_has() {
        with_pmem(|pmem, driver| {
            pmem.activate(driver.activation(0)).unwrap();
            let answer = driver.writable(4);
            for _ in 0..QUEUE_SIZES[0] {
                driver.add(0, &[answer]);
            }
            driver.kick(0);
            for _ in 0..QUEUE_SIZES[0] {
                assert_eq!(driver.wait_used(0).1, 4);
            }
        });
    }
}
