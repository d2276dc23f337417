//! How large a virtual machine a bundle asks for.
//!
//! * **vCPUs**: `linux.resources.cpu.quota / period`, rounded up (so that a container allowed 1.5 CPUs can use them), else 1; and as many
//!   as `linux.resources.cpu.cpus` needs, which counts the machine's: the last one it names must be there.
//!   All are started at boot. More than the host has is allowed: CPUs may be over-committed.
//! * **Memory**: without `linux.resources.memory.limit`, [`Sizes::memory_mib`]. With one, the limit plus what the guest itself
//!   needs: 64 MiB for kernel, initramfs, agent and page cache of its own, and 1/32 of the limit for what the kernel
//!   keeps per page of memory (64 bytes of `struct page` for every 4 KiB is 1/64; the hash tables sized by memory and reclaim's
//!   reserves are the rest). So the limit is reached, and reported, in the container's cgroup before the machine
//!   itself runs out. Rounded up to 2 MiB, so that huge pages fit; at least [`MIN_MEMORY_MIB`]. `linux.resources.hugepageLimits` come on top.
//!
//! The first container of a Kubernetes pod has no limits worth speaking of: it holds namespaces. So where annotations of containerd's CRI plugin say what the
//! pod's containers come to (its `pkg/cri/annotations`: `sandbox-cpu-quota`, `-period` and `-memory`), these count instead.
//!
//! Annotations of our own ([`crate::annotations`]), where the configuration allows them, say it outright.
//!
//! The defaults and the most there may be are the configuration's ([`Sizes`]). Guest memory costs nothing on the host before the guest touches it.
//!
//! That is the size at the start, and the least there is. What the containers of a machine ask for while it runs ([`Demand`]) comes to a size by the
//! same rules ([`VmSize::total`]); [`growth`](crate::growth) makes it so large. A machine has room for [`ROOM_VCPUS`] and for as much memory
//! as its host has, as far as the configuration goes, and for no less than it starts with. Room for memory costs address space and nothing else.

use std::str::FromStr;

use kvrun_vmm_api::VcpuConfig;
use kvrun_vmm_api::config::{MAX_MEMORY_MIB, MAX_VCPUS, MEM_BLOCK_MIB};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};
use rustix::system::sysinfo;

use crate::annotations;

mod demand;

pub use demand::Demand;

/// The smallest machine we start, in MiB: a smaller one saves the host nothing and leaves the guest no page cache.
pub const MIN_MEMORY_MIB: u32 = 128;
/// The vCPUs that every machine has room for, if the configuration lets it. For each the guest's kernel sets up its per-CPU data at boot.
pub const ROOM_VCPUS: u8 = 4;
/// What the guest's kernel and agent need beside the container, in MiB.
const OVERHEAD_MIB: u64 = 64;
/// The kernel's default CFS period in microseconds (`default_cfs_period`, Linux 6.12 kernel/sched/fair.c).
const DEFAULT_PERIOD_US: u64 = 100_000;

