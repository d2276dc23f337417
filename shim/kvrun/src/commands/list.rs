//! `kvrun list`: the containers below `--root`.

use kvrun_pod::record::{OCI_VERSION, Record, Status};
use kvrun_pod::state_dir;
use serde_json::{Value, json};

use super::{print, table};
use crate::cli::{Global, ListArgs, ListFormat};
use crate::error::{Error, host};
use crate::monitor::client::Known;

/// Prints them.
pub(crate) fn list(global: &Global, args: &ListArgs) -> Result<(), Error> {
    let mut records = Vec::new();
    for id in state_dir::all(&global.root)? {
        // It may have been deleted meanwhile, or be another program's.
        match Known::find(&global.root, &id) {
            Ok(known) => records.extend(known.map(|known| known.record)),
            Err(error) => tracing::warn!(%id, %error, "left out of the list"),
        }
    }
    if args.quiet {
        return records.iter().try_for_each(|record| print(record.id.as_str()));
    }
    match args.format {
        ListFormat::Json => {
            let all: Vec<Value> = records.iter().map(row).collect();
            // One line, as runc prints it.
            print(&serde_json::to_string(&all).map_err(host("write JSON"))?)
        }
        ListFormat::Table => {
            let mut rows =
                vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned).to_vec()];
            rows.extend(records.iter().map(|record| {
                let (status, pid) = status_and_pid(record);
                let bundle = record.bundle.display().to_string();
                let cells =
                    [record.id.as_str(), &pid.to_string(), status.name(), &bundle, &record.created, "root"];
                cells.map(str::to_owned).to_vec()
            }));
            print(&table(&rows))
        }
    }
}

fn status_and_pid(record: &Record) -> (Status, i32) {
    let status = record.status();
    // runc's 0 for a container without a process.
    (status, if status == Status::Stopped { 0 } else { record.process.pid })
}

fn row(record: &Record) -> Value {
    let (status, pid) = status_and_pid(record);
    json!({
        "ociVersion": OCI_VERSION, "id": record.id, "pid": pid, "status": status.name(), "bundle": record.bundle,
        "rootfs": record.rootfs, "created": record.created, "annotations": record.annotations, "owner": "root",
    })
}
