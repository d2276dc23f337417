//! The rules for what a spec may say, mounts aside.
//!
//! Two kinds: what the specification forbids, and what it allows but we cannot do, because the container runs in a kernel of its own: host
//! namespaces, host devices, hooks on the host, security modules the guest does not have.

use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDeviceType, LinuxResources, LinuxSeccompAction, Process, Spec};

use super::{Fault, mounts, namespaces};

/// Character devices the guest has of its own: major, minor, where it has them.
const GUEST_DEVICES: [(i64, i64, &str); 10] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (5, 0, "/dev/tty"),
    (5, 1, "/dev/console"),
    (5, 2, "/dev/ptmx"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
];

/// Where the guest has a character device of its own.
pub(super) fn guest_device(major: i64, minor: i64) -> Option<&'static str> {
    GUEST_DEVICES.iter().find(|known| (known.0, known.1) == (major, minor)).map(|known| known.2)
}

/// The longest host and domain name in bytes (`__NEW_UTS_LEN`, Linux include/uapi/linux/utsname.h).
const UTS_LEN: usize = 64;

/// The sysctls that belong to a namespace, beside `net.*` and `fs.mqueue.*`. (`kernel.hostname` is the spec's `hostname`.)
const SYSCTLS: [&str; 9] = [
    "kernel.domainname",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
];

/// Finds the first fault of a spec.
pub(super) fn check(spec: &Spec) -> Result<(), Fault> {
    version(spec.version())?;
    for (field, present) in [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ] {
        refuse(
            present,
            field,
            "is not supported: kvrun runs Linux containers in machines it configures itself; remove it",
        )?;
    }
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| Fault::new("root", "is missing: root.path must name the root file system"))?;
    refuse(
        root.path().as_os_str().is_empty(),
        "root.path",
        "is missing or empty: it must name the root file system",
    )?;
    let process = spec.process().as_ref();
    process_fields(process.ok_or_else(|| Fault::new("process", "is missing: it must say what to run"))?)?;
    mounts::check(spec)?;
    hooks(spec)?;
    for (field, name) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        let length = name.as_ref().map_or(0, String::len);
        refuse(length > UTS_LEN, field, format!("has {length} bytes: it must have no more than {UTS_LEN}"))?;
    }
    let missing = || Fault::new("linux", "is missing: kvrun runs Linux containers");
    linux(spec, spec.linux().as_ref().ok_or_else(missing)?)
}

/// An error if `wrong`.
pub(super) fn refuse(wrong: bool, field: impl Into<String>, problem: impl Into<String>) -> Result<(), Fault> {
    if wrong { Err(Fault::new(field, problem)) } else { Ok(()) }
}

/// config.md, "Specification version": semantic versioning, of which the major version says whether it is compatible.
fn version(version: &str) -> Result<(), Fault> {
    refuse(
        version.is_empty(),
        "ociVersion",
        "is missing: it must be the version of the OCI runtime-spec, such as \"1.2.0\"",
    )?;
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<Option<u32>> = core.split('.').map(|n| n.parse().ok()).collect();
    let [Some(major), Some(_), Some(_)] = numbers[..] else {
        return Err(Fault::new(
            "ociVersion",
            format!("{version:?} is not a version: it must be such as \"1.2.0\""),
        ));
    };
    refuse(major != 1, "ociVersion", format!("{version:?} is not supported: kvrun supports 1.x.y"))
}

