//! `kvrun create`, and `run --detach`: the container's machine and its monitor, or its part in the machine of a pod, in a process that
//! stays.

use std::os::fd::AsFd;
use std::path::Path;

use kvrun_pod::bundle::{Bundle, Files};
use kvrun_pod::config::Config;
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::network::NetworkNamespace;
use kvrun_pod::record::Status;
use kvrun_pod::share::{self, MountNamespace, Trees, View};
use kvrun_pod::state_dir::{self, StateError};
use kvrun_pod::stdio::{Copying, Stdio};

use crate::attach::{End, aborted, attend};
use crate::cli::process::CreateArgs;
use crate::cli::{Global, Rootless};
use crate::commands::{delete, start};
use crate::daemon::{self, Parent, write_pid_file};
use crate::engine::{Prepared, claim, enter_network, join_cgroup};
use crate::error::{Error, host};
use crate::first_thread::beside;
use crate::log::Log;
use crate::monitor::client::{Known, PATIENCE};
use crate::monitor::describe;
use crate::monitor::protocol::{Request, file_of};
use crate::run::{Own, finish, own_stdio};
use crate::signals::{self, Signals};
use crate::terminal::Terminal;

/// The annotations by which containerd's CRI plugin and CRI-O say which container belongs to which pod: kind, and the pod's own container.
const POD_ANNOTATIONS: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

/// Creates a container.
pub(crate) fn create(global: &Global, args: &CreateArgs, log: &Log) -> Result<(), Error> {
    let id: ContainerId = args.id.parse()?;
    check_options(global, args)?;
    daemon::start(|parent| {
        // Before anything is opened that is to be shared: a mount of another namespace cannot be cloned.
        let namespace = share::enter_mount_namespace()?;
        let (bundle, files) = Bundle::load_beside(&args.bundle, &|pid| stands_for(&global.root, pid))?;
        let console = Console::new(bundle.has_terminal(), args.console_socket.as_deref())?;
        let own = Creation { global, args, id: &id, console, parent };
        match sandbox(&global.root, &bundle, &id)? {
            None => {
                let config = global.load_config()?;
                log.obey(&config);
                own.monitor(config, &namespace, bundle, files, log)
            }
            Some(sandbox) => own.join(&bundle, files, &sandbox),
        }
    })
}

/// `run --detach`: creates a container and starts it. One that cannot be started is deleted.
pub(crate) fn run_detached(global: &Global, args: &CreateArgs, log: &Log) -> Result<(), Error> {
    create(global, args, log)?;
    start::start(global, &args.id).inspect_err(|_| {
        if let Err(error) = delete::delete(global, &args.id, true, log) {
            tracing::warn!(error = %kvrun_pod::text::chain(&error), "delete a container that could not be started");
        }
    })
}

/// The container for which a process of the host stands: how a config names one whose namespaces are to be joined.
pub(crate) fn stands_for(root: &Path, pid: i32) -> Option<ContainerId> {
    let ids = state_dir::all(root).ok()?;
    let records = ids.iter().filter_map(|id| Known::find(root, id).ok()?).map(|known| known.record);
    records
        .into_iter()
        .find(|record| record.process.pid == pid && record.status() != Status::Stopped)
        .map(|record| record.id)
}

/// What can be said about options without the bundle.
pub(crate) fn check_options(global: &Global, args: &CreateArgs) -> Result<(), Error> {
    if args.preserve_fds > 0 {
        return Err(Error::Option(format!(
            "--preserve-fds {}: descriptors of the host do not reach into a guest; leave it out",
            args.preserve_fds
        )));
    }
    if global.rootless == Rootless::True {
        return Err(Error::Option("--rootless=true: kvrun needs to run as root".into()));
    }
    Ok(())
}

/// The container in whose machine this one is to be: by its annotations, or because it joins namespaces of one that is there.
fn sandbox(root: &Path, bundle: &Bundle, id: &ContainerId) -> Result<Option<ContainerId>, Error> {
    let annotations = bundle.annotations();
    for (kind, sandbox) in POD_ANNOTATIONS {
        if annotations.get(kind).is_some_and(|kind| kind == "container")
            && let Some(sandbox) = annotations.get(sandbox).filter(|sandbox| *sandbox != id.as_str())
        {
            return Ok(Some(sandbox.parse()?));
        }
    }
    let Some(sibling) = bundle.siblings().first() else { return Ok(None) };
    let known = Known::get(root, sibling.as_str())?;
    Ok(Some(known.record.sandbox.unwrap_or_else(|| sibling.clone())))
}

/// What a process that stays has as standard input and output.
pub(crate) enum Console<'a> {
    /// Those of whoever started it.
    Inherited,
    /// A terminal, to be sent there.
    Socket(&'a Path),
}

impl<'a> Console<'a> {
    /// Refuses what does not go together, as runc does.
    pub(crate) fn new(terminal: bool, socket: Option<&'a Path>) -> Result<Self, Error> {
        match (terminal, socket) {
            (false, None) => Ok(Self::Inherited),
            (true, Some(socket)) => Ok(Self::Socket(socket)),
            (true, None) => Err(Error::Option(
                "a process with a terminal that is not in the foreground needs --console-socket to send the terminal to".into(),
            )),
            (false, Some(_)) => {
                Err(Error::Option("--console-socket is for a process with a terminal, and this one has none".into()))
            }
        }
    }

