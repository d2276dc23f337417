//! All connections: which packet belongs to which, and whose turn it is.
//!
//! Connections with something for the guest stand in a queue, each at most once, and so do packets that belong to no connection
//! and get an RST. A turn is one packet, or one read's worth of data, and then it is the next one's turn.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;

use rustix::event::epoll::EventFlags;

use super::connection::{BUF_ALLOC, Connection, Key, Next, SMALL_BUF_ALLOC, Verdict};
use super::handle::{ConnectError, ConnectRequest, Shared};
use super::packet::{Buffers, HOST_CID, Header, RxBuffer, TYPE_STREAM, TxPacket, op};
use super::stream::HostStream;
use crate::devices::virtio::{GuestRam, QueueError, VirtQueue};
use crate::event_loop::Registry;
use crate::locked;

/// The most connections at a time, closing ones included.
pub(super) const MAX_CONNECTIONS: usize = 4096;
/// While there are so many connections, a new one gets little room for bytes on their way to the host: with 256 KiB for each of these and
/// 32 KiB for each of the others, all together hold 184 MiB at most, and that only if the guest fills them and nobody on the host reads.
const MANY_CONNECTIONS: usize = 256;
/// How many packets that belong to no connection may wait for their RST; beyond that they get none.
pub(super) const MAX_STRAY_RESETS: usize = 128;
/// Tokens below are the device's own descriptors.
pub(super) const FIRST_TOKEN: u32 = 16;
/// How many pieces of guest memory one read fills at most.
const MAX_PIECES: usize = 64;

/// The connections of an active device.
pub(super) struct Table {
    guest_cid: u32,
    shared: Arc<Shared>,
    connections: HashMap<Key, Connection>,
    tokens: HashMap<u32, Key>,
    next_token: u32,
    queue: VecDeque<Turn>,
    /// How many in `queue` are [`Turn::Stray`].
    strays: usize,
}

/// Whose turn it is to send something to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// The connection with this token, if it is still there.
    Connection(u32),
    /// A packet that belongs to no connection, and the socket type it came with.
    Stray(Key, u16),
}

