//! `process`: what a process is given before its program runs, in the order in which privileges allow it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy,
    PosixRlimit, PosixRlimitType, Process, Scheduler, User,
};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{CpuSet, sched_setaffinity, set_keep_capabilities, set_no_new_privs};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::capabilities::Sets;
use super::error::{SetupError, system};
use super::{in_root, sys};

/// The most of `/etc/passwd` that is read for the home directory, in bytes.
const PASSWD_MAX: u64 = 1 << 20;

/// Keeps processes of other containers from tracing this one, or from opening what it has open, while it still is ours. Exec ends that.
///
/// # Errors
///
/// prctl(2).
pub fn hide() -> Result<(), SetupError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(system("hide the process"))
}

/// Sets `process.oomScoreAdj` of this process and those it makes.
///
/// # Errors
///
/// [`SetupError`].
pub fn set_oom_score(process: &Process) -> Result<(), SetupError> {
    let Some(score) = process.oom_score_adj() else { return Ok(()) };
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
        .map_err(system(format!("process.oomScoreAdj: set {score}")))
}

/// Sets what needs our privileges in the guest, of the process `pid`: scheduler and I/O priority. It must not fork before its program runs.
///
/// # Errors
///
/// [`SetupError`].
pub fn schedule(pid: i32, process: &Process) -> Result<(), SetupError> {
    if let Some(scheduler) = process.scheduler() {
        sys::sched_setattr(pid, sched_attr(scheduler)?)
            .map_err(system(format!("process.scheduler: set {}", scheduler.policy())))?;
    }
    if let Some(priority) = process.io_priority() {
        let class = match priority.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        let level = u32::try_from(priority.priority()).ok().filter(|level| *level < 8).ok_or_else(|| {
            SetupError::field(
                "process.ioPriority.priority",
                format!("is {}: it must be from 0 to 7", priority.priority()),
            )
        })?;
        sys::ioprio_set(pid, class, level).map_err(system("process.ioPriority: set"))?;
    }
    Ok(())
}

/// `SCHED_*` and `SCHED_FLAG_*` of Linux 6.12 include/uapi/linux/sched.h.
fn sched_attr(scheduler: &Scheduler) -> Result<sys::SchedAttr, SetupError> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    let priority = scheduler.priority().unwrap_or(0);
    let priority = u32::try_from(priority).map_err(|_| {
        SetupError::field("process.scheduler.priority", format!("is {priority}: it must not be negative"))
    })?;
    Ok(sys::SchedAttr {
        policy,
        flags,
        priority,
        nice: scheduler.nice().unwrap_or(0),
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..sys::SchedAttr::default()
    })
}

/// Binds a process (`None`: this one, and those it makes) to CPUs: "0-2,7".
///
/// # Errors
///
/// [`SetupError`].
pub fn set_affinity(pid: Option<i32>, field: &str, list: &str) -> Result<(), SetupError> {
    let set = parse_cpus(list).ok_or_else(|| {
        SetupError::field(field, format!("is {list:?}: it must be a list of CPUs such as \"0-2,7\""))
    })?;
    sched_setaffinity(pid.and_then(rustix::process::Pid::from_raw), &set)
        .map_err(system(format!("{field}: bind the process to the CPUs {list}")))
}

fn parse_cpus(list: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    Some(set)
}

/// Sets `linux.personality`.
///
/// # Errors
///
/// [`SetupError`].
pub fn set_personality(personality: Option<&LinuxPersonality>) -> Result<(), SetupError> {
    let Some(personality) = personality else { return Ok(()) };
    if personality.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        // config-linux.md, "Personality": "Additional flags to apply. Currently no flag values are supported."
        return Err(SetupError::field(
            "linux.personality.flags",
            "has flags, of which the specification knows none",
        ));
    }
    // Linux 6.12 include/uapi/linux/personality.h: PER_LINUX, PER_LINUX32.
    let value = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    };
    sys::personality(value).map_err(system("linux.personality: set"))
}

/// Becomes the user with the rights that `process` says: limits, groups, IDs, capabilities, `no_new_privs`, umask. `before_drop` runs while all
/// privileges are there still.
///
/// # Errors
///
/// [`SetupError`].
pub fn become_user(
    process: &Process,
    before_drop: impl FnOnce() -> Result<(), SetupError>,
) -> Result<(), SetupError> {
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        set_limit(index, limit)?;
    }
    let cwd = process.cwd();
    // As root if root may: the user need not see the way there. Else, in a moment, as the user: root may not be let into a
    // directory of another user (virtio-fs of an NFS export, FUSE).
    let later = match rustix::process::chdir(cwd.as_path()) {
        Ok(()) => false,
        Err(Errno::ACCESS | Errno::PERM) => true,
        Err(errno) => return Err(change_directory(cwd)(errno)),
    };
    if process.no_new_privileges() == Some(true) {
        set_no_new_privs(true).map_err(system("process.noNewPrivileges: set"))?;
    }
    before_drop()?;
    let capabilities = Sets::new(process.capabilities().as_ref());
    capabilities.bound()?;
    set_ids(process.user())?;
    capabilities.apply()?;
    if later {
        rustix::process::chdir(cwd.as_path()).map_err(change_directory(cwd))?;
    }
    check_directory(cwd)?;
    // The specification has no default; 0022 is what runc and crun leave a container with.
    let umask = process.user().umask().unwrap_or(0o022);
    rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    Ok(())
}