pub(super) fn process_fields(process: &Process) -> Result<(), Fault> {
    let args = process.args().as_deref().unwrap_or_default();
    refuse(args.is_empty(), "process.args", "is missing or empty: it must say what to run")?;
    refuse(args[0].is_empty(), "process.args[0]", "is empty: it must name the program to run")?;
    for (index, arg) in args.iter().enumerate() {
        refuse(arg.contains('\0'), format!("process.args[{index}]"), "contains a NUL character")?;
    }
    let cwd = process.cwd();
    refuse(!cwd.is_absolute(), "process.cwd", format!("{cwd:?} is not absolute: it must start with /"))?;
    for (index, variable) in process.env().iter().flatten().enumerate() {
        let valid = variable.find('=').is_some_and(|at| at > 0) && !variable.contains('\0');
        refuse(!valid, format!("process.env[{index}]"), "is not of the form NAME=value")?;
    }
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        let (field, typ) = (format!("process.rlimits[{index}]"), limit.typ());
        let (soft, hard) = (limit.soft(), limit.hard());
        refuse(
            soft > hard,
            &field,
            format!("({typ}) has the soft limit {soft} above the hard limit {hard}"),
        )?;
        // config.md, "POSIX process": a duplicate is an error.
        let earlier = process.rlimits().iter().flatten().take(index).any(|other| other.typ() == typ);
        refuse(earlier, field, format!("({typ}) is there twice; remove one"))?;
    }
    refuse(
        process.user().username().is_some(),
        "process.user.username",
        "is for Windows; use process.user.uid",
    )?;
    refuse(process.command_line().is_some(), "process.commandLine", "is for Windows; use process.args")?;
    let label = process.selinux_label().as_deref().unwrap_or_default();
    refuse(
        !label.is_empty(),
        "process.selinuxLabel",
        "is set, but the guest kernel has no SELinux; remove it",
    )?;
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    refuse(
        !is_default_apparmor_profile(profile),
        "process.apparmorProfile",
        format!("is {profile:?}, but the guest kernel has no AppArmor; remove it"),
    )?;
    super::process::check(process)
}

/// Whether an AppArmor profile is none, or one that an engine asks for where its user has asked for none: of containerd, docker, nerdctl, CRI-O
/// and podman. Those keep containers away from a kernel that they share with the host, which these do not.
pub fn is_default_apparmor_profile(profile: &str) -> bool {
    matches!(
        profile,
        "" | "unconfined"
            | "cri-containerd.apparmor.d"
            | "docker-default"
            | "nerdctl-default"
            | "crio-default"
    ) || profile.starts_with("containers-default-")
}

fn hooks(spec: &Spec) -> Result<(), Fault> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    #[allow(deprecated, reason = "deprecated in the specification, and in use")]
    let prestart = hooks.prestart();
    let all = [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in all {
        for (index, hook) in list.iter().flatten().enumerate() {
            let (field, path) = (format!("hooks.{name}[{index}]"), hook.path());
            // config.md, "POSIX-platform Hooks".
            let problem = format!("{path:?} is not absolute: it must start with /");
            refuse(!path.is_absolute(), format!("{field}.path"), problem)?;
            let none = hook.timeout().is_some_and(|timeout| timeout <= 0);
            refuse(none, format!("{field}.timeout"), "must be greater than 0")?;
        }
    }
    Ok(())
}

fn linux(spec: &Spec, linux: &Linux) -> Result<(), Fault> {
    namespaces::check(spec, linux)?;
    devices(spec, linux)?;
    if let Some(resources) = linux.resources() {
        limits(resources)?;
    }
    for name in linux.sysctl().iter().flatten().map(|(name, _)| name) {
        // sysctl(8): "kernel/shmmax" is the same.
        let dotted = name.replace('/', ".");
        let known = SYSCTLS.contains(&dotted.as_str())
            || dotted.starts_with("net.")
            || dotted.starts_with("fs.mqueue.");
        let problem =
            format!("has {name:?}, which does not belong to a namespace of the container; remove it");
        refuse(!known, "linux.sysctl", problem)?;
    }
    if let Some(seccomp) = linux.seccomp() {
        let notifies = seccomp.default_action() == LinuxSeccompAction::ScmpActNotify
            || seccomp.syscalls().iter().flatten().any(|s| s.action() == LinuxSeccompAction::ScmpActNotify);
        let problem = "asks for a seccomp agent on the host, which cannot serve a guest; remove SCMP_ACT_NOTIFY, listenerPath and listenerMetadata";
        let listens = seccomp.listener_path().is_some() || seccomp.listener_metadata().is_some();
        refuse(notifies || listens, "linux.seccomp", problem)?;
    }
    let label = linux.mount_label().as_deref().unwrap_or_default();
    refuse(!label.is_empty(), "linux.mountLabel", "is set, but the guest kernel has no SELinux; remove it")?;
    refuse(
        linux.intel_rdt().is_some(),
        "linux.intelRdt",
        "is not supported: the guest has no resctrl; remove it",
    )?;
    refuse(
        linux.memory_policy().is_some(),
        "linux.memoryPolicy",
        "is not supported: the guest has one NUMA node; remove it",
    )?;
    let devices = linux.net_devices().as_ref().is_some_and(|d| !d.is_empty());
    refuse(
        devices,
        "linux.netDevices",
        "is not supported: a host network device cannot be moved into the guest; remove it",
    )?;
    match linux.rootfs_propagation().as_deref() {
        None | Some("" | "private" | "rprivate" | "slave" | "rslave" | "unbindable" | "runbindable") => {
            Ok(())
        }
        Some(propagation @ ("shared" | "rshared")) => {
            let problem = format!(
                "{propagation:?} is not supported: a mount made in the guest cannot appear on the host; use rslave"
            );
            Err(Fault::new("linux.rootfsPropagation", problem))
        }
        Some(other) => {
            let problem = format!(
                "{other:?} is not a propagation: it must be one of private, rprivate, slave, rslave, unbindable"
            );
            Err(Fault::new("linux.rootfsPropagation", problem))
        }
    }
}

