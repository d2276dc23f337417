//! The pod of this shim: its machine and the containers in it.
//!
//! The first container brings the machine up; it is the pod's own (a sandbox), or alone. When the last one is deleted, the machine is shut
//! down. Everything a pod has on the host is this process's, its VMM's, or in its state directory, which `delete` removes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim::mount::mount_rootfs;
use containerd_shim::protos::api::Status as State;
use containerd_shim::protos::events::task::{TaskExecStarted, TaskOOM, TaskStart};
use containerd_shim::protos::types::mount::Mount;
use kvrun_pod::assets::{Assets, Explicit};
use kvrun_pod::bundle::{
    Bundle, Files, HostNetwork, LinuxResources, Process as OciProcess, Spec, check_process,
};
use kvrun_pod::cgroup::{self, HostCgroup};
use kvrun_pod::container::Exit;
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::host_process::HostProcess;
use kvrun_pod::network::{Network, NetworkNamespace};
use kvrun_pod::pod::{self as engine, Pod as Vm, Starting};
use kvrun_pod::record::{Record, Status};
use kvrun_pod::share::{MountNamespace, Place, Share, Trees};
use kvrun_pod::size::VmSize;
use kvrun_pod::state_dir::ContainerDir;
use kvrun_pod::{hooks, text};
use nix::mount::{MntFlags, umount2};
use tokio::sync::Semaphore;

use crate::error::{Error, host};
use crate::events::Events;
use crate::stdio::Names;
use crate::task::{Ended, Task};

/// Where a container's root file system is mounted, in its bundle.
const ROOTFS: &str = "rootfs";

/// The pod.
#[derive(Debug)]
pub(crate) struct Pod {
    namespace: String,
    state_root: PathBuf,
    mounts: MountNamespace,
    /// The network namespace of this process.
    home: NetworkNamespace,
    events: Events,
    machine: tokio::sync::Mutex<Option<Arc<Machine>>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    execs: AtomicU64,
    /// Further processes that may be made at the same time; the others wait. The agent keeps 64 streams that nobody has asked for yet, of
    /// which each has up to 3 (`MAX_UNCLAIMED` in agent/src/streams.rs).
    making: Semaphore,
}

/// How many further processes are made at the same time.
const MAKING: usize = 4;
const SIGKILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;

/// What the containers of a pod have in common. In the order in which it is undone.
#[derive(Debug)]
struct Machine {
    vm: Vm,
    /// Its links, if it is in a network namespace.
    network: Option<Network>,
    share: Share,
    _cgroup: Option<HostCgroup>,
    _dir: ContainerDir,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: ContainerId,
    pub(crate) bundle_path: String,
    bundle: Bundle,
    record: Record,
    machine: Arc<Machine>,
    place: Place,
    _rootfs: Rootfs,
    pub(crate) task: Arc<Task>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
}

/// A further process, and what it is to be.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) task: Arc<Task>,
    process: OciProcess,
}

/// What containerd has named as root file system, mounted in our own namespace. Dropped, it is unmounted.
#[derive(Debug)]
struct Rootfs(Vec<PathBuf>);

