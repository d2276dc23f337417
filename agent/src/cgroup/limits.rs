//! `linux.resources` as files of a cgroup (config-linux.md, "Control groups"; Linux 6.12 Documentation/admin-guide/cgroup-v2.rst). Where
//! the specification still speaks of cgroup v1, the value is converted as runc and crun do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources, LinuxThrottleDevice,
};

/// Why limits are not in force.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// A value that makes no sense, or one that cgroup v2 does not have.
    #[error("{field} {problem}")]
    Field {
        /// As a path in the config.
        field: String,
        /// The rest of the sentence.
        problem: String,
    },
    /// The kernel does not take it.
    #[error("{field}: cannot write {value:?} to {file} of the cgroup")]
    Write {
        /// As a path in the config.
        field: String,
        /// Which file.
        file: String,
        /// What was written.
        value: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// There cannot be huge pages.
    #[error("linux.resources.hugepageLimits: cannot have the kernel make huge pages")]
    HugePages(#[source] io::Error),
}

/// How many huge pages of the usual size the kernel makes as they are asked for, beside those that it keeps, of which there are none
/// (Linux 6.12 Documentation/admin-guide/mm/hugetlbpage.rst).
const HUGE_PAGES: &str = "/proc/sys/vm/nr_overcommit_hugepages";

/// What is to be written, in order.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    field: String,
    file: String,
    value: String,
}

fn refuse<T>(field: &str, problem: impl Into<String>) -> Result<T, LimitError> {
    Err(LimitError::Field { field: format!("linux.resources.{field}"), problem: problem.into() })
}

/// Sets the limits, devices aside ([`super::device_filter`]), of the cgroup `dir`. What `resources` does not name stays as it is.
///
/// # Errors
///
/// [`LimitError`]; limits before the one it names are in force then.
pub fn apply(dir: &Path, resources: &LinuxResources) -> Result<(), LimitError> {
    if let Some(memory) = resources.memory() {
        check_usage(dir, memory)?;
    }
    for Setting { field, file, value } in settings(resources)? {
        fs::write(dir.join(&file), &value).map_err(|source| LimitError::Write {
            field,
            file,
            value,
            source,
        })?;
    }
    // From the first container on that may have some: who has no limit is not charged for them elsewhere.
    if resources.hugepage_limits().iter().flatten().any(|limit| limit.limit() > 0) {
        fs::write(HUGE_PAGES, u32::MAX.to_string()).map_err(LimitError::HugePages)?;
    }
    Ok(())
}

/// `memory.checkBeforeUpdate`: a limit below what is used now would kill.
fn check_usage(dir: &Path, memory: &LinuxMemory) -> Result<(), LimitError> {
    let (Some(true), Some(limit)) = (memory.check_before_update(), memory.limit()) else { return Ok(()) };
    let used = fs::read_to_string(dir.join("memory.current")).ok();
    let used: Option<i64> = used.and_then(|text| text.trim().parse().ok());
    match used {
        Some(used) if limit >= 0 && used > limit => refuse(
            "memory.limit",
            format!("{limit} is below the {used} bytes in use, and memory.checkBeforeUpdate is true"),
        ),
        _ => Ok(()),
    }
}

fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, LimitError> {
    let mut list = Vec::new();
    let mut set = |field: &str, file: &str, value: String| {
        list.push(Setting { field: format!("linux.resources.{field}"), file: file.to_owned(), value });
    };
    if let Some(value) = resources.memory() {
        memory(value, &mut set)?;
    }
    if let Some(value) = resources.cpu() {
        cpu(value, &mut set)?;
    }
    if let Some(value) = resources.pids() {
        pids(value, &mut set);
    }
    if let Some(value) = resources.block_io() {
        block_io(value, &mut set)?;
    }
    for (index, value) in resources.hugepage_limits().iter().flatten().enumerate() {
        huge_pages(index, value, &mut set)?;
    }
    let unified = resources.unified().iter().flatten();
    let mut unified: Vec<_> = unified.collect();
    // Their order means nothing, and a map has none.
    unified.sort_unstable();
    for (file, value) in unified {
        if !is_file_name(file) {
            return refuse("unified", format!("has {file:?}, which is not the name of a cgroup file"));
        }
        set(&format!("unified[{file:?}]"), file, value.clone());
    }
    Ok(list)
}

