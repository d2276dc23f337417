//! The monitor: the process that has a machine, and serves the containers in it to the command line.
//!
//! * [`protocol`] - what is said.
//! * [`client`] - the command line's end of it.
//! * [`server`] - the monitor's end: takes connections, checks who asks, answers.
//! * [`exec`] - what a further process is to be.
//! * [`container`] - a container of the machine.
//! * Here - the machine, and what can be done with its containers.
//!
//! The first container is the machine's: when it ends, so do the machine and this process. Others join it in [`Monitor::create`] and are
//! there as long as the connection that made them. They are gone from the machine by the time their end is told.

pub(crate) mod client;
mod container;
pub(crate) mod exec;
pub(crate) mod protocol;
mod server;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvrun_pod::accept::Serving;
use kvrun_pod::agent::ProcEntry;
use kvrun_pod::annotations;
use kvrun_pod::bundle::{self, Bundle, HandedOver, HostNetwork, LinuxResources, Process as OciProcess};
use kvrun_pod::channel::ChannelListener;
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::debug;
use kvrun_pod::hooks;
use kvrun_pod::network::{self, Identity, NetworkNamespace};
use kvrun_pod::observe;
use kvrun_pod::pod::Pod;
use kvrun_pod::process::Process;
use kvrun_pod::record::{Record, Status};
use kvrun_pod::share::{Share, Trees};
use kvrun_pod::state_dir::{SOCKET, StateError};
use kvrun_pod::stdio::{Streams, Wanted};
use kvrun_pod::watched;
use tokio::sync::{Notify, Semaphore};

pub(crate) use self::container::{Container, until_end};
use self::exec::Program;
use self::protocol::ProcessRow;
use crate::attach::End;
use crate::engine::{Links, Prepared};
use crate::error::{Error, host};

/// How many further processes are made at the same time; the others wait, for as long as it takes. More would only share the time of the guest's CPUs, until
/// each takes longer than a guest may that does not hang. (The agent keeps 64 streams that nobody has asked for yet, of which each has up
/// to 3: `MAX_UNCLAIMED` in agent/src/streams.rs.)
const MAKING: usize = 4;
/// Connections that wait to be taken.
const BACKLOG: i32 = 128;

/// The containers of a machine.
#[derive(Debug)]
pub(crate) struct Monitor {
    /// Shows it to whoever asks.
    _observed: Serving,
    /// Runs programs in the guest, if the configuration allows it.
    _debugged: Option<Serving>,
    pod: Pod,
    /// By the configuration with which the machine was made.
    allowed_annotations: Vec<&'static str>,
    share: Arc<Share>,
    links: Links,
    /// The network namespace of the machine.
    network: Identity,
    /// The one in which hooks run.
    home: Arc<NetworkNamespace>,
    containers: Mutex<HashMap<ContainerId, Arc<Container>>>,
    execs: AtomicU64,
    /// Further processes that may be made at the same time.
    making: Semaphore,
    leave: Notify,
}

/// What a container that joins the machine comes with.
#[derive(Debug)]
pub(crate) struct Handed {
    /// Its state directory, in which there is a record already.
    dir: OwnedFd,
    /// The text of its config.
    config: File,
    network: NetworkNamespace,
    /// Its files.
    trees: Trees,
}

impl Monitor {
    /// Serves a machine with its first container.
    pub(crate) fn new(
        pod: Pod,
        prepared: &Prepared,
        share: Arc<Share>,
        links: Links,
        first: &Arc<Container>,
    ) -> Result<Arc<Self>, Error> {
        let id = first.record().id.clone();
        let network = NetworkNamespace::current().and_then(|namespace| namespace.identity());
        let labels = observe::Labels { namespace: String::new(), pod: id.to_string() };
        let observed = observe::start(&pod, prepared.dir().as_fd(), labels)
            .map_err(host("listen on the pod's socket"))?;
        let debugged = debug::start(&pod, &share, prepared.config(), prepared.dir().as_fd())
            .map_err(host("listen on the debug socket"))?;
        Ok(Arc::new(Self {
            _observed: observed,
            _debugged: debugged,
            pod,
            allowed_annotations: prepared.config().allowed_annotations.clone(),
            share,
            links,
            network: network.map_err(host("find the network namespace"))?,
            home: prepared.home(),
            containers: Mutex::new(HashMap::from([(id, Arc::clone(first))])),
            execs: AtomicU64::new(0),
            making: Semaphore::new(MAKING),
            leave: Notify::new(),
        }))
    }