/// The annotations with what a pod's containers come to.
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// The bundle asks for a machine that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// Too many CPUs.
    #[error(
        "linux.resources.cpu.quota {quota} with period {period} asks for {cpus} CPUs: a virtual machine has at most {max} (setting machine.max_vcpus), lower the quota"
    )]
    Vcpus {
        /// Microseconds per period.
        quota: u64,
        /// Microseconds.
        period: u64,
        /// What they come to.
        cpus: u64,
        /// The most there may be.
        max: u8,
    },
    /// A period of nothing.
    #[error("linux.resources.cpu.period is 0: leave it out or set it to 1000 to 1000000 microseconds")]
    Period,
    /// A CPU that cannot be there.
    #[error(
        "linux.resources.cpu.cpus {list:?} must be a list such as \"0-2,7\" of the CPUs 0 to {last} that a virtual machine can have",
        last = max - 1
    )]
    Cpus {
        /// What it is.
        list: String,
        /// How many there may be.
        max: u8,
    },
    /// A size of the pod that is none.
    #[error("annotation {name} must be a number, not {value:?}")]
    Annotation {
        /// Which.
        name: &'static str,
        /// What it is.
        value: String,
    },
    /// More CPUs than a machine that runs has room for.
    #[error(
        "linux.resources.cpu: what the containers of the machine ask for comes to {cpus} CPUs, and it can have {most}: lower cpu.quota, or name lower ones in cpu.cpus"
    )]
    RoomVcpus {
        /// What they come to.
        cpus: u64,
        /// What there can be.
        most: u8,
    },
    /// More memory than a machine that runs has room for.
    #[error(
        "linux.resources.memory.limit: what the containers of the machine ask for comes to {memory_mib} MiB with its overhead, and it can have {most_mib} MiB: lower it"
    )]
    RoomMemory {
        /// What they come to, in MiB.
        memory_mib: u64,
        /// What there can be, in MiB.
        most_mib: u32,
    },
    /// Too much memory.
    #[error(
        "linux.resources.memory.limit {limit} is more than a virtual machine can have ({max} MiB with its overhead; setting machine.max_memory_mib): lower it, or leave it out for the default"
    )]
    Memory {
        /// Bytes.
        limit: u64,
        /// The most there may be, in MiB.
        max: u32,
    },
    /// One of our own annotations asks for a size that cannot be.
    #[error("annotation {name} must be a number from {min} to {max} ({setting}), not {value:?}")]
    Asked {
        /// Which.
        name: &'static str,
        /// What it is.
        value: String,
        /// The least.
        min: u32,
        /// The most.
        max: u32,
        /// The setting of the most.
        setting: &'static str,
    },
}

/// What sizes machines have when nobody asks for one, and the most that may be asked for. A part of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Memory of a machine whose container has no limit, in MiB.
    pub memory_mib: u32,
    /// The most memory, in MiB; [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub max_memory_mib: u32,
    /// vCPUs of a machine whose container has no CPU quota.
    pub vcpus: u8,
    /// The most vCPUs, 1 to [`MAX_VCPUS`].
    pub max_vcpus: u8,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { memory_mib: 512, max_memory_mib: MAX_MEMORY_MIB, vcpus: 1, max_vcpus: MAX_VCPUS }
    }
}

/// The size of a virtual machine, and how far it can grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmSize {
    /// Virtual CPUs: those it starts with, and those it can have.
    pub vcpus: VcpuConfig,
    /// Memory in MiB that it starts with.
    pub memory_mib: u32,
    /// Memory in MiB that it can have.
    pub max_memory_mib: u32,
}

/// A size that a virtual machine is to have while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Total {
    /// vCPUs online.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// The memory of this host in MiB, up to [`MAX_MEMORY_MIB`].
fn host_memory_mib() -> u32 {
    let system = sysinfo();
    let bytes = system.totalram.saturating_mul(system.mem_unit.into());
    u32::try_from(bytes >> 20).unwrap_or(MAX_MEMORY_MIB).min(MAX_MEMORY_MIB)
}

impl VmSize {
    /// The size for a machine with the container of this spec alone; see the module's documentation.
    ///
    /// # Errors
    /// [`SizeError`] when it is beyond what a virtual machine can have.
    pub fn for_spec(spec: &Spec, sizes: &Sizes) -> Result<Self, SizeError> {
        let vcpus = match sizes.asked_vcpus(spec)? {
            Some(vcpus) => vcpus,
            None => sizes.needed_vcpus(spec)?,
        };
        let memory_mib = match sizes.asked_memory(spec)? {
            Some(memory_mib) => memory_mib,
            None => sizes.needed_memory(spec)?,
        };
        Ok(Self::with_room(vcpus, memory_mib, sizes))
    }

