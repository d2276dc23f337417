//! A process in a pod, as containerd sees it: a container's own, or a further one (an "exec").
//!
//! It goes from created over running to stopped, which is for good, and its end is told once, after its start has been.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use containerd_shim::protos::api::Status;
use containerd_shim::protos::events::task::{TaskExit, TaskOOM};
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use kvrun_pod::container::{Exit, ExitState};
use kvrun_pod::network::{self, NetworkNamespace};
use kvrun_pod::process::Process;
use kvrun_pod::stdio::{Copying, Streams};
use kvrun_pod::vmm::VmEnd;
use rustix::thread::gettid;
use tokio::sync::watch;

use crate::error::{Error, host};
use crate::events::{Events, now};
use crate::stdio::{Logger, Names, Opened, Owner};

/// The exit status of what was killed.
pub(crate) const KILLED: u32 = 128 + 9;
/// How long the output of a process that is deleted may still take to get to a client that does not read it.
const DRAIN: Duration = Duration::from_secs(5);
/// The stack of a thread that does next to nothing.
const STACK: usize = 32 * 1024;

/// How and when a process ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) status: u32,
    pub(crate) at: Timestamp,
}

/// A process ID on the host that stands for a process in the guest, as long as this is there: that of a thread. By it, namespaces
/// of a container are named in the configs of others, and engines find its network namespace.
#[derive(Debug)]
struct HostPid {
    pid: u32,
    /// Dropped, the thread ends.
    orders: mpsc::Sender<EnterNetwork>,
}

/// Has the thread enter a network namespace, or make one, and answer which.
struct EnterNetwork {
    namespace: Option<NetworkNamespace>,
    answer: mpsc::Sender<io::Result<NetworkNamespace>>,
}

impl HostPid {
    fn new() -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let (orders, inbox) = mpsc::channel::<EnterNetwork>();
        thread::Builder::new().name("container".into()).stack_size(STACK).spawn(move || {
            let _ = sender.send(gettid());
            for EnterNetwork { namespace, answer } in inbox {
                let entered = namespace.map_or_else(network::enter_new, |namespace| namespace.enter());
                let _ = answer.send(entered.and_then(|()| NetworkNamespace::current()));
            }
        })?;
        let pid = receiver.recv().map_err(io::Error::other)?.as_raw_nonzero().get().unsigned_abs();
        Ok(Self { pid, orders })
    }

    fn enter_network(&self, namespace: Option<NetworkNamespace>) -> io::Result<NetworkNamespace> {
        let (answer, answered) = mpsc::channel();
        self.orders.send(EnterNetwork { namespace, answer }).map_err(|_| io::ErrorKind::BrokenPipe)?;
        answered.recv().map_err(io::Error::other)?
    }
}

/// A process.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) container: String,
    /// Empty for the container's own.
    pub(crate) exec_id: String,
    pub(crate) names: Names,
    pid: HostPid,
    paused: Mutex<bool>,
    /// In the guest; from the start on if it is a further one.
    process: Mutex<Option<Process>>,
    started: watch::Sender<bool>,
    ended: watch::Sender<Option<Ended>>,
    streams: Mutex<Open>,
    /// Held while it is being started.
    pub(crate) changing: tokio::sync::Mutex<()>,
}

