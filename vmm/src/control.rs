//! The control socket, served.
//!
//! Everything the pod engine asks for passes through [`serve`], on the main thread, one request at a time. Only the answer to a
//! vsock connection, which waits for the guest, and the events come from other threads; a datagram is atomic, so they share the
//! socket without a lock.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kvrun_vmm_api::{
    Channel, ChannelError, Event, ExitReason, FromVmm, Received, Reply, Request, RequestError, ToVmm,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::devices::virtio::DeviceRequest;
use crate::devices::virtio::vsock::ConnectError;
use crate::jail::Jail;
use crate::machine::{Machine, MachineError, exactly};

/// Why serving ended before the machine did.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket failed or carried something that is not the protocol.
    #[error("control socket")]
    Channel(#[from] ChannelError),
    /// The first request was not [`Request::Boot`].
    #[error("the first request must be boot")]
    NotBoot,
    /// poll(2) failed.
    #[error("cannot wait for the control socket")]
    Poll(#[source] Errno),
}

/// Boots the machine the first request asks for, in the process's jail, and serves requests until it has ended or the socket is closed.
///
/// # Errors
/// [`ServeError`]; the machine, if any, has been stopped by then. That the machine could not be booted is not an error here: the
/// refusal has been sent.
pub fn serve(channel: Channel, jail: Jail) -> Result<(), ServeError> {
    let channel = Arc::new(channel);
    let Some(Received { message: ToVmm { id, request }, fds }) = channel.receive()? else { return Ok(()) };
    let Request::Boot(config) = request else { return Err(ServeError::NotBoot) };
    let accepted = {
        let channel = channel.clone();
        move |port, stream: OwnedFd| {
            // An engine that is gone takes the machine with it: the main thread sees that too.
            let _ = channel.send(&FromVmm::Event(Event::VsockAccepted { port }), &[stream.as_fd()]);
        }
    };
    let mut machine = match exactly(fds).and_then(|fds| Machine::boot(&config, fds, jail, Box::new(accepted)))
    {
        Ok(machine) => machine,
        Err(e) => return Ok(reply(&channel, id, Err(e.into()))?),
    };
    reply(&channel, id, Ok(Reply::Done))?;

    let reason = loop {
        match wait(&channel, &machine).map_err(ServeError::Poll)? {
            Wake::Exit => break machine.exit_reason().cloned().unwrap_or(ExitReason::Stopped),
            Wake::Request => {}
        }
        let received = match channel.receive() {
            Ok(Some(received)) => received,
            // The engine is gone, and with it whoever would have been told.
            Ok(None) => {
                machine.stop();
                return Ok(());
            }
            Err(e) => {
                machine.stop();
                return Err(e.into());
            }
        };
        let ToVmm { id, request } = received.message;
        let stop = request == Request::Stop;
        obey(&channel, &machine, id, request, received.fds)?;
        if stop {
            break ExitReason::Stopped;
        }
    };
    machine.stop();
    let event = Event::Exited { reason, console_tail: machine.console_tail() };
    Ok(channel.send(&FromVmm::Event(event), &[])?)
}

enum Wake {
    Request,
    Exit,
}

/// Waits for the machine to end or a request to arrive. The end comes first.
fn wait(channel: &Channel, machine: &Machine) -> Result<Wake, Errno> {
    let mut fds =
        [PollFd::from_borrowed_fd(machine.exit_event(), PollFlags::IN), PollFd::new(channel, PollFlags::IN)];
    while let Err(e) = poll(&mut fds, None) {
        if e != Errno::INTR {
            return Err(e);
        }
    }
    Ok(if fds[0].revents().is_empty() { Wake::Request } else { Wake::Exit })
}

fn obey(
    channel: &Arc<Channel>,
    machine: &Machine,
    id: u64,
    request: Request,
    fds: Vec<OwnedFd>,
) -> Result<(), ChannelError> {
    let outcome = match request {
        Request::Boot(_) => Err(MachineError::BootedAlready),
        Request::Attach { slot, device } => machine.attach(slot, device, fds),
        Request::Detach { slot } => machine.detach(slot),
        Request::VsockConnect { port } => match exactly(fds) {
            Err(e) => Err(e),
            Ok([stream]) => {
                let channel = channel.clone();
                let done = move |outcome: Result<(), ConnectError>| {
                    let result = match outcome {
                        Ok(()) => Ok(Reply::Done),
                        Err(ConnectError::Refused) => Err(RequestError::ConnectionRefused { port }),
                        Err(e) => Err(RequestError::Precondition(format!("vsock port {port}: {e}"))),
                    };
                    let _ = reply(&channel, id, result);
                };
                machine.vsock().connect(port, stream, Box::new(done));
                return Ok(());
            }
        },
        Request::Pause => {
            machine.pause();
            Ok(())
        }
        Request::Resume => {
            machine.resume();
            Ok(())
        }
        Request::ResizeMemory { plugged_mib } => {
            machine.request_of("mem", DeviceRequest::Plug(u64::from(plugged_mib) << 20))
        }
        Request::SetBalloon { mib } => {
            machine.request_of("balloon", DeviceRequest::Inflate(u64::from(mib) << 20))
        }
        Request::HintFreePages => machine.request_of("balloon", DeviceRequest::HintFreePages),
        Request::SetRateLimit { slot, first, second } => {
            machine.request(slot, DeviceRequest::Limit(first, second))
        }
        Request::Metrics => return reply(channel, id, Ok(Reply::Metrics(machine.metrics()))),
        Request::State => return reply(channel, id, Ok(Reply::State(machine.state()))),
        Request::Console => return reply(channel, id, Ok(Reply::Console(machine.console_tail()))),
        Request::Stop => Ok(()),
    };
    reply(channel, id, outcome.map(|()| Reply::Done).map_err(Into::into))
}

fn reply(channel: &Channel, id: u64, result: Result<Reply, RequestError>) -> Result<(), ChannelError> {
    channel.send(&FromVmm::Reply { id, result }, &[])
}