impl Rootfs {
    fn mount(mounts: Vec<Mount>, bundle: &Path) -> Result<Self, Error> {
        let target = bundle.join(ROOTFS);
        let mut mounted = Self(Vec::new());
        if mounts.is_empty() {
            return Ok(mounted);
        }
        std::fs::create_dir_all(&target).map_err(host("make the directory of the root file system"))?;
        for mount in mounts {
            let target = if mount.target.is_empty() {
                target.clone()
            } else {
                target.join(mount.target.trim_start_matches('/'))
            };
            let at = target.clone();
            // On a thread of its own: it may leave the working directory for good, to make paths shorter.
            let done = std::thread::spawn(move || {
                let kind = Some(mount.type_.as_str()).filter(|kind| !kind.is_empty());
                mount_rootfs(kind, Some(&mount.source), &mount.options, &at)
            });
            let done = done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            done.map_err(host(format!("mount the root file system at {}", target.display())))?;
            mounted.0.push(target);
        }
        Ok(mounted)
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        for target in self.0.iter().rev() {
            if let Err(error) = umount2(target, MntFlags::MNT_DETACH) {
                tracing::warn!(target = %target.display(), %error, "unmount a root file system");
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a container is to be made of.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) id: String,
    pub(crate) bundle: String,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) names: Names,
}

impl Pod {
    /// One without containers yet.
    pub(crate) fn new(
        namespace: &str,
        state_root: PathBuf,
        mounts: MountNamespace,
        home: NetworkNamespace,
        events: Events,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.to_owned(),
            state_root,
            mounts,
            home,
            events,
            machine: tokio::sync::Mutex::default(),
            containers: Mutex::default(),
            execs: AtomicU64::new(0),
            making: Semaphore::new(MAKING),
        })
    }

    /// Where its events go.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// A container of it.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        let found = lock(&self.containers).get(id).cloned();
        found.ok_or_else(|| Error::NotFound { what: "container", id: text::one_line(id, 128) })
    }

    /// Whether there is no container in it.
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.containers).is_empty()
    }

    /// Creates a container, and the machine if it is the first.
    pub(crate) async fn create(&self, plan: Plan) -> Result<Arc<Container>, Error> {
        let id: ContainerId = plan.id.parse()?;
        // One at a time: the first makes the machine for the others.
        let mut machine = self.machine.lock().await;
        if lock(&self.containers).contains_key(&plan.id) {
            return Err(Error::Exists { what: "container", id: plan.id });
        }
        let path = PathBuf::from(&plan.bundle);
        let rootfs = Rootfs::mount(plan.rootfs, &path)?;
        let sibling = |pid: i32| {
            let containers = lock(&self.containers);
            let mut all = containers.values();
            all.find(|other| other.task.pid() == pid.unsigned_abs()).map(|other| other.id.clone())
        };
        let (bundle, files) = Bundle::load_beside(&path, &sibling)?;
        let task = Arc::new(Task::new(&plan.id, "", plan.names)?);
        let is_first = machine.is_none();
        let (used, spec, place) = match &*machine {
            Some(machine) => {
                machine.check_network(&bundle)?;
                let (spec, place) = machine.share.add(&bundle, Trees::of(&bundle, &files)?)?;
                (Arc::clone(machine), spec, place)
            }
            None => {
                let (booted, spec, place) = self.boot(&id, &bundle, files).await?;
                (Arc::clone(machine.insert(Arc::new(booted))), spec, place)
            }
        };
        let made = self.make(&used, &bundle, &spec, &task).await;
        match made {
            Ok(record) => {
                let container = Container {
                    id,
                    bundle_path: plan.bundle,
                    bundle,
                    record,
                    machine: used,
                    place,
                    _rootfs: rootfs,
                    task,
                    execs: Mutex::default(),
                };
                let container = Arc::new(container);
                lock(&self.containers).insert(plan.id, Arc::clone(&container));
                Ok(container)
            }
            Err(error) => {
                used.forget(&place, &bundle).await;
                if is_first && let Some(machine) = machine.take() {
                    machine.vm.clone().shutdown().await;
                }
                Err(error)
            }
        }
    }

    /// Brings the machine up, with the files of its first container.
    async fn boot(
        &self,
        id: &ContainerId,
        bundle: &Bundle,
        files: Files,
    ) -> Result<(Machine, Spec, Place), Error> {
        let size = VmSize::for_spec(bundle.spec())?;
        let mut network = self.network(bundle, size)?;
        let assets = Assets::open(&Explicit::default())?;
        std::fs::create_dir_all(&self.state_root).map_err(host("make the state directory"))?;
        let dir = ContainerDir::claim(&self.state_root, id)?;
        let process = HostProcess::current().map_err(host("read /proc/self/stat"))?;
        let mut record = Record::creating(id.clone(), process, String::new());
        if let HostNetwork::Named { path, .. } = bundle.network() {
            record.network = Some(path.clone());
        }
        let write = |record: &Record| record.write(dir.as_fd()).map_err(host("write the pod's record"));
        write(&record)?;
        // Before anything is started, so that all of it is accounted there.
        let cgroup = match bundle.cgroups_path() {
            Some(path) => Some(HostCgroup::join(path, cgroup::Driver::of(path), &dir)?),
            None => None,
        };
        let share = Share::mount(&self.mounts, &dir.make_share_directory()?)?;
        let starting = Starting::spawn(&assets, engine::machine(size), share.directory())?;
        // If this process is killed, somebody else may have to end the VMM.
        record.vmm = starting.vmm().process().ok();
        write(&record)?;
        // While the guest boots.
        let (spec, place) = share.add(bundle, Trees::of(bundle, &files)?)?;
        let vm = starting.ready().await?;
        if let Some(network) = &mut network {
            network.update(&vm).await?;
        }
        Ok((Machine { vm, network, share, _cgroup: cgroup, _dir: dir }, spec, place))
    }

    /// What the machine is to have of the host's networks: the links of the namespace that is named, which CNI has made before.
    fn network(&self, bundle: &Bundle, size: VmSize) -> Result<Option<Network>, Error> {
        let HostNetwork::Named { path, namespace } = bundle.network() else { return Ok(None) };
        let look = host("look at the network namespace");
        if namespace.is_of_host(&self.home).map_err(look)? {
            return Err(Error::Invalid(format!(
                "linux.namespaces: {} is the network namespace of the host, in which a guest cannot be; name another one",
                path.display()
            )));
        }
        let namespace = namespace.try_clone().map_err(host("keep the network namespace"))?;
        Ok(Some(Network::new(namespace, size.vcpus.max)))
    }

    /// Makes a container in the guest.
    async fn make(
        &self,
        machine: &Machine,
        bundle: &Bundle,
        spec: &Spec,
        task: &Arc<Task>,
    ) -> Result<Record, Error> {
        let id: ContainerId = task.container.parse()?;
        let process = HostProcess::current().map_err(host("read /proc/self/stat"))?;
        let mut record = Record::creating(id.clone(), process, String::new());
        let absolute = |path: &Path| path.canonicalize().map_err(host("resolve the bundle's path"));
        record.bundle = absolute(bundle.path())?;
        record.annotations = bundle.annotations();
        record.poststop = bundle.poststop_hooks();
        for (kind, list) in bundle.creation_hooks() {
            hooks::run(kind, &list, &self.home, &state(&record, Status::Creating)).await?;
        }
        let opened = task.open(&self.namespace)?;
        let wanted = opened.stdio.wanted();
        let (process, streams) = machine.vm.create_process(&id, &record.bundle, spec, wanted).await?;
        let (events, container) = (self.events.clone(), task.container.clone());
        let oom = move |exit: &Exit| {
            if exit.oom_killed {
                events.publish(TaskOOM { container_id: container, ..Default::default() });
            }
        };
        task.is_made(process, streams, opened, self.events.clone(), oom)?;
        Ok(record)
    }

    /// Runs the process of a created container, or a further one that was added.
    pub(crate) async fn start(&self, container: &Container, exec_id: &str) -> Result<Arc<Task>, Error> {
        if !exec_id.is_empty() {
            return self.start_exec(container, exec_id).await;
        }
        let task = &container.task;
        let _changing = task.changing.lock().await;
        if task.status() != State::CREATED {
            return Err(task.wrong_state("start"));
        }
        let process = task.process()?;
        process.start().await?;
        task.set_started();
        self.events.publish(TaskStart {
            container_id: task.container.clone(),
            pid: task.pid(),
            ..Default::default()
        });
        let document = state(&container.record, Status::Running);
        if let Err(error) =
            hooks::run("poststart", &container.bundle.poststart_hooks(), &self.home, &document).await
        {
            // runtime.md, "Lifecycle", step 9.
            let _ = process.kill(SIGKILL, true).await;
            return Err(error.into());
        }
        Ok(Arc::clone(task))
    }

    async fn start_exec(&self, container: &Container, exec_id: &str) -> Result<Arc<Task>, Error> {
        let exec = container.exec(exec_id)?;
        let task = &exec.task;
        let _changing = task.changing.lock().await;
        if task.status() != State::CREATED {
            return Err(task.wrong_state("start"));
        }
        if container.task.status() != State::RUNNING {
            return Err(container.task.wrong_state("run a process beside"));
        }
        let opened = task.open(&self.namespace)?;
        // It is never closed.
        let _making = self.making.acquire().await;
        // Its name in the guest is ours.
        let name = self.execs.fetch_add(1, Ordering::Relaxed).to_string();
        let vm = &container.machine.vm;
        let (process, streams) = vm.exec(&container.id, name, &exec.process, opened.stdio.wanted()).await?;
        task.is_made(process, streams, opened, self.events.clone(), |_| ())?;
        task.set_started();
        self.events.publish(TaskExecStarted {
            container_id: task.container.clone(),
            exec_id: exec_id.to_owned(),
            pid: task.pid(),
            ..Default::default()
        });
        Ok(Arc::clone(task))
    }

    /// Removes a container that has stopped, or was never started; with the last one, the machine.
    pub(crate) async fn delete(&self, container: &Container) -> Result<Ended, Error> {
        let task = &container.task;
        match task.status() {
            State::STOPPED => {}
            State::CREATED => {
                let _ = task.process()?.kill(SIGKILL, true).await;
            }
            _ => return Err(task.wrong_state("delete")),
        }
        let ended = task.wait().await;
        let Some(_removed) = lock(&self.containers).remove(container.id.as_str()) else {
            return Err(Error::NotFound { what: "container", id: container.id.to_string() });
        };
        let execs: Vec<_> = lock(&container.execs).drain().map(|(_, exec)| exec).collect();
        task.close().await;
        task.process()?.delete().await;
        for exec in execs {
            exec.task.close().await;
        }
        container.machine.forget(&container.place, &container.bundle).await;
        let document = state(&container.record, Status::Stopped);
        for hook in &container.record.poststop {
            if let Err(error) =
                hooks::run("poststop", std::slice::from_ref(hook), &self.home, &document).await
            {
                tracing::warn!(error = %text::chain(&error), "run a hook");
            }
        }
        let mut machine = self.machine.lock().await;
        if self.is_empty()
            && let Some(machine) = machine.take()
        {
            machine.vm.clone().shutdown().await;
        }
        Ok(ended)
    }

    /// Ends everything, in whatever state it is.
    pub(crate) async fn shut_down(&self) {
        let machine = self.machine.lock().await.take();
        if let Some(machine) = machine {
            machine.vm.clone().shutdown().await;
        }
        lock(&self.containers).clear();
    }
}

