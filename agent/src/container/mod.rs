//! One container:
//!
//! * [`id`] - its name; [`spec`] - its config; [`terminal`] - its pty; [`process`] - its process; [`exec`] - further ones;
//!   [`list`] - all there are;
//! * here - its states (creating, created, running, stopped), each under the container's own lock, and [`Containers`], the
//!   table of all of them, whose lock is never held across a wait.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kvrun_agent_api::GUEST_RUN_DIR;
use tokio::sync::watch;
use tokio::time::timeout;

pub use self::id::ContainerId;
pub use self::process::{Exit, Process};
pub use self::spec::ContainerSpec;
use crate::cgroup::Cgroup;
use crate::cgroup::freeze::freeze;
use crate::descriptor::Descriptor;
use crate::mounts::look_again;
use crate::oci::create::{Creation, OciError, StartGate, What, create};
use crate::oci::helper::CONFIG;
use crate::path::OCI_DIR;
use crate::reaper::Reaper;
use crate::stdio::{self, EngineStreams, Pumps};

pub mod exec;
pub mod id;
pub mod list;
pub mod own_proc;
pub mod process;
pub mod spec;
pub mod terminal;

/// How long creation may take. Hooks have timeouts of their own; this is for a helper that hangs on a file system.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long killed processes may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a container refuses.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// It exists.
    #[error("container {0} exists already")]
    Exists(ContainerId),
    /// Its cgroup is another one's, or inside it.
    #[error("the cgroup of container {0} is inside that of container {1}, or the other way round")]
    CgroupTaken(ContainerId, ContainerId),
    /// It does not exist.
    #[error("container {0} does not exist")]
    Unknown(ContainerId),
    /// It was removed while it was being created.
    #[error("container {0} was removed while it was being created")]
    Removed(ContainerId),
    /// Not in this state.
    #[error("container {id} is {state}")]
    State {
        /// Which.
        id: ContainerId,
        /// Its state.
        state: &'static str,
    },
    /// It has no such further process.
    #[error("container {0} has no process {1:?}")]
    UnknownExec(ContainerId, String),
    /// It has one of that name.
    #[error("container {0} has a process {1:?} already")]
    ExecExists(ContainerId, String),
    /// A further process needs another name.
    #[error("a further process of container {0} must have a name of 1 to 200 bytes")]
    BadExecId(ContainerId),
    /// Its processes are not held.
    #[error("processes of container {0} could not be held within {KILL_TIMEOUT:?}")]
    FreezeTimeout(ContainerId),
    /// The process has no terminal.
    #[error("the process of container {0} has no terminal")]
    NoTerminal(ContainerId),
    /// Creation hangs.
    #[error("container {0} was not created within {CREATE_TIMEOUT:?}")]
    CreateTimeout(ContainerId),
    /// Killed processes hang.
    #[error("processes of container {0} are still there {KILL_TIMEOUT:?} after they were killed")]
    KillTimeout(ContainerId),
    /// Its set-up, or the program to run.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// A system call of the agent.
    #[error("cannot {what} of container {id}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// For which.
        id: ContainerId,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// What every container of a machine shares.
#[derive(Debug)]
pub struct Engine {
    /// The program that creates containers: the agent itself.
    pub helper: PathBuf,
    /// Waits for children.
    pub reaper: Arc<Reaper>,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: ContainerId,
    cgroup: Cgroup,
    process: OnceLock<Arc<Process>>,
    template: OnceLock<exec::Template>,
    /// The sources of its bind mounts.
    binds: OnceLock<Vec<PathBuf>>,
    execs: exec::Execs,
    state: tokio::sync::Mutex<State>,
    removal: watch::Sender<bool>,
}

#[derive(Debug)]
enum State {
    Creating,
    Created(StartGate),
    /// Or stopped: the process knows.
    Running,
    Removed,
}

impl Container {
    fn new(id: ContainerId, cgroup: Cgroup) -> Self {
        let (removal, _) = watch::channel(false);
        Self {
            id,
            cgroup,
            process: OnceLock::new(),
            template: OnceLock::new(),
            binds: OnceLock::new(),
            execs: exec::Execs::default(),
            state: tokio::sync::Mutex::new(State::Creating),
            removal,
        }
    }

    /// Creates it: its process then waits for the start.
    ///
    /// # Errors
    ///
    /// [`ContainerError`]; nothing of it is left then, except its entry in the table.
    pub async fn create(
        &self,
        engine: &Engine,
        spec: ContainerSpec,
        streams: EngineStreams,
    ) -> Result<i32, ContainerError> {
        let mut state = self.state.lock().await;
        if !matches!(*state, State::Creating) {
            return Err(ContainerError::Removed(self.id.clone()));
        }
        let mut removal = self.removal.subscribe();
        let result = tokio::select! {
            result = timeout(CREATE_TIMEOUT, self.create_process(engine, spec, streams)) => {
                result.unwrap_or_else(|_| Err(ContainerError::CreateTimeout(self.id.clone())))
            }
            _ = removal.wait_for(|removed| *removed) => Err(ContainerError::Removed(self.id.clone())),
        };
        match result {
            Ok((pid, gate)) => {
                *state = State::Created(gate);
                Ok(pid)
            }
            Err(err) => {
                *state = State::Removed;
                if let Err(cleanup) = self.clean_up(&engine.reaper).await {
                    log::warn!("after a failed creation: {}", crate::oci::error_chain(&cleanup));
                }
                Err(err)
            }
        }
    }

