//! One connection: credit, half-closes, and the bytes on their way to the host.
//!
//! What is to be said to the guest is kept as flags, not as packets, so a guest that gives no receive buffers costs nothing.
//! The data flows like this:
//!
//! * guest to host: straight from the guest's buffers into the Unix socket; what the socket does not take waits in `backlog`,
//!   which is bounded by the credit we grant.
//! * host to guest: straight from the Unix socket into the guest's buffers; nothing is read before there are buffers and credit
//!   for it, so nothing ever waits here.
//!
//! The life of a connection:
//!
//! ```text
//! Connecting --RESPONSE--> Open --both directions ended by us, or by both sides--> Closing --RST from the guest--> gone
//!                            |                                                        ^  \--our RST sent--> gone
//!                            |--guest ended both: Draining{answer} --backlog written--'
//!                            '--guest sent RST:   Draining         --backlog written--> gone
//! ```

use std::collections::VecDeque;
use std::io;

use rustix::event::epoll::EventFlags;
use vm_memory::Bytes;

use super::handle::{ConnectError, PendingConnect};
use super::packet::{Buffers, Header, SHUT_BOTH, SHUT_RCV, SHUT_SEND, op};
use super::stream::HostStream;
use crate::event_loop::Registry;

/// How many bytes on their way to the host are buffered on a connection; what the guest is told as `buf_alloc`. Linux
/// sends packets of up to 64 KiB and sleeps when there is no room for more: so this lets it go on while the host works on those before,
/// and the Unix socket of a stream takes most of it.
pub(super) const BUF_ALLOC: u32 = 512 * 1024;
/// The same for a connection that is one of very many, so that a guest that fills all of them costs the host no more than a bounded sum.
pub(super) const SMALL_BUF_ALLOC: u32 = 32 * 1024;
/// The most receive buffers filled by one read: 64 KiB with the 4 KiB buffers of Linux.
pub(super) const MAX_BURST: u8 = 16;

/// Names a connection: the ports at both its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Verdict {
    Keep,
    Remove,
}

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A packet without data: its operation and flags.
    Control(u16, u32),
    /// Data may wait in the Unix socket.
    Data,
    Nothing,
}

enum Phase {
    /// The host has asked; the guest has not answered.
    Connecting(PendingConnect),
    Open,
    /// The guest neither sends nor receives any more, but the backlog is not empty. With `answer` it waits for our RST.
    Draining {
        answer: bool,
    },
    /// The Unix socket is closed. Unless we owe it an RST, the guest owes us one (virtio 1.3 s5.10.6.6).
    Closing,
}

/// Packets owed to the guest.
#[derive(Default)]
struct Owed {
    request: bool,
    response: bool,
    reset: bool,
    credit: bool,
}

/// One connection.
pub(super) struct Connection {
    phase: Phase,
    stream: Option<HostStream>,
    /// Names the Unix socket to the event loop.
    token: u32,
    /// Whether it is in the table's queue of connections with something for the guest.
    pub(super) queued: bool,
    /// How many receive buffers the next read tries to fill.
    pub(super) burst: u8,

    owed: Owed,
    /// Directions the guest has ended, and those we have told it that we have ended.
    guest_shut: u32,
    shut_sent: u32,
    /// The Unix socket takes no more; what the guest sends is thrown away.
    write_dead: bool,
    /// The host's peer reads end-of-stream after the backlog.
    write_ended: bool,
    /// All the host sent has been read.
    host_ended: bool,
    /// The Unix socket may have data to read: set by the event loop's edge, cleared by a read that found less than it asked for.
    readable: bool,
    /// The host will send no more, so a short read does not mean that there is nothing left to find.
    end_in_sight: bool,
    /// Registered for `EPOLLOUT`.
    wants_out: bool,

    /// How many bytes `backlog` may hold, as the guest is told.
    buf_alloc: u32,
    backlog: VecDeque<u8>,
    /// Bytes received from the guest, those of them passed on, and the latter as last told to the guest. All modulo 2^32
    /// (virtio 1.3 s5.10.6.3).
    rx_cnt: u32,
    fwd_cnt: u32,
    fwd_sent: u32,
    /// Bytes sent to the guest, and what the guest says of its own buffer.
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
}

