//! A container of the pod, and the further processes in it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim::protos::api::Status as State;
use kvrun_pod::bundle::{Bundle, LinuxResources, Process as OciProcess, check_process};
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::pod::PodError;
use kvrun_pod::record::Record;
use kvrun_pod::share::Place;
use kvrun_pod::text;

use crate::error::Error;
use crate::machine::Machine;
use crate::rootfs::Rootfs;
use crate::stand_in::StandIn;
use crate::stdio::Names;
use crate::task::{Ended, Task};

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: ContainerId,
    pub(crate) bundle_path: String,
    pub(crate) bundle: Bundle,
    pub(crate) record: Record,
    pub(crate) machine: Arc<Machine>,
    /// Whether it has brought the machine up.
    pub(crate) is_first: bool,
    pub(crate) place: Place,
    pub(crate) _rootfs: Rootfs,
    pub(crate) task: Arc<Task>,
    /// The machine, if it stands for this container, or has done so.
    pub(crate) stand_in: Option<StandIn>,
    pub(crate) execs: Mutex<HashMap<String, Arc<Exec>>>,
}

/// A further process, and what it is to be.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) task: Arc<Task>,
    pub(crate) process: OciProcess,
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

    pub(crate) fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, Error> {
        let found = self.execs().get(exec_id).cloned();
        found.ok_or_else(|| Error::NotFound { what: "process", id: text::one_line(exec_id, 128) })
    }

    /// Plans a further process.
    pub(crate) fn add_exec(&self, exec_id: &str, process: OciProcess, names: Names) -> Result<(), Error> {
        check_process(&process).map_err(|fault| Error::Invalid(format!("process: {fault}")))?;
        if self.task.status() == State::STOPPED {
            return Err(self.task.wrong_state("run a process beside"));
        }
        let exec = Exec { task: Arc::new(Task::new(self.id.as_str(), exec_id, names)?), process };
        match self.execs().entry(exec_id.to_owned()) {
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
        self.execs().remove(exec_id);
        exec.task.close().await;
        Ok((Arc::clone(&exec.task), ended))
    }

    /// Whether the machine stands for it, so that there is no process of it.
    pub(crate) fn has_no_process(&self) -> bool {
        self.stand_in.as_ref().is_some_and(StandIn::stands)
    }

    /// Sends a signal.
    pub(crate) async fn kill(&self, exec_id: &str, signal: i32, all: bool) -> Result<(), Error> {
        let task = self.task(exec_id)?;
        if task.status() == State::STOPPED {
            return if all { Ok(()) } else { Err(self.finished()) };
        }
        if let Some(stand_in) = &self.stand_in
            && exec_id.is_empty()
            && task.process().is_err()
        {
            return if stand_in.signal(signal) { Ok(()) } else { Err(self.finished()) };
        }
        match task.process()?.kill(signal, all).await {
            // It has ended meanwhile, or with its machine, which the task may be about to hear.
            Err(error) if task.ended().is_some() || matches!(error, PodError::Died(_)) => {
                Err(self.finished())
            }
            result => Ok(result?),
        }
    }

    fn finished(&self) -> Error {
        Error::Finished { id: self.id.to_string() }
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

    /// The process IDs in it, as it has them. Without one it is that of the task: containerd 1.7 ends a shim whose task has none when it starts again
    /// (its `runtime/v2/shim_load.go`).
    pub(crate) async fn pids(&self) -> Result<Vec<u32>, Error> {
        if self.has_no_process() {
            return Ok(vec![self.task.pid()]);
        }
        let vm = &self.machine.vm;
        let response = vm.or_death(vm.agent().processes(&self.id)).await?;
        Ok(response.processes.into_iter().map(|process| process.pid).collect())
    }

    /// What its cgroup counts.
    pub(crate) async fn counters(&self) -> Result<HashMap<String, u64>, Error> {
        if self.has_no_process() {
            return Ok(HashMap::new());
        }
        let vm = &self.machine.vm;
        Ok(vm.or_death(vm.agent().stats(&self.id)).await?.counters)
    }

    /// Changes its limits.
    pub(crate) async fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        Ok(self.task.process()?.update(resources).await?)
    }
}
