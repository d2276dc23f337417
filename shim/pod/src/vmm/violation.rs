//! Which system call a VMM ended for that its filter does not allow.

use std::fmt;

use kvrun_vmm_api::VIOLATION_PREFIX;

use crate::text;

/// The most characters that are shown of what a VMM says.
const MAX: usize = 200;

/// A call that a filter did not allow, in the words of the VMM: which class of thread, which call. Cleaned, but no more to be trusted
/// than the VMM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Violation {
    /// Takes the line about a violation out of what a VMM wrote to its standard error.
    pub(super) fn take_from(stderr: &mut String) -> Option<Self> {
        let line = stderr.lines().rfind(|line| line.starts_with(VIOLATION_PREFIX))?.to_owned();
        let rest: Vec<&str> = stderr.lines().filter(|other| *other != line).collect();
        *stderr = rest.iter().map(|line| format!("{line}\n")).collect();
        Some(Self(text::one_line(line.strip_prefix(VIOLATION_PREFIX)?, MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_of_the_vmm_is_taken_and_cleaned() {
        let mut stderr = format!("one\n{VIOLATION_PREFIX}thread of class \x1b[2Jvcpu\ntwo\n");
        let violation = Violation::take_from(&mut stderr).unwrap();
        assert_eq!(violation.to_string(), "thread of class [2Jvcpu");
        assert_eq!(stderr, "one\ntwo\n");
        assert_eq!(Violation::take_from(&mut stderr), None);
        let mut stderr = format!("{VIOLATION_PREFIX}{}", "x".repeat(4096));
        assert_eq!(Violation::take_from(&mut stderr).unwrap().to_string().len(), MAX);
    }
}