impl Table {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let guest_cid = locked(shared.state.lock()).guest_cid;
        Self {
            guest_cid,
            shared,
            connections: HashMap::new(),
            tokens: HashMap::new(),
            next_token: FIRST_TOKEN,
            queue: VecDeque::new(),
            strays: 0,
        }
    }

    /// Whether there is something for the guest.
    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Takes the host's requests to connect.
    pub(super) fn take_requests(&mut self, registry: &Registry<'_>) {
        for ConnectRequest { port, stream, pending } in self.shared.take_requests() {
            if self.connections.len() >= MAX_CONNECTIONS {
                pending.answer(Err(ConnectError::TooMany));
                continue;
            }
            let host_port = {
                let mut state = locked(self.shared.state.lock());
                state.pick_host_port(|host_port| {
                    self.connections.contains_key(&Key { guest_port: port, host_port })
                })
            };
            let (token, buf_alloc) = (self.fresh_token(), self.buf_alloc());
            let connection = Connection::to_guest(stream, token, buf_alloc, pending);
            self.shared.counters.connections_to_guest.add(1);
            self.insert(Key { guest_port: port, host_port }, connection, registry);
        }
    }

    /// Takes a packet from the guest.
    pub(super) fn receive(&mut self, packet: TxPacket<'_>, registry: &Registry<'_>) {
        let TxPacket { header, data, .. } = packet;
        // virtio 1.3 s5.10.6.4: the guest speaks for itself, and only the host is here to listen.
        if header.src_cid != u64::from(self.guest_cid) || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key { guest_port: header.src_port, host_port: header.dst_port };
        let connection = self.connections.get_mut(&key).filter(|_| header.kind == TYPE_STREAM);
        let Some(connection) = connection else {
            return match header.op {
                // Never an RST in answer to an RST: the two sides could go on for ever.
                op::RST => {}
                op::REQUEST if header.kind == TYPE_STREAM => self.accept(key, &header, registry),
                _ => self.reset_stray(key, header.kind),
            };
        };
        let verdict = match header.op {
            op::RST => {
                if connection.is_connecting() {
                    self.shared.counters.connections_refused.add(1);
                }
                connection.receive_reset(registry)
            }
            _ if connection.is_forgotten() => return self.reset_stray(key, header.kind),
            _ => {
                self.shared.counters.bytes_from_guest.add(data.as_ref().map_or(0, Buffers::len) as u64);
                connection.receive(&header, data, registry)
            }
        };
        self.conclude(key, verdict, registry);
    }

    /// The Unix socket of a connection is ready for something.
    pub(super) fn stream_ready(&mut self, token: u32, events: EventFlags, registry: &Registry<'_>) {
        // Absent: closed by an earlier event of the same batch.
        let Some(&key) = self.tokens.get(&token) else { return };
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let verdict = connection.stream_ready(events, registry);
        self.conclude(key, verdict, registry);
    }

    /// Takes one turn: puts one packet, or one read's worth of data, into the receive queue, which has at least one buffer.
    /// Returns whether there was anything to put there.
    ///
    /// # Errors
    /// When the driver broke the rules of the queue.
    pub(super) fn serve(
        &mut self,
        rx: &mut VirtQueue,
        mem: &GuestRam,
        registry: &Registry<'_>,
    ) -> Result<bool, QueueError> {
        let key = match self.queue.pop_front() {
            None => return Ok(false),
            Some(Turn::Stray(key, kind)) => {
                self.strays -= 1;
                let header = Header { kind, op: op::RST, ..self.header(key) };
                let sent = send(&header, rx, mem)?;
                self.shared.counters.packets_to_guest.add(sent.into());
                return Ok(sent);
            }
            Some(Turn::Connection(token)) => match self.tokens.get(&token) {
                Some(&key) => key,
                None => return Ok(false),
            },
        };
        let mut header = self.header(key);
        let Some(connection) = self.connections.get_mut(&key) else { return Ok(false) };
        connection.queued = false;
        let (packets, verdict) = match connection.next() {
            Next::Control(op, flags) => {
                (header.buf_alloc, header.fwd_cnt) = connection.tell_credit();
                (header.op, header.flags) = (op, flags);
                let sent = send(&header, rx, mem)?;
                let verdict = if sent { connection.control_sent(op, flags) } else { Verdict::Keep };
                (u64::from(sent), verdict)
            }
            Next::Data => {
                let (packets, bytes, verdict) = send_data(connection, header, rx, mem, registry)?;
                self.shared.counters.bytes_to_guest.add(bytes);
                (packets, verdict)
            }
            Next::Nothing => (0, Verdict::Keep),
        };
        self.shared.counters.packets_to_guest.add(packets);
        self.conclude(key, verdict, registry);
        Ok(packets > 0)
    }

    /// Watches every connection's Unix socket, which at once reports what is ready.
    pub(super) fn register(&self, registry: &Registry<'_>) -> io::Result<()> {
        self.connections.values().try_for_each(|connection| connection.register(registry))
    }

    /// Watches none of them any more.
    pub(super) fn deregister(&self, registry: &Registry<'_>) {
        for connection in self.connections.values() {
            connection.deregister(registry);
        }
    }

    /// Closes everything, which is not watched any more; whoever waits for a connection is answered.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.tokens.clear();
        self.queue.clear();
        self.strays = 0;
    }

    fn accept(&mut self, key: Key, request: &Header, registry: &Registry<'_>) {
        let listens = locked(self.shared.state.lock()).listen.contains(&key.host_port);
        if !listens || self.connections.len() >= MAX_CONNECTIONS {
            return self.reset_stray(key, TYPE_STREAM);
        }
        // Fails when the host is out of descriptors: the guest may try again, the port stays open.
        let Ok((ours, theirs)) = HostStream::pair() else { return self.reset_stray(key, TYPE_STREAM) };
        locked(self.shared.state.lock()).listen.remove(&key.host_port);
        let (token, buf_alloc) = (self.fresh_token(), self.buf_alloc());
        let connection = Connection::from_guest(ours, token, buf_alloc, request);
        self.shared.counters.connections_from_guest.add(1);
        self.insert(key, connection, registry);
        locked(self.shared.accepted.lock())(key.host_port, theirs);
    }

    fn insert(&mut self, key: Key, mut connection: Connection, registry: &Registry<'_>) {
        let verdict = match connection.register(registry) {
            Ok(()) => Verdict::Keep,
            // Out of epoll watches.
            Err(_) => connection.abort(registry),
        };
        self.tokens.insert(connection.token(), key);
        self.connections.insert(key, connection);
        self.conclude(key, verdict, registry);
    }

    /// After something happened to a connection: forgets it, or queues it if it has something for the guest.
    fn conclude(&mut self, key: Key, verdict: Verdict, registry: &Registry<'_>) {
        match verdict {
            Verdict::Keep => {
                if let Some(connection) = self.connections.get_mut(&key)
                    && !connection.queued
                    && connection.next() != Next::Nothing
                {
                    connection.queued = true;
                    self.queue.push_back(Turn::Connection(connection.token()));
                }
            }
            Verdict::Remove => {
                if let Some(mut connection) = self.connections.remove(&key) {
                    connection.close_stream(registry);
                    self.tokens.remove(&connection.token());
                    self.tidy_queue();
                }
            }
        }
    }

    /// Turns of connections that are gone are skipped when they come; here, if they are most of the queue, for a guest that gives no
    /// buffers lets no turn come. So a connection's end costs the same however many there are.
    fn tidy_queue(&mut self) {
        if self.queue.len() > 2 * (self.connections.len() + self.strays) + 64 {
            let tokens = &self.tokens;
            self.queue.retain(|turn| match turn {
                Turn::Connection(token) => tokens.contains_key(token),
                Turn::Stray(..) => true,
            });
        }
    }

    fn reset_stray(&mut self, key: Key, kind: u16) {
        if self.strays < MAX_STRAY_RESETS {
            self.strays += 1;
            self.queue.push_back(Turn::Stray(key, kind));
        }
    }

    /// How many bytes the next connection may buffer.
    fn buf_alloc(&self) -> u32 {
        if self.connections.len() < MANY_CONNECTIONS { BUF_ALLOC } else { SMALL_BUF_ALLOC }
    }

    fn fresh_token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = token.checked_add(1).unwrap_or(FIRST_TOKEN);
            if !self.tokens.contains_key(&token) {
                return token;
            }
        }
    }

    fn header(&self, key: Key) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: u64::from(self.guest_cid),
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            ..Header::default()
        }
    }
}

