//! `linux.namespaces`, `linux.uidMappings`, `linux.gidMappings` and `linux.timeOffsets`: which namespaces are new, which are joined, and what is
//! written into them from outside.

use std::fs::{self, File};
use std::os::fd::OwnedFd;

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::error::{SetupError, system};
use super::sys;

/// In which order existing namespaces are joined: the user namespace last, because our privileges end there.
const JOIN_ORDER: [LinuxNamespaceType; 7] = [
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
    LinuxNamespaceType::Network,
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Cgroup,
    LinuxNamespaceType::Time,
    LinuxNamespaceType::User,
];

/// The namespaces of a container.
#[derive(Debug)]
pub struct Namespaces {
    /// `CLONE_NEW*` of those that are new.
    new: u64,
    joined: Vec<(LinuxNamespaceType, OwnedFd)>,
}

impl Namespaces {
    /// Opens those that are joined.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn open(linux: &Linux) -> Result<Self, SetupError> {
        let mut namespaces = Self { new: 0, joined: Vec::new() };
        for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
            let Some(path) = namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty()) else {
                namespaces.new |= namespace.typ() as u64;
                continue;
            };
            let field = format!("linux.namespaces[{index}].path");
            if namespace.typ() == LinuxNamespaceType::Mount {
                return Err(SetupError::field(
                    field,
                    "joins a mount namespace: a container has its own root, so it must have its own mounts",
                ));
            }
            let file = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(system(format!("{field}: open {}", path.display())))?;
            namespaces.joined.push((namespace.typ(), file));
        }
        Ok(namespaces)
    }

    /// Whether this kind is new.
    #[must_use]
    pub fn is_new(&self, kind: LinuxNamespaceType) -> bool {
        self.new & kind as u64 != 0
    }

    /// Whether this kind is not the guest's.
    #[must_use]
    pub fn is_private(&self, kind: LinuxNamespaceType) -> bool {
        self.is_new(kind) || self.joined.iter().any(|(other, _)| *other == kind)
    }

    /// What to clone the container's process with. Its cgroup namespace it must make itself, once it is in its cgroup: the
    /// kernel would take the root of one from the parent's cgroup (Linux 6.12 kernel/cgroup/namespace.c, `copy_cgroup_ns`).
    #[must_use]
    pub fn to_clone(&self) -> u64 {
        self.new & !(LinuxNamespaceType::Cgroup as u64 | LinuxNamespaceType::Time as u64)
    }

    /// Joins namespaces, and makes a new time namespace for children, with its offsets: they are fixed when the first process
    /// enters (time_namespaces(7)).
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn enter(&self, linux: &Linux) -> Result<(), SetupError> {
        if self.is_new(LinuxNamespaceType::Time) {
            sys::unshare(libc::CLONE_NEWTIME).map_err(system("make a time namespace"))?;
            let mut lines = String::new();
            for (clock, offset) in linux.time_offsets().iter().flatten() {
                let (seconds, nanoseconds) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
                lines.push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
            }
            if !lines.is_empty() {
                fs::write("/proc/self/timens_offsets", &lines)
                    .map_err(system(format!("linux.timeOffsets: set {:?}", lines.trim_end())))?;
            }
        }
        for kind in JOIN_ORDER {
            if let Some((_, file)) = self.joined.iter().find(|(other, _)| *other == kind) {
                sys::setns(file, kind as libc::c_int)
                    .map_err(system(format!("linux.namespaces: join the {kind} namespace")))?;
            }
        }
        Ok(())
    }
}

/// Writes the mappings of the new user namespace of a process.
///
/// # Errors
///
/// [`SetupError`].
pub fn map_ids(pid: i32, linux: &Linux) -> Result<(), SetupError> {
    for (field, file, mappings) in [
        ("linux.uidMappings", "uid_map", linux.uid_mappings()),
        ("linux.gidMappings", "gid_map", linux.gid_mappings()),
    ] {
        let lines = lines_of(mappings.as_deref().unwrap_or_default());
        fs::write(format!("/proc/{pid}/{file}"), &lines)
            .map_err(system(format!("{field}: write {:?}", lines.trim_end())))?;
    }
    Ok(())
}

fn lines_of(mappings: &[LinuxIdMapping]) -> String {
    mappings.iter().map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size())).collect()
}

