//! The rules for namespaces and what is written into them, and how one that is named by a path is found in the guest.

use std::path::{Path, PathBuf};

use kvrun_agent_api::GUEST_CONTAINERS_DIR;
use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};

use super::Fault;
use super::check::refuse;
use crate::container_id::ContainerId;

/// Which container of the same pod a process ID of the host stands for.
pub type Siblings<'a> = &'a dyn Fn(i32) -> Option<ContainerId>;

pub(super) fn check(spec: &Spec, linux: &Linux) -> Result<(), Fault> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    for (index, namespace) in namespaces.iter().enumerate() {
        // config-linux.md, "Namespaces": a duplicate is an error.
        let twice = namespaces[..index].iter().any(|earlier| earlier.typ() == namespace.typ());
        let problem = format!("{} is there twice; remove one", name_of(namespace.typ()));
        refuse(twice, format!("linux.namespaces[{index}].type"), problem)?;
    }
    let is_new = |kind| namespaces.iter().any(|n| n.typ() == kind && path_of(n).is_none());
    let is_there = |kind| namespaces.iter().any(|n| n.typ() == kind);
    // Any other may be left out, and is then that of the guest. But the container's mounts in the guest's own namespace would be
    // the agent's.
    refuse(
        !is_there(LinuxNamespaceType::Mount),
        "linux.namespaces",
        "has no mount namespace; add {\"type\": \"mount\"}",
    )?;
    for (field, name) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        let set = name.as_ref().is_some_and(|name| !name.is_empty());
        let problem =
            "is set, but the container has no UTS namespace; add {\"type\": \"uts\"} to linux.namespaces";
        refuse(set && !is_there(LinuxNamespaceType::Uts), field, problem)?;
    }
    let new_user = is_new(LinuxNamespaceType::User);
    for (field, mappings) in
        [("linux.uidMappings", linux.uid_mappings()), ("linux.gidMappings", linux.gid_mappings())]
    {
        let any = mappings.as_ref().is_some_and(|mappings| !mappings.is_empty());
        let problem = "is set, but the container has no new user namespace; add {\"type\": \"user\"} to linux.namespaces";
        refuse(any && !new_user, field, problem)?;
        refuse(new_user && !any, field, "is missing: a new user namespace needs it")?;
    }
    let offsets = linux.time_offsets().iter().flatten();
    for (clock, offset) in offsets {
        let field = format!("linux.timeOffsets.{clock}");
        // time_namespaces(7).
        let known = matches!(clock.as_str(), "monotonic" | "boottime");
        refuse(!known, &field, "is not a clock with an offset: it must be monotonic or boottime")?;
        let too_many = offset.nanosecs().is_some_and(|n| n >= 1_000_000_000);
        refuse(too_many, format!("{field}.nanosecs"), "must be less than 1000000000")?;
        let problem = "is set, but the container has no new time namespace; add {\"type\": \"time\"} to linux.namespaces";
        refuse(!is_new(LinuxNamespaceType::Time), "linux.timeOffsets", problem)?;
    }
    Ok(())
}

/// The path by which a namespace is named that is joined; `None`: it is new.
pub fn path_of(namespace: &oci_spec::runtime::LinuxNamespace) -> Option<&Path> {
    namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty())
}

/// What the namespaces of a spec are on the host.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    /// The network namespace: where in the list it is, and its path, if it has one. `None` if the list has none.
    pub(super) network: Option<(usize, Option<PathBuf>)>,
    /// Containers whose namespaces are joined.
    pub(super) siblings: Vec<ContainerId>,
}

/// Gives each namespace that is named by a path the path it has in the guest. The host's namespaces are not there: only that of another
/// container of the same pod is, where it is named as engines do, `/proc/PID/ns/NAME` with the process ID of that container.
///
/// The network namespace is taken out: the guest as a whole is on the network of the one on the host, and so are all its containers.
pub(super) fn resolve(linux: &mut Linux, siblings: Siblings<'_>) -> Result<Resolved, Fault> {
    let mut resolved = Resolved::default();
    for (index, namespace) in linux.namespaces_mut().iter_mut().flatten().enumerate() {
        let (kind, field) = (namespace.typ(), format!("linux.namespaces[{index}].path"));
        let path = path_of(namespace).map(Path::to_owned);
        let sibling = path.as_ref().and_then(|path| process_of(path, kind)).and_then(siblings);
        resolved.siblings.extend(sibling.clone());
        if kind == LinuxNamespaceType::Network {
            resolved.network = Some((index, path));
            continue;
        }
        let Some(path) = path else { continue };
        let problem =
            "joins a mount namespace: a container has a root of its own, so it must have mounts of its own";
        refuse(kind == LinuxNamespaceType::Mount, &field, format!("{} {problem}", path.display()))?;
        let Some(sibling) = sibling else {
            let problem = format!(
                "{} names a {} namespace of the host, which a guest cannot join; remove it for a new namespace",
                path.display(),
                name_of(kind)
            );
            return Err(Fault::new(field, problem));
        };
        namespace.set_path(Some(in_guest(&sibling).join(file_of(kind))));
    }
    if let Some(namespaces) = linux.namespaces_mut() {
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    }
    Ok(resolved)
}

/// Where the guest has the namespaces of a container.
fn in_guest(container: &ContainerId) -> PathBuf {
    PathBuf::from(GUEST_CONTAINERS_DIR).join(container.as_str()).join("ns")
}

/// Whether a path in a spec for the guest names a namespace of a container.
pub fn is_namespace_of(path: &Path, container: &ContainerId) -> bool {
    path.parent() == Some(&in_guest(container))
}

/// The process in `/proc/PID/ns/NAME`, if the name fits the kind.
fn process_of(path: &Path, kind: LinuxNamespaceType) -> Option<i32> {
    let (pid, name) = path.to_str()?.strip_prefix("/proc/")?.split_once("/ns/")?;
    let digits = !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit());
    (digits && name == file_of(kind)).then(|| pid.parse().ok())?
}

/// In `/proc/PID/ns`.
fn file_of(kind: LinuxNamespaceType) -> String {
    kind.to_string()
}

/// As in the spec: "network", not "net".
fn name_of(typ: LinuxNamespaceType) -> String {
    let name = serde_json::to_value(typ).ok();
    name.as_ref().and_then(|name| name.as_str()).map_or_else(|| typ.to_string(), str::to_owned)
}
