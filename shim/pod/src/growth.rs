//! The size of a machine while it runs: it grows before a container is to have more, and shrinks when less is asked for.
//!
//! Each container has a [`Claim`] on the machine from before it is created until it is gone. What all of them come to
//! ([`VmSize::total`]) is what the machine is made to have: vCPUs are brought online by the agent, memory is plugged through a virtio-mem
//! device, which the machine gets when it first grows.
//!
//! Growing is waited for, for no longer than a guest may take that does not hang, and whoever asked is told if it fails; then all
//! is as it was. Shrinking is a request, in the background: what the guest's kernel keeps in plugged memory stays plugged, and is there when
//! more is asked for again. There is one change at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvrun_vmm_api::{DeviceConfig, VmConfig};
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::time::{sleep, timeout};

use crate::container_id::ContainerId;
use crate::pod::{Pod, PodError};
use crate::size::{Demand, SizeError, Total, VmSize};
use crate::text;

/// How long the guest may take to plug memory. Some GiB in a second on hardware, and a second for some hundred MiB in an emulated machine.
const PLUG_TIMEOUT: Duration = Duration::from_secs(30);
/// How long we look whether it unplugs memory, to tell of it.
const UNPLUG_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait at most between two looks: the VMM does not tell of itself how far a guest has come.
const LOOK: Duration = Duration::from_millis(50);

/// Why a machine is not made larger. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum GrowthError {
    /// It would be too large, or the limits make no sense.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The limits cannot be written as JSON.
    #[error("write the limits as JSON")]
    Serialize(#[source] serde_json::Error),
    /// The machine has as many devices as it can have.
    #[error(
        "the machine has no slot left for the device through which memory is plugged: use fewer disks or links, or start it with the memory"
    )]
    NoSlot,
    /// The guest does not take the memory.
    #[error("the guest plugged {plugged_mib} of {wanted_mib} MiB of memory within {} s", bound.as_secs())]
    NotPlugged {
        /// In MiB beyond what it booted with.
        wanted_mib: u32,
        /// Likewise.
        plugged_mib: u32,
        /// How long it had.
        bound: Duration,
    },
    /// The machine or the agent failed.
    #[error(transparent)]
    Pod(#[from] PodError),
}

/// How large a machine is, and why.
#[derive(Debug)]
pub(crate) struct Growth {
    size: VmSize,
    /// How long the guest may take to plug memory.
    patience: Duration,
    claims: Mutex<Claims>,
    /// Held while it changes.
    current: tokio::sync::Mutex<Current>,
}

/// What the containers ask for, by the numbers of their claims.
#[derive(Debug, Default)]
struct Claims {
    last: u64,
    demands: HashMap<u64, Demand>,
}

/// What the guest was last asked to have. It may have more, for what it does not give back.
#[derive(Debug)]
struct Current {
    total: Total,
    has_device: bool,
}

/// What a container takes of its machine. It is gone when this is dropped, or released before.
#[derive(Debug)]
pub(crate) struct Claim {
    growth: Arc<Growth>,
    number: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.growth.claims().demands.remove(&self.number);
    }
}

impl Growth {
    /// Of a machine that is as it boots.
    pub(crate) fn new(config: &VmConfig) -> Arc<Self> {
        Self::with_patience(config, PLUG_TIMEOUT)
    }

    fn with_patience(config: &VmConfig, patience: Duration) -> Arc<Self> {
        let size = VmSize {
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            max_memory_mib: config.memory_mib.saturating_add(config.hotplug_mib),
        };
        let current = Current { total: size.at_start(), has_device: false };
        Arc::new(Self { size, patience, claims: Mutex::default(), current: tokio::sync::Mutex::new(current) })
    }

    /// The vCPUs it started with.
    pub(crate) fn boot_vcpus(&self) -> u8 {
        self.size.vcpus.boot
    }

