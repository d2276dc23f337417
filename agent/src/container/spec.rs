//! What the agent itself takes from a container's config.

use std::path::PathBuf;

use kvrun_agent_api::GUEST_CONTAINERS_DIR;
use oci_spec::runtime::{LinuxIdMapping, Spec};

use super::ContainerId;
use crate::cgroup::{Cgroup, CgroupPathError};
use crate::oci::mount_options::MountOptions;

/// Why a config is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON, or not a runtime-spec config.
    #[error("config.json of the container cannot be read")]
    Parse(#[source] serde_json::Error),
    /// Something the agent cannot do without.
    #[error("config.json has no {0:?}")]
    Missing(&'static str),
    /// A namespace that is not one of a container of this machine.
    #[error("linux.namespaces[{index}].path: {} names no namespace of a container that runs here", path.display())]
    Namespace {
        /// Which.
        index: usize,
        /// Its path.
        path: PathBuf,
    },
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupPathError),
}

/// A config.
#[derive(Debug)]
pub struct ContainerSpec {
    /// All of it.
    pub spec: Spec,
    /// The container's cgroup.
    pub cgroup: Cgroup,
    /// `process.terminal`.
    pub terminal: bool,
    /// `process.consoleSize`, rows and columns.
    pub console_size: Option<(u16, u16)>,
    /// User and group of the process in the guest's numbers, behind the container's user namespace.
    pub owner: (u32, u32),
    /// The bundle directory on the host, which hooks are told.
    pub host_bundle: PathBuf,
}

impl ContainerSpec {
    /// Reads a config.
    ///
    /// # Errors
    ///
    /// [`SpecError`].
    pub fn parse(json: &[u8], id: &ContainerId, host_bundle: PathBuf) -> Result<Self, SpecError> {
        let spec: Spec = serde_json::from_slice(json).map_err(SpecError::Parse)?;
        if spec.root().is_none() {
            return Err(SpecError::Missing("root"));
        }
        let process = spec.process().as_ref().ok_or(SpecError::Missing("process"))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(SpecError::Missing("process.args"));
        }
        let terminal = process.terminal().unwrap_or(false);
        let console_size =
            process.console_size().map(|size| (saturate(size.height()), saturate(size.width())));
        let user = (process.user().uid(), process.user().gid());

        let linux = spec.linux().as_ref().ok_or(SpecError::Missing("linux"))?;
        let owner = (
            in_guest(user.0, linux.uid_mappings().as_deref()),
            in_guest(user.1, linux.gid_mappings().as_deref()),
        );
        let cgroup = Cgroup::from_spec(linux.cgroups_path().as_deref(), id.as_str())?;
        Ok(Self { spec, cgroup, terminal, console_size, owner, host_bundle })
    }

    /// The sources of its bind mounts.
    pub(super) fn binds(&self) -> Vec<PathBuf> {
        // One whose options are no good is refused when it is made.
        let is_bind =
            |index, mount| MountOptions::parse(index, mount).is_ok_and(|options| options.bind.is_some());
        let mounts = self.spec.mounts().iter().flatten().enumerate();
        mounts
            .filter(|(index, mount)| is_bind(*index, mount))
            .filter_map(|(_, mount)| mount.source().clone())
            .collect()
    }
}

/// Gives the namespaces of other containers the paths they have for the agent. `process` tells a process that is in the namespaces of a kind, as in
/// `/proc/PID/ns`, of a container that runs.
///
/// # Errors
///
/// [`SpecError::Namespace`].
pub fn find_namespaces(
    spec: &mut Spec,
    process: impl Fn(&str, &str) -> Option<i32>,
) -> Result<(), SpecError> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    for (index, namespace) in linux.namespaces_mut().iter_mut().flatten().enumerate() {
        let Some(path) = namespace.path().clone().filter(|path| !path.as_os_str().is_empty()) else {
            continue;
        };
        let kind = namespace.typ().to_string();
        let found = path.strip_prefix(GUEST_CONTAINERS_DIR).ok().and_then(|rest| {
            let (id, name) = rest.to_str()?.split_once("/ns/")?;
            (name == kind).then(|| process(id, &kind))?
        });
        let Some(pid) = found else { return Err(SpecError::Namespace { index, path }) };
        namespace.set_path(Some(format!("/proc/{pid}/ns/{kind}").into()));
    }
    Ok(())
}

