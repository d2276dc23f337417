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
use kvrun_pod::vmm::VmmError;
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
            Self::TooSlow { .. } | Self::Hook(HookError::TimedOut { .. }) => Code::DEADLINE_EXCEEDED,
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
        PodError::Agent(AgentError::Timeout { .. })
        | PodError::Vmm(VmmError::Timeout { .. })
        | PodError::NotReady => Code::DEADLINE_EXCEEDED,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_that_containerd_acts_on() {
        let (what, bound, id) = ("do it", Duration::from_secs(1), "c1".to_owned());
        let refused = |code| AgentError::Refused { what, code, message: "no".into() };
        let agent = |code| Error::Pod(refused(code).into());
        let hook = HookError::TimedOut { kind: "prestart", path: "/hook".into(), bound };
        let table = [
            (Error::Usage("-id is missing".into()), Code::INVALID_ARGUMENT),
            (Error::Invalid("a size of nothing".into()), Code::INVALID_ARGUMENT),
            (Error::NotFound { what: "container", id: id.clone() }, Code::NOT_FOUND),
            (Error::Finished { id: id.clone() }, Code::NOT_FOUND),
            (Error::Exists { what: "process", id }, Code::ALREADY_EXISTS),
            (Error::WrongState { what: "delete", status: "running" }, Code::FAILED_PRECONDITION),
            (Error::Unimplemented("checkpoints"), Code::UNIMPLEMENTED),
            (Error::TooSlow { what: "a pause", bound }, Code::DEADLINE_EXCEEDED),
            (hook.into(), Code::DEADLINE_EXCEEDED),
            (PodError::NotReady.into(), Code::DEADLINE_EXCEEDED),
            (PodError::from(AgentError::Timeout { what, bound }).into(), Code::DEADLINE_EXCEEDED),
            (PodError::from(VmmError::Timeout { what, bound }).into(), Code::DEADLINE_EXCEEDED),
            (GrowthError::Pod(PodError::NotReady).into(), Code::DEADLINE_EXCEEDED),
            (PodError::NoSlot.into(), Code::FAILED_PRECONDITION),
            // The program is not there; containerd would take "not found" for the container.
            (agent(Code::NOT_FOUND), Code::FAILED_PRECONDITION),
            (agent(Code::UNKNOWN), Code::FAILED_PRECONDITION),
            (agent(Code::RESOURCE_EXHAUSTED), Code::RESOURCE_EXHAUSTED),
            (host("make a thread")(std::io::Error::other("no")), Code::INTERNAL),
        ];
        for (error, code) in table {
            let text = kvrun_pod::text::chain(&error);
            let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else { panic!("no status") };
            assert_eq!((status.code(), status.message.as_str()), (code, text.as_str()));
        }
    }
}
