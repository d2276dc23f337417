//! How large a virtual machine a bundle asks for.
//!
//! * **vCPUs**: `linux.resources.cpu.quota / period`, rounded up (so that a container allowed 1.5 CPUs can use them), else 1; and as many
//!   as `linux.resources.cpu.cpus` needs, which counts the machine's: the last one it names must be there.
//!   All are started at boot. No more than [`MAX_VCPUS`]. More than the host has is allowed: CPUs may be over-committed.
//! * **Memory**: without `linux.resources.memory.limit`, [`DEFAULT_MEMORY_MIB`]. With one, the limit plus what the guest itself
//!   needs: 64 MiB for kernel, initramfs, agent and page cache of its own, and 1/32 of the limit for what the kernel
//!   keeps per page of memory (64 bytes of `struct page` for every 4 KiB is 1/64; the hash tables sized by memory and reclaim's
//!   reserves are the rest). So the limit is reached, and reported, in the container's cgroup before the machine
//!   itself runs out. Rounded up to 2 MiB, so that huge pages fit; at least [`MIN_MEMORY_MIB`].
//!
//! The first container of a Kubernetes pod has no limits worth speaking of: it holds namespaces. So where annotations of containerd's CRI plugin say what the
//! pod's containers come to (its `pkg/cri/annotations`: `sandbox-cpu-quota`, `-period` and `-memory`), these count instead.
//!
//! Guest memory costs nothing on the host before the guest touches it.
//!
//! That is the size at the start, and the least there is. What the containers of a machine ask for while it runs ([`Demand`]) comes to a size by the
//! same rules ([`VmSize::total`]); [`growth`](crate::growth) makes it so large. A machine has room for [`ROOM_VCPUS`] and for as much memory
//! as its host has, and for no less than it starts with. Room for memory costs address space and nothing else.

use std::str::FromStr;

use kvrun_vmm_api::VcpuConfig;
use kvrun_vmm_api::config::{MAX_MEMORY_MIB, MAX_VCPUS, MEM_BLOCK_MIB};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};
use rustix::system::sysinfo;

/// Memory of a machine whose container has no limit, in MiB: the least that common server software starts in.
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// The smallest machine we start, in MiB: a smaller one saves the host nothing and leaves the guest no page cache.
pub const MIN_MEMORY_MIB: u32 = 128;
/// The vCPUs that every machine has room for. For each the guest's kernel sets up its per-CPU data at boot.
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
        "linux.resources.cpu.quota {quota} with period {period} asks for {cpus} CPUs: a virtual machine has at most {MAX_VCPUS}, lower the quota"
    )]
    Vcpus {
        /// Microseconds per period.
        quota: u64,
        /// Microseconds.
        period: u64,
        /// What they come to.
        cpus: u64,
    },
    /// A period of nothing.
    #[error("linux.resources.cpu.period is 0: leave it out or set it to 1000 to 1000000 microseconds")]
    Period,
    /// A CPU that cannot be there.
    #[error(
        "linux.resources.cpu.cpus {0:?} must be a list such as \"0-2,7\" of the CPUs 0 to {last} that a virtual machine can have",
        last = MAX_VCPUS - 1
    )]
    Cpus(String),
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
        "linux.resources.memory.limit {limit} is more than a virtual machine can have ({MAX_MEMORY_MIB} MiB with its overhead): lower it, or leave it out for the default"
    )]
    Memory {
        /// Bytes.
        limit: u64,
    },
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
    pub fn for_spec(spec: &Spec) -> Result<Self, SizeError> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let cpu = resources.and_then(|r| r.cpu().as_ref());
        let limit = resources.and_then(|r| r.memory().as_ref()).and_then(LinuxMemory::limit);
        let (mut quota, mut period) = (cpu.and_then(LinuxCpu::quota), cpu.and_then(LinuxCpu::period));
        if let Some(of_pod) = annotation(spec, POD_QUOTA)? {
            (quota, period) = (Some(of_pod), annotation(spec, POD_PERIOD)?.filter(|period| *period != 0));
        }
        let limit = annotation(spec, POD_MEMORY)?.or(limit);
        let vcpus = vcpus(quota, period)?;
        let vcpus = vcpus.max(up_to_last(cpu.and_then(|cpu| cpu.cpus().as_deref()).unwrap_or_default())?);
        Ok(Self::with_room(vcpus, memory_mib(limit)?))
    }

    /// This size at the start, with room to grow on this host.
    pub fn with_room(vcpus: u8, memory_mib: u32) -> Self {
        let most_mib = host_memory_mib();
        Self {
            vcpus: VcpuConfig { boot: vcpus, max: vcpus.max(ROOM_VCPUS) },
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
            memory = memory.saturating_add(demand.memory);
        }
        let cpus = millionths.div_ceil(MILLION).max(up_to.into()).max(self.vcpus.boot.into());
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

/// What a container asks of the machine it is in, by its limits: without any, nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// CPU time in microseconds for each period; 0: no limit.
    quota: u64,
    /// In microseconds; 0: the kernel's default.
    period: u64,
    /// How many CPUs there must be for those it names.
    cpus: u8,
    /// In bytes; 0: no limit.
    memory: u64,
}