    /// Takes connections at a container's state directory, in tasks of the current runtime.
    pub(crate) fn serve(self: &Arc<Self>, dir: impl AsFd) -> Result<(), Error> {
        let listener = ChannelListener::bind(dir, SOCKET, BACKLOG).map_err(host("listen for commands"))?;
        tokio::spawn(server::serve(Arc::clone(self), listener));
        Ok(())
    }

    /// Completes when the first container is to be deleted.
    pub(crate) async fn leave(&self) {
        self.leave.notified().await;
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<ContainerId, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: &ContainerId) -> Result<Arc<Container>, Error> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| StateError::Unknown { id: id.clone() }.into())
    }

    /// Runs the process of a created container.
    pub(crate) async fn start(&self, container: &Container) -> Result<(), Error> {
        let _changing = container.changing.lock().await;
        if container.status() != Status::Created {
            return Err(container.wrong_state("start"));
        }
        self.join_network(container).await?;
        // First, because the program may be seen to run before we hear of it. If it cannot run, its process ends.
        container.set(Status::Running)?;
        container.process.start().await?;
        let hooks = container.bundle.poststart_hooks();
        let document = state(&container.record(), Status::Running);
        if let Err(error) = hooks::run("poststart", &hooks, &self.home, &document).await {
            // runtime.md, "Lifecycle", step 9.
            let _ = container.process.kill(libc_sigkill(), true).await;
            return Err(error.into());
        }
        Ok(())
    }

    async fn kill(&self, container: &Container, signal: i32, all: bool) -> Result<(), Error> {
        match (container.status(), all) {
            (Status::Stopped, true) => Ok(()),
            (Status::Stopped, false) => {
                Err(Error::NotRunning { id: container.record().id.clone(), status: Status::Stopped })
            }
            _ => Ok(container.process.kill(signal, all).await?),
        }
    }

    /// Has the first container, and with it the machine, begin to end; takes any other away.
    async fn delete(&self, container: &Container) {
        if container.place.is_some() {
            return self.remove(container).await;
        }
        if container.status() != Status::Stopped
            && let Err(error) = container.process.kill(libc_sigkill(), true).await
        {
            tracing::debug!(%error, "kill a container that is to be deleted");
        }
        self.leave.notify_one();
    }

    async fn pause(&self, container: &Container) -> Result<(), Error> {
        let _changing = container.changing.lock().await;
        if container.status() != Status::Running {
            return Err(container.wrong_state("pause"));
        }
        let id = container.record().id.clone();
        self.pod.or_death(self.pod.agent().pause(&id)).await?;
        container.set(Status::Paused)
    }

    async fn resume(&self, container: &Container) -> Result<(), Error> {
        let _changing = container.changing.lock().await;
        if container.status() != Status::Paused {
            return Err(container.wrong_state("resume"));
        }
        let id = container.record().id.clone();
        self.pod.or_death(self.pod.agent().resume(&id)).await?;
        container.set(Status::Running)
    }

    /// Runs a further process in a container, for the process `peer` of the host.
    async fn exec(
        &self,
        container: &Container,
        program: Program,
        ignore_paused: bool,
        wanted: Wanted,
    ) -> Result<(Process, Streams), Error> {
        match container.status() {
            Status::Created | Status::Running => {}
            Status::Paused if ignore_paused => {}
            Status::Stopped => {
                return Err(Error::NotRunning { id: container.record().id.clone(), status: Status::Stopped });
            }
            _ => return Err(container.wrong_state("run a process in")),
        }
        let base: &OciProcess =
            container.bundle.spec().process().as_ref().ok_or_else(|| container.wrong_state("find"))?;
        let process = program.resolve(base)?;
        // It is never closed.
        let _making = self.making.acquire().await;
        let exec_id = self.execs.fetch_add(1, Ordering::Relaxed).to_string();
        let id = container.record().id.clone();
        Ok(self.pod.exec(&id, exec_id, &process, wanted).await?)
    }

    async fn processes(&self, container: &Container) -> Result<Vec<ProcessRow>, Error> {
        let id = running(container)?;
        let response = self.pod.or_death(self.pod.agent().processes(&id)).await?;
        let rows = response.processes.into_iter().map(|process| ProcessRow {
            pid: process.pid,
            parent_pid: process.parent_pid,
            uid: process.uid,
            started_s: process.started_s,
            cpu_ms: process.cpu_ms,
            terminal: kvrun_pod::text::one_line(&process.terminal, 32),
            command: kvrun_pod::text::one_line(&process.command, 4096),
        });
        Ok(rows.collect())
    }

    async fn look_at_proc(&self, container: &Container, path: String) -> Result<Option<ProcEntry>, Error> {
        let id = running(container)?;
        Ok(self.pod.or_death(self.pod.agent().look_at_proc(&id, path)).await?)
    }

    fn host_processes(container: &Container) -> Result<Vec<i32>, Error> {
        running(container)?;
        let mut all = vec![container.record().process.pid];
        all.extend(&*container.execs.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(all)
    }

    async fn stats(&self, container: &Container) -> Result<HashMap<String, u64>, Error> {
        let id = running(container)?;
        Ok(self.pod.or_death(self.pod.agent().stats(&id)).await?.counters)
    }

    async fn update(container: &Container, resources: &LinuxResources) -> Result<(), Error> {
        running(container)?;
        Ok(container.process.update(resources).await?)
    }

    /// Creates a further container in the machine.
    async fn create(
        &self,
        bundle: &Path,
        handed: Handed,
        wanted: Wanted,
    ) -> Result<(Arc<Container>, Streams), Error> {
        let Handed { dir, config, network, trees } = handed;
        let missing = || io::Error::from(io::ErrorKind::InvalidData);
        let record = Record::read(dir.as_fd()).and_then(|record| record.ok_or_else(missing));
        let record = record.map_err(host("read the container's record"))?;
        // Namespaces of the containers of this machine may be joined, and no others.
        let sibling = |pid| {
            let containers = self.containers();
            let mut all = containers.values().map(|container| container.record());
            all.find(|record| record.process.pid == pid).map(|record| record.id.clone())
        };
        let bundle = Bundle::handed_over(bundle, HandedOver { config, network, trees: &trees }, &sibling)?;
        let id = record.id.clone();
        annotations::check(&bundle.annotations(), &self.allowed_annotations)?;
        self.check_network(&id, &bundle)?;
        // The ID is the caller's now, so one that has it still is about to go.
        let earlier = self.containers().get(&id).cloned();
        if let Some(earlier) = earlier {
            self.remove(&earlier).await;
        }
        let (mut spec, mut place) = self.share.add(&bundle, trees)?;
        if matches!(bundle.network(), HostNetwork::New) {
            bundle::add_network_namespace(&mut spec);
        }
        let created = async {
            run_creation_hooks(&bundle, &record, &self.home).await?;
            watched::copy(&self.pod, &self.share, &mut place, &mut spec).await;
            Ok::<_, Error>(self.pod.create_process(&id, &record.bundle, &spec, wanted).await?)
        };
        let (process, streams) = match created.await {
            Ok(created) => created,
            Err(error) => {
                self.pod.take_from_share(&self.share, &place).await;
                return Err(error);
            }
        };
        let container = Container::new(process, bundle, dir, record, Some(place))?;
        self.containers().insert(id, Arc::clone(&container));
        Ok((container, streams))
    }

    /// Gives the machine what its network namespace has by now: engines that name none configure it when they know the container's process.
    async fn join_network(&self, container: &Container) -> Result<(), Error> {
        let (id, process, is_first) = {
            let record = container.record();
            (record.id.clone(), record.process.pid, record.sandbox.is_none())
        };
        if is_first {
            if let Some(network) = &mut *self.links.lock().await {
                network.update(&self.pod).await?;
            }
        } else if matches!(container.bundle.network(), HostNetwork::New) {
            let namespace = NetworkNamespace::open(Path::new(&format!("/proc/{process}/ns/net")));
            let links = network::links(&namespace.map_err(host("open the network namespace"))?)?;
            if let Some(link) = links.first() {
                return Err(Error::Option(format!(
                    "container {id} is in the machine of another one, and so cannot have a network of its own with link {link}: name the other one's network namespace in linux.namespaces"
                )));
            }
        }
        Ok(())
    }

    /// All containers of a machine are on its network, or on none.
    fn check_network(&self, id: &ContainerId, bundle: &Bundle) -> Result<(), Error> {
        if let HostNetwork::Named { path, namespace } = bundle.network() {
            let identity = namespace.identity().map_err(host("look at the network namespace"))?;
            if identity != self.network {
                return Err(Error::Option(format!(
                    "linux.namespaces: container {id} is in the machine of another one, and so cannot be in the network namespace {}: name the other one's",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    /// Takes a further container away, with whatever is left of it. May be called again, also while it is being taken away, or after that was given up.
    async fn remove(&self, container: &Container) {
        let mut removed = container.removed.lock().await;
        let Some(place) = container.place.as_ref().filter(|_| !*removed) else { return };
        container.process.delete().await;
        self.pod.take_from_share(&self.share, place).await;
        self.containers().remove(&container.record().id);
        *removed = true;
    }

    /// Waits for the end of the process of a further container, writes it down, and takes the container away.
    async fn until_removed(&self, container: &Container) -> End {
        let end = until_end(container).await;
        self.remove(container).await;
        end
    }
}

/// A container that has not stopped: its ID.
fn running(container: &Container) -> Result<ContainerId, Error> {
    let record = container.record();
    match record.last {
        Status::Stopped => Err(Error::NotRunning { id: record.id.clone(), status: Status::Stopped }),
        _ => Ok(record.id.clone()),
    }
}

fn libc_sigkill() -> i32 {
    nix::sys::signal::Signal::SIGKILL as i32
}

/// The state document, as hooks read it.
pub(crate) fn state(record: &Record, status: Status) -> Vec<u8> {
    // A structure of strings and numbers: this does not fail.
    serde_json::to_vec(&record.state(status)).unwrap_or_default()
}

/// Fills a record with what a bundle says.
pub(crate) fn describe(record: &mut Record, bundle: &Bundle) -> Result<(), Error> {
    let absolute = |path: &Path| -> Result<PathBuf, Error> {
        path.canonicalize().map_err(host("resolve the bundle's path"))
    };
    record.bundle = absolute(bundle.path())?;
    record.rootfs = absolute(bundle.rootfs_path())?;
    record.annotations = bundle.annotations();
    record.poststop = bundle.poststop_hooks();
    Ok(())
}

/// Runs the hooks that come before the container's program.
pub(crate) async fn run_creation_hooks(
    bundle: &Bundle,
    record: &Record,
    network: &NetworkNamespace,
) -> Result<(), Error> {
    for (kind, hooks) in bundle.creation_hooks() {
        hooks::run(kind, &hooks, network, &state(record, Status::Creating)).await?;
    }
    Ok(())
}