/// "CONTROLLER.NAME", and nothing that moves processes, removes the cgroup or hands it on.
fn is_file_name(name: &str) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    name.len() <= 255
        && name.bytes().all(fine)
        && !name.starts_with("cgroup.")
        && name.split_once('.').is_some_and(|(controller, rest)| !controller.is_empty() && !rest.is_empty())
}

/// -1 is "no limit".
fn bytes_or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn memory(memory: &LinuxMemory, set: &mut impl FnMut(&str, &str, String)) -> Result<(), LimitError> {
    let v1: [(&str, bool); 5] = [
        ("memory.kernel", memory.kernel().is_some_and(|n| n > 0)),
        ("memory.kernelTCP", memory.kernel_tcp().is_some_and(|n| n > 0)),
        ("memory.swappiness", memory.swappiness().is_some()),
        ("memory.disableOOMKiller", memory.disable_oom_killer() == Some(true)),
        ("memory.useHierarchy", memory.use_hierarchy() == Some(false)),
    ];
    if let Some((field, _)) = v1.iter().find(|(_, present)| *present) {
        return refuse(field, "is set, which cgroup v2 does not have; remove it");
    }
    // 0 is "not set", as with runc.
    let limit = memory.limit().filter(|limit| *limit != 0);
    let swap = memory.swap().filter(|swap| *swap != 0);
    // Swap before memory would be refused when both shrink; the other way round it is not, cgroup v2 counts them apart.
    if let Some(limit) = limit {
        set("memory.limit", "memory.max", bytes_or_max(limit));
    }
    match (swap, limit) {
        (None, _) => {}
        (Some(..0), _) => set("memory.swap", "memory.swap.max", "max".to_owned()),
        // The specification's swap is memory and swap together.
        (Some(swap), Some(limit @ 1..)) if swap >= limit => {
            set("memory.swap", "memory.swap.max", (swap - limit).to_string());
        }
        (Some(swap), Some(limit @ 1..)) => {
            return refuse("memory.swap", format!("{swap} is below memory.limit {limit}, which it includes"));
        }
        (Some(swap), _) => {
            return refuse("memory.swap", format!("{swap} needs a memory.limit, which it includes"));
        }
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        if limit.is_some_and(|limit| limit > 0 && reservation > limit) {
            return refuse("memory.reservation", format!("{reservation} is above memory.limit"));
        }
        set("memory.reservation", "memory.low", bytes_or_max(reservation));
    }
    Ok(())
}

/// `shares` 2 to 262144 to `cpu.weight` 1 to 10000.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn cpu(cpu: &LinuxCpu, set: &mut impl FnMut(&str, &str, String)) -> Result<(), LimitError> {
    if cpu.realtime_period().is_some_and(|n| n != 0) || cpu.realtime_runtime().is_some_and(|n| n != 0) {
        return refuse(
            "cpu",
            "has realtimeRuntime or realtimePeriod, which cgroup v2 does not have; remove them",
        );
    }
    for (field, file, list) in
        [("cpu.cpus", "cpuset.cpus", cpu.cpus()), ("cpu.mems", "cpuset.mems", cpu.mems())]
    {
        if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
            set(field, file, list.to_owned());
        }
    }
    // A weight cannot be given to an idle cgroup, nor a cgroup made idle that has one.
    if let Some(idle) = cpu.idle() {
        set("cpu.idle", "cpu.idle", idle.to_string());
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        set("cpu.shares", "cpu.weight", weight_of_shares(shares).to_string());
    }
    let (quota, period) = (cpu.quota().filter(|n| *n != 0), cpu.period().filter(|n| *n != 0));
    let burst = cpu.burst();
    // A burst must not be above the quota at any moment.
    if burst == Some(0) {
        set("cpu.burst", "cpu.max.burst", "0".to_owned());
    }
    match (quota, period) {
        (None, None) => {}
        (Some(quota), None) => set("cpu.quota", "cpu.max", bytes_or_max(quota)),
        (quota, Some(period)) => {
            set("cpu.quota", "cpu.max", format!("{} {period}", bytes_or_max(quota.unwrap_or(-1))));
        }
    }
    if let Some(burst) = burst.filter(|burst| *burst != 0) {
        set("cpu.burst", "cpu.max.burst", burst.to_string());
    }
    Ok(())
}

