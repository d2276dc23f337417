//! From `DRIVER_OK` to reset: requests out of the queues, into the engine, and back.
//!
//! All queues are served by one thread, in turn, a request each. While it has work it looks at all of them by itself; only before it sleeps
//! does it ask the driver for kicks, so that a busy driver leaves the guest for nothing but interrupts it wants.

use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::Disk;
use super::counters::Counters;
use super::engine::{Done, Engine};
use super::io::{Io, Next, Status};
use super::request::{Request, Todo};
use super::worker::Calls;
use crate::devices::virtio::counter::Counter;
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError, QueuePosition, VirtQueue};
use crate::locked;

/// How many requests are taken before those that are done are looked at.
const BATCH: usize = 64;
/// The driver hears of what is done once there is nothing more to do, or after so many requests ...
const UNTOLD_REQUESTS: usize = 16;
/// ... or after requests that moved so many bytes: in about the time that they take, an interrupt each would cost more than it gains.
const UNTOLD_BYTES: u64 = 64 << 10;
/// No more requests are taken while those under way move so many bytes: what a reset or a pause may have to wait for.
const MAX_BYTES_UNDER_WAY: u64 = 32 << 20;

/// The driver's side is ready, and either the worker serves it, or the device holds it while it is paused. No request is under way
/// whenever the worker does not have it.
pub(super) struct Session {
    disk: Arc<Disk>,
    mem: GuestRam,
    interrupt: Arc<dyn InterruptLine>,
    /// Changes are to be on the medium before the driver hears of them.
    durable: bool,
    queues: Vec<Served>,
    /// Which queue is next.
    turn: usize,
    /// The driver broke the rules: nothing is served until it resets the device.
    broken: bool,
    /// The next request has been found to be too early, and counted as such.
    throttled: bool,
    under_way: UnderWay,
    untold: Untold,
}

/// What is done and the driver has not been told of.
#[derive(Default)]
struct Untold {
    requests: usize,
    bytes: u64,
}

/// A queue and what the driver has been told of it.
struct Served {
    queue: VirtQueue,
    /// Whether the driver is to kick it.
    kicked: bool,
    /// Whether chains were returned that the driver has not been told of.
    returned: bool,
}

/// The requests the engine works on, by token.
#[derive(Default)]
struct UnderWay {
    requests: Vec<Option<Flight>>,
    free: Vec<u16>,
    bytes: u64,
}

/// A request the engine works on.
struct Flight {
    io: Io,
    /// Index in [`Session::queues`].
    queue: usize,
    head: u16,
    status_at: GuestAddress,
    /// How much of its room is filled if it goes well.
    filled: u32,
    /// What it weighs.
    bytes: u64,
    /// Where it is counted if it goes well.
    counter: fn(&Counters) -> &Counter,
}

impl Session {
    pub(super) fn new(
        disk: Arc<Disk>,
        mem: GuestRam,
        interrupt: Arc<dyn InterruptLine>,
        durable: bool,
        queues: Vec<VirtQueue>,
    ) -> Self {
        let served = |queue| Served { queue, kicked: true, returned: false };
        let queues = queues.into_iter().map(served).collect();
        let under_way = UnderWay::default();
        let untold = Untold::default();
        Self {
            disk,
            mem,
            interrupt,
            durable,
            queues,
            turn: 0,
            broken: false,
            throttled: false,
            under_way,
            untold,
        }
    }

    /// How far each of the device's `count` queues has come; `None` for one that the driver has left out.
    pub(super) fn positions(&self, count: usize) -> Vec<Option<QueuePosition>> {
        let mut positions = vec![None; count];
        for Served { queue, .. } in &self.queues {
            positions[usize::from(queue.index())] = Some(queue.position());
        }
        positions
    }

    /// Serves the queues until told to halt. When this returns, no request is under way.
    pub(super) fn run(&mut self, calls: &Calls) {
        if self.broken {
            return;
        }
        let kicks: Vec<_> = self.queues.iter().map(|served| served.queue.kick()).collect();
        let mut engine = Engine::new(self.disk.engine, &kicks, calls.wake());
        if let Err(reason) = self.serve(&mut engine, calls) {
            self.broken = true;
            self.interrupt.needs_reset(&reason);
        }
        self.finish_all(&mut engine);
    }

