//! A guest: a driver that keeps the receive queue filled, and sockets that keep account of their credit.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::{MockDriver, Segment};
use crate::devices::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use crate::devices::virtio::vsock::{ConnectError, QUEUE_SIZES, Vsock, VsockHandle};
use crate::event_loop::{EventLoop, LoopHandle};

pub(super) const CID: u32 = 3;
/// Ports on which the host listens.
pub(super) const LISTEN: [u32; 3] = [1024, 1025, 1026];
/// A port on which it does not.
pub(super) const CLOSED: u32 = 7;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
/// The guest's receive buffers, as Linux makes them.
const RX_BUFFER: usize = 4096;
/// The largest packet Linux sends.
pub(super) const MAX_DATA: usize = 64 * 1024;
/// How long a host-side read waits before the test is declared hung.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Guest {
    pub(super) driver: MockDriver,
    pub(super) device: Vsock,
    pub(super) handle: VsockHandle,
    pub(super) accepted: Receiver<(u32, UnixStream)>,
    /// Receive buffers on offer, by head.
    offered: HashMap<u16, Vec<Segment>>,
    tx: u64,
    features: u64,
    pub(super) events: LoopHandle,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Guest {
    /// A guest whose driver is up, with all the receive buffers the queue takes.
    pub(super) fn new() -> Self {
        Self::with_features(0)
    }

    /// Likewise, with these features accepted.
    pub(super) fn with_features(features: u64) -> Self {
        let mut guest = Self::asleep();
        guest.features = features;
        guest.activate();
        guest.offer_all();
        guest
    }

    /// A guest whose driver is not up.
    pub(super) fn asleep() -> Self {
        let (event_loop, events) = EventLoop::new().unwrap();
        let thread = std::thread::spawn(move || event_loop.run());
        let (sender, accepted) = channel();
        let on_accept = move |port, socket: OwnedFd| sender.send((port, patient(socket.into()))).unwrap();
        let (device, handle) = Vsock::new(events.clone(), CID, LISTEN.to_vec(), Box::new(on_accept)).unwrap();
        let driver = MockDriver::new(&QUEUE_SIZES);
        let offered = HashMap::new();
        Self { driver, device, handle, accepted, offered, tx: 0, features: 0, events, thread: Some(thread) }
    }

    /// Brings the driver up, without receive buffers.
    pub(super) fn activate(&mut self) {
        self.offered.clear();
        let activation = self.driver.activation(self.features);
        self.device.activate(activation).unwrap();
        self.tx = self.driver.alloc(HEADER_LEN + MAX_DATA);
    }

    /// Fills the receive queue.
    pub(super) fn offer_all(&mut self) {
        for _ in 0..QUEUE_SIZES[RX] {
            let buffer = self.driver.writable(RX_BUFFER);
            self.offer(vec![buffer]);
        }
        self.driver.kick_if_wanted(RX);
    }

    /// Offers a receive buffer. Does not kick.
    pub(super) fn offer(&mut self, segments: Vec<Segment>) {
        let head = self.driver.add(RX, &segments);
        self.offered.insert(head, segments);
    }

    /// Sends a packet and waits until the device has taken it.
    pub(super) fn send(&mut self, header: &Header, data: &[u8]) {
        let len = (HEADER_LEN + data.len()) as u32;
        self.driver.write(self.tx, &header.encode());
        self.driver.write(self.tx + HEADER_LEN as u64, data);
        self.send_chain(&[Segment { addr: self.tx, len, writable: false }]);
    }

    /// Sends a packet cut into these descriptors and waits until the device has taken it.
    pub(super) fn send_chain(&mut self, segments: &[Segment]) {
        let head = self.driver.add(TX, segments);
        self.driver.kick_if_wanted(TX);
        assert_eq!(self.driver.wait_used(TX), (head, 0));
    }

    /// Takes the next packet and offers its buffer again.
    pub(super) fn recv(&mut self) -> (Header, Vec<u8>) {
        let (packet, segments) = self.take();
        self.offer(segments);
        self.driver.kick_if_wanted(RX);
        packet
    }

    /// Takes the next packet and keeps its buffer.
    pub(super) fn recv_and_keep(&mut self) -> (Header, Vec<u8>) {
        self.take().0
    }

    fn take(&mut self) -> ((Header, Vec<u8>), Vec<Segment>) {
        let used = self.driver.wait_used(RX);
        self.unpack(used)
    }

    /// Takes the next packet if there is one, and offers its buffer again.
    pub(super) fn try_recv(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.driver.pop_used(RX)?;
        let (packet, segments) = self.unpack(used);
        self.offer(segments);
        self.driver.kick_if_wanted(RX);
        Some(packet)
    }

    fn unpack(&mut self, (head, len): (u16, u32)) -> ((Header, Vec<u8>), Vec<Segment>) {
        let segments = self.offered.remove(&head).unwrap();
        let mut bytes = Vec::new();
        for segment in &segments {
            bytes.extend(self.driver.read(segment.addr, segment.len as usize));
        }
        assert!(len as usize <= bytes.len());
        let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len as usize + HEADER_LEN, len as usize, "{header:?}");
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(CID)));
        ((header, bytes[HEADER_LEN..len as usize].to_vec()), segments)
    }

    /// Takes the next packet, which must be this for this socket, and notes what it says of credit.
    pub(super) fn expect(&mut self, sock: &mut Sock, op: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.recv();
        assert_eq!((header.dst_port, header.src_port), (sock.guest_port, sock.host_port), "{header:?}");
        assert_eq!(header.op, op, "{header:?}");
        assert_eq!(header.kind, TYPE_STREAM);
        sock.note(&header);
        (header, data)
    }

    /// Takes all credit updates the device has sent of its own accord; returns how many.
    pub(super) fn take_updates(&mut self, sock: &mut Sock) -> usize {
        self.send(&Sock::new(0xabce, CLOSED).header(op::RW), b"");
        for updates in 0.. {
            let (header, _) = self.recv();
            if header.op == op::RST {
                assert_eq!(header.dst_port, 0xabce);
                return updates;
            }
            assert_eq!((header.op, header.dst_port), (op::CREDIT_UPDATE, sock.guest_port), "{header:?}");
            sock.note(&header);
        }
        unreachable!()
    }

    /// Asks the device for credit.
    pub(super) fn catch_up(&mut self, sock: &mut Sock) {
        self.send(&sock.header(op::CREDIT_REQUEST), b"");
        assert_ne!(self.take_updates(sock), 0);
    }

    /// The device has nothing to say: what is answered first is what is asked last.
    pub(super) fn expect_silence(&mut self) {
        let probe = Header { op: op::SHUTDOWN, ..Sock::new(0xabcd, CLOSED).header(op::RW) };
        self.send(&probe, b"");
        let (answer, _) = self.recv();
        assert_eq!((answer.op, answer.dst_port, answer.src_port), (op::RST, 0xabcd, CLOSED), "{answer:?}");
    }

    /// Connects to a port on which the host listens.
    pub(super) fn connect(&mut self, guest_port: u32, host_port: u32) -> (Sock, UnixStream) {
        let mut sock = Sock::new(guest_port, host_port);
        self.send(&sock.header(op::REQUEST), b"");
        self.expect(&mut sock, op::RESPONSE);
        let (port, stream) = self.accepted.recv().unwrap();
        assert_eq!(port, host_port);
        (sock, stream)
    }

    /// Lets the host ask for a connection, and takes its request.
    pub(super) fn requested(
        &mut self,
        guest_port: u32,
    ) -> (Sock, UnixStream, Receiver<Result<(), ConnectError>>) {
        let (near, far) = UnixStream::pair().unwrap();
        let answer = self.host_connect(guest_port, far.into());
        let (request, _) = self.recv();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, guest_port), "{request:?}");
        let mut sock = Sock::new(guest_port, request.src_port);
        sock.note(&request);
        (sock, patient(near), answer)
    }

    /// Asks for a connection to the guest, on the host's behalf.
    pub(super) fn host_connect(&self, port: u32, socket: OwnedFd) -> Receiver<Result<(), ConnectError>> {
        let (sender, answer) = channel();
        let connected = move |result| {
            // A test may not care for the answer.
            let _ = sender.send(result);
        };
        self.handle.connect(port, socket, Box::new(connected));
        answer
    }

    /// Accepts a connection from the host.
    pub(super) fn accept(&mut self, guest_port: u32) -> (Sock, UnixStream) {
        let (sock, stream, answer) = self.requested(guest_port);
        self.send(&sock.header(op::RESPONSE), b"");
        assert_eq!(answer.recv().unwrap(), Ok(()));
        (sock, stream)
    }

    /// Sends data, which must be within the credit.
    pub(super) fn write(&mut self, sock: &mut Sock, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..sock.header(op::RW) };
        self.send(&header, data);
        sock.tx_cnt = sock.tx_cnt.wrapping_add(data.len() as u32);
    }

    /// Puts data into the transmit queue, which must be within the credit, without waiting for the device to take it.
    pub(super) fn queue_data(&mut self, sock: &mut Sock, data: &[u8]) -> u16 {
        let header = Header { len: data.len() as u32, ..sock.header(op::RW) };
        self.driver.write(self.tx, &header.encode());
        self.driver.write(self.tx + HEADER_LEN as u64, data);
        sock.tx_cnt = sock.tx_cnt.wrapping_add(data.len() as u32);
        let len = (HEADER_LEN + data.len()) as u32;
        let head = self.driver.add(TX, &[Segment { addr: self.tx, len, writable: false }]);
        self.driver.kick_if_wanted(TX);
        head
    }

    /// Ends directions.
    pub(super) fn shutdown(&mut self, sock: &Sock, flags: u32) {
        self.send(&Header { flags, ..sock.header(op::SHUTDOWN) }, b"");
    }

    /// Receives so much data and tells the host that it is consumed.
    pub(super) fn read(&mut self, sock: &mut Sock, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            let (_, data) = self.expect(sock, op::RW);
            all.extend(data);
        }
        assert_eq!(all.len(), len);
        sock.fwd_cnt = sock.fwd_cnt.wrapping_add(len as u32);
        self.send(&sock.header(op::CREDIT_UPDATE), b"");
        all
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.device.reset();
        self.events.quit();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

/// A socket of the guest.
pub(super) struct Sock {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
    pub(super) tx_cnt: u32,
    pub(super) peer_alloc: u32,
    pub(super) peer_fwd: u32,
}

impl Sock {
    pub(super) fn new(guest_port: u32, host_port: u32) -> Self {
        let buf_alloc = 256 * 1024;
        Self { guest_port, host_port, buf_alloc, fwd_cnt: 0, tx_cnt: 0, peer_alloc: 0, peer_fwd: 0 }
    }

    pub(super) fn header(&self, op: u16) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    pub(super) fn note(&mut self, header: &Header) {
        (self.peer_alloc, self.peer_fwd) = (header.buf_alloc, header.fwd_cnt);
    }

    /// How many bytes the device lets it send.
    pub(super) fn credit(&self) -> usize {
        (self.peer_alloc - self.tx_cnt.wrapping_sub(self.peer_fwd)) as usize
    }
}

/// A blocking socket whose reads and writes do not wait for ever.
pub(super) fn patient(stream: UnixStream) -> UnixStream {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Bytes that are different everywhere and for every seed.
pub(super) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len);
    for _ in 0..len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.push(state as u8);
    }
    bytes
}
