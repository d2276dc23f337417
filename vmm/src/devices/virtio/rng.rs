//! The entropy device (virtio 1.3 s5.4): fills the driver's buffers from the host's getrandom(2).
//!
//! It works on the event loop, in turns of bounded length: a guest that asks for entropy without end gets it in slices between
//! which everything else on the loop is served.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{Address, Bytes};

use super::counter::Counter;
use super::queue::{Chain, QueueError};
use super::served::{Serve, ServedPart, Turn};
use super::{ActivateError, Activation, DeviceState, GuestRam, SavedDevice, VirtQueue, VirtioDevice};
use crate::event_loop::LoopHandle;

/// Linux keeps one buffer in flight; more would be spent on nothing.
const QUEUE_SIZES: [u16; 1] = [16];
/// Most bytes given out in one turn on the event loop.
const TURN: usize = 64 * 1024;
/// What a descriptor costs at least of a turn, so that empty ones end it too.
const MIN_COST: usize = 16;
/// getrandom(2) never returns less than asked up to this size.
const SLICE: usize = 256;

/// The entropy device.
pub struct Rng {
    source: ServedPart<Source>,
    counters: Arc<Counters>,
}

/// What there is to save of it beside its queue: nothing, which is as it should be with random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}

#[derive(Default)]
struct Counters {
    requests: Counter,
    bytes: Counter,
}

impl Rng {
    /// A device that works on this event loop.
    pub fn new(events: LoopHandle) -> Self {
        Self { source: ServedPart::new(events), counters: Arc::default() }
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.source.start(activation, Source { counters: self.counters.clone() })
    }

    fn reset(&mut self) {
        self.source.stop();
    }

    fn pause(&mut self) {
        self.source.pause();
    }

    fn resume(&mut self) {
        self.source.resume();
    }

    fn save(&self) -> Option<SavedDevice> {
        Some(SavedDevice { queues: self.source.positions(), state: DeviceState::Rng(RngState {}) })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("requests", self.counters.requests.get()), ("bytes", self.counters.bytes.get())]
    }
}

/// Fills buffers.
struct Source {
    counters: Arc<Counters>,
}

impl Serve for Source {
    fn turn(&mut self, queue: &mut VirtQueue, mem: &GuestRam) -> Result<Turn, QueueError> {
        let mut budget = TURN;
        let mut answered = false;
        while budget > 0 {
            let Some(chain) = queue.pop(mem)? else { break };
            let head = chain.head_index();
            let written = fill(mem, chain, &mut budget);
            queue.add_used(mem, head, written)?;
            self.counters.requests.add(1);
            self.counters.bytes.add(written.into());
            answered = true;
        }
        Ok(Turn { answered, more: budget == 0 })
    }
}

