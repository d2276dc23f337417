//! What can go wrong, and how containerd is told.

use std::error::Error as StdError;
use std::time::Duration;

use kvrun_pod::agent::AgentError;
use kvrun_pod::annotations::AnnotationError;
use kvrun_pod::assets::AssetError;
use kvrun_pod::bundle::BundleError;
use kvrun_pod::cgroup::CgroupError;
use kvrun_pod::config::ConfigError;
use kvrun_pod::container::CreateError;
use kvrun_pod::container_id::InvalidContainerId;
use kvrun_pod::disks::DiskError;
use kvrun_pod::growth::GrowthError;
use kvrun_pod::hooks::HookError;
use kvrun_pod::layers::LayersError;
use kvrun_pod::network::NetworkError;
use kvrun_pod::pod::PodError;
use kvrun_pod::root_disk::RootDiskError;
use kvrun_pod::share::ShareError;
use kvrun_pod::size::SizeError;
use kvrun_pod::state_dir::StateError;
use kvrun_pod::stdio::StdioError;
use ttrpc::Code;

/// Why something cannot be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The program is used wrongly.
    #[error("{0}")]
    Usage(String),
    /// The request asks for what makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// There is no such container or process.
    #[error("{what} {id} does not exist")]
    NotFound {
        /// `container` or `process`.
        what: &'static str,
        /// Its ID.
        id: String,
    },
    /// There is one of that ID.
    #[error("{what} {id} exists already")]
    Exists {
        /// `container` or `process`.
        what: &'static str,
        /// Its ID.
        id: String,
    },
    /// It is in a state in which this cannot be.
    #[error("cannot {what} a process that is {status}")]
    WrongState {
        /// What was asked.
        what: &'static str,
        /// The state.
        status: &'static str,
    },
    /// Its process has ended.
    #[error("process {id} already finished")]
    Finished {
        /// The container's ID.
        id: String,
    },
    /// It takes too long.
    #[error("{what} took longer than {} s", bound.as_secs())]
    TooSlow {
        /// What.
        what: &'static str,
        /// How long it had.
        bound: Duration,
    },
    /// We do not do this.
    #[error("{0}")]
    Unimplemented(&'static str),
    /// The bundle is not as it should be.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The ID is none.
    #[error(transparent)]
    Id(#[from] InvalidContainerId),
    /// The resources are beyond a machine.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// There is no configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An annotation of ours is refused.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// A file of ours is missing.
    #[error(transparent)]
    Asset(#[from] AssetError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The share.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The disk with the root file system.
    #[error(transparent)]
    RootDisk(#[from] RootDiskError),
    /// The layers of the root file system.
    #[error(transparent)]
    Layers(#[from] LayersError),
    /// The same, and without them it is of no use.
    #[error(
        "the root file system cannot be served as files, for it was changed by a guest that had its layers"
    )]
    NotAsFiles(#[source] LayersError),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The machine cannot be as large as is asked.
    #[error(transparent)]
    Growth(#[from] GrowthError),
    /// The machine or its agent.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The pod cannot be on its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A stream.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// A process could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The host refuses.
    #[error("{what}")]
    Host {
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// For `map_err`: what was attempted.
pub(crate) fn host<E: Into<Box<dyn StdError + Send + Sync>>>(
    what: impl Into<String>,
) -> impl FnOnce(E) -> Error {
    move |source| Error::Host { what: what.into(), source: source.into() }
}

impl Error {
    /// The code by which containerd and its clients decide what to do (containerd's `errdefs`).
    fn code(&self) -> Code {
        match self {
            Self::Usage(_) | Self::Invalid(_) | Self::Bundle(_) | Self::Id(_) => Code::INVALID_ARGUMENT,
            Self::Size(_) | Self::Annotation(_) => Code::INVALID_ARGUMENT,
            Self::Config(_) => Code::FAILED_PRECONDITION,
            // containerd takes "not found" for the answer to a signal for a process that has ended.
            Self::NotFound { .. } | Self::Finished { .. } => Code::NOT_FOUND,
            Self::Exists { .. } | Self::State(StateError::InUse { .. }) => Code::ALREADY_EXISTS,
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::TooSlow { .. } => Code::DEADLINE_EXCEEDED,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Growth(GrowthError::Pod(error))
            | Self::Pod(error)
            | Self::RootDisk(RootDiskError { source: error, .. })
            | Self::Create(CreateError::Disk(DiskError::Attach { source: error, .. }))
            | Self::Create(CreateError::Pod(error))
            | Self::Network(NetworkError::Pod(error)) => code_of(error),
            Self::Growth(error) | Self::Create(CreateError::Growth(error)) => match error {
                GrowthError::Size(_) => Code::INVALID_ARGUMENT,
                GrowthError::NoSlot => Code::FAILED_PRECONDITION,
                GrowthError::NotPlugged { .. } => Code::DEADLINE_EXCEEDED,
                _ => Code::INTERNAL,
            },
            Self::Layers(error) | Self::NotAsFiles(error) => {
                error.pod_error().map_or(Code::FAILED_PRECONDITION, code_of)
            }
            Self::Network(NetworkError::Host { .. }) => Code::INTERNAL,
            // What the namespace has is none of our making.
            Self::Network(_) => Code::FAILED_PRECONDITION,
            _ => Code::INTERNAL,
        }
    }
}

fn code_of(error: &PodError) -> Code {
    match error {
        PodError::Agent(AgentError::Timeout { .. }) | PodError::NotReady => Code::DEADLINE_EXCEEDED,
        PodError::Agent(AgentError::Refused { code, .. }) => match code {
            // It is the program or the process that is missing, not what containerd calls a container.
            Code::NOT_FOUND | Code::PERMISSION_DENIED | Code::UNKNOWN => Code::FAILED_PRECONDITION,
            code => *code,
        },
        PodError::NoSlot => Code::FAILED_PRECONDITION,
        PodError::Died(_) => Code::UNAVAILABLE,
        _ => Code::INTERNAL,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), kvrun_pod::text::chain(&error)))
    }
}