/// `CLONE_NEW*` of the namespaces in which the process `pid` differs from this one.
///
/// # Errors
///
/// The process has ended.
pub fn of_process(pid: i32) -> Result<libc::c_int, SetupError> {
    let mut flags = 0;
    for (kind, name) in [
        (LinuxNamespaceType::User, "user"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
        (LinuxNamespaceType::Network, "net"),
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Cgroup, "cgroup"),
        (LinuxNamespaceType::Time, "time"),
        (LinuxNamespaceType::Mount, "mnt"),
    ] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{name}"));
        let theirs = match of(&pid.to_string()) {
            // A kernel without this kind.
            Err(_) if of("self").is_err() => continue,
            other => other.map_err(system(format!("look at the {name} namespace of the container")))?,
        };
        if of("self").map_err(system("look at our own namespaces"))? != theirs {
            flags |= kind as libc::c_int;
        }
    }
    Ok(flags)
}

/// Sets the names of a UTS namespace this process is in.
///
/// # Errors
///
/// [`SetupError`].
pub fn set_names(hostname: Option<&str>, domainname: Option<&str>) -> Result<(), SetupError> {
    if let Some(name) = hostname.filter(|name| !name.is_empty()) {
        rustix::system::sethostname(name.as_bytes()).map_err(system(format!("hostname: set {name:?}")))?;
    }
    if let Some(name) = domainname.filter(|name| !name.is_empty()) {
        rustix::system::setdomainname(name.as_bytes())
            .map_err(system(format!("domainname: set {name:?}")))?;
    }
    Ok(())
}

/// Writes the settings of `linux.sysctl`, in the namespaces of this process, through the guest's own `/proc`.
///
/// # Errors
///
/// [`SetupError`].
pub fn set_sysctls<'a>(
    settings: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<(), SetupError> {
    for (name, value) in settings {
        let path = sysctl_path(name);
        let error = || system(format!("linux.sysctl[{name:?}]: write {value:?}"));
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(SetupError::field(
                "linux.sysctl",
                format!("has {name:?}, which is not the name of a sysctl"),
            ));
        }
        let mut file = File::options().write(true).open(format!("/proc/sys/{path}")).map_err(error())?;
        std::io::Write::write_all(&mut file, value.as_bytes()).map_err(error())?;
    }
    Ok(())
}

/// The path of a sysctl below `/proc/sys` (sysctl(8)): "kernel/shmmax" and "kernel.shmmax" are the same. The first separator decides
/// which it is; the other is then a part of a name.
fn sysctl_path(name: &str) -> String {
    if name.find(['.', '/']).is_none_or(|at| name.as_bytes()[at] == b'/') {
        return name.to_owned();
    }
    let swapped = name.chars().map(|c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    });
    swapped.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_have_two_spellings() {
        assert_eq!(sysctl_path("kernel.shmmax"), "kernel/shmmax");
        assert_eq!(sysctl_path("kernel/shmmax"), "kernel/shmmax");
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.forwarding"), "net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/forwarding"), "net/ipv4/conf/eth0.1/forwarding");
    }

    fn linux(json: &str) -> Linux {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn new_and_joined_namespaces_are_told_apart() {
        let namespaces = Namespaces::open(&linux(
            r#"{"namespaces":[{"type":"pid"},{"type":"ipc","path":"/proc/self/ns/ipc"},{"type":"cgroup"},
                {"type":"time"},{"type":"uts","path":""}]}"#,
        ))
        .unwrap();
        assert_eq!(namespaces.to_clone(), (libc::CLONE_NEWPID | libc::CLONE_NEWUTS) as u64);
        assert!(namespaces.is_new(LinuxNamespaceType::Cgroup) && !namespaces.is_new(LinuxNamespaceType::Ipc));
        assert!(namespaces.is_private(LinuxNamespaceType::Ipc));
        assert!(!namespaces.is_private(LinuxNamespaceType::Network));
    }

    #[test]
    fn a_namespace_that_cannot_be_joined_is_named() {
        let text = |json| super::super::error_chain(&Namespaces::open(&linux(json)).unwrap_err());
        let missing = text(r#"{"namespaces":[{"type":"ipc","path":"/no/such"}]}"#);
        assert!(missing.starts_with("linux.namespaces[0].path: open /no/such: No such file"), "{missing}");
        let mount = text(r#"{"namespaces":[{"type":"mount","path":"/proc/self/ns/mnt"}]}"#);
        assert!(mount.starts_with("linux.namespaces[0].path joins a mount namespace"), "{mount}");
    }
}
