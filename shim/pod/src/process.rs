//! A process in a running machine: a container's own, or a further one in a container.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use tokio::time::{sleep, timeout};

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
/// OOM kills of a container are told once in this time, however many there are: so a guest that invents them costs the host next to nothing.
const KILLS_PACE: Duration = Duration::from_secs(1);

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
        let (state, oom_kills) = self.end().await;
        Exit { state, oom_killed: oom_kills > 0 }
    }

    /// As [`Process::wait`] of a container's own process, and does `tell` when processes of the container have been killed for want of memory since it was done
    /// last. The first time at once, again no sooner than a second later; and before this returns, if there is something left to tell.
    pub async fn wait_and_tell_kills<F: Future<Output = ()>>(&self, mut tell: impl FnMut() -> F) -> Exit {
        let mut told = 0;
        let (state, oom_kills) = tokio::select! {
            biased;
            end = self.end() => end,
            never = self.tell_kills(&mut told, &mut tell) => match never {},
        };
        if oom_kills > told {
            tell().await;
        }
        Exit { state, oom_killed: oom_kills > 0 }
    }

    async fn tell_kills<F: Future<Output = ()>>(
        &self,
        told: &mut u64,
        tell: &mut impl FnMut() -> F,
    ) -> Infallible {
        loop {
            match self.pod.agent.more_oom_kills(&self.id, *told).await {
                Ok(Some(kills)) => {
                    tell().await;
                    *told = kills;
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(id = %self.id, error = %text::chain(&error), "watch for OOM kills");
                    break;
                }
            }
            sleep(KILLS_PACE).await;
        }
        // What else there is comes with the end.
        std::future::pending().await
    }

    /// How it has ended, and how many processes of its container the OOM killer had killed by then.
    async fn end(&self) -> (ExitState, u64) {
        match self.pod.or_death(self.pod.agent.wait(&self.id, &self.exec_id)).await {
            Ok((ProcessEnd::Exited(code), oom_kills)) => (ExitState::Exited(code), oom_kills),
            Ok((ProcessEnd::Signaled(signal), oom_kills)) => (ExitState::Signaled(signal), oom_kills),
            Err(PodError::Died(end)) => (ExitState::VmDied(VmDeath::Died(end)), 0),
            Err(error) => {
                let why = text::chain(&error);
                self.pod.vmm.kill("the agent in the guest was lost").await;
                (ExitState::VmDied(VmDeath::AgentLost(why)), 0)
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