/// Sends a packet without data; `false` if there is no buffer for it.
fn send(header: &Header, rx: &mut VirtQueue, mem: &GuestRam) -> Result<bool, QueueError> {
    let Some(buffer) = RxBuffer::pop(rx, mem)? else { return Ok(false) };
    buffer.finish(header, rx, mem)?;
    Ok(true)
}

/// Reads once from the host, into as many receive buffers as the connection may fill in one turn. Returns how many packets and
/// bytes that made.
fn send_data(
    connection: &mut Connection,
    header: Header,
    rx: &mut VirtQueue,
    mem: &GuestRam,
    registry: &Registry<'_>,
) -> Result<(u64, u64, Verdict), QueueError> {
    let credit = connection.credit() as usize;
    let mut buffers: Vec<(RxBuffer<'_>, usize)> = Vec::with_capacity(connection.burst.into());
    let mut room = Buffers::expecting(connection.burst.into());
    let mut total = 0;
    while buffers.len() < connection.burst.into() && total < credit {
        let Some(buffer) = RxBuffer::pop(rx, mem)? else { break };
        let mut data = buffer.data();
        if data.len() == 0 {
            let what = "receive buffer has no room for data";
            return Err(QueueError::Request { queue: rx.index(), what });
        }
        if !buffers.is_empty() && room.slices().len() + data.slices().len() > MAX_PIECES {
            rx.undo_pop();
            break;
        }
        data.truncate(credit - total);
        total += data.len();
        buffers.push((buffer, data.len()));
        room.append(&data);
    }
    let (mut left, verdict) = connection.read_host(&room, registry);
    let (mut packets, bytes) = (0, left as u64);
    let (buf_alloc, fwd_cnt) = if bytes > 0 { connection.tell_credit() } else { (0, 0) };
    for (buffer, capacity) in buffers {
        if left == 0 {
            rx.undo_pop();
            continue;
        }
        let len = left.min(capacity);
        left -= len;
        packets += 1;
        buffer.finish(&Header { op: op::RW, len: len as u32, buf_alloc, fwd_cnt, ..header }, rx, mem)?;
    }
    Ok((packets, bytes, verdict))
}
