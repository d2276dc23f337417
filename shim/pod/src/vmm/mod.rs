//! The VMM process and its control socket.
//!
//! * [`process`] starts it, with nothing but `/dev/null`, a pipe for its complaints, the control socket and the share.
//! * This file speaks the control protocol ([`kvrun_vmm_api`]) with it: requests go out from whoever has a [`Vmm`], one task reads
//!   replies and events.
//! * [`end`] watches for its death, of which the pidfd is the final authority, and says why it died; [`violation`] reads what it said if
//!   it made a system call that its filter does not allow.
//!
//! A VMM that breaks the protocol is killed: it runs hostile code's devices, so nothing it says is taken on trust.

mod end;
mod process;
mod violation;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvrun_vmm_api::{
    Channel, ChannelError, DeviceConfig, Event, ExitReason, FromVmm, RateLimit, Reply, Request, RequestError,
    ToVmm, VmConfig, VmMetrics, VmState,
};
use rustix::io::Errno;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::channel::AsyncChannel;
use crate::host_process::HostProcess;

pub use end::{Death, VmEnd};
pub use violation::Violation;

/// How long the VMM may take over a request other than Boot. It answers from its event loop, in microseconds on hardware.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the VMM may take to build a machine and start its vCPUs.
const BOOT_REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a VMM asked to stop may take until it is killed.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// What can go wrong with the VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The process could not be started.
    #[error("start the VMM {}", path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control socket failed.
    #[error("talk to the VMM")]
    Channel(#[from] ChannelError),
    /// A descriptor for a stream could not be made.
    #[error("make a socket pair for a vsock stream")]
    Socket(#[source] io::Error),
    /// The VMM said no.
    #[error("the VMM refused to {what}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its answer.
        #[source]
        source: RequestError,
    },
    /// The VMM did not answer in time.
    #[error("the VMM did not {what} within {} s", bound.as_secs())]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long it had.
        bound: Duration,
    },
    /// The VMM is gone.
    #[error("{}", .0.death)]
    Ended(Arc<VmEnd>),
}

/// An answer of another kind than the request's.
fn wrong_answer(what: &'static str) -> VmmError {
    VmmError::Refused { what, source: RequestError::Invalid("an answer of the wrong kind".into()) }
}

/// What became of a message. That the VMM has ended is not said by this but by the answer, which then is why.
fn unless_ended(sent: Result<(), ChannelError>) -> Result<(), ChannelError> {
    match sent {
        Err(ChannelError::Socket(Errno::PIPE | Errno::CONNRESET)) => Ok(()),
        sent => sent,
    }
}

/// A running VMM. Clones share one; when the last is dropped it is killed and reaped.
#[derive(Clone, Debug)]
pub struct Vmm {
    control: Arc<Control>,
    ended: watch::Receiver<Option<Arc<VmEnd>>>,
    process: Arc<process::Guard>,
}

/// The control socket, shared between the requesters and the task that reads it.
#[derive(Debug)]
struct Control {
    socket: AsyncChannel,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    last_id: u64,
    replies: HashMap<u64, oneshot::Sender<Result<Reply, RequestError>>>,
    connections: HashMap<u32, oneshot::Sender<OwnedFd>>,
    closed: bool,
    /// Why we have killed the VMM, if we have.
    killed: Option<&'static str>,
}

/// A connection that the guest will make to a host port; see [`VmConfig::vsock_listen`].
#[derive(Debug)]
pub struct GuestConnection {
    port: oneshot::Receiver<OwnedFd>,
    vmm: Vmm,
}

impl GuestConnection {
    /// Waits for the guest to connect. Not bounded in time.
    ///
    /// # Errors
    /// [`VmmError::Ended`] when the machine ends first.
    pub async fn accepted(self) -> Result<OwnedFd, VmmError> {
        match self.port.await {
            Ok(stream) => Ok(stream),
            Err(_) => Err(VmmError::Ended(self.vmm.ended().await)),
        }
    }
}

impl Vmm {
    /// Starts the program, with the directory it may share with its guest, if any. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`VmmError::Spawn`].
    pub fn spawn(program: &Path, share: Option<BorrowedFd<'_>>) -> Result<Self, VmmError> {
        let spawn_error = |source| VmmError::Spawn { path: program.to_owned(), source };
        let (channel, theirs) = Channel::pair()?;
        let child = process::spawn(program, &theirs.into(), share).map_err(spawn_error)?;
        Self::over(channel, child).map_err(spawn_error)
    }

    fn over(channel: Channel, child: process::Child) -> io::Result<Self> {
        let control = Arc::new(Control::new(channel)?);
        let process = Arc::new(process::Guard::new(&child)?);
        let ended = end::watch(Arc::clone(&control), child)?;
        Ok(Self { control, ended, process })
    }

    /// Tells that the guest may connect to a host port, to be called before [`Vmm::boot`].
    pub fn expect(&self, port: u32) -> GuestConnection {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.control.waiting();
        if !waiting.closed {
            waiting.connections.insert(port, sender);
        }
        GuestConnection { port: receiver, vmm: self.clone() }
    }