    async fn create_process(
        &self,
        engine: &Engine,
        spec: ContainerSpec,
        streams: EngineStreams,
    ) -> Result<(i32, StartGate), ContainerError> {
        // Set once: this runs once.
        let _ = self.template.set(exec::Template::of(&spec));
        let _ = self.binds.set(spec.binds());
        let bundle = self.bundle();
        fs::create_dir_all(&bundle).map_err(self.system("make the bundle directory"))?;
        let config = serde_json::to_vec(&spec.spec).map_err(self.system("write the config"))?;
        fs::write(bundle.join(CONFIG), config).map_err(self.system("write the config"))?;

        let (streams, (process_ends, agent_ends)) = if spec.terminal {
            let ends =
                (stdio::null_ends().map_err(self.system("open /dev/null"))?, stdio::AgentEnds::default());
            (streams, ends)
        } else {
            let ends = stdio::pipes(streams, spec.owner).map_err(self.system("make the stdio pipes"))?;
            (EngineStreams::default(), ends)
        };
        let created = create(
            Creation {
                helper: &engine.helper,
                bundle: &bundle,
                cgroup: self.cgroup.path(),
                what: What::Container { id: self.id.as_str(), host_bundle: &spec.host_bundle },
                stdio: process_ends,
            },
            &engine.reaper,
        )
        .await?;
        let (terminal, agent_ends) = match created.terminal {
            None => (None, agent_ends),
            Some(master) => {
                terminal::give_to(&master, spec.owner)
                    .map_err(self.system("give the terminal to the user"))?;
                if let Some((rows, columns)) = spec.console_size {
                    terminal::resize(&master, rows, columns)
                        .map_err(self.system("set the terminal's size"))?;
                }
                let master = Arc::new(Descriptor::new(master).map_err(self.system("watch the terminal"))?);
                let ends = stdio::terminal(streams, &master);
                (Some(master), ends)
            }
        };
        let pumps = Pumps::start(agent_ends);
        let process =
            Process::watch(created.pid, created.pidfd, created.end, terminal, pumps, self.cgroup.clone());
        // Set once: this runs once.
        let _ = self.process.set(Arc::new(process));
        Ok((created.pid, created.gate))
    }

    /// Runs the user's program.
    ///
    /// # Errors
    ///
    /// [`ContainerError::State`]: it is not "created". [`ContainerError::Oci`]: the program cannot be executed.
    pub async fn start(&self) -> Result<(), ContainerError> {
        let mut state = self.state.lock().await;
        if self.process()?.has_ended() {
            return Err(self.wrong_state("stopped"));
        }
        let gate = match std::mem::replace(&mut *state, State::Running) {
            State::Created(gate) => gate,
            other => {
                let name = match other {
                    State::Running => "running already",
                    _ => "being removed",
                };
                *state = other;
                return Err(self.wrong_state(name));
            }
        };
        // startContainer hooks run here, and nobody who wants to kill or remove the container waits for them.
        drop(state);
        // Engines write files like /etc/resolv.conf after the creation, when they know the network.
        let binds = self.binds.get().cloned().unwrap_or_default();
        tokio::task::spawn_blocking(move || look_again(&binds))
            .await
            .map_err(|err| self.system("look at the bind mounts")(io::Error::other(err)))?;
        Ok(gate.start().await?)
    }

    /// Its process.
    ///
    /// # Errors
    ///
    /// [`ContainerError::State`]: it is still being created.
    pub fn process(&self) -> Result<&Arc<Process>, ContainerError> {
        self.process.get().ok_or_else(|| self.wrong_state("being created"))
    }

    /// Sends a signal to a process, or to all of its processes.
    ///
    /// # Errors
    ///
    /// [`ContainerError::State`]: the one process has ended, or is not there yet. A signal to all is no error then.
    pub fn signal(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), ContainerError> {
        let process = self.process_named(exec_id)?;
        if all {
            return self.cgroup.signal(signal).map_err(self.system("signal the processes"));
        }
        match process.signal(signal).map_err(self.system("signal the process"))? {
            true => Ok(()),
            false => Err(self.wrong_state("stopped")),
        }
    }