fn devices(spec: &Spec, linux: &Linux) -> Result<(), Fault> {
    let bound = spec.mounts().iter().flatten().any(|mount| {
        mounts::is_bind(mount) && mount.destination().components().eq(Path::new("/dev").components())
    });
    let any = linux.devices().as_ref().is_some_and(|devices| !devices.is_empty());
    let problem =
        "has devices, but /dev is a bind mount: they would be made in its source; remove one of the two";
    refuse(bound && any, "linux.devices", problem)?;
    for (index, device) in linux.devices().iter().flatten().enumerate() {
        let field = format!("linux.devices[{index}]");
        let path = device.path();
        refuse(
            !path.is_absolute(),
            format!("{field}.path"),
            format!("{path:?} is not absolute: it must start with /"),
        )?;
        let can_be = match device.typ() {
            // Block devices of the host become disks of the machine.
            LinuxDeviceType::P | LinuxDeviceType::B => true,
            LinuxDeviceType::C | LinuxDeviceType::U => guest_device(device.major(), device.minor()).is_some(),
            LinuxDeviceType::A => false,
        };
        let problem = format!(
            "{} ({} {}:{}) is a device of the host, which the guest does not have; remove it",
            path.display(),
            device.typ().as_str(),
            device.major(),
            device.minor()
        );
        refuse(!can_be, field, problem)?;
    }
    Ok(())
}

fn limits(resources: &LinuxResources) -> Result<(), Fault> {
    if let Some(cpu) = resources.cpu() {
        let mems = cpu.mems().as_deref().unwrap_or_default();
        let problem =
            format!("{mems:?} names memory nodes that the guest does not have: it has node 0; remove it");
        refuse(!matches!(mems, "" | "0"), "linux.resources.cpu.mems", problem)?;
        let realtime =
            cpu.realtime_runtime().is_some_and(|r| r != 0) || cpu.realtime_period().is_some_and(|p| p != 0);
        refuse(
            realtime,
            "linux.resources.cpu",
            "has realtimeRuntime or realtimePeriod, which cgroup v2 does not have; remove them",
        )?;
    }
    if let Some(memory) = resources.memory() {
        let disabled = memory.disable_oom_killer() == Some(true);
        refuse(
            disabled,
            "linux.resources.memory.disableOOMKiller",
            "is true, which cgroup v2 does not have; remove it",
        )?;
    }
    if let Some(io) = resources.block_io() {
        let named = [
            ("weightDevice", io.weight_device().as_ref().is_some_and(|l| !l.is_empty())),
            ("throttleReadBpsDevice", io.throttle_read_bps_device().as_ref().is_some_and(|l| !l.is_empty())),
            (
                "throttleWriteBpsDevice",
                io.throttle_write_bps_device().as_ref().is_some_and(|l| !l.is_empty()),
            ),
            (
                "throttleReadIOPSDevice",
                io.throttle_read_iops_device().as_ref().is_some_and(|l| !l.is_empty()),
            ),
            (
                "throttleWriteIOPSDevice",
                io.throttle_write_iops_device().as_ref().is_some_and(|l| !l.is_empty()),
            ),
        ];
        for (name, present) in named {
            let problem = "names block devices of the host, which the guest does not have; remove it";
            refuse(present, format!("linux.resources.blockIO.{name}"), problem)?;
        }
    }
    if let Some(network) = resources.network() {
        let set =
            network.class_id().is_some() || network.priorities().as_ref().is_some_and(|p| !p.is_empty());
        refuse(
            set,
            "linux.resources.network",
            "has classID or priorities, which cgroup v2 does not have; remove them",
        )?;
    }
    let rdma = resources.rdma().as_ref().is_some_and(|r| !r.is_empty());
    refuse(rdma, "linux.resources.rdma", "is not supported: the guest has no RDMA devices; remove it")
}