    /// This size at the start, with room to grow on this host.
    pub fn with_room(vcpus: u8, memory_mib: u32, sizes: &Sizes) -> Self {
        let most_mib = host_memory_mib().min(sizes.max_memory_mib);
        Self {
            vcpus: VcpuConfig { boot: vcpus, max: vcpus.max(ROOM_VCPUS.min(sizes.max_vcpus)) },
            memory_mib,
            max_memory_mib: memory_mib.max(most_mib - most_mib % MEM_BLOCK_MIB),
        }
    }

    /// As at the start.
    pub fn at_start(&self) -> Total {
        Total { vcpus: self.vcpus.boot, memory_mib: self.memory_mib }
    }

    /// What containers come to that run together: no less than at the start.
    ///
    /// # Errors
    /// [`SizeError::RoomVcpus`], [`SizeError::RoomMemory`] when it is more than there is room for.
    pub fn total<'d>(&self, demands: impl IntoIterator<Item = &'d Demand>) -> Result<Total, SizeError> {
        let (mut millionths, mut up_to, mut memory) = (0_u64, 0, 0_u64);
        for demand in demands {
            millionths = millionths.saturating_add(demand.millionths());
            up_to = up_to.max(demand.cpus);
            memory = memory.saturating_add(demand.memory).saturating_add(demand.huge_pages);
        }
        let cpus = millionths.div_ceil(demand::MILLION).max(up_to.into()).max(self.vcpus.boot.into());
        let most = self.vcpus.max;
        let vcpus = u8::try_from(cpus).ok().filter(|cpus| *cpus <= most);
        let vcpus = vcpus.ok_or(SizeError::RoomVcpus { cpus, most })?;
        let needed = if memory == 0 { 0 } else { with_overhead(memory) }.max(self.memory_mib.into());
        let most_mib = self.max_memory_mib;
        let memory_mib = u32::try_from(needed).ok().filter(|mib| *mib <= most_mib);
        let memory_mib = memory_mib.ok_or(SizeError::RoomMemory { memory_mib: needed, most_mib })?;
        Ok(Total { vcpus, memory_mib })
    }
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref().and_then(|linux| linux.resources().as_ref())
}

impl Sizes {
    fn needed_vcpus(&self, spec: &Spec) -> Result<u8, SizeError> {
        let cpu = resources(spec).and_then(|r| r.cpu().as_ref());
        let (mut quota, mut period) = (cpu.and_then(LinuxCpu::quota), cpu.and_then(LinuxCpu::period));
        if let Some(of_pod) = annotation(spec, POD_QUOTA)? {
            (quota, period) = (Some(of_pod), annotation(spec, POD_PERIOD)?.filter(|period| *period != 0));
        }
        let list = cpu.and_then(|cpu| cpu.cpus().as_deref()).unwrap_or_default();
        Ok(self.vcpus_for(quota, period)?.max(up_to_last(list, self.max_vcpus)?))
    }

    fn needed_memory(&self, spec: &Spec) -> Result<u32, SizeError> {
        let limit = resources(spec).and_then(|r| r.memory().as_ref()).and_then(LinuxMemory::limit);
        let huge_pages = resources(spec).and_then(huge_pages).unwrap_or(0);
        self.memory_for(annotation(spec, POD_MEMORY)?.or(limit), huge_pages)
    }

    fn asked_vcpus(&self, spec: &Spec) -> Result<Option<u8>, SizeError> {
        let max = self.max_vcpus.into();
        let asked = asked(spec, annotations::VCPUS, (1, max), "setting machine.max_vcpus")?;
        Ok(asked.and_then(|vcpus| vcpus.try_into().ok()))
    }

    fn asked_memory(&self, spec: &Spec) -> Result<Option<u32>, SizeError> {
        let range = (MIN_MEMORY_MIB, self.max_memory_mib);
        let asked = asked(spec, annotations::MEMORY_MIB, range, "setting machine.max_memory_mib")?;
        Ok(asked.map(|mib| mib.next_multiple_of(MEM_BLOCK_MIB)))
    }

