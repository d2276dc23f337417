//! `kvrun delete`: removes everything a container has left, from what is written down, whoever is dead by then.

use std::time::Duration;

use kvrun_pod::container_id::ContainerId;
use kvrun_pod::hooks;
use kvrun_pod::network::{self, NetworkNamespace};
use kvrun_pod::record::{Record, Status};
use kvrun_pod::state_dir::{ContainerDir, StateError};
use rustix::process::Signal;

use crate::cli::Global;
use crate::create::runtime;
use crate::error::{Error, host};
use crate::log::Log;
use crate::monitor::client::Known;
use crate::monitor::protocol::Request;
use crate::monitor::state;

/// How long the monitor may take to answer, and then to end by itself, before it is killed: together well below 2 s.
const ANSWER: Duration = Duration::from_millis(300);
const END: Duration = Duration::from_millis(900);
/// How long the kernel may take over the end of a process that was killed. It has the memory of a machine to give back, which takes
/// milliseconds; this is for a host where something is wrong.
const KILLED: Duration = Duration::from_secs(10);

/// Deletes a container that has stopped, or any if `force`.
pub(crate) fn delete(global: &Global, id: &str, force: bool, log: &Log) -> Result<(), Error> {
    let id: ContainerId = id.parse()?;
    let Some(container) = Known::find(&global.root, &id)? else {
        return if force { Ok(()) } else { Err(StateError::Unknown { id }.into()) };
    };
    let status = container.record.status();
    if status != Status::Stopped && !force {
        return Err(Error::NotStopped { id, status });
    }
    let process = container.record.process.alive();
    // The process may hand output over that nobody takes, or serve a container that is to be killed; and a machine of others may have the container
    // still when its process was killed.
    if (process.is_some() || container.record.sandbox.is_some())
        && let Err(error) =
            container.connect(&global.root, ANSWER).and_then(|connection| connection.tell(Request::Delete))
    {
        tracing::debug!(%error, "tell the monitor that its container is deleted");
    }
    if let Some(process) = process {
        process.ends_within(END);
    }
    if !end(&container.record) {
        return Err(Error::Unkillable { id });
    }
    release_network(&container.record);
    match ContainerDir::take_over(&global.root, &id) {
        // Dropping it removes everything.
        Ok(dir) => drop(dir),
        // One in the foreground has cleaned up after itself, or somebody else deletes it too.
        Err(StateError::Unknown { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let home = NetworkNamespace::current().map_err(host("find our network namespace"))?;
    run_poststop(&container.record, &home, log);
    Ok(())
}

/// Gives back what the container's machine had of the host's network, if its monitor was killed before it could.
fn release_network(record: &Record) {
    let Some(path) = &record.network else { return };
    if let Err(error) = network::release(path) {
        let error = kvrun_pod::text::chain(&error);
        tracing::warn!(path = %path.display(), error, "give the network namespace back");
    }
}

/// Ends a container whose machine does not do what it is told: kills the VMM, and after a moment, in which whoever serves it can tell of its
/// end, that process too.
pub(crate) fn end_machine(record: &Record) {
    if let Some(vmm) = record.vmm.as_ref().and_then(kvrun_pod::host_process::HostProcess::alive) {
        vmm.signal(Signal::KILL);
        if let Some(process) = record.process.alive() {
            process.ends_within(ANSWER);
        }
    }
    end(record);
}

/// Kills what is left of a container's processes on the host; whether they have ended.
pub(crate) fn end(record: &Record) -> bool {
    let killed = |process: &kvrun_pod::host_process::HostProcess| {
        process.alive().is_none_or(|process| {
            process.signal(Signal::KILL);
            process.ends_within(KILLED)
        })
    };
    // Both, whatever became of the first.
    let monitor = killed(&record.process);
    let vmm = record.vmm.as_ref().is_none_or(killed);
    monitor && vmm
}

/// Runs the hooks that come after a container. One that fails is told of, and the next one runs (runtime.md, "Lifecycle").
pub(crate) fn run_poststop(record: &Record, network: &NetworkNamespace, log: &Log) {
    if record.poststop.is_empty() {
        return;
    }
    let state = state(record, Status::Stopped);
    let run = |runtime: tokio::runtime::Runtime| {
        for hook in &record.poststop {
            let hook = std::slice::from_ref(hook);
            if let Err(error) = runtime.block_on(hooks::run("poststop", hook, network, &state)) {
                log.warn(&kvrun_pod::text::chain(&error));
            }
        }
    };
    match runtime() {
        Ok(runtime) => run(runtime),
        Err(error) => log.warn(&kvrun_pod::text::chain(&error)),
    }
}
