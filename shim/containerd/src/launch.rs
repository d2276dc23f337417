//! The action `start`: finds the shim of a container's pod, or starts one.
//!
//! The new shim inherits a socket that listens already, so whoever is told the address can connect at once, and of two that start the same
//! pod one finds the other's.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use containerd_shim::Flags;
use kvrun_pod::bundle::MAX_CONFIG;
use serde::Deserialize;

use crate::error::{Error, host};

/// The annotations by which containerd's CRI plugin says which container belongs to which pod (its `pkg/cri/annotations`).
pub(crate) const KIND: &str = "io.kubernetes.cri.container-type";
/// The ID of the pod's own container.
pub(crate) const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// Only what is needed here: the shim reads, and checks, all of it.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

/// The ID by which the containers of a pod are grouped: the sandbox's, or that of a container that is alone.
pub(crate) fn group(flags: &Flags) -> Result<String, Error> {
    let mut text = String::new();
    let read = File::open("config.json").and_then(|file| file.take(MAX_CONFIG).read_to_string(&mut text));
    read.map_err(host("read config.json of the bundle"))?;
    let config: Config = serde_json::from_str(&text).map_err(host("read config.json of the bundle"))?;
    let of_pod = config.annotations.get(KIND).is_some_and(|kind| kind == "container");
    let sandbox = config.annotations.get(SANDBOX).filter(|_| of_pod);
    Ok(sandbox.unwrap_or(&flags.id).clone())
}

/// Does it in the bundle, which is the working directory; what to print for containerd.
pub(crate) fn start(flags: &Flags) -> Result<String, Error> {
    let group = group(flags)?;
    let address = containerd_shim::socket_address(&flags.address, &flags.namespace, &group);
    let path = Path::new(address.strip_prefix("unix://").unwrap_or(&address));
    // Unless the pod has a shim.
    if let Some(socket) = listen(path).map_err(host(format!("listen at {}", path.display())))? {
        spawn(flags, socket).inspect_err(|_| drop(fs::remove_file(path)))?;
    }
    fs::write("address", &address).map_err(host("write the shim's address"))?;
    // Version 2 of the Task API is spoken by every containerd since 1.3.
    Ok(serde_json::json!({"version": 2, "address": address, "protocol": "ttrpc"}).to_string())
}

/// `None` if somebody listens there.
fn listen(path: &Path) -> io::Result<Option<UnixListener>> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    loop {
        match UnixListener::bind(path) {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
        match UnixStream::connect(path) {
            Ok(_) => return Ok(None),
            // Of a shim that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// Starts the shim, with the socket as its standard input.
fn spawn(flags: &Flags, socket: UnixListener) -> Result<(), Error> {
    let program = std::env::current_exe().map_err(host("find this program"))?;
    let mut command = Command::new(program);
    command.args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address]);
    if flags.debug {
        command.arg("-debug");
    }
    command.stdin(OwnedFd::from(socket)).stdout(Stdio::null()).stderr(Stdio::null());
    // Signals for containerd's process group are not for its shims.
    command.process_group(0);
    command.spawn().map_err(host("start the shim"))?;
    Ok(())
}

/// The socket that [`spawn`] has handed to this process.
pub(crate) fn inherited_socket() -> Result<UnixListener, Error> {
    let missing = || Error::Usage("no action was given; containerd runs this program with start".into());
    let stdin = io::stdin();
    if !rustix::net::sockopt::socket_acceptconn(&stdin).unwrap_or(false) {
        return Err(missing());
    }
    let socket = stdin.as_fd().try_clone_to_owned().map_err(host("take the inherited socket"))?;
    Ok(socket.into())
}