    /// Sends the machine to boot; the answer is to be awaited with [`Booting::running`]. `kvm`, `kernel` and `initramfs` are open
    /// descriptors; the VMM gets its own.
    ///
    /// # Errors
    /// [`VmmError::Channel`].
    pub fn boot(
        &self,
        config: VmConfig,
        kvm: BorrowedFd<'_>,
        kernel: BorrowedFd<'_>,
        initramfs: BorrowedFd<'_>,
    ) -> Result<Booting, VmmError> {
        let (id, reply) = self.register();
        let message = ToVmm { id, request: Request::Boot(config) };
        // The first message on the socket: its queue is empty, so this does not block.
        unless_ended(self.control.socket.send_now(&message, &[kvm, kernel, initramfs]))?;
        Ok(Booting { reply, vmm: self.clone() })
    }

    /// Fills an empty slot.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn attach(
        &self,
        slot: u8,
        device: DeviceConfig,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), VmmError> {
        self.request("attach a device", Request::Attach { slot, device }, fds, REQUEST_TIMEOUT)
            .await
            .map(drop)
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn detach(&self, slot: u8) -> Result<(), VmmError> {
        self.request("detach a device", Request::Detach { slot }, &[], REQUEST_TIMEOUT).await.map(drop)
    }

    /// Opens a stream to a port on which the guest listens.
    ///
    /// # Errors
    /// [`VmmError`]; [`RequestError::ConnectionRefused`] in it when nothing listens.
    pub async fn connect(&self, port: u32) -> Result<StdUnixStream, VmmError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(VmmError::Socket)?;
        let request = Request::VsockConnect { port };
        self.request("connect to the guest", request, &[theirs.as_fd()], REQUEST_TIMEOUT).await?;
        Ok(ours)
    }

    /// As [`Vmm::connect`], for use in the runtime.
    ///
    /// # Errors
    /// As [`Vmm::connect`].
    pub async fn connect_async(&self, port: u32) -> Result<UnixStream, VmmError> {
        let stream = self.connect(port).await?;
        stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream)).map_err(VmmError::Socket)
    }

    /// Holds the vCPUs.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn pause(&self) -> Result<(), VmmError> {
        self.request("pause", Request::Pause, &[], REQUEST_TIMEOUT).await.map(drop)
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn resume(&self) -> Result<(), VmmError> {
        self.request("resume", Request::Resume, &[], REQUEST_TIMEOUT).await.map(drop)
    }

    /// What the machine is doing.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn state(&self) -> Result<VmState, VmmError> {
        match self.request("report its state", Request::State, &[], REQUEST_TIMEOUT).await? {
            Reply::State(state) => Ok(state),
            _ => Err(wrong_answer("report its state")),
        }
    }

    /// What the machine has counted.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn metrics(&self) -> Result<VmMetrics, VmmError> {
        match self.request("report its metrics", Request::Metrics, &[], REQUEST_TIMEOUT).await? {
            Reply::Metrics(metrics) => Ok(metrics),
            _ => Err(wrong_answer("report its metrics")),
        }
    }

    /// The end of what the guest wrote to its serial console: not a text for a terminal.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn console(&self) -> Result<String, VmmError> {
        const WHAT: &str = "show the guest's console";
        match self.request(WHAT, Request::Console, &[], REQUEST_TIMEOUT).await? {
            Reply::Console(text) => Ok(text),
            _ => Err(wrong_answer(WHAT)),
        }
    }

    /// Asks the guest to have this much memory beyond what it booted with; how far it has come is in [`Vmm::state`].
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn resize_memory(&self, plugged_mib: u32) -> Result<(), VmmError> {
        self.request("resize memory", Request::ResizeMemory { plugged_mib }, &[], REQUEST_TIMEOUT)
            .await
            .map(drop)
    }

    /// Asks the guest to give up this much memory.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn set_balloon(&self, mib: u32) -> Result<(), VmmError> {
        self.request("set the balloon", Request::SetBalloon { mib }, &[], REQUEST_TIMEOUT).await.map(drop)
    }

    /// Asks the guest which pages are free, and drops their contents.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn hint_free_pages(&self) -> Result<(), VmmError> {
        self.request("hint free pages", Request::HintFreePages, &[], REQUEST_TIMEOUT).await.map(drop)
    }

    /// Changes the limits of a disk (`first`) or a link (`first`: receiving, `second`: sending).
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn set_rate_limit(
        &self,
        slot: u8,
        first: RateLimit,
        second: Option<RateLimit>,
    ) -> Result<(), VmmError> {
        let request = Request::SetRateLimit { slot, first, second };
        self.request("change a rate limit", request, &[], REQUEST_TIMEOUT).await.map(drop)
    }

    /// Waits until the VMM has ended, and tells why. Cancel-safe; answers at once afterwards.
    pub async fn ended(&self) -> Arc<VmEnd> {
        let mut ended = self.ended.clone();
        loop {
            if let Some(end) = ended.borrow_and_update().as_ref() {
                return Arc::clone(end);
            }
            if ended.changed().await.is_err() {
                // The watching task was dropped with its runtime; so is whoever waits here.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Its process, to be found again by others.
    ///
    /// # Errors
    /// It has ended, or `/proc` is not mounted.
    pub fn process(&self) -> io::Result<HostProcess> {
        self.process.host_process()
    }

    /// Why the VMM has ended, if it has.
    pub fn try_ended(&self) -> Option<Arc<VmEnd>> {
        self.ended.borrow().clone()
    }

    /// Ends the machine: asks for it, and kills the VMM if that takes longer than 0.5 s.
    pub async fn stop(&self) -> Arc<VmEnd> {
        // The answer does not matter: the end of the process is what counts.
        let asked = async {
            let _ = self.request("stop", Request::Stop, &[], STOP_TIMEOUT).await;
            self.ended().await
        };
        match timeout(STOP_TIMEOUT, asked).await {
            Ok(end) => end,
            Err(_) => self.kill("it did not stop when asked").await,
        }
    }

    /// Kills the VMM; the reason completes the sentence "it was killed because".
    pub async fn kill(&self, why: &'static str) -> Arc<VmEnd> {
        self.control.waiting().killed = Some(why);
        self.process.kill();
        self.ended().await
    }

    fn register(&self) -> (u64, oneshot::Receiver<Result<Reply, RequestError>>) {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.control.waiting();
        waiting.last_id += 1;
        let id = waiting.last_id;
        if !waiting.closed {
            waiting.replies.insert(id, sender);
        }
        (id, receiver)
    }

    async fn request(
        &self,
        what: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
        bound: Duration,
    ) -> Result<Reply, VmmError> {
        let (id, reply) = self.register();
        let exchange = async {
            unless_ended(self.control.socket.send(&ToVmm { id, request }, fds).await)?;
            self.answer(what, reply).await
        };
        match timeout(bound, exchange).await {
            Ok(result) => result,
            Err(_) => Err(VmmError::Timeout { what, bound }),
        }
    }

    async fn answer(
        &self,
        what: &'static str,
        reply: oneshot::Receiver<Result<Reply, RequestError>>,
    ) -> Result<Reply, VmmError> {
        match reply.await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(source)) => Err(VmmError::Refused { what, source }),
            Err(_) => Err(VmmError::Ended(self.ended().await)),
        }
    }
}

