//! A process in a running machine: a container's own, or a further one in a container.

use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use tokio::time::timeout;

use crate::agent::{AgentError, ProcessEnd};
use crate::container::{Exit, ExitState, VmDeath};
use crate::container_id::ContainerId;
use crate::disks;
use crate::growth::{self, Claim, GrowthError};
use crate::pod::{Pod, PodError};
use crate::text;

/// How long the guest may take to deliver a signal.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to deliver SIGKILL, after which the machine is ended instead.
const KILL_TIMEOUT: Duration = Duration::from_millis(1500);

/// How long the guest may take to remove a container whose processes it has killed, after which the machine is ended. Longer than the other bounds, because
/// nobody waits for it, and other containers may be in the machine.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(15);

/// A process. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Process {
    pod: Pod,
    id: ContainerId,
    /// Empty for the container's own.
    exec_id: String,
    /// What its container has of the host's block devices.
    disks: Arc<[(i64, i64)]>,
    /// What its container takes of the machine. None for a further process.
    claim: Option<Arc<Claim>>,
}

impl Process {
    /// The one that a container is made for.
    pub(crate) fn containers_own(pod: Pod, id: ContainerId, disks: Vec<(i64, i64)>, claim: Claim) -> Self {
        Self { pod, id, exec_id: String::new(), disks: disks.into(), claim: Some(Arc::new(claim)) }
    }

    /// One in a container that is there.
    pub(crate) fn further(pod: Pod, id: ContainerId, exec_id: String) -> Self {
        Self { pod, id, exec_id, disks: Arc::default(), claim: None }
    }

    /// Whether it is a container's own, and not a further one.
    pub fn is_containers_own(&self) -> bool {
        self.exec_id.is_empty()
    }

    /// Runs a container's own process.
    ///
    /// # Errors
    /// [`PodError`]; [`AgentError::Refused`] in it with `NOT_FOUND` or `PERMISSION_DENIED` when the program is missing or not executable.
    pub async fn start(&self) -> Result<(), PodError> {
        self.pod.or_death(self.pod.agent.start(&self.id)).await?;
        tracing::debug!(id = %self.id, "started");
        Ok(())
    }

    /// Waits until it has ended; some of its output may still be on the way. Cancel-safe.
    pub async fn wait(&self) -> Exit {
        let died = |death| Exit { state: ExitState::VmDied(death), oom_killed: false };
        match self.pod.or_death(self.pod.agent.wait(&self.id, &self.exec_id)).await {
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

    /// Sends it a signal, unchanged, or, with `all`, to all processes of its container. If the guest does not take it within 10 s
    /// (a SIGKILL: 1.5 s) the machine is ended: a guest that cannot be signalled must not live on. Then SIGKILL has had its effect, and is no
    /// error.
    ///
    /// # Errors
    /// [`PodError`]; [`AgentError::Refused`] in it when the process has ended.
    pub async fn kill(&self, signal: i32, all: bool) -> Result<(), PodError> {
        let bound = if signal == libc::SIGKILL { KILL_TIMEOUT } else { SIGNAL_TIMEOUT };
        let request = self.pod.agent.signal(&self.id, &self.exec_id, signal, all, bound);
        let result = self.pod.or_death(request).await;
        if let Err(PodError::Agent(AgentError::Timeout { .. })) = result {
            self.pod.vmm.kill("the guest did not take a signal in time").await;
            if signal == libc::SIGKILL {
                return Ok(());
            }
        }
        result
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// [`PodError`].
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<(), PodError> {
        self.pod.or_death(self.pod.agent.resize(&self.id, &self.exec_id, rows, columns)).await
    }

    /// Changes the limits of its container, and with them the size of the machine. What is not in `resources` stays as it is. Does nothing for a
    /// further process.
    ///
    /// # Errors
    /// [`GrowthError`].
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), GrowthError> {
        match &self.claim {
            Some(claim) => growth::update(&self.pod, claim, &self.id, resources).await,
            None => Ok(()),
        }
    }

    /// Kills what is left of its container and removes that from the guest, within 15 s or with the machine.
    pub async fn delete(&self) {
        let removed = timeout(REMOVAL_TIMEOUT, self.pod.or_death(self.pod.agent.remove(&self.id))).await;
        if !matches!(removed, Ok(Ok(()))) {
            self.pod.vmm.kill("the container could not be removed from the guest").await;
        }
        disks::detach(&self.pod, &self.disks).await;
        if let Some(claim) = &self.claim {
            growth::release(&self.pod, claim);
        }
    }
}