fn pids(pids: &LinuxPids, set: &mut impl FnMut(&str, &str, String)) {
    // As in runc and crun, 0 is "not set".
    if pids.limit() != 0 {
        set("pids.limit", "pids.max", bytes_or_max(pids.limit()));
    }
}

/// `weight` 10 to 1000 to `io.weight` 1 to 10000.
fn io_weight(field: &str, weight: u16) -> Result<u64, LimitError> {
    if !(10..=1000).contains(&weight) {
        return refuse(field, format!("is {weight}: it must be from 10 to 1000"));
    }
    Ok(1 + (u64::from(weight) - 10) * 9999 / 990)
}

fn block_io(io: &LinuxBlockIo, set: &mut impl FnMut(&str, &str, String)) -> Result<(), LimitError> {
    if io.leaf_weight().is_some_and(|weight| weight != 0) {
        return refuse("blockIO.leafWeight", "is set, which cgroup v2 does not have; remove it");
    }
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        set("blockIO.weight", "io.weight", format!("default {}", io_weight("blockIO.weight", weight)?));
    }
    for device in io.weight_device().iter().flatten() {
        let field = "blockIO.weightDevice";
        if device.leaf_weight().is_some_and(|weight| weight != 0) {
            return refuse(field, "has leafWeight, which cgroup v2 does not have; remove it");
        }
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let weight = io_weight(field, weight)?;
            set(field, "io.weight", format!("{}:{} {weight}", device.major(), device.minor()));
        }
    }
    let throttles: [(&str, &str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("throttleReadBpsDevice", "rbps", io.throttle_read_bps_device()),
        ("throttleWriteBpsDevice", "wbps", io.throttle_write_bps_device()),
        ("throttleReadIOPSDevice", "riops", io.throttle_read_iops_device()),
        ("throttleWriteIOPSDevice", "wiops", io.throttle_write_iops_device()),
    ];
    for (field, key, devices) in throttles {
        for device in devices.iter().flatten() {
            // 0 is "no limit" in cgroup v1, from which the specification has it.
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            let line = format!("{}:{} {key}={rate}", device.major(), device.minor());
            set(&format!("blockIO.{field}"), "io.max", line);
        }
    }
    Ok(())
}

fn huge_pages(
    index: usize,
    limit: &LinuxHugepageLimit,
    set: &mut impl FnMut(&str, &str, String),
) -> Result<(), LimitError> {
    let (field, size) = (format!("hugepageLimits[{index}]"), limit.page_size());
    let number =
        size.strip_suffix("KB").or_else(|| size.strip_suffix("MB")).or_else(|| size.strip_suffix("GB"));
    if !number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
        return refuse(&field, format!("has pageSize {size:?}: it must be such as \"2MB\""));
    }
    set(&field, &format!("hugetlb.{size}.max"), bytes_or_max(limit.limit()));
    Ok(())
}