impl Container {
    /// A process in it: its own if `exec_id` is empty.
    pub(crate) fn task(&self, exec_id: &str) -> Result<Arc<Task>, Error> {
        if exec_id.is_empty() {
            Ok(Arc::clone(&self.task))
        } else {
            Ok(Arc::clone(&self.exec(exec_id)?.task))
        }
    }

    fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, Error> {
        let found = lock(&self.execs).get(exec_id).cloned();
        found.ok_or_else(|| Error::NotFound { what: "process", id: text::one_line(exec_id, 128) })
    }

    /// Plans a further process.
    pub(crate) fn add_exec(&self, exec_id: &str, process: OciProcess, names: Names) -> Result<(), Error> {
        check_process(&process).map_err(|fault| Error::Invalid(format!("process: {fault}")))?;
        if self.task.status() == State::STOPPED {
            return Err(self.task.wrong_state("run a process beside"));
        }
        let exec = Exec { task: Arc::new(Task::new(self.id.as_str(), exec_id, names)?), process };
        match lock(&self.execs).entry(exec_id.to_owned()) {
            Entry::Occupied(_) => Err(Error::Exists { what: "process", id: text::one_line(exec_id, 128) }),
            Entry::Vacant(entry) => {
                entry.insert(Arc::new(exec));
                Ok(())
            }
        }
    }

