//! What is written down of a container: a JSON file in its state directory.
//!
//! Only the process that serves the container writes it, each time as a whole (rename(2)); every other reads it, without asking
//! anybody. What it says is as old as that process: a container whose process has ended is stopped, whatever the file says
//! ([`Record::status`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use oci_spec::runtime::Hook;
use rustix::fs::{Mode, OFlags, openat, renameat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::container_id::ContainerId;
use crate::host_process::HostProcess;

/// The version of the OCI runtime-spec that is implemented.
pub const OCI_VERSION: &str = "1.2.0";
/// The file's name.
pub(crate) const FILE: &str = "record.json";
/// The file while it is written.
pub(crate) const NEW_FILE: &str = ".record.json";
/// The most that is read of it, in bytes: a `config.json` has no more, and it has a part of one.
const MAX: u64 = 2 * 1024 * 1024;
/// The version of the format: another one is another program's.
const VERSION: u32 = 1;

/// The state of a container (runtime.md, "State"), and `paused`, which runc and its callers know too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its machine or its process is being made.
    Creating,
    /// Its process waits for the start.
    Created,
    /// Its process runs.
    Running,
    /// Its process is held.
    Paused,
    /// Its process has ended.
    Stopped,
}

impl Status {
    /// As in the state document.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// What is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// The container.
    pub id: ContainerId,
    /// Its bundle, an absolute path.
    pub bundle: PathBuf,
    /// Its root file system, an absolute path.
    pub rootfs: PathBuf,
    /// From its config.
    pub annotations: BTreeMap<String, String>,
    /// When it was created, as in RFC 3339.
    pub created: String,
    /// The process that lives as long as the container and ends as it does.
    pub process: HostProcess,
    /// The VMM of its machine, once there is one.
    pub vmm: Option<HostProcess>,
    /// The path of its network namespace, if it has a machine and the namespace a path: an absolute one.
    pub network: Option<PathBuf>,
    /// The container in whose machine it is, if that is another one.
    pub sandbox: Option<ContainerId>,
    /// It belongs to a `kvrun run` in the foreground, and to nobody once that has ended.
    pub transient: bool,
    /// What the process said last. [`Record::status`] is the truth.
    pub last: Status,
    /// Run on the host when it has been deleted.
    pub poststop: Vec<Hook>,
}

impl Record {
    /// A container that is being created.
    pub fn creating(id: ContainerId, process: HostProcess, created: String) -> Self {
        Self {
            version: VERSION,
            id,
            bundle: PathBuf::new(),
            rootfs: PathBuf::new(),
            annotations: BTreeMap::new(),
            created,
            process,
            vmm: None,
            network: None,
            sandbox: None,
            transient: false,
            last: Status::Creating,
            poststop: Vec::new(),
        }
    }

    /// Its state now.
    pub fn status(&self) -> Status {
        if self.last == Status::Stopped || self.process.alive().is_none() {
            Status::Stopped
        } else {
            self.last
        }
    }

    /// The state document (runtime.md, "State") for a status.
    pub fn state(&self, status: Status) -> State<'_> {
        State {
            oci_version: OCI_VERSION,
            id: self.id.as_str(),
            status: status.name(),
            pid: (status != Status::Stopped).then_some(self.process.pid),
            bundle: &self.bundle,
            annotations: &self.annotations,
        }
    }

    /// Reads the one in a state directory; `None` if there is none yet.
    ///
    /// # Errors
    /// It cannot be read, or is not what this program writes.
    pub fn read(dir: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match openat(dir, FILE, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let mut bytes = Vec::new();
        file.take(MAX).read_to_end(&mut bytes)?;
        let record: Self = serde_json::from_slice(&bytes)?;
        if record.version != VERSION {
            return Err(io::Error::other(format!("version {} instead of {VERSION}", record.version)));
        }
        Ok(Some(record))
    }

    /// Writes it.
    ///
    /// # Errors
    /// As open(2), write(2), rename(2); then the one before is still there.
    pub fn write(&self, dir: BorrowedFd<'_>) -> io::Result<()> {
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(dir, NEW_FILE, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(&serde_json::to_vec(self)?)?;
        Ok(renameat(dir, NEW_FILE, dir, FILE)?)
    }
}

/// The state document, which is what `state` prints and hooks read.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    oci_version: &'static str,
    id: &'a str,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
    bundle: &'a std::path::Path,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn record() -> Record {
        let mut record = Record::creating(
            "c1".parse().unwrap(),
            HostProcess::current().unwrap(),
            "2026-01-01T00:00:00Z".into(),
        );
        record.bundle = "/b".into();
        record
    }

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let fd = File::open(dir.path()).unwrap();
        assert!(Record::read(fd.as_fd()).unwrap().is_none());
        let mut record = record();
        record.write(fd.as_fd()).unwrap();
        record.last = Status::Running;
        record.write(fd.as_fd()).unwrap();
        assert_eq!(Record::read(fd.as_fd()).unwrap().unwrap().last, Status::Running);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::write(dir.path().join(FILE), "{}").unwrap();
        assert!(Record::read(fd.as_fd()).is_err());
    }

    #[test]
    fn container_whose_process_is_gone_is_stopped_whatever_was_written() {
        let mut record = record();
        record.last = Status::Running;
        assert_eq!(record.status(), Status::Running);
        record.process.start_time += 1;
        assert_eq!(record.status(), Status::Stopped);
    }

    #[test]
    fn state_has_what_the_specification_names() {
        let mut record = record();
        let state = serde_json::to_value(record.state(Status::Created)).unwrap();
        assert_eq!(
            state,
            serde_json::json!({"ociVersion": OCI_VERSION, "id": "c1", "status": "created",
                "pid": record.process.pid, "bundle": "/b"})
        );
        record.annotations.insert("a".into(), "b".into());
        let state = serde_json::to_value(record.state(Status::Stopped)).unwrap();
        assert_eq!(
            state,
            serde_json::json!({"ociVersion": OCI_VERSION, "id": "c1", "status": "stopped", "bundle": "/b",
                "annotations": {"a": "b"}})
        );
    }
}
