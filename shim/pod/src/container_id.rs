//! The name of a container: the only text of a stranger that becomes part of a path.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest container ID in bytes; the same as in the agent, where it names a directory and a cgroup.
pub const MAX_LEN: usize = 200;

/// A container ID that is safe as the name of a directory entry. By runc's rule: letters, digits, `_`, `+`, `-` and `.`,
/// but neither `.` nor `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

/// The text is no container ID.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "container ID {id:?} is invalid: it must have 1 to {MAX_LEN} characters of a-z A-Z 0-9 _ + - . and not be \".\" or \"..\""
)]
pub struct InvalidContainerId {
    /// The text, cut to [`MAX_LEN`] characters.
    id: String,
}

impl ContainerId {
    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = InvalidContainerId;

    fn from_str(id: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'-' | b'.');
        if id.is_empty() || id.len() > MAX_LEN || id == "." || id == ".." || !id.bytes().all(allowed) {
            return Err(InvalidContainerId { id: id.chars().take(MAX_LEN).collect() });
        }
        Ok(Self(id.to_owned()))
    }
}

impl TryFrom<String> for ContainerId {
    type Error = InvalidContainerId;

    fn try_from(id: String) -> Result<Self, Self::Error> {
        id.parse()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for ContainerId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_runc_takes_are_taken() {
        for id in ["a", "A.b_c+d-9", "...", &"x".repeat(MAX_LEN)] {
            assert_eq!(id.parse::<ContainerId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn ids_that_could_leave_the_state_directory_are_refused() {
        for id in ["", ".", "..", "a/b", "../a", "a b", "a\n", "a\0", "ä", "a,b", &"x".repeat(MAX_LEN + 1)] {
            assert!(id.parse::<ContainerId>().is_err(), "{id:?}");
        }
    }
}