    /// Opens it.
    pub(crate) fn open(&self) -> Result<(Stdio, Option<Terminal>), Error> {
        match self {
            Self::Inherited => {
                let stdio = own_stdio(false).map_err(host("duplicate standard input and output"))?;
                Ok((stdio, None))
            }
            Self::Socket(path) => {
                let error = |source| Error::Console { path: (*path).to_owned(), source };
                let terminal = Terminal::send(path).map_err(error)?;
                let ends = terminal.duplicate().and_then(|one| Ok((one, terminal.duplicate()?)));
                let (stdin, stdout) = ends.map_err(host("duplicate the terminal"))?;
                Ok((Stdio { stdin: Some(stdin), stdout: Some(stdout), stderr: None }, Some(terminal)))
            }
        }
    }
}

/// The creation of one container, in the process that stays.
struct Creation<'a> {
    global: &'a Global,
    args: &'a CreateArgs,
    id: &'a ContainerId,
    console: Console<'a>,
    parent: &'a Parent,
}

impl Creation<'_> {
    /// In a machine of its own.
    fn monitor(
        &self,
        config: Config,
        namespace: &MountNamespace,
        bundle: Bundle,
        files: Files,
        log: &Log,
    ) -> Result<End, Error> {
        let signals = signals::block().map_err(host("block signals"))?;
        let mut prepared = Prepared::new(self.global, config, namespace, self.id, &bundle, false)?;
        let view = View::of(&bundle, &files)?;
        beside(&self.global.root, self.id, view, move |showing| {
            runtime()?.block_on(async {
                let signals = signals.listen().map_err(host("listen for signals"))?;
                let mut early = Vec::new();
                let (stdio, terminal) = self.console.open()?;
                let created = tokio::select! {
                    biased;
                    created = prepared.create(&bundle, files, stdio.wanted()) => created?,
                    signal = aborted(&signals, &mut early) => return Err(interrupted(signal?)),
                };
                let (pod, process, streams) = created;
                let copying = Copying::start(stdio, streams)?;
                let (monitor, container) = prepared.serve(&pod, process, bundle)?;
                showing.show()?;
                self.ready()?;
                prepared.dir().keep();
                let end = attend(&Own(&container), &signals, early, terminal.as_ref()).await?;
                tokio::select! {
                    biased;
                    () = drained(copying, &signals) => {}
                    () = monitor.leave() => {}
                }
                drop(terminal);
                finish(&pod, &end, &container, self.id, log).await;
                Ok(end)
            })
        })
    }

    /// In the machine of another container: that one's monitor does it, and this process stands for it. The files go along: the
    /// monitor may be in a mount namespace in which they are not.
    fn join(&self, bundle: &Bundle, files: Files, sandbox: &ContainerId) -> Result<End, Error> {
        let root = &self.global.root;
        let signals = signals::block().map_err(host("block signals"))?;
        let monitor =
            Known::find(root, sandbox)?.ok_or_else(|| StateError::Unknown { id: sandbox.clone() })?;
        if let Some(other) = &monitor.record.sandbox {
            return Err(Error::Option(format!(
                "container {sandbox} has no machine of its own, but is in that of {other}"
            )));
        }
        enter_network(bundle)?;
        let (dir, record) = claim(root, self.id, |record| {
            record.sandbox = Some(sandbox.clone());
            describe(record, bundle)
        })?;
        // What the container takes is on the machine's account; but this is where engines look for its process.
        let cgroup = join_cgroup(self.global, bundle, &dir)?;
        let network = NetworkNamespace::current().map_err(host("find the network namespace"))?;
        let (trees, view) = (Trees::of(bundle, &files)?, View::of(bundle, &files)?);
        let config = file_of(files.config()).map_err(host("hand the config over"))?;
        drop(files);
        beside(root, self.id, view, move |showing| {
            let _cgroup = cgroup;
            runtime()?.block_on(async {
                let signals = signals.listen().map_err(host("listen for signals"))?;
                let (stdio, terminal) = self.console.open()?;
                let wanted = stdio.wanted();
                let request = Request::Create { bundle: record.bundle, wanted };
                let connection = monitor.connect(root, PATIENCE)?.about(self.id);
                let state = dir.reopen()?;
                let mut descriptors = vec![state.as_fd(), config.as_fd(), network.as_fd()];
                descriptors.extend(trees.descriptors());
                let (process, streams) = connection.attach(request, &descriptors, wanted)?;
                // The monitor has them now.
                drop((trees, config));
                let copying = Copying::start(stdio, streams)?;
                showing.show()?;
                self.ready()?;
                dir.keep();
                let end = attend(&process, &signals, Vec::new(), terminal.as_ref()).await?;
                drained(copying, &signals).await;
                Ok(end)
            })
        })
    }

    fn ready(&self) -> Result<(), Error> {
        if let Some(path) = &self.args.pid_file {
            write_pid_file(path)?;
        }
        self.parent.ready()
    }
}

/// Waits until the output is where it belongs, for as long as nobody sends a signal to end.
pub(crate) async fn drained(copying: Copying, signals: &Signals) {
    let mut ignored = Vec::new();
    tokio::select! {
        biased;
        () = copying.drain() => {}
        _ = aborted(signals, &mut ignored) => {}
    }
}

/// Runs the rest of a process that stays.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(host("start"))
}

fn interrupted(signal: nix::sys::signal::Signal) -> Error {
    Error::Option(format!("interrupted by {signal}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_and_console_socket_go_together() {
        let socket = Path::new("/s");
        assert!(matches!(Console::new(false, None), Ok(Console::Inherited)));
        assert!(matches!(Console::new(true, Some(socket)), Ok(Console::Socket(_))));
        assert!(Console::new(true, None).is_err_and(|e| e.to_string().contains("--console-socket")));
        assert!(Console::new(false, Some(socket)).is_err_and(|e| e.to_string().contains("--console-socket")));
    }
}
