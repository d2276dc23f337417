//! `containerd-shim-kvrun-v2`: containerd's door to the pod engine ([`kvrun_pod`]), a shim of API version 2
//! (containerd's `core/runtime/v2/README.md`).
//!
//! containerd runs this program in three ways:
//!
//! * `start`, in the bundle of a new container: [`launch`] finds the shim of its pod or starts one, and prints its address.
//! * without an action: [`serve`] is that shim. One process serves all containers of a pod: [`service`] is the Task API over
//!   [`pod`], which has the [`machine`], its [`container`]s and their [`task`]s, the processes in it; the machine may [stand in](stand_in) for one. [`stdio`] opens what they read and write, [`events`] tells
//!   containerd what happens, [`metrics`] says what they use, [`options`] which configuration counts.
//! * `delete`, when the shim is gone: [`cleanup`] removes what it has left.

mod cleanup;
mod container;
mod error;
mod events;
mod launch;
mod machine;
mod metrics;
mod options;
mod pod;
mod rootfs;
mod serve;
mod service;
mod stand_in;
mod stdio;
mod task;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use containerd_shim::Flags;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{Message, MessageField};
use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use kvrun_pod::state_dir::CONTAINERD_ROOT;

use crate::error::{Error, host};

/// What containerd's `typeurl` calls the features of a runtime, which it writes as JSON (containerd's `client/client.go`).
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// The name containerd knows us by.
const RUNTIME: &str = "io.containerd.kvrun.v2";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "containerd-shim-kvrun-v2: {}", kvrun_pod::text::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Error> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = containerd_shim::parse(&arguments).map_err(|e| Error::Usage(e.to_string()))?;
    if flags.version {
        let version = env!("CARGO_PKG_VERSION");
        return write(
            format!("containerd-shim-kvrun-v2:\n  Runtime:  {RUNTIME}\n  Version:  {version}\n").as_bytes(),
        );
    }
    if flags.info {
        return write(&info().write_to_bytes().map_err(host("write the runtime's description"))?);
    }
    if flags.id.is_empty() || flags.namespace.is_empty() {
        return Err(Error::Usage("-id and -namespace are needed; containerd runs this program".into()));
    }
    match flags.action.as_str() {
        "start" => write(launch::start(&flags)?.as_bytes()),
        "delete" => {
            let response = cleanup::delete(&flags)?;
            write(&response.write_to_bytes().map_err(host("write what was deleted"))?)
        }
        "" => serve::serve(&flags),
        other => Err(Error::Usage(format!("there is no action {other:?}; only start and delete"))),
    }
}

fn write(bytes: &[u8]) -> Result<(), Error> {
    let mut stdout = io::stdout();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(host("write to standard output"))
}

/// What `-info` prints.
fn info() -> RuntimeInfo {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() };
    let features = Any {
        type_url: FEATURES.to_owned(),
        value: kvrun_pod::features::features().to_string().into_bytes(),
        ..Default::default()
    };
    RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..Default::default()
    }
}

/// Where the pods of a namespace of containerd have their state.
fn state_root(flags: &Flags) -> Result<PathBuf, Error> {
    let name = &flags.namespace;
    // containerd's own rule (its pkg/identifiers) is narrower; this is what keeps us below our directory.
    if name.starts_with('.') || name.contains('/') {
        return Err(Error::Usage(format!("-namespace {name:?} is no name of a namespace")));
    }
    Ok(Path::new(CONTAINERD_ROOT).join(name))
}