fn change_directory(cwd: &Path) -> impl FnOnce(Errno) -> SetupError {
    system(format!("process.cwd: change to {}", cwd.display()))
}

/// A working directory outside of the root would be a way out (runc's CVE-2024-21626): getcwd(2) says "(unreachable)" of it.
fn check_directory(cwd: &Path) -> Result<(), SetupError> {
    let found = rustix::process::getcwd(Vec::new()).map_err(change_directory(cwd))?;
    if found.to_bytes().starts_with(b"/") {
        return Ok(());
    }
    Err(SetupError::field("process.cwd", format!("{} is outside of the container", cwd.display())))
}

fn set_ids(user: &User) -> Result<(), SetupError> {
    use rustix::fs::{Gid, Uid};
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    set_keep_capabilities(true).map_err(system("keep the capabilities"))?;
    set_thread_groups(&groups).map_err(system("process.user.additionalGids: set"))?;
    let gid = Gid::from_raw(user.gid());
    set_thread_res_gid(gid, gid, gid).map_err(system(format!("process.user.gid: set {}", user.gid())))?;
    let uid = Uid::from_raw(user.uid());
    set_thread_res_uid(uid, uid, uid).map_err(system(format!("process.user.uid: set {}", user.uid())))?;
    set_keep_capabilities(false).map_err(system("let go of the capabilities"))
}

fn set_limit(index: usize, limit: &PosixRlimit) -> Result<(), SetupError> {
    let resource = match limit.typ() {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    };
    let value = libc::rlimit { rlim_cur: limit.soft(), rlim_max: limit.hard() };
    // SAFETY: the kernel reads `value`, which outlives the call.
    if unsafe { libc::setrlimit(resource, &raw const value) } == 0 {
        return Ok(());
    }
    let what =
        format!("process.rlimits[{index}]: set {} to {} and {}", limit.typ(), limit.soft(), limit.hard());
    Err(system(what)(std::io::Error::last_os_error()))
}

/// The environment of the program: the config's, and `HOME` as the container's `/etc/passwd` has it where the config leaves it out.
#[must_use]
pub fn environment(process: &Process) -> Vec<String> {
    let mut list = process.env().clone().unwrap_or_default();
    let is_home = |variable: &String| variable.strip_prefix("HOME=").is_some_and(|home| !home.is_empty());
    if !list.iter().any(is_home) {
        list.retain(|variable| !variable.starts_with("HOME="));
        let home = home_directory(process.user().uid()).unwrap_or_else(|| "/".to_owned());
        list.push(format!("HOME={home}"));
    }
    list
}

/// The file is a stranger's: it may be a FIFO, or endless.
fn home_directory(uid: u32) -> Option<String> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let file = in_root::open_with(&root, Path::new("etc/passwd"), flags, ResolveFlags::empty()).ok()?;
    if FileType::from_raw_mode(fstat(&file).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    BufReader::new(File::from(file).take(PASSWD_MAX)).lines().map_while(Result::ok).find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let is_user = fields.get(2)?.parse() == Ok(uid);
        (is_user && fields.len() >= 6 && !fields[5].is_empty()).then(|| fields[5].to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read() {
        let cpus = |list| {
            let set = parse_cpus(list)?;
            Some((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>())
        };
        assert_eq!(cpus("0-2,7"), Some(vec![0, 1, 2, 7]));
        assert_eq!(cpus("3"), Some(vec![3]));
        for bad in ["", "2-1", "a", "0-", "1,,2", "99999999"] {
            assert_eq!(cpus(bad), None, "{bad}");
        }
    }

    #[test]
    fn home_is_added_where_it_is_missing_or_empty() {
        let process: Process = serde_json::from_str(
            r#"{"user":{"uid":4000000,"gid":0},"cwd":"/","args":["x"],"env":["A=b","HOME="]}"#,
        )
        .unwrap();
        assert_eq!(environment(&process), ["A=b", "HOME=/"]);
        let process: Process = serde_json::from_str(
            r#"{"user":{"uid":0,"gid":0},"cwd":"/","args":["x"],"env":["HOME=/x","A=b"]}"#,
        )
        .unwrap();
        assert_eq!(environment(&process), ["HOME=/x", "A=b"]);
    }
}
