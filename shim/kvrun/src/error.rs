//! What can go wrong, on its way to one line on standard error and an exit code.

use std::io;
use std::path::PathBuf;

use kvrun_pod::annotations::AnnotationError;
use kvrun_pod::assets::AssetError;
use kvrun_pod::bundle::BundleError;
use kvrun_pod::cgroup::CgroupError;
use kvrun_pod::config::ConfigError;
use kvrun_pod::container::{CreateError, ProgramFault};
use kvrun_pod::container_id::{ContainerId, InvalidContainerId};
use kvrun_pod::debug::DebugError;
use kvrun_pod::growth::GrowthError;
use kvrun_pod::hooks::HookError;
use kvrun_pod::network::NetworkError;
use kvrun_pod::observe::FetchError;
use kvrun_pod::pod::PodError;
use kvrun_pod::record::Status;
use kvrun_pod::share::ShareError;
use kvrun_pod::size::SizeError;
use kvrun_pod::state_dir::StateError;
use kvrun_pod::stdio::StdioError;
use kvrun_pod::text;
use kvrun_pod::vmm::VmEnd;
use serde::{Deserialize, Serialize};

/// The exit code for a failure of kvrun itself.
pub(crate) const FAILED: u8 = 1;

/// Each message is complete in itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Id(#[from] InvalidContainerId),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Size(#[from] SizeError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    #[error(transparent)]
    Assets(#[from] AssetError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    Growth(#[from] GrowthError),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error("write the pid file {}", path.display())]
    PidFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("send the terminal to the console socket {}", path.display())]
    Console {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "process.terminal is true, but none of standard input, output and error is a terminal: run kvrun on one, or set it to false"
    )]
    NoTerminal,
    /// An option, or a combination of some, that cannot be obeyed.
    #[error("{0}")]
    Option(String),
    /// runc's words for a container that has stopped: engines look for them.
    #[error("container not running: {id} is {}", status.name())]
    NotRunning { id: ContainerId, status: Status },
    #[error("cannot {what} container {id}: it is {}", status.name())]
    WrongState { what: &'static str, id: ContainerId, status: Status },
    #[error("container {id} is not stopped: it is {}", status.name())]
    NotStopped { id: ContainerId, status: Status },
    #[error("the process that serves container {id} does not answer")]
    Silent {
        id: ContainerId,
        #[source]
        source: io::Error,
    },
    #[error(
        "no container and no pod of containerd has the ID {id}: name a container that `kvrun list` shows, or a pod that `crictl pods` shows"
    )]
    NoMachine { id: ContainerId },
    #[error("look at the machine of container {id}")]
    Unseen {
        id: String,
        #[source]
        source: FetchError,
    },
    #[error("run a program in the machine of container {id}")]
    NotDebugged {
        id: String,
        #[source]
        source: DebugError,
    },
    #[error("container {id} cannot be removed: its process does not end although it was killed")]
    Unkillable { id: ContainerId },
    /// As another process of ours has reported it.
    #[error("{}", .0.message)]
    Elsewhere(Failure),
    #[error("{step}")]
    Host {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

/// An error on its way from one process of ours to another.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Failure {
    /// One line.
    pub(crate) message: String,
    /// The exit code it is to become.
    pub(crate) code: u8,
    /// What a machine that died said last.
    pub(crate) last_words: Vec<LastWords>,
}

/// What one part of a machine that died said last.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LastWords {
    /// Of whom.
    pub(crate) title: String,
    /// Lines without control characters.
    pub(crate) lines: Vec<String>,
}

/// The longest message that is passed on, in bytes.
const MAX_MESSAGE: usize = 8 * 1024;

impl LastWords {
    /// Those of a machine.
    pub(crate) fn of(end: Option<&VmEnd>) -> Vec<Self> {
        let words = end.map(VmEnd::last_words).unwrap_or_default();
        words.into_iter().map(|(title, lines)| Self { title: title.to_owned(), lines }).collect()
    }
}

impl Error {
    /// The exit code: the shell's for a program that cannot be run, else that of a failure of ours.
    pub(crate) fn code(&self) -> u8 {
        if let Self::Elsewhere(failure) = self {
            return failure.code;
        }
        self.pod_error().and_then(PodError::program_fault).map_or(FAILED, ProgramFault::code)
    }

    /// What the machine said last, if its end is the error.
    pub(crate) fn last_words(&self) -> Vec<LastWords> {
        match self {
            Self::Elsewhere(failure) => failure.last_words.clone(),
            _ => LastWords::of(self.pod_error().and_then(PodError::vm_end)),
        }
    }

    /// For another process to report.
    pub(crate) fn to_failure(&self) -> Failure {
        let message = text::one_line(&text::chain(self), MAX_MESSAGE);
        Failure { message, code: self.code(), last_words: self.last_words() }
    }

    fn pod_error(&self) -> Option<&PodError> {
        match self {
            Self::Create(error) => error.pod_error(),
            Self::Pod(error)
            | Self::Growth(GrowthError::Pod(error))
            | Self::Network(NetworkError::Pod(error)) => Some(error),
            _ => None,
        }
    }
}

/// For `map_err`.
pub(crate) fn host<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Host { step, source: source.into() }
}
