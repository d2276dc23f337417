//! What the agent takes from a container's config, and the little it changes in it.

use oci_spec::runtime::{LinuxIdMapping, LinuxMemory, Spec};

use super::ContainerId;
use crate::cgroup::{Cgroup, CgroupPathError};

/// Why a config is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON, or not a runtime-spec config.
    #[error("config.json of the container cannot be read")]
    Parse(#[source] serde_json::Error),
    /// Something the agent cannot do without.
    #[error("config.json has no {0:?}")]
    Missing(&'static str),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupPathError),
}

/// A config, ready for libcontainer.
#[derive(Debug)]
pub struct ContainerSpec {
    /// The config with the agent's changes.
    pub spec: Spec,
    /// The container's cgroup.
    pub cgroup: Cgroup,
    /// `process.terminal`.
    pub terminal: bool,
    /// `process.consoleSize`, rows and columns.
    pub console_size: Option<(u16, u16)>,
    /// User and group of the process in the guest's numbers, behind the container's user namespace.
    pub owner: (u32, u32),
}

impl ContainerSpec {
    /// Reads a config.
    ///
    /// # Errors
    ///
    /// [`SpecError`].
    pub fn parse(json: &[u8], id: &ContainerId) -> Result<Self, SpecError> {
        let mut spec: Spec = serde_json::from_slice(json).map_err(SpecError::Parse)?;
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

        let linux = spec.linux_mut().as_mut().ok_or(SpecError::Missing("linux"))?;
        let owner = (
            in_guest(user.0, linux.uid_mappings().as_deref()),
            in_guest(user.1, linux.gid_mappings().as_deref()),
        );
        let cgroup = Cgroup::from_spec(linux.cgroups_path().as_deref(), id.as_str())?;
        linux.set_cgroups_path(Some(cgroup.in_spec()));
        if let Some(resources) = linux.resources_mut()
            && let Some(memory) = resources.memory()
        {
            resources.set_memory(Some(without_swap(*memory)));
        }
        Ok(Self { spec, cgroup, terminal, console_size, owner })
    }
}

/// The guest has no swap, and its kernel no `memory.swap.max` to write to: memory plus swap is memory. runc, too, takes no
/// offence at a swap limit where there is no swap.
fn without_swap(mut memory: LinuxMemory) -> LinuxMemory {
    match memory.limit() {
        // -1 is "no limit", which a new cgroup has.
        None | Some(-1) => {
            memory.set_limit(None);
            memory.set_swap(None);
        }
        Some(limit) => {
            memory.set_swap(Some(limit));
        }
    }
    memory
}

fn saturate(size: u64) -> u16 {
    u16::try_from(size).unwrap_or(u16::MAX)
}

/// The number in the guest for a number in the container; one without a mapping stays as it is (libcontainer refuses it).
fn in_guest(id: u32, mappings: Option<&[LinuxIdMapping]>) -> u32 {
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
        ContainerSpec::parse(json.as_bytes(), &ContainerId::parse("c1").unwrap())
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
    fn a_swap_limit_never_reaches_the_kernel() {
        let memory = |text: &str| {
            let linux = format!(r#"{{"resources":{{"memory":{text}}}}}"#);
            let spec = parse(PROCESS, &linux).unwrap().spec;
            let memory = spec.linux().as_ref().unwrap().resources().as_ref().unwrap().memory().unwrap();
            (memory.limit(), memory.swap())
        };
        assert_eq!(memory(r#"{"limit":4096,"swap":8192}"#), (Some(4096), Some(4096)));
        assert_eq!(memory(r#"{"limit":4096}"#), (Some(4096), Some(4096)));
        assert_eq!(memory(r#"{"limit":-1,"swap":-1}"#), (None, None));
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