impl Connection {
    fn new(phase: Phase, owed: Owed, stream: HostStream, token: u32, buf_alloc: u32) -> Self {
        Self {
            phase,
            stream: Some(stream),
            token,
            queued: false,
            burst: 1,
            owed,
            guest_shut: 0,
            shut_sent: 0,
            write_dead: false,
            write_ended: false,
            host_ended: false,
            readable: false,
            end_in_sight: false,
            wants_out: false,
            buf_alloc,
            backlog: VecDeque::new(),
            rx_cnt: 0,
            fwd_cnt: 0,
            fwd_sent: 0,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
        }
    }

    /// A connection the host asks for, on which `buf_alloc` bytes are buffered.
    pub(super) fn to_guest(stream: HostStream, token: u32, buf_alloc: u32, pending: PendingConnect) -> Self {
        let owed = Owed { request: true, ..Owed::default() };
        Self::new(Phase::Connecting(pending), owed, stream, token, buf_alloc)
    }

    /// A connection the guest has asked for and gets.
    pub(super) fn from_guest(stream: HostStream, token: u32, buf_alloc: u32, request: &Header) -> Self {
        let owed = Owed { response: true, ..Owed::default() };
        let mut it = Self::new(Phase::Open, owed, stream, token, buf_alloc);
        it.note_credit(request);
        it
    }

    /// Registers the Unix socket, edge-triggered: the state of a connection decides when to read, so an event must only say
    /// that something has changed, and a hang-up be told once.
    pub(super) fn register(&self, registry: &Registry<'_>) -> io::Result<()> {
        match &self.stream {
            Some(stream) => registry.add(stream, self.token, interest(self.wants_out)),
            None => Ok(()),
        }
    }

    /// Takes that back. Explicitly: the description may live on in a duplicate, and with it the watch.
    pub(super) fn deregister(&self, registry: &Registry<'_>) {
        if let Some(stream) = &self.stream {
            // Fails only if it never was.
            let _ = registry.delete(stream);
        }
    }

    pub(super) fn token(&self) -> u32 {
        self.token
    }

