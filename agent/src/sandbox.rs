//! A pod's own container without a process: the guest itself stands for it, so its names and sysctls are those of the agent's own
//! namespaces, which other containers join.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::container::ContainerId;
use crate::oci::error::SetupError;
use crate::oci::namespaces;

/// Which container it is, if there is one.
#[derive(Debug, Default)]
pub struct Sandbox(Mutex<Option<ContainerId>>);

impl Sandbox {
    /// The guest stands for this container from now on.
    ///
    /// # Errors
    ///
    /// [`SetupError`]: a name or a sysctl cannot be set. Those before it are.
    pub fn stand_for(
        &self,
        id: ContainerId,
        hostname: &str,
        domainname: &str,
        sysctls: &HashMap<String, String>,
    ) -> Result<(), SetupError> {
        namespaces::set_names(Some(hostname), Some(domainname))?;
        namespaces::set_sysctls(sysctls)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
        Ok(())
    }

    /// The process that is in the namespaces of this kind of that container.
    #[must_use]
    pub fn process(&self, id: &str, kind: &str) -> Option<i32> {
        let standing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = standing.as_ref().is_some_and(|sandbox| sandbox.as_str() == id);
        // Those that it may share with the guest.
        (is_it && matches!(kind, "ipc" | "uts" | "pid")).then(|| std::process::id().cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_namespaces_are_the_agents_and_nobody_elses() {
        let sandbox = Sandbox(Mutex::new(Some(ContainerId::parse("pod").unwrap())));
        for kind in ["ipc", "uts", "pid"] {
            assert_eq!(sandbox.process("pod", kind), Some(std::process::id().cast_signed()), "{kind}");
            assert_eq!(sandbox.process("other", kind), None, "{kind}");
            assert_eq!(Sandbox::default().process("pod", kind), None, "{kind}");
        }
        for kind in ["mnt", "user", "cgroup", "net"] {
            assert_eq!(sandbox.process("pod", kind), None, "{kind}");
        }
    }
}
