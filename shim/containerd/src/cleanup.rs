//! The action `delete`: removes what a shim that is gone has left of a container.

use std::fs;
use std::time::Duration;

use containerd_shim::Flags;
use containerd_shim::protos::api::DeleteResponse;
use containerd_shim::protos::protobuf::MessageField;
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::network;
use kvrun_pod::record::Record;
use kvrun_pod::state_dir::{self, ContainerDir, StateError};
use rustix::process::Signal;

use crate::error::{Error, host};
use crate::events::now;
use crate::task::KILLED;

/// How long the kernel may take over the end of a process that was killed, with the memory of a machine to give back.
const DEATH: Duration = Duration::from_secs(10);

/// Does it. A container that is one of several in a pod has left nothing of its own: all it had was its shim's.
pub(crate) fn delete(flags: &Flags) -> Result<DeleteResponse, Error> {
    let root = crate::state_root(flags)?;
    let id: ContainerId = flags.id.parse()?;
    let mut pid = 0;
    if let Some(record) = record(&root, &id)? {
        pid = record.process.pid;
        for process in [Some(&record.process), record.vmm.as_ref()].into_iter().flatten() {
            let Some(process) = process.alive() else { continue };
            process.signal(Signal::KILL);
            if !process.ends_within(DEATH) {
                return Err(Error::TooSlow { what: "the end of a killed process", bound: DEATH });
            }
        }
        release_network(&record);
        match ContainerDir::take_over(&root, &id) {
            // Dropping it removes everything.
            Ok(dir) => drop(dir),
            Err(StateError::Unknown { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let address = containerd_shim::socket_address(&flags.address, &flags.namespace, &flags.id);
        let _ = fs::remove_file(address.strip_prefix("unix://").unwrap_or(&address));
    }
    Ok(DeleteResponse {
        pid: pid.unsigned_abs(),
        exit_status: KILLED,
        exited_at: MessageField::some(now()),
        ..Default::default()
    })
}

/// Gives back what the pod's machine had of the host's network.
fn release_network(record: &Record) {
    let Some(path) = &record.network else { return };
    if let Err(error) = network::release(path) {
        // Containerd logs what the action says on standard error.
        eprintln!("give the pod's network namespace back: {}", kvrun_pod::text::chain(&error));
    }
}

fn record(root: &std::path::Path, id: &ContainerId) -> Result<Option<Record>, Error> {
    let Some(dir) = state_dir::look(root, id)? else { return Ok(None) };
    Record::read(std::os::fd::AsFd::as_fd(&dir)).map_err(host("read the pod's record"))
}
