//! Annotations of our own: what whoever writes a bundle or a pod may ask for, if the configuration allows it.
//!
//! Annotations are a stranger's: in Kubernetes, everybody who may create a pod writes them. So none has an effect unless the configuration names it
//! (`annotations.allowed`), and one that begins with our prefix and is not allowed is refused rather than ignored: whoever has written it expects something of it.

use std::collections::BTreeMap;

use crate::text;

/// What all of them begin with.
pub const PREFIX: &str = "io.kvrun.";
/// Memory in MiB that the pod's machine starts with, whatever the limit of its first container is.
pub const MEMORY_MIB: &str = "io.kvrun.memory_mib";
/// vCPUs that it starts with, likewise.
pub const VCPUS: &str = "io.kvrun.vcpus";
/// All there are.
pub const KNOWN: [&str; 2] = [MEMORY_MIB, VCPUS];

/// An annotation is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AnnotationError {
    /// There is none of this name.
    #[error("annotation {0} means nothing to kvrun, which knows {known}: remove it", known = KNOWN.join(" and "))]
    Unknown(String),
    /// The configuration does not allow it.
    #[error("annotation {0} is not allowed: remove it, or add it to the setting annotations.allowed")]
    NotAllowed(&'static str),
}

/// Checks the annotations of a container against those that are allowed.
///
/// # Errors
/// [`AnnotationError`] of the first that is refused.
pub fn check(
    annotations: &BTreeMap<String, String>,
    allowed: &[&'static str],
) -> Result<(), AnnotationError> {
    for name in annotations.keys().filter(|name| name.starts_with(PREFIX)) {
        let known = KNOWN.into_iter().find(|known| known == name);
        let known = known.ok_or_else(|| AnnotationError::Unknown(text::one_line(name, 128)))?;
        if !allowed.contains(&known) {
            return Err(AnnotationError::NotAllowed(known));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allowed_passes() {
        let all = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), "1".to_owned())).collect();
        let strangers = all(&["io.kubernetes.cri.sandbox-id", "io.kvrunner.x", "x"]);
        assert_eq!(check(&strangers, &[]), Ok(()));
        let ours = all(&[MEMORY_MIB, "x"]);
        assert_eq!(check(&ours, &[MEMORY_MIB]), Ok(()));
        assert_eq!(check(&ours, &[VCPUS]), Err(AnnotationError::NotAllowed(MEMORY_MIB)));
        let unknown = check(&all(&["io.kvrun.kernel\n"]), &KNOWN).unwrap_err();
        assert!(!unknown.to_string().contains('\n') && unknown.to_string().contains("io.kvrun.kernel"));
    }
}
