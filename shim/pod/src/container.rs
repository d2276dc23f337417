//! A container in a running machine.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::agent::{AgentError, ProcessEnd};
use crate::container_id::ContainerId;
use crate::pod::{DEATH_GRACE, Pod, PodError};
use crate::stdio::{Copying, StdioError};
use crate::text;
use crate::vmm::VmEnd;

/// How long the guest may take to deliver a signal.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to deliver SIGKILL, after which the machine is ended instead.
const KILL_TIMEOUT: Duration = Duration::from_millis(1500);
/// The exit code of a container whose machine died: that of a process killed by SIGKILL.
const VM_DIED_CODE: u8 = 128 + 9;

/// What can go wrong when a container is created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Its spec cannot be written as JSON.
    #[error("write the container's spec as JSON")]
    Serialize(#[source] serde_json::Error),
    /// Its streams failed.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The machine or the agent failed.
    #[error(transparent)]
    Pod(#[from] PodError),
}

/// Why the program of a container cannot be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramFault {
    /// There is no such file.
    NotFound,
    /// It is not executable.
    NotExecutable,
}

impl ProgramFault {
    /// The exit code by the shell's rule (POSIX, "Exit Status for Commands").
    pub fn code(self) -> u8 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable => 126,
        }
    }
}

impl CreateError {
    /// The machine or agent error in it.
    pub fn pod_error(&self) -> Option<&PodError> {
        if let Self::Pod(error) = self { Some(error) } else { None }
    }
}

/// How a container's process ended.
#[derive(Clone, Debug)]
pub enum ExitState {
    /// Exited with this code.
    Exited(u8),
    /// Killed by this signal.
    Signaled(u8),
    /// The virtual machine ended under it.
    VmDied(VmDeath),
}

/// Why the machine of a running container is gone.
#[derive(Clone, Debug)]
pub enum VmDeath {
    /// It died.
    Died(Arc<VmEnd>),
    /// The agent stopped answering, or answered nonsense, while the VMM went on; it was killed.
    AgentLost(String),
}

impl fmt::Display for VmDeath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Died(end) => end.fmt(f),
            Self::AgentLost(why) => write!(f, "the agent in the guest was lost: {why}"),
        }
    }
}

impl ExitState {
    /// The exit code by the shell's rule: that of the process, or 128 + the signal; 137 when the machine died.
    pub fn code(&self) -> u8 {
        match self {
            Self::Exited(code) => *code,
            Self::Signaled(signal) => 128_u8.saturating_add(*signal),
            Self::VmDied(_) => VM_DIED_CODE,
        }
    }
}

/// The end of a container.
#[derive(Clone, Debug)]
pub struct Exit {
    /// How its process ended.
    pub state: ExitState,
    /// The guest's kernel killed a process of it at its memory limit.
    pub oom_killed: bool,
}

/// A container that was created. Dropping it closes its streams; its process lives until [`Container::delete`] or the end of
/// the machine.
#[derive(Debug)]
pub struct Container {
    pod: Pod,
    id: ContainerId,
    copying: Option<Copying>,
}

impl Container {
    pub(crate) fn new(pod: Pod, id: ContainerId, copying: Copying) -> Self {
        Self { pod, id, copying: Some(copying) }
    }

    /// Runs its process.
    ///
    /// # Errors
    /// [`PodError`]; [`AgentError::Refused`] in it with `NOT_FOUND` or `PERMISSION_DENIED` when the program is missing or not executable.
    pub async fn start(&self) -> Result<(), PodError> {
        self.pod.or_death(self.pod.agent.start(&self.id)).await?;
        tracing::debug!(id = %self.id, "started");
        Ok(())
    }

    /// Waits until its process has ended; some of its output may still be on the way ([`Container::drain`]). Cancel-safe.
    pub async fn wait(&self) -> Exit {
        let died = |death| Exit { state: ExitState::VmDied(death), oom_killed: false };
        match self.pod.or_death(self.pod.agent.wait(&self.id)).await {
            Ok((ProcessEnd::Exited(code), oom_killed)) => Exit { state: ExitState::Exited(code), oom_killed },
            Ok((ProcessEnd::Signaled(signal), oom_killed)) => {
                Exit { state: ExitState::Signaled(signal), oom_killed }
            }
            Err(PodError::Died(end)) => died(VmDeath::Died(end)),
            Err(error) => {
                let why = text::chain(&error);
                self.pod.vmm.kill("the agent in the guest was lost").await;
                died(VmDeath::AgentLost(why))
            }
        }
    }

    /// After the end of its process: waits until all of its output has reached the descriptors it was created with. Bounded
    /// for a guest that does not end a stream, not for a reader of those descriptors that does not read.
    pub async fn drain(&mut self) {
        if let Some(copying) = self.copying.take() {
            copying.drain().await;
            tracing::debug!(id = %self.id, "drained");
        }
    }

    /// Sends a signal, unchanged, to its process (or, with `all`, to all of its processes). If the guest does not take it within 10 s
    /// (a SIGKILL: 1.5 s) the machine is ended: a guest that cannot be signalled must not live on.
    ///
    /// # Errors
    /// [`PodError`]; [`AgentError::Refused`] in it when the process has ended.
    pub async fn kill(&self, signal: i32, all: bool) -> Result<(), PodError> {
        let bound = if signal == libc::SIGKILL { KILL_TIMEOUT } else { SIGNAL_TIMEOUT };
        let result = self.pod.or_death(self.pod.agent.signal(&self.id, signal, all, bound)).await;
        if let Err(PodError::Agent(AgentError::Timeout { .. })) = result {
            self.pod.vmm.kill("the guest did not take a signal in time").await;
        }
        result
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// [`PodError`].
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<(), PodError> {
        self.pod.or_death(self.pod.agent.resize(&self.id, rows, columns)).await
    }

    /// Kills what is left of it and removes it from the guest, within 2 s or with the machine.
    pub async fn delete(self) {
        let removed = timeout(DEATH_GRACE, self.pod.or_death(self.pod.agent.remove(&self.id))).await;
        if !matches!(removed, Ok(Ok(()))) {
            self.pod.vmm.kill("the container could not be removed from the guest").await;
        }
    }
}