    fn serve(&mut self, engine: &mut Engine, calls: &Calls) -> Result<(), QueueError> {
        let mut done = Vec::new();
        while !calls.halt_wanted() {
            let taken = self.take(engine)?;
            let look_again = engine.start(&mut done);
            self.complete(engine, &mut done)?;
            if look_again && !self.untold.is_much() {
                continue;
            }
            self.tell()?;
            if look_again {
                continue;
            }
            let deadline = match taken {
                Taken::Batch => continue,
                Taken::Throttled(until) => Some(until),
                Taken::Full => None,
                // With kicks wanted again, there may turn out to be more.
                Taken::All if self.want_kicks()? => continue,
                Taken::All => None,
            };
            engine.wait(deadline, &mut done);
            self.complete(engine, &mut done)?;
            // Before more is taken: the driver has waited for these.
            self.tell()?;
        }
        Ok(())
    }

    /// Takes requests from the queues in turn and hands them to the engine.
    fn take(&mut self, engine: &mut Engine) -> Result<Taken, QueueError> {
        let (disk, mem) = (self.disk.clone(), self.mem.clone());
        let limited = !locked(disk.limiter.lock()).is_unbounded();
        for _ in 0..BATCH {
            if self.under_way.is_full(engine.depth()) {
                return Ok(Taken::Full);
            }
            let Some(index) = self.next_queue()? else { return Ok(Taken::All) };
            let queue = &mut self.queues[index].queue;
            let Some(chain) = queue.pop(&mem)? else { continue };
            let head = chain.head_index();
            let Some(request) = Request::take(&mem, chain) else {
                disk.counters.errors.add(1);
                self.return_chain(index, head, 0)?;
                continue;
            };
            let status_at = request.status_at();
            let todo = request.check(&disk.image, &disk.id, self.durable);
            if limited {
                let bytes = if let Ok(Todo::Io(io, _)) = &todo { io.bytes_to_move() } else { 0 };
                if let Err(throttled) = locked(disk.limiter.lock()).take(bytes, Instant::now()) {
                    queue.undo_pop();
                    // Its turn is not over.
                    self.turn = index;
                    disk.counters.throttled.add(u64::from(!std::mem::replace(&mut self.throttled, true)));
                    return Ok(Taken::Throttled(throttled.until));
                }
                self.throttled = false;
            }
            match todo {
                Ok(Todo::Io(io, filled)) => {
                    let (bytes, counter) = (io.weight(), io.counter());
                    let flight = Flight { io, queue: index, head, status_at, filled, bytes, counter };
                    let (token, flight) = self.under_way.insert(flight);
                    engine.submit(token, &disk.image, &flight.io);
                }
                Ok(Todo::Nothing(filled)) => self.answer(index, head, status_at, Status::Ok, filled)?,
                Err(status) => {
                    disk.counters.errors.add(1);
                    self.answer(index, head, status_at, status, 0)?;
                }
            }
        }
        Ok(Taken::Batch)
    }

