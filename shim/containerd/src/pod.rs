//! The pod of this shim: its machine and the containers in it.
//!
//! The first container brings the machine up; it is the pod's own (a sandbox), or alone. When the last one is deleted, the machine is shut
//! down. Everything a pod has on the host is this process's, its VMM's, or in its state directory, which `delete` removes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim::protos::api::Status as State;
use containerd_shim::protos::events::task::{TaskExecStarted, TaskStart};
use containerd_shim::protos::types::mount::Mount;
use kvrun_pod::annotations;
use kvrun_pod::bundle::{Bundle, Root, Spec};
use kvrun_pod::config::{Config, Source};
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::host_process::HostProcess;
use kvrun_pod::process::Process;
use kvrun_pod::record::{Record, Status};
use kvrun_pod::stdio::Streams;
use kvrun_pod::{hooks, layers, root_disk, sandbox, text};
use tokio::sync::Semaphore;

use crate::container::Container;
use crate::error::{Error, host};
use crate::events::Events;
use crate::launch::KIND;
use crate::machine::{Host, Machine};
use crate::rootfs::Rootfs;
use crate::stand_in::StandIn;
use crate::stdio::{Names, Opened};
use crate::task::{Ended, Task};

/// The pod.
#[derive(Debug)]
pub(crate) struct Pod {
    host: Host,
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
    /// Where the configuration is.
    pub(crate) config: Source,
}