    /// The memory in MiB that it started with, and the most that it can have.
    pub(crate) fn memory_mib(&self) -> (u32, u32) {
        (self.size.memory_mib, self.size.max_memory_mib)
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all claims come to.
    fn total(&self) -> Result<Total, SizeError> {
        self.size.total(self.claims().demands.values())
    }

    /// What they would come to if one were, or were also, `demand`.
    fn total_with(&self, number: u64, demand: &Demand) -> Result<Total, SizeError> {
        let claims = self.claims();
        let others = claims.demands.iter().filter(|(other, _)| **other != number).map(|(_, demand)| demand);
        self.size.total(others.chain([demand]))
    }
}

/// Has the machine grow to what a container with this spec needs beside the others.
///
/// # Errors
/// [`GrowthError`].
pub(crate) async fn claim(pod: &Pod, spec: &Spec) -> Result<Claim, GrowthError> {
    let growth = &pod.growth;
    let demand = Demand::of(spec)?;
    let mut current = growth.current.lock().await;
    let number = {
        let mut claims = growth.claims();
        claims.last += 1;
        claims.last
    };
    let total = growth.total_with(number, &demand)?;
    grow(pod, &mut current, total).await.inspect_err(|_| settle(pod))?;
    growth.claims().demands.insert(number, demand);
    Ok(Claim { growth: Arc::clone(growth), number })
}

/// Changes the limits of a container, and the size of the machine with them: before they are higher, or after they are lower.
///
/// # Errors
/// [`GrowthError`].
pub(crate) async fn update(
    pod: &Pod,
    claim: &Claim,
    id: &ContainerId,
    resources: &LinuxResources,
) -> Result<(), GrowthError> {
    let growth = &pod.growth;
    let json = serde_json::to_vec(resources).map_err(GrowthError::Serialize)?;
    let mut current = growth.current.lock().await;
    let before = growth.claims().demands.get(&claim.number).cloned();
    // One that is gone the agent does not know.
    let after = before.map(|before| before.updated(resources)).transpose()?;
    if let Some(after) = &after {
        let total = growth.total_with(claim.number, after)?;
        grow(pod, &mut current, total).await.inspect_err(|_| settle(pod))?;
    }
    let updated = pod.or_death(pod.agent.update(id, json)).await;
    if let (Ok(()), Some(after)) = (&updated, after)
        && let Some(demand) = growth.claims().demands.get_mut(&claim.number)
    {
        *demand = after;
    }
    drop(current);
    settle(pod);
    Ok(updated?)
}

/// Ends the claim of a container that is gone.
pub(crate) fn release(pod: &Pod, claim: &Claim) {
    if pod.growth.claims().demands.remove(&claim.number).is_some() {
        settle(pod);
    }
}

/// Has the machine shrink, in the background, if less is asked for than it has. Must be called in a tokio runtime.
fn settle(pod: &Pod) {
    let pod = pod.clone();
    tokio::spawn(async move {
        let asked = {
            let mut current = pod.growth.current.lock().await;
            // What there was room for there is room for still.
            let Ok(total) = pod.growth.total() else { return };
            shrink(&pod, &mut current, total).await
        };
        if let Some(asked_mib) = asked {
            let done = timeout(UNPLUG_TIMEOUT, until(&pod, |plugged_mib| plugged_mib <= asked_mib)).await;
            let plugged_mib = pod.vmm.state().await.map(|state| state.plugged_mib).ok();
            tracing::debug!(asked_mib, plugged_mib, done = done.is_ok(), "the machine was to shrink");
        }
    });
}

/// Gives the machine what it does not have yet of `total`. If it fails, or is given up, the guest may have been asked for some of it: that is
/// written down, for [`settle`] to take back.
async fn grow(pod: &Pod, current: &mut Current, total: Total) -> Result<(), GrowthError> {
    if total.memory_mib > current.total.memory_mib {
        tracing::debug!(memory_mib = total.memory_mib, "the machine grows");
        plug(pod, current, total.memory_mib).await?;
    }
    if total.vcpus > current.total.vcpus {
        tracing::debug!(vcpus = total.vcpus, "the machine grows");
        current.total.vcpus = total.vcpus;
        pod.or_death(pod.agent.set_cpus(total.vcpus)).await?;
    }
    Ok(())
}

/// Has the guest plug memory until it has so much.
async fn plug(pod: &Pod, current: &mut Current, memory_mib: u32) -> Result<(), GrowthError> {
    if !current.has_device {
        let slot = pod.slots.take().ok_or(GrowthError::NoSlot)?;
        pod.add_device(slot, DeviceConfig::Mem, &[]).await?;
        current.has_device = true;
    }
    let wanted_mib = memory_mib - pod.growth.size.memory_mib;
    current.total.memory_mib = memory_mib;
    pod.vmm.resize_memory(wanted_mib).await.map_err(PodError::from)?;
    // Plugged is a moment before online: the guest's driver plugs, and adds to its kernel's memory, a block of 128 MiB at a time.
    let bound = pod.growth.patience;
    match timeout(bound, until(pod, |plugged_mib| plugged_mib >= wanted_mib)).await {
        Ok(result) => Ok(result?),
        Err(_) => {
            let plugged_mib = pod.vmm.state().await.map_err(PodError::from)?.plugged_mib;
            Err(GrowthError::NotPlugged { wanted_mib, plugged_mib, bound })
        }
    }
}

/// Asks the guest to give back what it has beyond `total`; how much memory may stay plugged, in MiB, if any is to be given back.
async fn shrink(pod: &Pod, current: &mut Current, total: Total) -> Option<u32> {
    if total.vcpus < current.total.vcpus {
        // As with memory: one that stays online is there when it is asked for again.
        current.total.vcpus = total.vcpus;
        if let Err(error) = pod.or_death(pod.agent.set_cpus(total.vcpus)).await {
            tracing::debug!(vcpus = total.vcpus, error = %text::chain(&error), "take vCPUs offline");
        }
    }
    if total.memory_mib >= current.total.memory_mib {
        return None;
    }
    current.total.memory_mib = total.memory_mib;
    let asked_mib = total.memory_mib - pod.growth.size.memory_mib;
    if !current.has_device {
        return None;
    }
    match pod.vmm.resize_memory(asked_mib).await {
        Ok(()) => Some(asked_mib),
        Err(error) => {
            tracing::debug!(asked_mib, error = %text::chain(&error), "have the guest unplug memory");
            None
        }
    }
}

/// Looks until so much memory is plugged as is asked for; not bounded in time.
async fn until(pod: &Pod, is_enough: impl Fn(u32) -> bool) -> Result<(), PodError> {
    let mut pause = Duration::from_millis(1);
    while !is_enough(pod.vmm.state().await?.plugged_mib) {
        sleep(pause).await;
        pause = (pause * 2).min(LOOK);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