    /// The queue whose turn it is among those that are not empty. It is not kicked from now on.
    fn next_queue(&mut self) -> Result<Option<usize>, QueueError> {
        for _ in 0..self.queues.len() {
            let index = self.turn;
            self.turn = (self.turn + 1) % self.queues.len();
            let served = &mut self.queues[index];
            if served.queue.has_available(&self.mem)? {
                if std::mem::take(&mut served.kicked) {
                    served.queue.disable_kicks(&self.mem)?;
                }
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// Answers what is done, and puts in again what is done in part.
    fn complete(&mut self, engine: &mut Engine, done: &mut Vec<Done>) -> Result<(), QueueError> {
        let mut broken = Ok(());
        for Done { token, outcome } in done.drain(..) {
            // The engine returns the tokens it was given, once.
            let Some(flight) = self.under_way.get(token) else { continue };
            let counters = &self.disk.counters;
            counters.count_bytes(&flight.io, outcome);
            let status = match flight.io.next(outcome) {
                Next::Again => {
                    engine.submit(token, &self.disk.image, &flight.io);
                    continue;
                }
                Next::Done(status) => status,
            };
            let Some(flight) = self.under_way.remove(token) else { continue };
            let Flight { queue, head, status_at, filled, counter, bytes, .. } = flight;
            self.untold.bytes += bytes;
            let (counter, filled) =
                if status == Status::Ok { (counter(counters), filled) } else { (&counters.errors, 0) };
            counter.add(1);
            let answered = self.answer(queue, head, status_at, status, filled);
            broken = broken.and(answered);
        }
        broken
    }

    fn answer(
        &mut self,
        queue: usize,
        head: u16,
        status_at: GuestAddress,
        status: Status,
        filled: u32,
    ) -> Result<(), QueueError> {
        // The address was found to be in memory, which does not shrink.
        let _ = self.mem.write_obj(status as u8, status_at);
        self.return_chain(queue, head, filled + 1)
    }

    fn return_chain(&mut self, queue: usize, head: u16, written: u32) -> Result<(), QueueError> {
        let served = &mut self.queues[queue];
        served.returned = true;
        self.untold.requests += 1;
        served.queue.add_used(&self.mem, head, written)
    }

    /// Interrupts the driver for what was returned, if it wants that.
    fn tell(&mut self) -> Result<(), QueueError> {
        self.untold = Untold::default();
        for served in &mut self.queues {
            if std::mem::take(&mut served.returned) && served.queue.needs_interrupt(&self.mem)? {
                self.interrupt.signal_queue(served.queue.index());
            }
        }
        Ok(())
    }

    /// Asks for kicks of every queue; whether one of them is not empty by now.
    fn want_kicks(&mut self) -> Result<bool, QueueError> {
        let mut more = false;
        for served in &mut self.queues {
            if !served.kicked {
                served.kicked = true;
                more |= served.queue.enable_kicks(&self.mem)?;
            }
        }
        Ok(more)
    }

    /// Waits for everything under way and answers it.
    fn finish_all(&mut self, engine: &mut Engine) {
        let mut done = Vec::new();
        while !self.under_way.is_empty() {
            if !engine.start(&mut done) {
                engine.wait(None, &mut done);
            }
            // A queue that is broken cannot be answered, and the driver knows.
            let _ = self.complete(engine, &mut done);
        }
        let _ = self.tell();
    }
}

/// Why no more requests were taken.
enum Taken {
    /// There are no more.
    All,
    /// There may be more.
    Batch,
    /// So much is under way that something has to be done first.
    Full,
    /// There is one more, which may not go before this time.
    Throttled(Instant),
}

impl Untold {
    fn is_much(&self) -> bool {
        self.requests >= UNTOLD_REQUESTS || self.bytes >= UNTOLD_BYTES
    }
}

impl UnderWay {
    fn is_empty(&self) -> bool {
        self.free.len() == self.requests.len()
    }

    fn is_full(&self, depth: usize) -> bool {
        self.requests.len() - self.free.len() >= depth || self.bytes >= MAX_BYTES_UNDER_WAY
    }

    fn insert(&mut self, flight: Flight) -> (u16, &Flight) {
        self.bytes += flight.bytes;
        let token = self.free.pop().unwrap_or_else(|| {
            self.requests.push(None);
            // No more than the depth of an engine.
            (self.requests.len() - 1) as u16
        });
        (token, self.requests[usize::from(token)].insert(flight))
    }

    fn get(&mut self, token: u16) -> Option<&mut Flight> {
        self.requests.get_mut(usize::from(token))?.as_mut()
    }

    fn remove(&mut self, token: u16) -> Option<Flight> {
        let flight = self.requests.get_mut(usize::from(token))?.take()?;
        self.free.push(token);
        self.bytes -= flight.bytes;
        Some(flight)
    }
}