impl Pod {
    /// One without containers yet.
    pub(crate) fn new(host: Host, events: Events) -> Arc<Self> {
        Arc::new(Self {
            host,
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

    /// The same, with its process in the guest, for what cannot do without.
    pub(crate) async fn get_with_process(&self, id: &str) -> Result<Arc<Container>, Error> {
        let container = self.get(id)?;
        self.need_process(&container).await?;
        Ok(container)
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
        let mut rootfs = Rootfs::mount(plan.rootfs, &path)?;
        let sibling = |pid: i32| {
            let containers = lock(&self.containers);
            let mut all = containers.values();
            all.find(|other| other.task.pid() == pid.unsigned_abs()).map(|other| other.id.clone())
        };
        let (mut bundle, files) = Bundle::load_beside(&path, &sibling)?;
        let image = rootfs.image.take();
        if image.is_some() {
            bundle.set_root(Root::Disk);
        } else if rootfs.layers.is_some() {
            bundle.set_root(Root::Layers);
        }
        let task = Arc::new(Task::new(&plan.id, "", plan.names)?);
        let is_first = machine.is_none();
        let (used, mut spec, mut place) = match &*machine {
            Some(machine) => {
                annotations::check(&bundle.annotations(), &machine.config.allowed_annotations)?;
                machine.check_network(&bundle, &task).await?;
                let (spec, place) = machine.add_to_share(&bundle, &files, false)?;
                (Arc::clone(machine), spec, place)
            }
            None => {
                // It is that of the whole pod.
                let config = Config::load(&plan.config)?;
                annotations::check(&bundle.annotations(), &config.allowed_annotations)?;
                self.host.log.obey(&config);
                let (booted, spec, place) =
                    Machine::boot(&self.host, config, &id, &bundle, files, &task).await?;
                (Arc::clone(machine.insert(Arc::new(booted))), spec, place)
            }
        };
        let made = async {
            if let Some(image) = image {
                root_disk::mount(&used.vm, &mut place, image).await?;
            }
            if let Some(root) = rootfs.layers.take()
                && let Err(error) = layers::mount(&used.vm, &mut place, &root).await
            {
                if !error.is_refusal() {
                    return Err(error.into());
                }
                if root.is_guests() {
                    return Err(Error::NotAsFiles(error));
                }
                tracing::info!(error = %text::chain(&error), "layers are served as files");
                rootfs.serve_files()?;
                let (files, instead);
                (bundle, files) = Bundle::load_beside(&path, &sibling)?;
                (spec, instead) = used.add_to_share(&bundle, &files, is_first)?;
                used.forget(&std::mem::replace(&mut place, instead)).await;
            }
            used.copy_volumes(&mut place, &mut spec).await;
            self.need_processes_of_siblings(&bundle).await?;
            self.make(&used, &bundle, &spec, &task).await
        };
        match made.await {
            Ok((record, stand_in)) => {
                let container = Arc::new(Container {
                    id,
                    bundle_path: plan.bundle,
                    bundle,
                    record,
                    machine: used,
                    is_first,
                    place,
                    _rootfs: rootfs,
                    task,
                    stand_in,
                    execs: Mutex::default(),
                });
                lock(&self.containers).insert(plan.id, Arc::clone(&container));
                Ok(container)
            }
            Err(error) => {
                used.forget(&place).await;
                if is_first && let Some(machine) = machine.take() {
                    machine.vm.clone().shutdown().await;
                }
                Err(error)
            }
        }
    }

    /// Makes a container in the guest; or has the machine stand for it.
    async fn make(
        &self,
        machine: &Machine,
        bundle: &Bundle,
        spec: &Spec,
        task: &Arc<Task>,
    ) -> Result<(Record, Option<StandIn>), Error> {
        let id: ContainerId = task.container.parse()?;
        let process = HostProcess::current().map_err(host("read /proc/self/stat"))?;
        let mut record = Record::creating(id.clone(), process, String::new());
        let absolute = |path: &Path| path.canonicalize().map_err(host("resolve the bundle's path"));
        record.bundle = absolute(bundle.path())?;
        record.annotations = bundle.annotations();
        record.poststop = bundle.poststop_hooks();
        for (kind, list) in bundle.creation_hooks() {
            hooks::run(kind, &list, &self.host.home, &state(&record, Status::Creating)).await?;
        }
        if record.annotations.get(KIND).is_some_and(|kind| kind == "sandbox")
            && sandbox::needs_no_process(spec)
        {
            machine.vm.stand_for(&id, spec).await?;
            let stand_in = StandIn::start(&machine.vm, task, self.events.clone(), spec);
            return Ok((record, Some(stand_in)));
        }
        let (process, streams, opened) = self.make_process(machine, &record, spec, task).await?;
        task.is_made(process, streams, opened, self.events.clone())?;
        Ok((record, None))
    }

    /// Makes the process of a container in the guest.
    async fn make_process(
        &self,
        machine: &Machine,
        record: &Record,
        spec: &Spec,
        task: &Task,
    ) -> Result<(Process, Streams, Opened), Error> {
        let opened = task.open(&self.host.namespace)?;
        let wanted = opened.stdio.wanted();
        let (process, streams) = machine.vm.create_process(&record.id, &record.bundle, spec, wanted).await?;
        Ok((process, streams, opened))
    }

    /// Makes the process of a container for which the machine has stood so far.
    async fn need_process(&self, container: &Container) -> Result<(), Error> {
        let Some(stand_in) = &container.stand_in else { return Ok(()) };
        let _making = stand_in.making.lock().await;
        if !stand_in.stands() {
            return Ok(());
        }
        let task = &container.task;
        let (process, streams, opened) =
            self.make_process(&container.machine, &container.record, &stand_in.spec, task).await?;
        let _changing = task.changing.lock().await;
        if task.status() == State::STOPPED || !stand_in.give_way() {
            process.delete().await;
            return Err(task.wrong_state("use"));
        }
        task.is_made(process.clone(), streams, opened, self.events.clone())?;
        if task.status() == State::RUNNING {
            process.start().await?;
        }
        Ok(())
    }

    /// Makes those processes whose namespaces a container joins.
    async fn need_processes_of_siblings(&self, bundle: &Bundle) -> Result<(), Error> {
        for sibling in bundle.siblings() {
            let container = self.get(sibling.as_str())?;
            if let Some(stand_in) = &container.stand_in
                && sandbox::needs_process(bundle.spec(), sibling, &stand_in.spec)
            {
                self.need_process(&container).await?;
            }
        }
        Ok(())
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
        if container.is_first {
            container.machine.update_network().await?;
        }
        if !container.has_no_process() {
            task.process()?.start().await?;
        }
        task.set_started();
        self.events.publish(TaskStart {
            container_id: task.container.clone(),
            pid: task.pid(),
            ..Default::default()
        });
        let document = state(&container.record, Status::Running);
        if let Err(error) =
            hooks::run("poststart", &container.bundle.poststart_hooks(), &self.host.home, &document).await
        {
            // runtime.md, "Lifecycle", step 9.
            let _ = container.kill("", SIGKILL, true).await;
            return Err(error.into());
        }
        Ok(Arc::clone(task))
    }

    async fn start_exec(&self, container: &Container, exec_id: &str) -> Result<Arc<Task>, Error> {
        self.need_process(container).await?;
        let exec = container.exec(exec_id)?;
        let task = &exec.task;
        let _changing = task.changing.lock().await;
        if task.status() != State::CREATED {
            return Err(task.wrong_state("start"));
        }
        if container.task.status() != State::RUNNING {
            return Err(container.task.wrong_state("run a process beside"));
        }
        let opened = task.open(&self.host.namespace)?;
        // It is never closed.
        let _making = self.making.acquire().await;
        // Its name in the guest is ours.
        let name = self.execs.fetch_add(1, Ordering::Relaxed).to_string();
        let vm = &container.machine.vm;
        let (process, streams) = vm.exec(&container.id, name, &exec.process, opened.stdio.wanted()).await?;
        task.is_made(process, streams, opened, self.events.clone())?;
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
                let _ = container.kill("", SIGKILL, true).await;
            }
            _ => return Err(task.wrong_state("delete")),
        }
        let ended = task.wait().await;
        let Some(_removed) = lock(&self.containers).remove(container.id.as_str()) else {
            return Err(Error::NotFound { what: "container", id: container.id.to_string() });
        };
        let execs: Vec<_> = container.execs().drain().map(|(_, exec)| exec).collect();
        task.close().await;
        // There is none of a container for which the machine has stood.
        if let Ok(process) = task.process() {
            process.delete().await;
        }
        for exec in execs {
            exec.task.close().await;
        }
        container.machine.forget(&container.place).await;
        let document = state(&container.record, Status::Stopped);
        for hook in &container.record.poststop {
            if let Err(error) =
                hooks::run("poststop", std::slice::from_ref(hook), &self.host.home, &document).await
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

/// The state document, as hooks read it.
fn state(record: &Record, status: Status) -> Vec<u8> {
    // A structure of strings and numbers: this does not fail.
    serde_json::to_vec(&record.state(status)).unwrap_or_default()
}