    /// Sets the size of the terminal of a process.
    ///
    /// # Errors
    ///
    /// [`ContainerError::NoTerminal`].
    pub fn resize(&self, exec_id: &str, rows: u16, columns: u16) -> Result<(), ContainerError> {
        let process = self.process_named(exec_id)?;
        let terminal =
            process.terminal.as_ref().ok_or_else(|| ContainerError::NoTerminal(self.id.clone()))?;
        terminal::resize(terminal.as_ref(), rows, columns).map_err(self.system("set the terminal's size"))
    }

    /// Holds all of its processes, or lets them run.
    ///
    /// # Errors
    ///
    /// [`ContainerError::FreezeTimeout`]: they run then.
    pub async fn freeze(&self, frozen: bool) -> Result<(), ContainerError> {
        let dir = self.cgroup.dir();
        match timeout(KILL_TIMEOUT, freeze(&dir, frozen)).await {
            Ok(result) => result.map_err(self.system("hold the processes")),
            Err(_) => {
                // Half-held is worse than not. The cgroup may be gone.
                let _ = fs::write(dir.join("cgroup.freeze"), "0");
                Err(ContainerError::FreezeTimeout(self.id.clone()))
            }
        }
    }

    /// Its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Kills what is left of it and removes it. A creation under way is given up.
    ///
    /// # Errors
    ///
    /// [`ContainerError::KillTimeout`], [`ContainerError::System`]; may be asked again.
    pub async fn remove(&self, reaper: &Reaper) -> Result<(), ContainerError> {
        self.removal.send_replace(true);
        let mut state = self.state.lock().await;
        *state = State::Removed;
        self.clean_up(reaper).await
    }

    async fn clean_up(&self, reaper: &Reaper) -> Result<(), ContainerError> {
        let kill = async {
            self.cgroup.kill().map_err(self.system("kill the processes"))?;
            if let Some(process) = self.process.get() {
                process.ended().await;
            }
            loop {
                // Before the attempt: whoever is reaped after it wakes us.
                let reaped = reaper.next();
                match self.cgroup.remove() {
                    // Linux 6.12 kernel/cgroup/cgroup.c: EBUSY while a killed process has not fully left.
                    Err(err) if err.kind() == io::ErrorKind::ResourceBusy => {
                        let _ = timeout(Duration::from_millis(20), reaped).await;
                    }
                    other => return other.map_err(self.system("remove the cgroup")),
                }
            }
        };
        timeout(KILL_TIMEOUT, kill).await.map_err(|_| ContainerError::KillTimeout(self.id.clone()))??;
        remove_dir(&self.bundle()).map_err(self.system("remove the bundle directory"))
    }

    /// The agent's copy of the config.
    fn bundle(&self) -> PathBuf {
        Path::new(GUEST_RUN_DIR).join(OCI_DIR).join("bundles").join(self.id.as_str())
    }

    fn wrong_state(&self, state: &'static str) -> ContainerError {
        ContainerError::State { id: self.id.clone(), state }
    }

    fn system<E: Into<io::Error>>(&self, what: &'static str) -> impl FnOnce(E) -> ContainerError + use<E> {
        let id = self.id.clone();
        move |err| ContainerError::System { what, id, source: err.into() }
    }
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// All containers.
#[derive(Debug, Default)]
pub struct Containers(Mutex<HashMap<ContainerId, Arc<Container>>>);

impl Containers {
    /// Reserves the ID and the cgroup.
    ///
    /// # Errors
    ///
    /// [`ContainerError::Exists`], [`ContainerError::CgroupTaken`].
    pub fn reserve(&self, id: &ContainerId, cgroup: &Cgroup) -> Result<Arc<Container>, ContainerError> {
        let mut table = self.table();
        if !table.contains_key(id)
            && let Some(other) = table.values().find(|other| other.cgroup.overlaps(cgroup))
        {
            return Err(ContainerError::CgroupTaken(id.clone(), other.id.clone()));
        }
        match table.entry(id.clone()) {
            Entry::Occupied(_) => Err(ContainerError::Exists(id.clone())),
            Entry::Vacant(entry) => {
                Ok(entry.insert(Arc::new(Container::new(id.clone(), cgroup.clone()))).clone())
            }
        }
    }

    /// Looks one up.
    ///
    /// # Errors
    ///
    /// [`ContainerError::Unknown`].
    pub fn get(&self, id: &ContainerId) -> Result<Arc<Container>, ContainerError> {
        self.table().get(id).cloned().ok_or_else(|| ContainerError::Unknown(id.clone()))
    }

    /// Takes one out of the table, if it is still the one in there.
    pub fn forget(&self, container: &Arc<Container>) {
        if let Entry::Occupied(entry) = self.table().entry(container.id.clone())
            && Arc::ptr_eq(entry.get(), container)
        {
            entry.remove();
        }
    }

    /// Every one there is now.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Container>> {
        self.table().values().cloned().collect()
    }

    fn table(&self) -> MutexGuard<'_, HashMap<ContainerId, Arc<Container>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