    /// Removes a further process that has ended, or was never started.
    pub(crate) async fn delete_exec(&self, exec_id: &str) -> Result<(Arc<Task>, Ended), Error> {
        let exec = self.exec(exec_id)?;
        let ended = match exec.task.status() {
            State::STOPPED => exec.task.wait().await,
            State::CREATED => Ended { status: 0, at: crate::events::now() },
            _ => return Err(exec.task.wrong_state("delete")),
        };
        lock(&self.execs).remove(exec_id);
        exec.task.close().await;
        Ok((Arc::clone(&exec.task), ended))
    }

    /// Sends a signal.
    pub(crate) async fn kill(&self, exec_id: &str, signal: i32, all: bool) -> Result<(), Error> {
        let task = self.task(exec_id)?;
        if task.status() == State::STOPPED {
            return if all { Ok(()) } else { Err(Error::Finished { id: self.id.to_string() }) };
        }
        match task.process()?.kill(signal, all).await {
            // It has ended meanwhile.
            Err(_) if task.ended().is_some() => Err(Error::Finished { id: self.id.to_string() }),
            result => Ok(result?),
        }
    }

    /// Holds all its processes.
    pub(crate) async fn pause(&self) -> Result<(), Error> {
        let _changing = self.task.changing.lock().await;
        if self.task.status() != State::RUNNING {
            return Err(self.task.wrong_state("pause"));
        }
        let vm = &self.machine.vm;
        vm.or_death(vm.agent().pause(&self.id)).await?;
        self.task.set_paused(true);
        Ok(())
    }