    /// How many more bytes the guest can take. A guest that claims nonsense gets nothing.
    pub(super) fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    fn note_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
    }

    /// Takes a packet of this connection, other than RST.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        data: Option<Buffers<'_>>,
        registry: &Registry<'_>,
    ) -> Verdict {
        self.note_credit(header);
        match (&mut self.phase, header.op) {
            (Phase::Connecting(_), op::RESPONSE) => {
                if let Phase::Connecting(pending) = std::mem::replace(&mut self.phase, Phase::Open) {
                    pending.answer(Ok(()));
                }
                self.settle(registry)
            }
            (Phase::Open, op::RW) => match data {
                Some(data) if self.guest_shut & SHUT_SEND == 0 => self.receive_data(data, registry),
                _ => self.abort(registry),
            },
            (Phase::Open, op::SHUTDOWN) => {
                self.guest_shut |= header.flags & SHUT_BOTH;
                if self.guest_shut & SHUT_RCV != 0
                    && let Some(stream) = &self.stream
                {
                    stream.end_receiving();
                }
                if self.guest_shut == SHUT_BOTH {
                    self.phase = Phase::Draining { answer: true };
                    self.owed = Owed::default();
                }
                self.settle(registry)
            }
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.owed.credit = true;
                Verdict::Keep
            }
            (Phase::Open, op::CREDIT_UPDATE) => Verdict::Keep,
            // Both sides ended it at the same time: the guest waits for an RST as we do.
            (Phase::Closing, op::SHUTDOWN) => {
                self.guest_shut |= header.flags & SHUT_BOTH;
                self.owed.reset |= self.guest_shut == SHUT_BOTH;
                Verdict::Keep
            }
            // Sent before the guest learnt that there is nobody any more.
            (Phase::Closing, op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST) => Verdict::Keep,
            // Old news from a guest that waits for our RST, which it gets after the backlog is written.
            (Phase::Draining { answer: true }, op::SHUTDOWN | op::CREDIT_UPDATE | op::CREDIT_REQUEST) => {
                Verdict::Keep
            }
            // A packet that makes no sense here, from a driver that breaks the rules.
            _ => self.abort(registry),
        }
    }

    /// Takes an RST from the guest.
    pub(super) fn receive_reset(&mut self, registry: &Registry<'_>) -> Verdict {
        match std::mem::replace(&mut self.phase, Phase::Draining { answer: false }) {
            Phase::Connecting(pending) => {
                pending.answer(Err(ConnectError::Refused));
                self.close_stream(registry);
                Verdict::Remove
            }
            Phase::Open | Phase::Draining { .. } => {
                self.guest_shut = SHUT_BOTH;
                self.owed = Owed::default();
                if let Some(stream) = &self.stream {
                    stream.end_receiving();
                }
                self.settle(registry)
            }
            Phase::Closing => Verdict::Remove,
        }
    }

    /// The guest has not answered yet.
    pub(super) fn is_connecting(&self) -> bool {
        matches!(self.phase, Phase::Connecting(_))
    }

    /// The guest has reset it, and only the host's end still matters.
    pub(super) fn is_forgotten(&self) -> bool {
        matches!(self.phase, Phase::Draining { answer: false })
    }

    fn receive_data(&mut self, mut data: Buffers<'_>, registry: &Registry<'_>) -> Verdict {
        let len = data.len() as u32;
        // virtio 1.3 s5.10.6.3.1: the guest must not send more than we said we have room for.
        if len > self.buf_alloc - self.rx_cnt.wrapping_sub(self.fwd_cnt) {
            return self.abort(registry);
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(len);
        if !self.write_dead
            && self.backlog.is_empty()
            && len > 0
            && let Some(stream) = &self.stream
        {
            match stream.send(data.slices()) {
                Ok(sent) => {
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(sent as u32);
                    data.skip(sent);
                }
                Err(e) if would_block(&e) => {}
                Err(_) => self.kill_writing(),
            }
        }
        if self.write_dead {
            self.fwd_cnt = self.rx_cnt;
        } else {
            self.keep_for_later(&data);
        }
        self.settle(registry)
    }

    fn keep_for_later(&mut self, data: &Buffers<'_>) {
        let mut piece = [0; 4096];
        self.backlog.reserve(data.len());
        for slice in data.slices() {
            let mut at = 0;
            while at < slice.len() {
                // Reads what is there of the piece; never nothing, for `at` is inside.
                let Ok(count @ 1..) = slice.read(&mut piece, at) else { break };
                self.backlog.extend(&piece[..count]);
                at += count;
            }
        }
    }

    /// The Unix socket is ready for something.
    pub(super) fn stream_ready(&mut self, events: EventFlags, registry: &Registry<'_>) -> Verdict {
        if events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            self.readable = true;
        }
        if events.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            self.end_in_sight = true;
        }
        // EPOLLHUP: both directions are shut down, so nobody can read what we would write.
        if events.contains(EventFlags::HUP) {
            if matches!(self.phase, Phase::Connecting(_)) {
                return self.abort(registry);
            }
            self.kill_writing();
        }
        if !self.backlog.is_empty()
            && let Some(stream) = &self.stream
        {
            match stream.send_bytes(self.backlog.as_slices()) {
                Ok(sent) => {
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(sent as u32);
                    self.backlog.drain(..sent);
                }
                Err(e) if would_block(&e) => {}
                Err(_) => self.kill_writing(),
            }
        }
        self.settle(registry)
    }

    fn kill_writing(&mut self) {
        self.write_dead = true;
        self.backlog = VecDeque::new();
        self.fwd_cnt = self.rx_cnt;
    }

    /// Draws the conclusions from what has changed.
    fn settle(&mut self, registry: &Registry<'_>) -> Verdict {
        if self.backlog.is_empty() && self.backlog.capacity() > 0 {
            self.backlog = VecDeque::new();
        }
        // The guest is told of new room when it believes to have less than half of it.
        let believed_room = self.buf_alloc.saturating_sub(self.rx_cnt.wrapping_sub(self.fwd_sent));
        if believed_room < self.buf_alloc / 2
            && self.fwd_cnt != self.fwd_sent
            && self.guest_shut & SHUT_SEND == 0
        {
            self.owed.credit = true;
        }
        if let Some(stream) = &self.stream {
            let wants_out = !self.backlog.is_empty();
            if wants_out != self.wants_out {
                if registry.modify(stream, self.token, interest(wants_out)).is_err() {
                    return self.abort(registry);
                }
                self.wants_out = wants_out;
            }
            if self.backlog.is_empty() && self.guest_shut & SHUT_SEND != 0 && !self.write_ended {
                stream.end_sending();
                self.write_ended = true;
            }
        }
        let to_host_ended = self.write_dead || self.write_ended;
        let to_guest_ended = self.host_ended || self.guest_shut & SHUT_RCV != 0;
        match self.phase {
            Phase::Draining { answer } if to_host_ended => {
                self.close_stream(registry);
                self.phase = Phase::Closing;
                self.owed = Owed { reset: true, ..Owed::default() };
                if answer { Verdict::Keep } else { Verdict::Remove }
            }
            // Nothing can flow any more, whatever the guest still has to read or to learn.
            Phase::Open if to_host_ended && to_guest_ended => {
                self.close_stream(registry);
                self.phase = Phase::Closing;
                Verdict::Keep
            }
            _ => Verdict::Keep,
        }
    }

    /// Ends it at once, towards both sides.
    pub(super) fn abort(&mut self, registry: &Registry<'_>) -> Verdict {
        self.close_stream(registry);
        // Drops a pending connect, which answers it.
        self.phase = Phase::Closing;
        self.owed = Owed { reset: true, ..Owed::default() };
        Verdict::Keep
    }

    /// Closes the Unix socket; whoever removes a connection calls this first.
    pub(super) fn close_stream(&mut self, registry: &Registry<'_>) {
        self.backlog = VecDeque::new();
        self.deregister(registry);
        self.stream = None;
    }

    fn unsent_shutdown(&self) -> u32 {
        let wanted = match self.phase {
            Phase::Open => {
                (if self.host_ended { SHUT_SEND } else { 0 }) | (if self.write_dead { SHUT_RCV } else { 0 })
            }
            Phase::Closing => SHUT_BOTH,
            Phase::Connecting(_) | Phase::Draining { .. } => 0,
        };
        // Flags of earlier packets are repeated: they only ever accumulate (virtio 1.3 s5.10.6.6).
        if wanted & !self.shut_sent == 0 { 0 } else { wanted | self.shut_sent }
    }

    fn wants_data(&self) -> bool {
        let open = matches!(self.phase, Phase::Open) && self.guest_shut & SHUT_RCV == 0;
        open && self.readable && !self.host_ended && self.credit() > 0
    }

    /// What to send to the guest next.
    pub(super) fn next(&self) -> Next {
        if self.owed.reset {
            Next::Control(op::RST, 0)
        } else if self.owed.request {
            Next::Control(op::REQUEST, 0)
        } else if self.owed.response {
            Next::Control(op::RESPONSE, 0)
        } else if self.wants_data() {
            // Before the rest: data tells of credit too, and may be the last before the end.
            Next::Data
        } else if self.unsent_shutdown() != 0 {
            Next::Control(op::SHUTDOWN, self.unsent_shutdown())
        } else if self.owed.credit {
            Next::Control(op::CREDIT_UPDATE, 0)
        } else {
            Next::Nothing
        }
    }

    /// What every packet of this connection tells about its credit; notes that the guest is told.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.owed.credit = false;
        self.fwd_sent = self.fwd_cnt;
        (self.buf_alloc, self.fwd_cnt)
    }

    /// A packet without data has been sent.
    pub(super) fn control_sent(&mut self, sent: u16, flags: u32) -> Verdict {
        match sent {
            op::RST => return Verdict::Remove,
            op::REQUEST => self.owed.request = false,
            op::RESPONSE => self.owed.response = false,
            op::SHUTDOWN => self.shut_sent |= flags,
            _ => {}
        }
        Verdict::Keep
    }

    /// Reads from the host into `room`, which is no longer than the credit. Returns how many bytes are there to be sent.
    pub(super) fn read_host(&mut self, room: &Buffers<'_>, registry: &Registry<'_>) -> (usize, Verdict) {
        let Some(stream) = &self.stream else { return (0, Verdict::Keep) };
        match stream.receive(room.slices()) {
            Ok(0) => {
                self.host_ended = true;
                (0, self.settle(registry))
            }
            Ok(count) => {
                self.tx_cnt = self.tx_cnt.wrapping_add(count as u32);
                // epoll(7), edge-triggered streams: less than asked for means all there was, if it does not end here.
                if count < room.len() && !self.end_in_sight {
                    self.readable = false;
                }
                // As much as there was is about what there will be: a busy stream is not read in small pieces first each time.
                let filled = (count * usize::from(self.burst)).div_ceil(room.len()) as u8;
                self.burst = if count == room.len() { (self.burst * 2).min(MAX_BURST) } else { filled };
                (count, Verdict::Keep)
            }
            Err(e) if would_block(&e) => {
                self.readable = false;
                (0, Verdict::Keep)
            }
            // The peer has closed its end without reading all: ECONNRESET comes after its data.
            Err(_) => {
                self.host_ended = true;
                self.kill_writing();
                (0, self.settle(registry))
            }
        }
    }
}

fn interest(out: bool) -> EventFlags {
    let always = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
    if out { always | EventFlags::OUT } else { always }
}

/// Whether to try again after the next event.
fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock)
}
