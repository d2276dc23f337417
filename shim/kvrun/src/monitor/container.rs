//! A container in the machine, and what is written down of it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvrun_pod::bundle::Bundle;
use kvrun_pod::process::Process;
use kvrun_pod::record::{Record, Status};
use kvrun_pod::share::Place;

use crate::attach::{Attended, End};
use crate::error::{Error, host};

/// A container in the machine.
#[derive(Debug)]
pub(crate) struct Container {
    pub(super) process: Process,
    pub(super) bundle: Bundle,
    /// Its state directory.
    dir: OwnedFd,
    /// Where its files are, if it is not the first.
    pub(super) place: Option<Place>,
    record: Mutex<Record>,
    /// Held while it goes from one state to another.
    pub(super) changing: tokio::sync::Mutex<()>,
    /// The processes on the host that stand for further processes in it.
    pub(super) execs: Mutex<Vec<i32>>,
    /// Whether it is gone from the machine; held while it goes.
    pub(super) removed: tokio::sync::Mutex<bool>,
}

impl Container {
    /// One that has just been created.
    pub(crate) fn new(
        process: Process,
        bundle: Bundle,
        dir: OwnedFd,
        record: Record,
        place: Option<Place>,
    ) -> Result<Arc<Self>, Error> {
        let container = Self {
            process,
            bundle,
            dir,
            place,
            record: Mutex::new(record),
            changing: tokio::sync::Mutex::default(),
            execs: Mutex::default(),
            removed: tokio::sync::Mutex::default(),
        };
        container.set(Status::Created)?;
        Ok(Arc::new(container))
    }

    /// Its process.
    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// Its bundle.
    pub(crate) fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    pub(super) fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn status(&self) -> Status {
        self.record().last
    }

    /// Writes down its state, unless it has stopped, which is for good.
    pub(crate) fn set(&self, status: Status) -> Result<(), Error> {
        let mut record = self.record();
        if record.last == Status::Stopped {
            return Ok(());
        }
        record.last = status;
        record.write(self.dir.as_fd()).map_err(host("write the container's record"))
    }

    pub(super) fn stopped(&self) {
        if let Err(error) = self.set(Status::Stopped) {
            // Whoever reads the record sees that this process has ended, a moment later.
            tracing::warn!(error = %kvrun_pod::text::chain(&error), "write down the end of the container");
        }
    }

    pub(super) fn wrong_state(&self, what: &'static str) -> Error {
        let record = self.record();
        Error::WrongState { what, id: record.id.clone(), status: record.last }
    }
}

/// Waits for the end of a container's process and writes it down.
pub(crate) async fn until_end(container: &Container) -> End {
    let end = Attended::wait(&container.process).await;
    container.stopped();
    end
}