/// What is open for it on the host.
#[derive(Debug, Default)]
struct Open {
    copying: Option<Copying>,
    input: Option<std::os::fd::OwnedFd>,
    logger: Option<Logger>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Task {
    /// One that is not in the guest yet.
    pub(crate) fn new(container: &str, exec_id: &str, names: Names) -> Result<Self, Error> {
        Ok(Self {
            container: container.to_owned(),
            exec_id: exec_id.to_owned(),
            names,
            pid: HostPid::new().map_err(host("start a thread for the process"))?,
            paused: Mutex::new(false),
            process: Mutex::default(),
            started: watch::Sender::new(false),
            ended: watch::Sender::new(None),
            streams: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// Opens its streams.
    pub(crate) fn open(&self, namespace: &str) -> Result<Opened, Error> {
        self.names.open(Owner { namespace, id: &self.container })
    }

    /// It is in the guest: copies its streams, and tells of its end when it has come, after that of its start; and, if it is a container's own, when processes
    /// of the container are killed for want of memory.
    pub(crate) fn is_made(
        self: &Arc<Self>,
        process: Process,
        streams: Streams,
        opened: Opened,
        events: Events,
    ) -> Result<(), Error> {
        let copying = Copying::start(opened.stdio, streams)?;
        *lock(&self.streams) = Open { copying: Some(copying), input: opened.input, logger: opened.logger };
        *lock(&self.process) = Some(process.clone());
        let task = Arc::clone(self);
        tokio::spawn(async move {
            // Its start is told first, by whoever holds `changing`.
            let oom = || async {
                let _changing = task.changing.lock().await;
                events.publish(TaskOOM { container_id: task.container.clone(), ..Default::default() });
            };
            let exit = match process.is_containers_own() {
                true => process.wait_and_tell_kills(oom).await,
                false => process.wait().await,
            };
            let _changing = task.changing.lock().await;
            task.has_ended(&exit, &events);
        });
        Ok(())
    }

    /// Tells of its end. Whoever calls it holds `changing`.
    pub(crate) fn has_ended(&self, exit: &Exit, events: &Events) {
        if let ExitState::VmDied(death) = &exit.state {
            tracing::error!(container = self.container, exec = self.exec_id, %death, "the virtual machine died");
            // All processes end with it, and it is the only one of ours.
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                for (from, lines) in death.vm_end().map(VmEnd::last_words).unwrap_or_default() {
                    lines.iter().for_each(|line| tracing::error!(from, "{line}"));
                }
            });
        }
        let ended = Ended { status: exit.state.code().into(), at: now() };
        tracing::info!(container = self.container, exec = self.exec_id, status = ended.status, "ended");
        // Nobody writes to it any more.
        lock(&self.streams).input = None;
        events.publish(TaskExit {
            container_id: self.container.clone(),
            // The container's own ID for its own process, as containerd has it.
            id: if self.exec_id.is_empty() { self.container.clone() } else { self.exec_id.clone() },
            pid: self.pid(),
            exit_status: ended.status,
            exited_at: MessageField::some(ended.at.clone()),
            ..Default::default()
        });
        self.ended.send_replace(Some(ended));
    }

    /// The process ID on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.pid
    }

    /// Makes a network namespace that of its process ID on the host, or makes one; and says which it is.
    pub(crate) fn enter_network(&self, namespace: Option<NetworkNamespace>) -> io::Result<NetworkNamespace> {
        self.pid.enter_network(namespace)
    }

    /// In the guest.
    pub(crate) fn process(&self) -> Result<Process, Error> {
        lock(&self.process).clone().ok_or(Error::WrongState { what: "use", status: "created" })
    }

    /// It runs, or has run.
    pub(crate) fn set_started(&self) {
        self.started.send_replace(true);
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        *lock(&self.paused) = paused;
    }

    /// Its state, in containerd's words.
    pub(crate) fn status(&self) -> Status {
        if self.ended.borrow().is_some() {
            Status::STOPPED
        } else if !*self.started.borrow() {
            Status::CREATED
        } else if *lock(&self.paused) {
            Status::PAUSED
        } else {
            Status::RUNNING
        }
    }

    /// The error that this cannot be done now.
    pub(crate) fn wrong_state(&self, what: &'static str) -> Error {
        let status = match self.status() {
            Status::CREATED => "created",
            Status::RUNNING => "running",
            Status::PAUSED => "paused",
            _ => "stopped",
        };
        Error::WrongState { what, status }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        // The sender is in `self`, so the receiver does not outlive it.
        match ended.wait_for(Option::is_some).await.map(|ended| ended.clone()) {
            Ok(Some(ended)) => ended,
            _ => Ended { status: KILLED, at: now() },
        }
    }

    /// Its input ends, once what is written has been read.
    pub(crate) fn close_input(&self) {
        lock(&self.streams).input = None;
    }

    /// Closes its streams, once its output has been read, or will not be.
    pub(crate) async fn close(&self) {
        let open = std::mem::take(&mut *lock(&self.streams));
        if let Some(copying) = open.copying {
            let _ = tokio::time::timeout(DRAIN, copying.drain()).await;
        }
        drop(open.logger);
    }
}
