//! Further processes of a container.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oci_spec::runtime::{LinuxIdMapping, Process as OciProcess};
use tokio::time::timeout;

use super::spec::{ContainerSpec, in_guest};
use super::{CREATE_TIMEOUT, Container, ContainerError, Engine, Process, State, terminal};
use crate::descriptor::Descriptor;
use crate::oci::create::{Creation, What, create};
use crate::stdio::{self, EngineStreams, Pumps};

/// Longest name of a further process: nothing is made of it but a key.
const MAX_ID: usize = 200;

/// What a further process needs to know of the container's own config.
#[derive(Debug)]
pub(super) struct Template {
    uid_mappings: Option<Vec<LinuxIdMapping>>,
    gid_mappings: Option<Vec<LinuxIdMapping>>,
}

impl Template {
    pub(super) fn of(spec: &ContainerSpec) -> Self {
        let linux = spec.spec.linux().as_ref();
        Self {
            uid_mappings: linux.and_then(|linux| linux.uid_mappings().clone()),
            gid_mappings: linux.and_then(|linux| linux.gid_mappings().clone()),
        }
    }
}

/// A file that the helper is to read; removed when dropped.
struct ProcessFile(PathBuf);

impl ProcessFile {
    fn write(directory: &Path, process: &OciProcess) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = Self(directory.join(format!("process-{number}.json")));
        std::fs::write(&file.0, serde_json::to_vec(process)?)?;
        Ok(file)
    }
}

impl Drop for ProcessFile {
    fn drop(&mut self) {
        // It goes with the container at the latest.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The further processes of a container, by their names; one that is being made has its name already.
#[derive(Debug, Default)]
pub(super) struct Execs(Mutex<HashMap<String, Option<Arc<Process>>>>);

impl Execs {
    fn table(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Process>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that is taken; given back when dropped.
struct Reserved<'a> {
    execs: &'a Execs,
    id: Option<&'a str>,
}

impl Reserved<'_> {
    fn fill(mut self, process: Arc<Process>) {
        if let Some(id) = self.id.take() {
            self.execs.table().insert(id.to_owned(), Some(process));
        }
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.execs.table().remove(id);
        }
    }
}

impl Container {
    /// Runs a further process; its number in the guest. Completes when its program runs.
    ///
    /// # Errors
    ///
    /// [`ContainerError`]; the process is gone or going then.
    pub async fn exec(
        &self,
        engine: &Engine,
        exec_id: &str,
        process: OciProcess,
        streams: EngineStreams,
    ) -> Result<i32, ContainerError> {
        if exec_id.is_empty() || exec_id.len() > MAX_ID {
            return Err(ContainerError::BadExecId(self.id.clone()));
        }
        let reserved = self.reserve(exec_id)?;
        let made = timeout(CREATE_TIMEOUT, self.make(engine, process, streams)).await;
        let made = made.unwrap_or_else(|_| Err(ContainerError::CreateTimeout(self.id.clone())))?;
        let pid = made.pid;
        reserved.fill(Arc::new(made));
        Ok(pid)
    }

    fn reserve<'a>(&'a self, exec_id: &'a str) -> Result<Reserved<'a>, ContainerError> {
        let mut table = self.execs.table();
        if table.contains_key(exec_id) {
            return Err(ContainerError::ExecExists(self.id.clone(), exec_id.to_owned()));
        }
        table.insert(exec_id.to_owned(), None);
        Ok(Reserved { execs: &self.execs, id: Some(exec_id) })
    }

    async fn make(
        &self,
        engine: &Engine,
        process: OciProcess,
        streams: EngineStreams,
    ) -> Result<Process, ContainerError> {
        if matches!(*self.state.lock().await, State::Removed) {
            return Err(self.wrong_state("being removed"));
        }
        let init = self.process()?;
        if init.has_ended() {
            return Err(self.wrong_state("stopped"));
        }
        let template = self.template.get().ok_or_else(|| self.wrong_state("being created"))?;
        let owner = (
            in_guest(process.user().uid(), template.uid_mappings.as_deref()),
            in_guest(process.user().gid(), template.gid_mappings.as_deref()),
        );
        let has_terminal = process.terminal().unwrap_or(false);
        let size = process.console_size();
        let bundle = self.bundle();
        let file = ProcessFile::write(&bundle, &process).map_err(self.system("write the process"))?;
        let (ends, agent_ends, streams) = if has_terminal {
            let ends = stdio::null_ends().map_err(self.system("open /dev/null"))?;
            (ends, stdio::AgentEnds::default(), streams)
        } else {
            let (ends, agent_ends) =
                stdio::pipes(streams, owner).map_err(self.system("make the stdio pipes"))?;
            (ends, agent_ends, EngineStreams::default())
        };
        let creation = Creation {
            helper: &engine.helper,
            bundle: &bundle,
            cgroup: self.cgroup.path(),
            what: What::Process { container: init.pid, process: &file.0 },
            stdio: ends,
        };
        let made = create(creation, &engine.reaper).await?;
        drop(file);
        let (terminal, agent_ends) = match made.terminal {
            None => (None, agent_ends),
            Some(master) => {
                terminal::give_to(&master, owner).map_err(self.system("give the terminal to the user"))?;
                if let Some(size) = size {
                    let cells = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
                    terminal::resize(&master, cells(size.height()), cells(size.width()))
                        .map_err(self.system("set the terminal's size"))?;
                }
                let master = Arc::new(Descriptor::new(master).map_err(self.system("watch the terminal"))?);
                let ends = stdio::terminal(streams, &master);
                (Some(master), ends)
            }
        };
        made.gate.start().await?;
        let pumps = Pumps::start(agent_ends);
        Ok(Process::watch(made.pid, made.pidfd, made.end, terminal, pumps, self.cgroup.clone()))
    }

    /// A process by its name; the container's own has an empty one.
    ///
    /// # Errors
    ///
    /// [`ContainerError::UnknownExec`], [`ContainerError::State`]: it is still being made.
    pub fn process_named(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        if exec_id.is_empty() {
            return self.process().cloned();
        }
        let found = self.execs.table().get(exec_id).cloned();
        found.flatten().ok_or_else(|| {
            ContainerError::UnknownExec(self.id.clone(), exec_id.chars().take(MAX_ID).collect())
        })
    }

    /// Forgets a further process.
    pub fn forget_process(&self, exec_id: &str) {
        self.execs.table().remove(exec_id);
    }
}
