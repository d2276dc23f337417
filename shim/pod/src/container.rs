//! A container in a running machine, and how it ends.

use std::fmt;
use std::sync::Arc;

use crate::disks::DiskError;
use crate::growth::GrowthError;
use crate::pod::PodError;
use crate::process::Process;
use crate::stdio::{Copying, StdioError};
use crate::vmm::VmEnd;

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
    /// It cannot have a block device of the host.
    #[error(transparent)]
    Disk(DiskError),
    /// The machine cannot be as large as it asks.
    #[error(transparent)]
    Growth(GrowthError),
    /// The machine or the agent failed.
    #[error(transparent)]
    Pod(#[from] PodError),
}

impl From<GrowthError> for CreateError {
    fn from(error: GrowthError) -> Self {
        match error {
            GrowthError::Pod(error) => Self::Pod(error),
            error => Self::Growth(error),
        }
    }
}

impl From<DiskError> for CreateError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::Pod(error) => Self::Pod(error),
            error => Self::Disk(error),
        }
    }
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

impl VmDeath {
    /// The end of the machine, if it was what came first.
    pub fn vm_end(&self) -> Option<&VmEnd> {
        match self {
            Self::Died(end) => Some(end),
            Self::AgentLost(_) => None,
        }
    }
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

/// A container that was created, with the copying of its streams. Dropping it closes them; its process lives until
/// [`Container::delete`] or the end of the machine.
#[derive(Debug)]
pub struct Container {
    process: Process,
    copying: Option<Copying>,
}

impl Container {
    pub(crate) fn new(process: Process, copying: Copying) -> Self {
        Self { process, copying: Some(copying) }
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Runs its process.
    ///
    /// # Errors
    /// [`PodError`]; [`AgentError::Refused`](crate::agent::AgentError::Refused) in it with `NOT_FOUND` or `PERMISSION_DENIED` when the
    /// program is missing or not executable.
    pub async fn start(&self) -> Result<(), PodError> {
        self.process.start().await
    }

    /// Waits until its process has ended; some of its output may still be on the way ([`Container::drain`]). Cancel-safe.
    pub async fn wait(&self) -> Exit {
        self.process.wait().await
    }

    /// After the end of its process: waits until all of its output has reached the descriptors it was created with. Bounded
    /// for a guest that does not end a stream, not for a reader of those descriptors that does not read.
    pub async fn drain(&mut self) {
        if let Some(copying) = self.copying.take() {
            copying.drain().await;
            tracing::debug!("drained");
        }
    }

    /// As [`Process::kill`].
    ///
    /// # Errors
    /// As [`Process::kill`].
    pub async fn kill(&self, signal: i32, all: bool) -> Result<(), PodError> {
        self.process.kill(signal, all).await
    }

    /// As [`Process::resize`].
    ///
    /// # Errors
    /// [`PodError`].
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<(), PodError> {
        self.process.resize(rows, columns).await
    }

    /// As [`Process::delete`].
    pub async fn delete(self) {
        self.process.delete().await;
    }
}