/// Fills the writable buffers of a chain until `budget` is used up, and says how many bytes it wrote. Giving less than asked is
/// within the rules (virtio 1.3 s5.4.6.2).
fn fill(mem: &GuestRam, chain: Chain<'_>, budget: &mut usize) -> u32 {
    let mut written = 0;
    for descriptor in chain {
        *budget = budget.saturating_sub(MIN_COST);
        if !descriptor.is_write_only() {
            continue;
        }
        let mut addr = descriptor.addr();
        let mut left = descriptor.len() as usize;
        while left > 0 && *budget > 0 {
            let mut bytes = [0; SLICE];
            let wanted = left.min(*budget).min(SLICE);
            // Fails only on a kernel without a random generator.
            let Ok(got) = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()) else { return written };
            if mem.write_slice(&bytes[..got], addr).is_err() {
                return written;
            }
            written += got as u32;
            left -= got;
            *budget -= got;
            let Some(next) = addr.checked_add(got as u64) else { return written };
            addr = next;
        }
        if *budget == 0 {
            break;
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use std::io;

    use rustix::event::epoll::EventFlags;

    use super::*;
    use crate::devices::virtio::QueuePosition;
    use crate::devices::virtio::testing::{Hostile, MockDriver};
    use crate::event_loop::{EventLoop, Registry, Subscriber};

    /// Runs `test` with a device whose event loop runs beside it.
    fn with_rng(test: impl FnOnce(&mut Rng, &mut MockDriver)) {
        let (events, handle) = EventLoop::new().unwrap();
        let thread = std::thread::spawn(move || events.run());
        let mut rng = Rng::new(handle.clone());
        test(&mut rng, &mut MockDriver::new(&QUEUE_SIZES));
        rng.reset();
        handle.quit();
        thread.join().unwrap().unwrap();
    }

    fn activate(rng: &mut Rng, driver: &mut MockDriver) {
        rng.activate(driver.activation(0)).unwrap();
    }

    #[test]
    fn fills_all_writable_buffers_of_a_chain() {
        with_rng(|rng, driver| {
            activate(rng, driver);
            let (one, two) = (driver.writable(300), driver.writable(64));
            let head = driver.add(0, &[one, two]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0), (head, 364));
            // 64 zero bytes in a row come once in 2^512.
            assert_ne!(driver.read(one.addr + 236, 64), [0; 64]);
            assert_ne!(driver.read(two.addr, 64), [0; 64]);
        });
    }

    #[test]
    fn leaves_readable_buffers_alone() {
        with_rng(|rng, driver| {
            activate(rng, driver);
            let (mine, yours) = (driver.readable(&[7; 64]), driver.writable(8));
            driver.add(0, &[mine, yours]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0).1, 8);
            assert_eq!(driver.read(mine.addr, 64), [7; 64]);
        });
    }

    #[test]
    fn a_chain_gets_at_most_one_turns_worth() {
        with_rng(|rng, driver| {
            activate(rng, driver);
            let buffer = driver.writable(1 << 20);
            driver.add(0, &[buffer]);
            driver.add(0, &[buffer]);
            driver.kick(0);
            // One kick serves both, though each uses up a turn.
            for _ in 0..2 {
                let (_, written) = driver.wait_used(0);
                assert!(written > 0 && written as usize <= TURN, "{written}");
            }
        });
    }

    #[test]
    fn hostile_chains_get_an_answer_or_end_the_device() {
        with_rng(|rng, driver| {
            for kind in Hostile::ALL {
                for writable in [true, false] {
                    activate(rng, driver);
                    let head = driver.add_hostile(0, kind, writable);
                    driver.kick(0);
                    if matches!(kind, Hostile::HeadBeyondTable) {
                        driver.interrupt.wait_reset();
                    } else {
                        assert_eq!(driver.wait_used(0).0, head, "{kind:?}");
                        let (buffer, head) = (driver.writable(16), ());
                        driver.add(0, &[buffer]);
                        driver.kick(0);
                        assert_eq!((driver.wait_used(0).1, head), (16, ()), "{kind:?}");
                    }
                    rng.reset();
                }
            }
        });
    }

    #[test]
    fn corrupt_available_ring_ends_the_device_until_reset() {
        with_rng(|rng, driver| {
            activate(rng, driver);
            driver.jump_avail_idx(0);
            driver.kick(0);
            driver.interrupt.wait_reset();
            assert_eq!(driver.interrupt.resets(), ["available ring of queue 0 is corrupt"]);
            rng.reset();
            activate(rng, driver);
            let buffer = driver.writable(16);
            driver.add(0, &[buffer]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0).1, 16);
        });
    }

    #[test]
    fn paused_device_waits_and_tells_its_position() {
        with_rng(|rng, driver| {
            let unstarted = rng.save().unwrap();
            assert_eq!(unstarted.queues, []);
            activate(rng, driver);
            for pauses in 1..=2 {
                let buffer = driver.writable(16);
                driver.add(0, &[buffer]);
                driver.kick(0);
                assert_eq!(driver.wait_used(0).1, 16);
                rng.pause();
                rng.pause();
                driver.add(0, &[buffer]);
                driver.kick(0);
                let position = QueuePosition { next_avail: pauses * 2 - 1, next_used: pauses * 2 - 1 };
                assert_eq!(rng.save().unwrap().queues, [Some(position)]);
                assert!(driver.pop_used(0).is_none());
                rng.resume();
                rng.resume();
                assert_eq!(driver.wait_used(0).1, 16);
            }
            assert_eq!(rng.counters(), [("requests", 4), ("bytes", 64)]);
            // A reset ends a paused device, too.
            rng.pause();
            rng.reset();
            rng.resume();
            assert_eq!(rng.save().unwrap(), unstarted);
            activate(rng, driver);
        });
    }

    #[test]
    fn broken_device_stays_deaf_across_a_pause() {
        with_rng(|rng, driver| {
            activate(rng, driver);
            driver.jump_avail_idx(0);
            driver.kick(0);
            driver.interrupt.wait_reset();
            rng.pause();
            driver.kick(0);
            rng.resume();
            rng.pause();
            assert_eq!(driver.interrupt.resets().len(), 1);
        });
    }

    #[test]
    fn needs_its_queue() {
        with_rng(|rng, driver| {
            let mut activation = driver.activation(0);
            activation.queues[0] = None;
            assert!(matches!(rng.activate(activation), Err(ActivateError::MissingQueue(0))));
        });
    }

    #[test]
    fn nothing_is_written_after_reset() {
        with_rng(|rng, driver| {
            activate(rng, driver);
            rng.reset();
            let buffer = driver.writable(16);
            driver.add(0, &[buffer]);
            driver.kick(0);
            // The loop has been round once when it has taken and given back a subscriber.
            struct Idle;
            impl Subscriber for Idle {
                fn subscribe(&mut self, _: &Registry<'_>) -> io::Result<()> {
                    Ok(())
                }
                fn ready(&mut self, _: u32, _: EventFlags, _: &Registry<'_>) {}
                fn unsubscribe(&mut self, _: &Registry<'_>) {}
            }
            let id = rng.source.events().add(Box::new(Idle)).unwrap();
            rng.source.events().remove(id);
            assert!(driver.pop_used(0).is_none());
        });
    }
}
