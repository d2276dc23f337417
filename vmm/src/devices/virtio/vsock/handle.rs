//! How the rest of the VMM reaches the device: what both share, and the handle to connect with.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use super::stream::HostStream;
use crate::devices::virtio::counter::Counter;
use crate::locked;

/// How many connect requests may wait for the event loop.
const MAX_QUEUED: usize = 128;
/// The lowest port the device connects from.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Is given the host's end of a connection that the guest made to the port. Called on the event loop's thread, once for each port:
/// must not block.
pub type Accepted = Box<dyn FnMut(u32, OwnedFd) + Send>;

/// Is told how a [`VsockHandle::connect`] went. Called once, on the event loop's thread or that of whoever resets the device:
/// must not block.
pub type Connected = Box<dyn FnOnce(Result<(), ConnectError>) + Send>;

/// Why the host did not get a connection to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The guest's driver is not up (yet, or any more).
    #[error("the guest's vsock driver is not ready")]
    NotReady,
    /// Nothing in the guest listens on the port, or its backlog is full.
    #[error("the guest refused the vsock connection")]
    Refused,
    /// The device was reset or the machine ended, or the host hung up, before the guest answered.
    #[error("the vsock connection was given up before the guest answered")]
    Reset,
    /// As many connections as there can be.
    #[error("too many vsock connections")]
    TooMany,
    /// The descriptor is not a Unix stream socket.
    #[error("the descriptor for the vsock connection is not a Unix stream socket")]
    NotAStream,
}

/// What the device must remember to be saved and restored; connections do not outlive a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's context identifier.
    pub guest_cid: u32,
    /// Ports the guest may still connect to.
    pub listen: BTreeSet<u32>,
    /// The port of the next connection the host makes.
    pub next_host_port: u32,
}

impl VsockState {
    pub(super) fn new(guest_cid: u32, listen: Vec<u32>) -> Self {
        Self { guest_cid, listen: listen.into_iter().collect(), next_host_port: FIRST_HOST_PORT }
    }

    /// A port for a connection from the host for which `taken` does not hold, of which there must be one.
    pub(super) fn pick_host_port(&mut self, taken: impl Fn(u32) -> bool) -> u32 {
        loop {
            let port = self.next_host_port;
            // u32::MAX is VMADDR_PORT_ANY of Linux <linux/vm_sockets.h>.
            self.next_host_port = if port >= u32::MAX - 1 { FIRST_HOST_PORT } else { port + 1 };
            if !self.listen.contains(&port) && !taken(port) {
                return port;
            }
        }
    }
}

/// An answer somebody waits for; says [`ConnectError::Reset`] if it is dropped without another.
pub(super) struct PendingConnect(Option<Connected>);

impl PendingConnect {
    pub(super) fn new(connected: Connected) -> Self {
        Self(Some(connected))
    }

    pub(super) fn answer(mut self, result: Result<(), ConnectError>) {
        if let Some(connected) = self.0.take() {
            connected(result);
        }
    }
}

impl Drop for PendingConnect {
    fn drop(&mut self) {
        if let Some(connected) = self.0.take() {
            connected(Err(ConnectError::Reset));
        }
    }
}

/// A wish of the host to connect.
pub(super) struct ConnectRequest {
    /// The guest's port.
    pub(super) port: u32,
    pub(super) stream: HostStream,
    pub(super) pending: PendingConnect,
}

/// What the device has counted since it was made.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) connections_from_guest: Counter,
    pub(super) connections_to_guest: Counter,
    pub(super) connections_refused: Counter,
    pub(super) bytes_from_guest: Counter,
    pub(super) bytes_to_guest: Counter,
    pub(super) packets_from_guest: Counter,
    pub(super) packets_to_guest: Counter,
}

impl Counters {
    pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("connections_from_guest", self.connections_from_guest.get()),
            ("connections_to_guest", self.connections_to_guest.get()),
            ("connections_refused", self.connections_refused.get()),
            ("bytes_from_guest", self.bytes_from_guest.get()),
            ("bytes_to_guest", self.bytes_to_guest.get()),
            ("packets_from_guest", self.packets_from_guest.get()),
            ("packets_to_guest", self.packets_to_guest.get()),
        ]
    }
}

/// What the device, its handles and its part on the event loop have in common. Locks are held for moments and never two at
/// a time.
pub(super) struct Shared {
    pub(super) state: Mutex<VsockState>,
    pub(super) accepted: Mutex<Accepted>,
    pub(super) counters: Counters,
    requests: Mutex<Requests>,
    /// Tells the event loop of new requests.
    pub(super) wake: OwnedFd,
}

#[derive(Default)]
struct Requests {
    ready: bool,
    waiting: VecDeque<ConnectRequest>,
}

impl Shared {
    pub(super) fn new(state: VsockState, accepted: Accepted) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(state),
            accepted: Mutex::new(accepted),
            counters: Counters::default(),
            requests: Mutex::default(),
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    /// From now on the event loop takes requests.
    pub(super) fn open(&self) {
        locked(self.requests.lock()).ready = true;
    }

    /// No more requests; those at hand are answered.
    pub(super) fn close(&self) {
        let mut requests = locked(self.requests.lock());
        requests.ready = false;
        let waiting = std::mem::take(&mut requests.waiting);
        drop(requests);
        // Answers them, without the lock.
        drop(waiting);
    }

    /// The requests at hand.
    pub(super) fn take_requests(&self) -> VecDeque<ConnectRequest> {
        // An error means that there was no wake-up to clear.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut locked(self.requests.lock()).waiting)
    }

    fn request(&self, request: ConnectRequest) -> Result<(), (PendingConnect, ConnectError)> {
        let mut requests = locked(self.requests.lock());
        if !requests.ready {
            return Err((request.pending, ConnectError::NotReady));
        }
        if requests.waiting.len() >= MAX_QUEUED {
            return Err((request.pending, ConnectError::TooMany));
        }
        requests.waiting.push_back(request);
        drop(requests);
        // Fails only when the counter is about to overflow, and then the loop is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        Ok(())
    }
}

/// Connects to the guest, from any thread.
#[derive(Clone)]
pub struct VsockHandle(pub(super) Arc<Shared>);

impl VsockHandle {
    /// Connects to a port on which the guest listens. `stream`, a Unix stream socket, becomes the host's end once the guest
    /// has accepted, which `connected` is told; it waits as long as the guest does. To give up, hang up the other end of
    /// `stream`.
    ///
    /// `connected` may be called before this returns.
    pub fn connect(&self, port: u32, stream: OwnedFd, connected: Connected) {
        let pending = PendingConnect::new(connected);
        let Some(stream) = HostStream::new(stream) else {
            return pending.answer(Err(ConnectError::NotAStream));
        };
        if let Err((pending, error)) = self.0.request(ConnectRequest { port, stream, pending }) {
            pending.answer(Err(error));
        }
    }
}
