//! The rules for `process` beyond its text: what the guest's kernel would refuse with a bare error number is refused here by name.

use oci_spec::runtime::{Capabilities, Process};

use super::Fault;
use super::check::refuse;

/// All capabilities that a kernel of the guest's version knows (Linux 6.12 include/uapi/linux/capability.h, `CAP_LAST_CAP`).
pub const CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

pub(super) fn check(process: &Process) -> Result<(), Fault> {
    if let Some(umask) = process.user().umask() {
        refuse(umask > 0o777, "process.user.umask", format!("is {umask:#o}: it must be no more than 0777"))?;
    }
    if let Some(score) = process.oom_score_adj() {
        let problem = format!("is {score}: it must be from -1000 to 1000");
        refuse(!(-1000..=1000).contains(&score), "process.oomScoreAdj", problem)?;
    }
    if let Some(priority) = process.io_priority() {
        let level = priority.priority();
        let problem = format!("is {level}: it must be from 0 to 7");
        refuse(!(0..8).contains(&level), "process.ioPriority.priority", problem)?;
    }
    if let Some(affinity) = process.exec_cpu_affinity() {
        for (name, list) in [("initial", affinity.initial()), ("final", affinity.cpu_affinity_final())] {
            let bad = list.as_deref().is_some_and(|list| !is_cpu_list(list));
            let problem = "is not a list of CPUs such as \"0-2,7\"";
            refuse(bad, format!("process.execCPUAffinity.{name}"), problem)?;
        }
    }
    capabilities(process)
}

/// cpuset(7), "List format".
pub(super) fn is_cpu_list(list: &str) -> bool {
    list.split(',').all(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<u16>(), last.parse::<u16>()) {
            (Ok(first), Ok(last)) => first <= last,
            _ => false,
        }
    })
}

/// capabilities(7), "Transformation of capabilities", and capset(2): which set must be within which.
fn capabilities(process: &Process) -> Result<(), Fault> {
    let Some(sets) = process.capabilities() else { return Ok(()) };
    let within = |name: &str, set: &Option<Capabilities>, outer_name: &str, outer: &Option<Capabilities>| {
        let mut outside: Vec<String> = set
            .iter()
            .flatten()
            .filter(|capability| !outer.as_ref().is_some_and(|outer| outer.contains(capability)))
            .filter_map(|capability| serde_json::to_value(capability).ok()?.as_str().map(str::to_owned))
            .collect();
        outside.sort_unstable();
        match outside.first() {
            None => Ok(()),
            Some(first) => Err(Fault::new(
                format!("process.capabilities.{name}"),
                format!(
                    "has {first}, which is not in {outer_name}: the kernel does not allow that; add it there"
                ),
            )),
        }
    };
    within("effective", sets.effective(), "permitted", sets.permitted())?;
    within("inheritable", sets.inheritable(), "bounding", sets.bounding())?;
    within("ambient", sets.ambient(), "permitted", sets.permitted())?;
    within("ambient", sets.ambient(), "inheritable", sets.inheritable())
}
