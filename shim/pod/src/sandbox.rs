//! The container that stands for a pod. Its program, "pause", only waits, so that there is a process in whose namespaces the pod's other containers
//! can be, and which reaps where they share their processes. The machine can stand for it: what they share is then the guest's own. The
//! process is made when somebody needs it, in the guest's namespaces of those kinds.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::bundle;
use crate::container::ExitState;
use crate::container_id::ContainerId;
use crate::pod::{Pod, PodError};

/// The program that only waits, where every image of it has it (Kubernetes, `build/pause`).
const PAUSE: &str = "/pause";

/// Whether nobody would miss the process of a pod's own container: its program only waits, and it has nothing that the guest itself has not.
pub fn needs_no_process(spec: &Spec) -> bool {
    let process = spec.process().as_ref();
    let only_waits =
        process.and_then(|process| process.args().as_deref()).is_some_and(|args| args == [PAUSE]);
    let has_own = |namespace: &LinuxNamespace| {
        bundle::path_of(namespace).is_some()
            || matches!(namespace.typ(), LinuxNamespaceType::User | LinuxNamespaceType::Time)
    };
    let in_guest = spec.hooks().as_ref().is_some_and(|hooks| {
        let lists = [hooks.create_container(), hooks.start_container()];
        lists.into_iter().flatten().any(|list| !list.is_empty())
    });
    only_waits && !namespaces(spec).iter().any(has_own) && !in_guest
}

/// Whether a container with this spec joins a namespace of a pod's own container that is not the guest's: one that its process has, whose spec
/// ([`in_guests_namespaces`]) is `own`.
pub fn needs_process(spec: &Spec, id: &ContainerId, own: &Spec) -> bool {
    namespaces(spec).iter().any(|namespace| {
        bundle::path_of(namespace).is_some_and(|path| bundle::is_namespace_of(path, id))
            && namespaces(own).iter().any(|own| own.typ() == namespace.typ())
    })
}

fn namespaces(spec: &Spec) -> &[LinuxNamespace] {
    spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default()
}

/// Whether the guest's own namespace of a kind can be the pod's.
fn is_guests(kind: LinuxNamespaceType) -> bool {
    matches!(kind, LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts)
}

/// The spec for the process, if it is needed after all.
pub fn in_guests_namespaces(spec: &Spec) -> Spec {
    let mut spec = spec.clone();
    if let Some(namespaces) = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut()) {
        namespaces.retain(|namespace| !is_guests(namespace.typ()));
    }
    spec
}

/// How a signal ends the process that is not there; `None`: it does not. (Kubernetes, `build/pause/linux/pause.c`; the kernel keeps all but these
/// from the first process of a PID namespace.)
pub fn end_by(signal: i32) -> Option<ExitState> {
    match signal {
        libc::SIGINT | libc::SIGTERM => Some(ExitState::Exited(0)),
        libc::SIGKILL => Some(ExitState::Signaled(libc::SIGKILL as u8)),
        _ => None,
    }
}

impl Pod {
    /// Has the machine stand for a container.
    ///
    /// # Errors
    /// [`PodError`]: for example a sysctl that there is not.
    pub async fn stand_for(&self, id: &ContainerId, spec: &Spec) -> Result<(), PodError> {
        let sysctl = spec.linux().as_ref().and_then(|linux| linux.sysctl().clone()).unwrap_or_default();
        let sysctl: HashMap<_, _> = sysctl.into_iter().collect();
        let names = [spec.hostname(), spec.domainname()].map(|name| name.clone().unwrap_or_default());
        self.or_death(self.agent.set_up_sandbox(id, names, sysctl)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(args: &str, namespaces: &str, hooks: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},
                "process":{{"user":{{"uid":0,"gid":0}},"cwd":"/","args":{args}}},
                "linux":{{"namespaces":{namespaces}}},"hooks":{hooks}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    const NEW: &str = r#"[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"}]"#;

    #[test]
    fn machine_stands_for_what_only_waits_and_for_nothing_else() {
        assert!(needs_no_process(&spec(r#"["/pause"]"#, NEW, "{}")));
        for args in [r#"["/pause","-v"]"#, r#"["sleep"]"#, "[]"] {
            assert!(!needs_no_process(&spec(args, NEW, "{}")), "{args}");
        }
        let joins = r#"[{"type":"ipc","path":"/run/kvrun/containers/a/ns/ipc"},{"type":"mount"}]"#;
        for namespaces in [r#"[{"type":"user"},{"type":"mount"}]"#, r#"[{"type":"time"}]"#, joins] {
            assert!(!needs_no_process(&spec(r#"["/pause"]"#, namespaces, "{}")), "{namespaces}");
        }
        let hook = |kind| format!(r#"{{"{kind}":[{{"path":"/bin/true"}}]}}"#);
        assert!(!needs_no_process(&spec(r#"["/pause"]"#, NEW, &hook("createContainer"))));
        assert!(!needs_no_process(&spec(r#"["/pause"]"#, NEW, &hook("startContainer"))));
        assert!(needs_no_process(&spec(r#"["/pause"]"#, NEW, &hook("poststart"))), "it runs on the host");
    }

    #[test]
    fn process_is_needed_by_who_joins_more_than_the_guests_namespaces() {
        let needs = |id: &str, kinds: &[&str], own: &str| {
            let list: Vec<_> = kinds
                .iter()
                .map(|kind| format!(r#"{{"type":"{kind}","path":"/run/kvrun/containers/{id}/ns/{kind}"}}"#))
                .collect();
            let own = in_guests_namespaces(&spec(r#"["/pause"]"#, own, "{}"));
            let spec = spec(r#"["sh"]"#, &format!("[{}]", list.join(",")), "{}");
            needs_process(&spec, &"pod".parse().unwrap(), &own)
        };
        assert!(!needs("pod", &["ipc", "uts"], NEW));
        assert!(needs("pod", &["ipc", "uts", "pid"], NEW));
        assert!(!needs("other", &["pid"], NEW));
        assert!(
            !needs("pod", &["ipc", "uts", "pid"], r#"[{"type":"ipc"}]"#),
            "its processes are the guest's"
        );
    }

    #[test]
    fn later_process_is_in_the_guests_namespaces() {
        let later = in_guests_namespaces(&spec(r#"["/pause"]"#, NEW, "{}"));
        let namespaces = later.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
        let kinds: Vec<_> = namespaces.iter().map(LinuxNamespace::typ).collect();
        assert_eq!(kinds, [LinuxNamespaceType::Pid, LinuxNamespaceType::Mount]);
    }

    #[test]
    fn signals_have_the_effect_they_have_on_pause() {
        let code = |signal| end_by(signal).map(|state| state.code());
        assert_eq!(code(libc::SIGKILL), Some(137));
        assert_eq!((code(libc::SIGTERM), code(libc::SIGINT)), (Some(0), Some(0)));
        assert_eq!((code(libc::SIGHUP), code(libc::SIGUSR1)), (None, None));
    }
}