    fn vcpus_for(&self, quota: Option<i64>, period: Option<u64>) -> Result<u8, SizeError> {
        let period = period.unwrap_or(DEFAULT_PERIOD_US);
        if period == 0 {
            return Err(SizeError::Period);
        }
        // cgroup v1's -1, like 0 and absence, is "no limit" (config-linux.md, CPU).
        let Some(quota) = quota.and_then(|q| u64::try_from(q).ok()).filter(|q| *q > 0) else {
            return Ok(self.vcpus);
        };
        let (cpus, max) = (quota.div_ceil(period), self.max_vcpus);
        u8::try_from(cpus).ok().filter(|c| *c <= max).ok_or(SizeError::Vcpus { quota, period, cpus, max })
    }

    fn memory_for(&self, limit: Option<i64>, huge_pages: u64) -> Result<u32, SizeError> {
        // -1 is "no limit" (config-linux.md, Memory).
        let limit = limit.and_then(|l| u64::try_from(l).ok()).filter(|l| *l > 0);
        let least = if limit.is_some() { 0 } else { self.memory_mib };
        let limit = limit.unwrap_or(0).saturating_add(huge_pages);
        if limit == 0 {
            return Ok(least);
        }
        let max = self.max_memory_mib;
        let total = u32::try_from(with_overhead(limit)).ok().filter(|total| *total <= max);
        Ok(total.ok_or(SizeError::Memory { limit, max })?.max(least))
    }
}

/// What limits of huge pages come to, in bytes, if there are some. They are not in the limit of memory.
fn huge_pages(resources: &LinuxResources) -> Option<u64> {
    let limits = resources.hugepage_limits().as_ref()?;
    Some(limits.iter().fold(0, |sum, limit| sum.saturating_add(u64::try_from(limit.limit()).unwrap_or(0))))
}

/// What one of our own annotations asks for, if it is there.
fn asked(
    spec: &Spec,
    name: &'static str,
    (min, max): (u32, u32),
    setting: &'static str,
) -> Result<Option<u32>, SizeError> {
    let Some(value) = spec.annotations().as_ref().and_then(|all| all.get(name)) else { return Ok(None) };
    let number = value.parse().ok().filter(|number| (min..=max).contains(number));
    let value = || crate::text::one_line(value, 64);
    number.map(Some).ok_or_else(|| SizeError::Asked { name, value: value(), min, max, setting })
}

/// A number among the annotations, if it is there.
fn annotation<T: FromStr>(spec: &Spec, name: &'static str) -> Result<Option<T>, SizeError> {
    let value = spec.annotations().as_ref().and_then(|all| all.get(name));
    let wrong = |value: &String| SizeError::Annotation { name, value: value.chars().take(64).collect() };
    value.map(|value| value.parse().map_err(|_| wrong(value))).transpose()
}

/// The memory in MiB of a machine whose containers may use so many bytes.
fn with_overhead(limit: u64) -> u64 {
    let limit_mib = limit.div_ceil(1 << 20);
    let total = (limit_mib + limit_mib / 32 + OVERHEAD_MIB).next_multiple_of(MEM_BLOCK_MIB.into());
    total.max(MIN_MEMORY_MIB.into())
}

/// How many CPUs there must be for a list of them (cpuset(7), "List format").
fn up_to_last(list: &str, max: u8) -> Result<u8, SizeError> {
    let wrong = || SizeError::Cpus { list: list.chars().take(64).collect(), max };
    let number = |text: &str| text.trim().parse::<u8>().ok().filter(|cpu| *cpu < max).ok_or_else(wrong);
    let mut count = 0;
    for part in list.split(',').filter(|_| !list.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(wrong());
        }
        count = count.max(last + 1);
    }
    Ok(count)
}

#[cfg(test)]
mod tests;
