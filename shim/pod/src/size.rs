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

use std::str::FromStr;

use kvrun_vmm_api::VcpuConfig;
use kvrun_vmm_api::config::{MAX_MEMORY_MIB, MAX_VCPUS};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, Spec};

/// Memory of a machine whose container has no limit, in MiB: the least that common server software starts in.
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// The smallest machine we start, in MiB: a smaller one saves the host nothing and leaves the guest no page cache.
pub const MIN_MEMORY_MIB: u32 = 128;
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
    /// Too much memory.
    #[error(
        "linux.resources.memory.limit {limit} is more than a virtual machine can have ({MAX_MEMORY_MIB} MiB with its overhead): lower it, or leave it out for the default"
    )]
    Memory {
        /// Bytes.
        limit: u64,
    },
}

/// The size of a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmSize {
    /// Virtual CPUs.
    pub vcpus: VcpuConfig,
    /// Memory in MiB.
    pub memory_mib: u32,
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
        Ok(Self { vcpus: VcpuConfig { boot: vcpus, max: vcpus }, memory_mib: memory_mib(limit)? })
    }
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
    let limit_mib = limit.div_ceil(1 << 20);
    let total = (limit_mib + limit_mib / 32 + OVERHEAD_MIB).next_multiple_of(2);
    let total =
        u32::try_from(total).ok().filter(|t| *t <= MAX_MEMORY_MIB).ok_or(SizeError::Memory { limit })?;
    Ok(total.max(MIN_MEMORY_MIB))
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
}