/// A CPU, in the unit in which parts of CPUs are added up.
const MILLION: u64 = 1_000_000;

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
                new.cpus = up_to_last(list)?;
            }
        }
        let limit = resources.memory().as_ref().and_then(LinuxMemory::limit);
        if let Some(limit) = limit.filter(|limit| *limit != 0) {
            new.memory = or_none(limit);
        }
        Ok(new)
    }

    /// The CPU time in millionths of a CPU, rounded down, so that thirds add up to a whole.
    fn millionths(&self) -> u64 {
        let period = if self.period == 0 { DEFAULT_PERIOD_US } else { self.period };
        let time = u128::from(self.quota) * u128::from(MILLION) / u128::from(period);
        u64::try_from(time).unwrap_or(u64::MAX)
    }
}

/// A limit, or 0 where a negative number says that there is none.
fn or_none(limit: i64) -> u64 {
    u64::try_from(limit).unwrap_or(0)
}

/// A number among the annotations, if it is there.
fn annotation<T: FromStr>(spec: &Spec, name: &'static str) -> Result<Option<T>, SizeError> {
    let value = spec.annotations().as_ref().and_then(|all| all.get(name));
    let wrong = |value: &String| SizeError::Annotation { name, value: value.chars().take(64).collect() };
    value.map(|value| value.parse().map_err(|_| wrong(value))).transpose()
}

fn vcpus(quota: Option<i64>, period: Option<u64>) -> Result<u8, SizeError> {
    let period = period.unwrap_or(DEFAULT_PERIOD_US);
    if period == 0 {
        return Err(SizeError::Period);
    }
    // cgroup v1's -1, like 0 and absence, is "no limit" (config-linux.md, CPU).
    let Some(quota) = quota.and_then(|q| u64::try_from(q).ok()).filter(|q| *q > 0) else { return Ok(1) };
    let cpus = quota.div_ceil(period);
    u8::try_from(cpus).ok().filter(|c| *c <= MAX_VCPUS).ok_or(SizeError::Vcpus { quota, period, cpus })
}