fn saturate(size: u64) -> u16 {
    u16::try_from(size).unwrap_or(u16::MAX)
}

/// The number in the guest for a number in the container; one without a mapping stays as it is (the process cannot become that user, which is reported then).
pub(super) fn in_guest(id: u32, mappings: Option<&[LinuxIdMapping]>) -> u32 {
    mappings
        .into_iter()
        .flatten()
        .find_map(|mapping| {
            let offset = id.checked_sub(mapping.container_id())?;
            (offset < mapping.size()).then(|| mapping.host_id().wrapping_add(offset))
        })
        .unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(process: &str, linux: &str) -> Result<ContainerSpec, SpecError> {
        let json =
            format!(r#"{{"ociVersion":"1.0.2","root":{{"path":"/r"}},"process":{process},"linux":{linux}}}"#);
        ContainerSpec::parse(json.as_bytes(), &ContainerId::parse("c1").unwrap(), PathBuf::new())
    }

    const PROCESS: &str = r#"{"user":{"uid":7,"gid":9},"args":["sh"],"cwd":"/"}"#;

    #[test]
    fn the_owner_of_stdio_is_the_user_outside_of_the_user_namespace() {
        assert_eq!(parse(PROCESS, "{}").unwrap().owner, (7, 9));
        let mapped = r#"{"uidMappings":[{"containerID":0,"hostID":1000,"size":8}],
                         "gidMappings":[{"containerID":0,"hostID":1000,"size":9}]}"#;
        assert_eq!(parse(PROCESS, mapped).unwrap().owner, (1007, 9));
    }

    #[test]
    fn namespaces_of_other_containers_are_found_and_no_others() {
        let find = |path: &str| {
            let linux = format!(r#"{{"namespaces":[{{"type":"network","path":"{path}"}}]}}"#);
            let mut spec = parse(PROCESS, &linux).unwrap().spec;
            find_namespaces(&mut spec, |id, _| (id == "one").then_some(42))?;
            let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
            Ok::<_, SpecError>(namespaces[0].path().clone().unwrap())
        };
        assert_eq!(find("/run/kvrun/containers/one/ns/net").unwrap(), PathBuf::from("/proc/42/ns/net"));
        for bad in ["/run/kvrun/containers/two/ns/net", "/run/kvrun/containers/one/ns/ipc", "/proc/1/ns/net"]
        {
            assert!(find(bad).unwrap_err().to_string().contains(bad));
        }
    }

    #[test]
    fn bind_mounts_are_told_from_file_systems() {
        let json = r#"{"ociVersion":"1.0.2","root":{"path":"/r"},"linux":{},
            "process":{"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/"},
            "mounts":[{"destination":"/a","type":"bind","source":"/s/a"},
                      {"destination":"/b","source":"/s/b","options":["ro","rbind"]},
                      {"destination":"/proc","type":"proc","source":"proc"}]}"#;
        let spec = ContainerSpec::parse(json.as_bytes(), &ContainerId::parse("c1").unwrap(), PathBuf::new());
        assert_eq!(spec.unwrap().binds(), [PathBuf::from("/s/a"), PathBuf::from("/s/b")]);
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(parse("null", "{}").unwrap_err().to_string(), "config.json has no \"process\"");
        assert_eq!(parse(PROCESS, "null").unwrap_err().to_string(), "config.json has no \"linux\"");
        let no_args = r#"{"user":{"uid":0,"gid":0},"args":[],"cwd":"/"}"#;
        assert_eq!(parse(no_args, "{}").unwrap_err().to_string(), "config.json has no \"process.args\"");
    }

    #[test]
    fn the_terminal_and_its_size_are_read() {
        let process = r#"{"terminal":true,"consoleSize":{"height":24,"width":99999},"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/"}"#;
        let spec = parse(process, "{}").unwrap();
        assert!(spec.terminal);
        assert_eq!(spec.console_size, Some((24, u16::MAX)));
    }
}
