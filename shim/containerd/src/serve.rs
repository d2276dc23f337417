//! The shim itself: a process that serves the containers of a pod until the last one is gone.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::Mutex;

use containerd_shim::Flags;
use containerd_shim::protos::shim_async::create_task;
use kvrun_pod::config::Config;
use kvrun_pod::log::{self, Format, Level};
use kvrun_pod::network::NetworkNamespace;
use kvrun_pod::share::{self, MountNamespace};
use rustix::fs::OFlags;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tracing::level_filters::LevelFilter;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::error::{Error, host};
use crate::events::Events;
use crate::launch;
use crate::machine::Host;
use crate::pod::Pod;
use crate::service::Service;

/// The name under which the generated code has the service, and the one by which every containerd since 1.3 calls it: the messages are the
/// same (containerd's `api/runtime/task/v3/shim.proto` is a copy).
const SERVICES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];
/// Where containerd says that it takes events.
const EVENTS_VARIABLE: &str = "TTRPC_ADDRESS";

/// Serves, in the bundle of the pod's first container.
pub(crate) fn serve(flags: &Flags) -> Result<(), Error> {
    let socket = launch::inherited_socket()?;
    let address = containerd_shim::socket_address(&flags.address, &flags.namespace, &launch::group(flags)?);
    let log = Log::open(flags)?;
    // The bundle goes away with its container, which others may outlive.
    std::env::set_current_dir("/").map_err(host("leave the bundle"))?;
    let events =
        std::env::var(EVENTS_VARIABLE).map_err(host(format!("find {EVENTS_VARIABLE} in the environment")))?;
    let mounts = share::enter_mount_namespace()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(host("start"))?;
    let served = runtime.block_on(serve_until_left(flags, socket, events, mounts, log));
    if let Err(error) = &served {
        tracing::error!(error = %kvrun_pod::text::chain(error), "serve the pod");
    }
    let _ = std::fs::remove_file(address.strip_prefix("unix://").unwrap_or(&address));
    served
}

async fn serve_until_left(
    flags: &Flags,
    socket: UnixListener,
    events: String,
    mounts: MountNamespace,
    log: Log,
) -> Result<(), Error> {
    let events = Events::new(events, &flags.namespace);
    let home = NetworkNamespace::current().map_err(host("find our network namespace"))?;
    let namespace = flags.namespace.clone();
    let host_side = Host { namespace, state_root: crate::state_root(flags)?, mounts, home, log };
    let pod = Pod::new(host_side, events.clone());
    let leave = Arc::new(Notify::new());
    let service = Arc::new(Service::new(Arc::clone(&pod), Arc::clone(&leave)));
    let mut terminate = signal(SignalKind::terminate()).map_err(host("listen for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(host("listen for signals"))?;

    let listener = Listener::try_from(socket).map_err(host("listen for containerd"))?;
    let mut server = Server::new().add_listener(listener);
    for name in SERVICES {
        let methods = create_task(service.clone());
        server = server
            .register_service(methods.into_values().map(|methods| (name.to_owned(), methods)).collect());
    }
    server.start().await.map_err(host("serve containerd"))?;
    tokio::select! {
        () = leave.notified() => {}
        _ = terminate.recv() => tracing::info!("terminated"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
    }
    pod.shut_down().await;
    events.flush().await;
    // Whoever asked us to leave has the answer by then.
    server.shutdown().await.map_err(host("stop serving containerd"))
}

/// The log, as containerd reads it.
#[derive(Debug)]
pub(crate) struct Log {
    level: Level,
    /// containerd wants everything.
    debug: bool,
}

impl Log {
    /// Sends traces to the FIFO that containerd reads and puts into its own log, with the pod in each line.
    fn open(flags: &Flags) -> Result<Self, Error> {
        let level = if flags.debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
        // Also for reading, so that a containerd that is being restarted is nothing to fail of; if the FIFO is full, lines are lost.
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        let file = options.open("log").map_err(host("open the log that containerd reads"))?;
        let fields = [("namespace", flags.namespace.as_str()), ("pod", flags.id.as_str())];
        Ok(Self { level: log::install(Format::Text, &fields, level, Mutex::new(file)), debug: flags.debug })
    }

    /// Does as the configuration says.
    pub(crate) fn obey(&self, config: &Config) {
        if !self.debug {
            self.level.set(config.log_level);
        }
    }
}