/// Makes the cgroup `path` below `root`, and hands every controller of the root down to it.
///
/// # Errors
///
/// mkdir(2), the write of `cgroup.subtree_control`.
pub fn make(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let wanted = fs::read_to_string(root.join("cgroup.subtree_control"))?;
    let mut dir = root.to_owned();
    for (depth, name) in path.components().enumerate() {
        if depth > 0 {
            hand_down(&dir, &wanted)?;
        }
        dir.push(name);
        match fs::create_dir(&dir) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
    Ok(dir)
}

fn hand_down(dir: &Path, wanted: &str) -> io::Result<()> {
    let file = dir.join("cgroup.subtree_control");
    let present = fs::read_to_string(&file)?;
    let missing: Vec<String> = wanted
        .split_whitespace()
        .filter(|name| !present.split_whitespace().any(|other| other == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() { Ok(()) } else { fs::write(file, missing.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(json: &str) -> Result<Vec<(String, String)>, String> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let list = settings(&resources).map_err(|err| err.to_string())?;
        Ok(list.into_iter().map(|setting| (setting.file, setting.value)).collect())
    }

    fn lines(json: &str) -> Vec<String> {
        written(json).unwrap().into_iter().map(|(file, value)| format!("{file} {value}")).collect()
    }

    #[test]
    fn memory_is_converted() {
        assert_eq!(
            lines(r#"{"memory":{"limit":4096,"swap":12288,"reservation":2048}}"#),
            ["memory.max 4096", "memory.swap.max 8192", "memory.low 2048"]
        );
        assert_eq!(lines(r#"{"memory":{"limit":-1,"swap":-1}}"#), ["memory.max max", "memory.swap.max max"]);
        assert!(lines(r#"{"memory":{"limit":0,"swap":0,"useHierarchy":true,"kernel":-1}}"#).is_empty());
        for (json, field) in [
            (r#"{"memory":{"swap":4096}}"#, "linux.resources.memory.swap"),
            (r#"{"memory":{"limit":4096,"swap":1}}"#, "linux.resources.memory.swap"),
            (r#"{"memory":{"limit":1,"reservation":2}}"#, "linux.resources.memory.reservation"),
            (r#"{"memory":{"swappiness":10}}"#, "linux.resources.memory.swappiness"),
            (r#"{"memory":{"kernel":10}}"#, "linux.resources.memory.kernel"),
            (r#"{"memory":{"disableOOMKiller":true}}"#, "linux.resources.memory.disableOOMKiller"),
        ] {
            let text = written(json).unwrap_err();
            assert!(text.starts_with(&format!("{field} ")), "{text}");
        }
    }

    #[test]
    fn cpu_is_converted() {
        assert_eq!(
            lines(
                r#"{"cpu":{"shares":1024,"quota":50000,"period":100000,"burst":1000,"cpus":"0-1","mems":"0"}}"#
            ),
            [
                "cpuset.cpus 0-1",
                "cpuset.mems 0",
                "cpu.weight 39",
                "cpu.max 50000 100000",
                "cpu.max.burst 1000"
            ]
        );
        assert_eq!(lines(r#"{"cpu":{"quota":-1}}"#), ["cpu.max max"]);
        assert_eq!(lines(r#"{"cpu":{"period":50000}}"#), ["cpu.max max 50000"]);
        assert_eq!(lines(r#"{"cpu":{"idle":1,"shares":2}}"#), ["cpu.idle 1"]);
        assert_eq!((weight_of_shares(2), weight_of_shares(262_144)), (1, 10000));
        assert!(written(r#"{"cpu":{"realtimeRuntime":1}}"#).is_err());
    }

    #[test]
    fn the_others_are_converted() {
        assert_eq!(lines(r#"{"pids":{"limit":5}}"#), ["pids.max 5"]);
        assert_eq!(lines(r#"{"pids":{"limit":-1}}"#), ["pids.max max"]);
        assert_eq!(
            lines(
                r#"{"blockIO":{"weight":1000,"weightDevice":[{"major":8,"minor":0,"weight":10}],
                   "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":7}],
                   "throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":0}]}}"#
            ),
            ["io.weight default 10000", "io.weight 8:0 1", "io.max 8:0 rbps=7", "io.max 8:0 wiops=max"]
        );
        assert_eq!(
            lines(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":2097152}]}"#),
            ["hugetlb.2MB.max 2097152"]
        );
        assert_eq!(
            lines(r#"{"unified":{"memory.high":"1","cpu.weight":"5"}}"#),
            ["cpu.weight 5", "memory.high 1"]
        );
        for bad in ["../x", "cgroup.procs", "cgroup.kill", "memory", ".x", "a/b.c"] {
            assert!(written(&format!(r#"{{"unified":{{"{bad}":"1"}}}}"#)).is_err(), "{bad}");
        }
        assert!(written(r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}"#).is_err());
        assert!(written(r#"{"blockIO":{"weight":5}}"#).is_err());
    }
}