/// A machine that was sent to the VMM.
#[derive(Debug)]
pub struct Booting {
    reply: oneshot::Receiver<Result<Reply, RequestError>>,
    vmm: Vmm,
}

impl Booting {
    /// Waits until its vCPUs run.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn running(self) -> Result<(), VmmError> {
        let what = "boot the machine";
        match timeout(BOOT_REQUEST_TIMEOUT, self.vmm.answer(what, self.reply)).await {
            Ok(result) => result.map(drop),
            Err(_) => Err(VmmError::Timeout { what, bound: BOOT_REQUEST_TIMEOUT }),
        }
    }
}

/// Why the control socket is read no more.
#[derive(Debug)]
enum Closed {
    /// The VMM closed it, after saying why the machine ended if it could.
    ByPeer(Option<(ExitReason, String)>),
    /// The VMM broke the protocol.
    Violation(&'static str),
}

impl Control {
    fn new(channel: Channel) -> io::Result<Self> {
        let socket = AsyncChannel::new(channel)?;
        Ok(Self { socket, waiting: Mutex::default() })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that holds the lock panics half-way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads replies and events until the VMM closes its end.
    async fn receive(&self) -> Closed {
        let closed = self.receive_all().await;
        let mut waiting = self.waiting();
        waiting.closed = true;
        waiting.replies.clear();
        waiting.connections.clear();
        closed
    }

    async fn receive_all(&self) -> Closed {
        let mut exited = None;
        loop {
            let received = match self.socket.receive::<FromVmm>().await {
                Ok(Some(received)) => received,
                Ok(None) | Err(ChannelError::Socket(_)) => return Closed::ByPeer(exited),
                Err(_) => return Closed::Violation("the VMM sent a malformed message"),
            };
            let mut fds = received.fds.into_iter();
            match received.message {
                FromVmm::Reply { id, result } => {
                    let Some(sender) = self.waiting().replies.remove(&id) else {
                        return Closed::Violation("the VMM answered a request that was not made");
                    };
                    // Whoever asked may have given up.
                    let _ = sender.send(result);
                }
                FromVmm::Event(Event::VsockAccepted { port }) => {
                    let (Some(sender), Some(stream)) = (self.waiting().connections.remove(&port), fds.next())
                    else {
                        return Closed::Violation("the VMM reported a connection that was not expected");
                    };
                    let _ = sender.send(stream);
                }
                FromVmm::Event(Event::Exited { reason, console_tail }) => {
                    exited = Some((reason, console_tail));
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
