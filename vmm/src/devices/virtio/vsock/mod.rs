//! virtio-vsock (virtio 1.3 s5.10): streams between guest and host, which on the host's side are Unix stream sockets.
//!
//! There is no vhost and no `AF_VSOCK` on the host: this device is the guest's only peer. The guest connects to ports the
//! pod engine asked for ([`Vsock::new`]); the host connects with a [`VsockHandle`]. Each connection has one end of a
//! socket pair here, which is read and written straight from and to the guest's buffers.
//!
//! * this file - the device as its transport sees it.
//! * [`handle`] - what other threads share with it.
//! * [`worker`] - its part on the event loop: the queues, whose turn is bounded.
//! * [`table`] - the connections, and whose turn it is among them.
//! * [`connection`] - one connection: credit, half-closes, backlog.
//! * [`stream`] - system calls on the Unix socket.
//! * [`packet`] - packets in descriptor chains.
//!
//! Hostile guests: a packet that makes no sense ends its connection; a ring or chain that makes no sense ends the device. All
//! that is buffered for a guest is bounded: [`table::MAX_CONNECTIONS`] connections at most, each with what it was granted when it was made
//! ([`connection::BUF_ALLOC`], or less for one of very many); an idle one buffers nothing.

mod connection;
mod handle;
mod packet;
mod stream;
mod table;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use handle::Shared;
pub use handle::{Accepted, ConnectError, Connected, VsockHandle, VsockState};
use worker::Worker;

use super::loop_part::LoopPart;
use super::{ActivateError, Activation, ConfigSpace, DeviceState, SavedDevice, VirtioDevice};
use crate::event_loop::LoopHandle;
use crate::locked;

/// Receive, transmit, event. Linux fills the receive queue with buffers of 4 KiB at once, so its size is guest memory.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// The device.
pub struct Vsock {
    shared: Arc<Shared>,
    worker: LoopPart<Worker>,
}

impl Vsock {
    /// A device for the guest with this context identifier, and the handle to connect to that guest with. The guest may
    /// connect once to each of the ports in `listen`, and `accepted` gets the host's end, a non-blocking socket; a
    /// connection to any other port is refused.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn new(
        events: LoopHandle,
        guest_cid: u32,
        listen: Vec<u32>,
        accepted: Accepted,
    ) -> io::Result<(Self, VsockHandle)> {
        let shared = Arc::new(Shared::new(VsockState::new(guest_cid, listen), accepted)?);
        let handle = VsockHandle(shared.clone());
        Ok((Self { shared, worker: LoopPart::new(events) }, handle))
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        19
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn place_config(&mut self, space: ConfigSpace) {
        // virtio 1.3 s5.10.4: le64, of which the upper half is zero.
        let cid = u64::from(locked(self.shared.state.lock()).guest_cid);
        space.write(0, &cid.to_le_bytes());
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues = activation.take_queues()?;
        let worker = Worker::new(activation.mem, activation.interrupt, self.shared.clone(), queues);
        self.worker.start(Box::new(worker)).map_err(watch_error)?;
        self.shared.open();
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.close();
        // Closes the connections.
        self.worker.stop();
    }

    /// Connections stay as they are: what arrives from either side waits where it is, and so do requests to connect.
    fn pause(&mut self) {
        self.worker.pause();
    }

    fn resume(&mut self) {
        let interrupt = self.worker.paused().map(Worker::interrupt);
        if let (Err(e), Some(interrupt)) = (self.worker.resume(), interrupt) {
            self.shared.close();
            interrupt.needs_reset(&watch_error(e));
        }
    }

    fn save(&self) -> Option<SavedDevice> {
        Some(SavedDevice {
            queues: self.worker.paused().map(Worker::positions).unwrap_or_default(),
            state: DeviceState::Vsock(locked(self.shared.state.lock()).clone()),
        })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.list()
    }
}

fn watch_error(source: io::Error) -> ActivateError {
    ActivateError::Host { what: "watch the queues of vsock", source }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
