//! `kvrun start`, `pause` and `resume`: the container goes from one state to another.

use kvrun_pod::record::Status;

use crate::cli::Global;
use crate::error::Error;
use crate::monitor::client::{Known, PATIENCE};
use crate::monitor::protocol::Request;

/// Runs the process of a created container.
pub(crate) fn start(global: &Global, id: &str) -> Result<(), Error> {
    change(global, id, "start", Request::Start)
}

/// Holds all its processes.
pub(crate) fn pause(global: &Global, id: &str) -> Result<(), Error> {
    change(global, id, "pause", Request::Pause)
}

/// Lets them run.
pub(crate) fn resume(global: &Global, id: &str) -> Result<(), Error> {
    change(global, id, "resume", Request::Resume)
}

fn change(global: &Global, id: &str, what: &'static str, request: Request) -> Result<(), Error> {
    let container = Known::get(&global.root, id)?;
    // The monitor says whether it can be; one that has stopped may have none.
    if container.record.status() == Status::Stopped {
        return Err(Error::WrongState { what, id: container.id().clone(), status: Status::Stopped });
    }
    container.connect(&global.root, PATIENCE)?.tell(request)
}