    /// Lets them run again.
    pub(crate) async fn resume(&self) -> Result<(), Error> {
        let _changing = self.task.changing.lock().await;
        if self.task.status() != State::PAUSED {
            return Err(self.task.wrong_state("resume"));
        }
        let vm = &self.machine.vm;
        vm.or_death(vm.agent().resume(&self.id)).await?;
        self.task.set_paused(false);
        Ok(())
    }

    /// The process IDs in it, as it has them.
    pub(crate) async fn pids(&self) -> Result<Vec<u32>, Error> {
        let vm = &self.machine.vm;
        let response = vm.or_death(vm.agent().processes(&self.id)).await?;
        Ok(response.processes.into_iter().map(|process| process.pid).collect())
    }

    /// What its cgroup counts.
    pub(crate) async fn counters(&self) -> Result<HashMap<String, u64>, Error> {
        let vm = &self.machine.vm;
        Ok(vm.or_death(vm.agent().stats(&self.id)).await?.counters)
    }

    /// Changes its limits.
    pub(crate) async fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        let json = serde_json::to_vec(resources).map_err(host("write the resources"))?;
        let vm = &self.machine.vm;
        Ok(vm.or_death(vm.agent().update(&self.id, json)).await?)
    }
}

impl Machine {
    /// All containers of a machine are on its network, or on none.
    fn check_network(&self, bundle: &Bundle) -> Result<(), Error> {
        let HostNetwork::Named { path, namespace } = bundle.network() else { return Ok(()) };
        let network = self.network.as_ref().map(|network| network.is_of(namespace)).transpose();
        if network.map_err(host("look at the network namespace"))? != Some(true) {
            return Err(Error::Invalid(format!(
                "linux.namespaces: the pod is not in the network namespace {}, so its container cannot be",
                path.display()
            )));
        }
        Ok(())
    }

    /// Takes a container's files away, which nothing in the guest uses any more.
    async fn forget(&self, place: &Place, bundle: &Bundle) {
        self.share.remove(place, bundle);
        // Else what the guest remembers of them keeps them open here, and their file systems with them.
        if let Err(error) = self.vm.or_death(self.vm.agent().forget_directory(&place.in_guest())).await {
            tracing::debug!(%error, "have the guest forget a container's files");
        }
    }
}

/// The state document, as hooks read it.
fn state(record: &Record, status: Status) -> Vec<u8> {
    // A structure of strings and numbers: this does not fail.
    serde_json::to_vec(&record.state(status)).unwrap_or_default()
}
