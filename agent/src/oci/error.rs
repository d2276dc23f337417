//! What goes wrong while a container is set up. Every error ends as one line for the user.

use std::fmt::Display;
use std::io;

use crate::cgroup::device_filter::DeviceFilterError;
use crate::cgroup::limits::LimitError;

/// Why a container, or a process in it, could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The program to run does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The program to run cannot be executed.
    #[error("{0}")]
    NotExecutable(String),
    /// A field asks for what cannot be.
    #[error("{field} {problem}")]
    Field {
        /// As a path in the config.
        field: String,
        /// The rest of the sentence.
        problem: String,
    },
    /// A system call.
    #[error("{what}")]
    System {
        /// What was attempted; with a field's name where there is one.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The seccomp filter.
    #[error("linux.seccomp: {what}")]
    Seccomp {
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: libseccomp::error::SeccompError,
    },
    /// A limit.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The devices.
    #[error(transparent)]
    DeviceFilter(#[from] DeviceFilterError),
}

impl SetupError {
    /// A field that asks for what cannot be.
    pub fn field(field: impl Display, problem: impl Into<String>) -> Self {
        Self::Field { field: field.to_string(), problem: problem.into() }
    }
}

/// Says what was attempted. To be used with `map_err`.
pub fn system<E: Into<io::Error>>(what: impl Display) -> impl FnOnce(E) -> SetupError {
    move |err| SetupError::System { what: what.to_string(), source: err.into() }
}
