//! What containers ask of a machine that runs.

use kvrun_vmm_api::config::MAX_VCPUS;
use oci_spec::runtime::{LinuxMemory, LinuxResources, Spec};

use super::{DEFAULT_PERIOD_US, SizeError, huge_pages, up_to_last};

/// What a container asks of the machine it is in, by its limits: without any, nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// CPU time in microseconds for each period; 0: no limit.
    pub(super) quota: u64,
    /// In microseconds; 0: the kernel's default.
    pub(super) period: u64,
    /// How many CPUs there must be for those it names.
    pub(super) cpus: u8,
    /// In bytes; 0: no limit.
    pub(super) memory: u64,
    /// In bytes.
    pub(super) huge_pages: u64,
}

/// A CPU, in the unit in which parts of CPUs are added up.
pub(super) const MILLION: u64 = 1_000_000;

impl Demand {
    /// That of a container with this spec.
    ///
    /// # Errors
    /// [`SizeError::Cpus`].
    pub fn of(spec: &Spec) -> Result<Self, SizeError> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map_or(Ok(Self::default()), |resources| Self::default().updated(resources))
    }

    /// That of the same container when these of its limits are changed: what is not there, and what is 0, stays (agent/src/cgroup/limits.rs).
    ///
    /// # Errors
    /// [`SizeError::Cpus`].
    pub fn updated(&self, resources: &LinuxResources) -> Result<Self, SizeError> {
        let mut new = self.clone();
        if let Some(cpu) = resources.cpu() {
            let (quota, period) = (cpu.quota().filter(|n| *n != 0), cpu.period().filter(|n| *n != 0));
            if quota.is_some() || period.is_some() {
                new.quota = quota.map_or(0, or_none);
            }
            new.period = period.unwrap_or(new.period);
            if let Some(list) = cpu.cpus().as_deref().filter(|list| !list.is_empty()) {
                new.cpus = up_to_last(list, MAX_VCPUS)?;
            }
        }
        let limit = resources.memory().as_ref().and_then(LinuxMemory::limit);
        if let Some(limit) = limit.filter(|limit| *limit != 0) {
            new.memory = or_none(limit);
        }
        new.huge_pages = huge_pages(resources).unwrap_or(new.huge_pages);
        Ok(new)
    }

    /// The CPU time in millionths of a CPU, rounded down, so that thirds add up to a whole.
    pub(super) fn millionths(&self) -> u64 {
        let period = if self.period == 0 { DEFAULT_PERIOD_US } else { self.period };
        let time = u128::from(self.quota) * u128::from(MILLION) / u128::from(period);
        u64::try_from(time).unwrap_or(u64::MAX)
    }
}

/// A limit, or 0 where a negative number says that there is none.
fn or_none(limit: i64) -> u64 {
    u64::try_from(limit).unwrap_or(0)
}
