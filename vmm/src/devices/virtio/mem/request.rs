//! What the driver asks for: blocks plugged and unplugged (virtio 1.3 s5.15.6).
//!
//! A request may name 65,535 blocks. Each costs a call of KVM, and giving memory back takes time; so a request is carried out in turns
//! of bounded length, between which the event loop serves others, and answered after the last.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::Shared;
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::served::{Serve, Turn};
use crate::devices::virtio::{GuestRam, QueueError, VirtQueue};
use crate::memory::hotplug::Plugged;

/// How much is plugged or unplugged in one turn, in bytes, but no less than a block.
const TURN: u64 = 128 << 20;
/// The most requests answered in one turn.
const REQUESTS: usize = 16;

/// `struct virtio_mem_req`: type, padding to 8; address, number of blocks, padding to 24.
const REQUEST_LEN: usize = 24;
/// `struct virtio_mem_resp`: type, padding to 8; state.
const RESPONSE_LEN: usize = 10;

mod kind {
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// s5.15.6: the types of response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Response {
    Ack = 0,
    Nack = 1,
    Busy = 2,
    Error = 3,
}

/// Blocks being plugged or unplugged for a request.
#[derive(Debug)]
struct Work {
    answer_to: AnswerTo,
    plug: bool,
    blocks: Range<u64>,
    /// The first that is left to do.
    next: u64,
    /// What to answer in the end.
    answer: Response,
}

/// Which chain an answer belongs to, and where in it.
#[derive(Clone, Copy, Debug)]
struct AnswerTo {
    head: u16,
    address: Option<GuestAddress>,
}

/// A request that makes sense.
enum Request {
    Change { plug: bool, blocks: Range<u64> },
    State(Plugged),
}

/// Carries requests out.
pub(super) struct Requests {
    shared: Arc<Shared>,
    work: Option<Work>,
}

impl Serve for Requests {
    fn turn(&mut self, queue: &mut VirtQueue, mem: &GuestRam) -> Result<Turn, QueueError> {
        let mut answered = false;
        for _ in 0..REQUESTS {
            if self.work.is_some() {
                answered |= self.carry_on(queue, mem)?;
                return Ok(Turn { answered, more: true });
            }
            let Some(chain) = queue.pop(mem)? else { return Ok(Turn { answered, more: false }) };
            answered |= self.begin(queue, mem, chain)?;
        }
        Ok(Turn { answered, more: true })
    }

    fn settle(&mut self, queue: &mut VirtQueue, mem: &GuestRam) -> Result<Turn, QueueError> {
        let mut answered = false;
        while self.work.is_some() {
            answered |= self.carry_on(queue, mem)?;
        }
        Ok(Turn { answered, more: false })
    }
}