/// How many CPUs there must be for a list of them (cpuset(7), "List format").
fn up_to_last(list: &str) -> Result<u8, SizeError> {
    let wrong = || SizeError::Cpus(list.chars().take(64).collect());
    let number = |text: &str| text.trim().parse::<u8>().ok().filter(|cpu| *cpu < MAX_VCPUS).ok_or_else(wrong);
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

fn memory_mib(limit: Option<i64>) -> Result<u32, SizeError> {
    // -1 is "no limit" (config-linux.md, Memory).
    let Some(limit) = limit.and_then(|l| u64::try_from(l).ok()).filter(|l| *l > 0) else {
        return Ok(DEFAULT_MEMORY_MIB);
    };
    u32::try_from(with_overhead(limit))
        .ok()
        .filter(|t| *t <= MAX_MEMORY_MIB)
        .ok_or(SizeError::Memory { limit })
}

/// The memory in MiB of a machine whose containers may use so many bytes.
fn with_overhead(limit: u64) -> u64 {
    let limit_mib = limit.div_ceil(1 << 20);
    let total = (limit_mib + limit_mib / 32 + OVERHEAD_MIB).next_multiple_of(MEM_BLOCK_MIB.into());
    total.max(MIN_MEMORY_MIB.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quota_is_rounded_up_to_whole_cpus() {
        assert_eq!(vcpus(None, None), Ok(1));
        assert_eq!(vcpus(Some(-1), Some(100_000)), Ok(1));
        assert_eq!(vcpus(Some(1), Some(100_000)), Ok(1));
        assert_eq!(vcpus(Some(150_000), None), Ok(2));
        assert_eq!(vcpus(Some(200_000), Some(100_000)), Ok(2));
        assert_eq!(vcpus(Some(3_200_000), Some(100_000)), Ok(32));
    }

    #[test]
    fn every_cpu_of_a_list_is_there() {
        assert_eq!((up_to_last(""), up_to_last("0"), up_to_last("3,1-2")), (Ok(0), Ok(1), Ok(4)));
        for bad in ["32", "a", "2-1", "1,,2", "-1", "0-"] {
            assert_eq!(up_to_last(bad), Err(SizeError::Cpus(bad.to_owned())), "{bad}");
        }
    }

    #[test]
    fn impossible_cpus_are_refused() {
        assert!(matches!(vcpus(Some(3_200_001), Some(100_000)), Err(SizeError::Vcpus { cpus: 33, .. })));
        assert!(matches!(vcpus(Some(i64::MAX), Some(1)), Err(SizeError::Vcpus { .. })));
        assert_eq!(vcpus(Some(1), Some(0)), Err(SizeError::Period));
    }

    #[test]
    fn size_of_a_pod_is_what_its_containers_come_to() {
        let size = |annotations: &[(&str, &str)]| {
            let mut spec = Spec::default();
            let all = annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            spec.set_annotations(Some(all.collect()));
            VmSize::for_spec(&spec)
        };
        let all = [(POD_QUOTA, "150000"), (POD_PERIOD, "100000"), (POD_MEMORY, "536870912")];
        let pod = size(&all).unwrap();
        assert_eq!((pod.vcpus.boot, pod.memory_mib), (2, 592));
        // What containerd says of a pod without limits.
        let unlimited = size(&[(POD_QUOTA, "0"), (POD_PERIOD, "0"), (POD_MEMORY, "0")]);
        assert_eq!(unlimited, size(&[]));
        for name in [POD_QUOTA, POD_MEMORY] {
            let error = size(&[(name, "much")]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn memory_limit_gets_the_guests_own_need_on_top() {
        assert_eq!(memory_mib(None), Ok(512));
        assert_eq!(memory_mib(Some(-1)), Ok(512));
        assert_eq!(memory_mib(Some(1)), Ok(128));
        assert_eq!(memory_mib(Some(64 << 20)), Ok(130));
        assert_eq!(memory_mib(Some(512 << 20)), Ok(592));
        assert!(matches!(memory_mib(Some(i64::MAX)), Err(SizeError::Memory { .. })));
        assert!(matches!(memory_mib(Some(1 << 40)), Err(SizeError::Memory { .. })));
    }

    /// One that starts with 1 vCPU and 512 MiB.
    const SMALL: VmSize =
        VmSize { vcpus: VcpuConfig { boot: 1, max: 4 }, memory_mib: 512, max_memory_mib: 2048 };

    fn demand(json: &str) -> Demand {
        Demand::default().updated(&serde_json::from_str(json).unwrap()).unwrap()
    }

    #[test]
    fn room_is_no_less_than_there_is_at_the_start() {
        let size = VmSize::with_room(1, 512);
        assert_eq!((size.vcpus, size.memory_mib), (VcpuConfig { boot: 1, max: ROOM_VCPUS }, 512));
        assert_eq!(size.max_memory_mib % MEM_BLOCK_MIB, 0);
        assert!((512..=MAX_MEMORY_MIB).contains(&size.max_memory_mib));
        let size = VmSize::with_room(ROOM_VCPUS + 1, MAX_MEMORY_MIB);
        assert_eq!((size.vcpus.max, size.max_memory_mib), (ROOM_VCPUS + 1, MAX_MEMORY_MIB));
    }

    #[test]
    fn demands_are_added_up_before_they_are_rounded() {
        let total = |demands: &[&str]| {
            let all: Vec<Demand> = demands.iter().map(|json| demand(json)).collect();
            SMALL.total(&all).map(|total| (total.vcpus, total.memory_mib))
        };
        let half = r#"{"cpu":{"quota":50000},"memory":{"limit":104857600}}"#;
        let third = r#"{"cpu":{"quota":50000,"period":150000}}"#;
        assert_eq!(total(&[]), Ok((1, 512)));
        assert_eq!(total(&["{}", r#"{"cpu":{"quota":-1},"memory":{"limit":-1}}"#]), Ok((1, 512)));
        assert_eq!(total(&[half, half]), Ok((1, 512)));
        assert_eq!(total(&[half, half, half]), Ok((2, 512)));
        assert_eq!(total(&[third, third, third]), Ok((1, 512)));
        assert_eq!(total(&[half, half, half, half, half]), Ok((3, 500 + 15 + 64 + 1)));
        assert_eq!(total(&[half, r#"{"cpu":{"cpus":"0,3"}}"#]), Ok((4, 512)));
        assert_eq!(
            total(&[r#"{"cpu":{"quota":9223372036854775807,"period":1}}"#, half]),
            Err(SizeError::RoomVcpus { cpus: u64::MAX.div_ceil(MILLION), most: 4 })
        );
        let huge = r#"{"memory":{"limit":9223372036854775807}}"#;
        assert!(matches!(total(&[huge, huge, huge]), Err(SizeError::RoomMemory { most_mib: 2048, .. })));
    }

    #[test]
    fn total_of_what_the_machine_was_made_for_is_its_size_at_the_start() {
        for (quota, limit) in [(1, 1), (150_000, 64 << 20), (400_000, 512 << 20)] {
            let json = format!(r#"{{"cpu":{{"quota":{quota}}},"memory":{{"limit":{limit}}}}}"#);
            let mut spec = Spec::default();
            let linux = format!(r#"{{"resources":{json}}}"#);
            spec.set_linux(Some(serde_json::from_str(&linux).unwrap()));
            let size = VmSize::for_spec(&spec).unwrap();
            assert_eq!(Demand::of(&spec), Ok(demand(&json)));
            assert_eq!(size.total([&demand(&json)]), Ok(size.at_start()));
        }
    }

    #[test]
    fn what_an_update_does_not_name_stays() {
        let before = demand(r#"{"cpu":{"quota":50000,"period":20000,"cpus":"0-1"},"memory":{"limit":4096}}"#);
        let updated = |json: &str| before.updated(&serde_json::from_str(json).unwrap()).unwrap();
        for nothing in ["{}", r#"{"cpu":{"quota":0,"period":0,"cpus":""},"memory":{"limit":0}}"#] {
            assert_eq!(updated(nothing), before);
        }
        assert_eq!(updated(r#"{"cpu":{"quota":20000}}"#).millionths(), MILLION);
        // A period without a quota is one without a limit.
        assert_eq!(updated(r#"{"cpu":{"period":10000}}"#).millionths(), 0);
        assert_eq!(updated(r#"{"memory":{"limit":-1}}"#), Demand { memory: 0, ..before.clone() });
        assert_eq!(updated(r#"{"cpu":{"cpus":"0"}}"#), Demand { cpus: 1, ..before.clone() });
        let wrong = serde_json::from_str(r#"{"cpu":{"cpus":"a"}}"#).unwrap();
        assert_eq!(before.updated(&wrong), Err(SizeError::Cpus("a".to_owned())));
    }
}
