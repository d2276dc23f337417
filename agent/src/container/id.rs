//! Container IDs.

/// Longest ID: it names a directory and a cgroup.
const MAX: usize = 200;

/// Why an ID is refused.
#[derive(Debug, thiserror::Error)]
#[error("container ID {0:?} is not 1 to {MAX} of the characters a-z A-Z 0-9 _ + - . (and not '.' or '..')")]
pub struct IdError(String);

/// A checked container ID: a file name. The characters are those that runc takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContainerId(String);

impl ContainerId {
    /// Checks an ID from a request.
    ///
    /// # Errors
    ///
    /// [`IdError`].
    pub fn parse(text: &str) -> Result<Self, IdError> {
        let is_fine = |b: u8| b.is_ascii_alphanumeric() || b"_+-.".contains(&b);
        if text.is_empty() || text.len() > MAX || text == "." || text == ".." || !text.bytes().all(is_fine) {
            return Err(IdError(text.chars().take(MAX).collect()));
        }
        Ok(Self(text.to_owned()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for ContainerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_file_name() {
        for good in ["a", "0f9a", "web_1+2-3.x", "...", &"x".repeat(MAX)] {
            assert_eq!(ContainerId::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", "a\0", "a\n", &"x".repeat(MAX + 1)] {
            assert!(ContainerId::parse(bad).is_err(), "{bad:?}");
        }
    }
}