impl Requests {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, work: None }
    }

    /// Takes a request: `true` if it is answered, else it has become work.
    fn begin(&mut self, queue: &mut VirtQueue, mem: &GuestRam, chain: Chain<'_>) -> Result<bool, QueueError> {
        let (answer_to, bytes) = read(mem, chain);
        let (answer, state) = match bytes.as_ref().map_or(Err(Response::Error), |bytes| self.parse(bytes)) {
            Ok(Request::Change { plug, blocks }) => {
                let next = blocks.start;
                self.work = Some(Work { answer_to, plug, blocks, next, answer: Response::Ack });
                return Ok(false);
            }
            Ok(Request::State(state)) => (Response::Ack, state),
            Err(refusal) => (refusal, Plugged::All),
        };
        self.answer(queue, mem, answer_to, answer, state)?;
        Ok(true)
    }

    /// s5.15.6: what is asked for, if it can be asked for.
    fn parse(&self, bytes: &[u8; REQUEST_LEN]) -> Result<Request, Response> {
        let Shared { hotplug, requested, counters, .. } = &*self.shared;
        let count = u64::from(u16_at(bytes, 16));
        let address = u64::from_le_bytes(bytes[8..16].try_into().unwrap_or_default());
        let blocks = || {
            let offset = address.checked_sub(hotplug.start().0).ok_or(Response::Error)?;
            let first = offset / hotplug.block();
            let blocks = first..first.saturating_add(count);
            let inside = offset.is_multiple_of(hotplug.block()) && blocks.end <= hotplug.blocks().end;
            if inside && !blocks.is_empty() { Ok(blocks) } else { Err(Response::Error) }
        };
        match u16_at(bytes, 0) {
            kind::PLUG => {
                counters.plug_requests.add(1);
                let blocks = blocks()?;
                if hotplug.state(&blocks) != Plugged::None {
                    return Err(Response::Error);
                }
                let after = hotplug.plugged() + count * hotplug.block();
                if after > requested.load(Ordering::Acquire) {
                    return Err(Response::Nack);
                }
                Ok(Request::Change { plug: true, blocks })
            }
            kind::UNPLUG => {
                counters.unplug_requests.add(1);
                let blocks = blocks()?;
                if hotplug.state(&blocks) != Plugged::All {
                    return Err(Response::Error);
                }
                Ok(Request::Change { plug: false, blocks })
            }
            kind::UNPLUG_ALL => {
                counters.unplug_requests.add(1);
                Ok(Request::Change { plug: false, blocks: hotplug.blocks() })
            }
            kind::STATE => {
                counters.state_requests.add(1);
                Ok(Request::State(hotplug.state(&blocks()?)))
            }
            _ => Err(Response::Error),
        }
    }

    /// Does one turn's worth of work; `true` if that was the last and the request is answered.
    fn carry_on(&mut self, queue: &mut VirtQueue, mem: &GuestRam) -> Result<bool, QueueError> {
        let Some(work) = &mut self.work else { return Ok(false) };
        let hotplug = &self.shared.hotplug;
        let before = hotplug.plugged();
        let turn = (TURN / hotplug.block()).max(1);
        let end = work.blocks.end.min(work.next + turn);
        while work.next < end {
            let change = if work.plug { hotplug.plug(work.next) } else { hotplug.unplug(work.next) };
            if let Err(e) = change {
                log::warn!("virtio-mem cannot change block {}: {e}", work.next);
                // A driver asked to come back later expects to find all of it or nothing done (s5.15.6.5), so what has been plugged is
                // unplugged again. What cannot be unplugged stays.
                work.answer = Response::Busy;
                let undo = if work.plug { work.blocks.start..work.next } else { 0..0 };
                (work.plug, work.next, work.blocks) = (false, undo.start, undo);
                break;
            }
            work.next += 1;
        }
        let after = hotplug.plugged();
        self.shared.counters.bytes_plugged.add(after.saturating_sub(before));
        self.shared.counters.bytes_unplugged.add(before.saturating_sub(after));
        self.shared.show();
        if work.next < work.blocks.end {
            return Ok(false);
        }
        let Work { answer_to, answer, .. } = *work;
        self.work = None;
        self.answer(queue, mem, answer_to, answer, Plugged::All)?;
        Ok(true)
    }

    fn answer(
        &self,
        queue: &mut VirtQueue,
        mem: &GuestRam,
        to: AnswerTo,
        answer: Response,
        state: Plugged,
    ) -> Result<(), QueueError> {
        if answer != Response::Ack {
            self.shared.counters.refused.add(1);
        }
        let state = match state {
            Plugged::All => 0u16,
            Plugged::None => 1,
            Plugged::Some => 2,
        };
        let mut bytes = [0; RESPONSE_LEN];
        bytes[..2].copy_from_slice(&(answer as u16).to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        let written = to.address.is_some_and(|address| mem.write_slice(&bytes, address).is_ok());
        queue.add_used(mem, to.head, if written { RESPONSE_LEN as u32 } else { 0 })
    }
}

/// Reads a request, if it is one, and finds where its answer goes, if there is room for one.
fn read(mem: &GuestRam, chain: Chain<'_>) -> (AnswerTo, Option<[u8; REQUEST_LEN]>) {
    let mut answer_to = AnswerTo { head: chain.head_index(), address: None };
    let mut request = None;
    for descriptor in chain {
        if descriptor.is_write_only() {
            if descriptor.len() as usize >= RESPONSE_LEN {
                answer_to.address = Some(descriptor.addr());
            }
            break;
        }
        let mut bytes = [0; REQUEST_LEN];
        if request.is_none()
            && descriptor.len() as usize >= REQUEST_LEN
            && mem.read_slice(&mut bytes, descriptor.addr()).is_ok()
        {
            request = Some(bytes);
        }
    }
    (answer_to, request)
}

fn u16_at(bytes: &[u8; REQUEST_LEN], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
