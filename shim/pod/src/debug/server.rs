//! The engine's end of a pod's debug socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use kvrun_vmm_api::{ChannelError, Received};
use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{Answer, Ended, Request, Terminal};
use crate::accept::{self, Serving};
use crate::bundle::{Bundle, BundleError, CAPABILITIES};
use crate::channel::{AsyncChannel, ChannelListener};
use crate::config::Config;
use crate::container::{Container, CreateError, ExitState};
use crate::container_id::{ContainerId, InvalidContainerId};
use crate::pod::{Pod, PodError};
use crate::share::{Place, Share, ShareError, Trees};
use crate::state_dir::DEBUG_SOCKET;
use crate::stdio::{Stdio, Wanted};
use crate::text;

/// How many programs run at a time; others wait.
const MOST_PROGRAMS: usize = 8;

/// Why a program is not run.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("name a program to run")]
    NoProgram,
    #[error("a request came without its descriptors")]
    NoStreams,
    #[error("use the directory of debug.root as a root file system")]
    Root(#[from] BundleError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error("the machine ends")]
    Ending,
    #[error(transparent)]
    Id(#[from] InvalidContainerId),
    #[error("create it")]
    Create(#[from] CreateError),
    #[error("start it")]
    Start(#[from] PodError),
}

/// Runs programs for whoever asks on a socket in the pod's state directory, if the configuration says that they may. Must be called in a tokio runtime.
///
/// The share is not kept: a program that runs when the pod undoes it loses its files, and its machine.
///
/// # Errors
/// The socket cannot be made.
pub fn start(pod: &Pod, share: &Arc<Share>, config: &Config, dir: impl AsFd) -> io::Result<Option<Serving>> {
    let Some(root) = &config.debug_root else { return Ok(None) };
    let listener = ChannelListener::bind(dir, DEBUG_SOCKET, MOST_PROGRAMS as i32)?;
    let runner = Runner {
        pod: pod.clone(),
        share: Arc::downgrade(share),
        root: root.clone(),
        next: AtomicU64::new(0),
    };
    Ok(Some(Serving::start(serve(listener, runner))))
}

async fn serve(listener: ChannelListener, runner: Runner) {
    let runner = Arc::new(runner);
    // They end with this task.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            socket = accept::patiently(|| listener.accept()), if connections.len() < MOST_PROGRAMS => {
                let runner = Arc::clone(&runner);
                connections.spawn(async move {
                    if let Err(error) = runner.converse(socket).await {
                        tracing::debug!(%error, "a connection to the debug socket ended");
                    }
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

struct Runner {
    pod: Pod,
    share: Weak<Share>,
    root: PathBuf,
    next: AtomicU64,
}

impl Runner {
    async fn converse(&self, socket: OwnedFd) -> Result<(), ChannelError> {
        if !accept::is_trusted(&socket_peercred(&socket)?) {
            return Ok(());
        }
        let channel = AsyncChannel::of_socket(socket)?;
        let Some(Received { message: Request::Run { args, terminal, streams }, fds }) =
            channel.receive().await?
        else {
            return Ok(());
        };
        let answer = match self.run(&channel, &args, terminal.as_ref(), streams, fds).await {
            Ok(ended) => Answer::Ended(ended),
            Err(error) => Answer::Failed(text::chain(&error)),
        };
        channel.send(&answer, &[]).await
    }

    /// Runs a program to its end, and takes away what it had.
    async fn run(
        &self,
        channel: &AsyncChannel,
        args: &[String],
        terminal: Option<&Terminal>,
        streams: Wanted,
        fds: Vec<OwnedFd>,
    ) -> Result<Ended, RunError> {
        if args.is_empty() {
            return Err(RunError::NoProgram);
        }
        let mut fds = fds.into_iter();
        let mut next = |wanted: bool| match (wanted, fds.next()) {
            (true, None) => Err(RunError::NoStreams),
            (true, fd) => Ok(fd),
            (false, _) => Ok(None),
        };
        let stdio = Stdio {
            stdin: next(streams.stdin)?,
            stdout: next(streams.stdout)?,
            stderr: next(streams.stderr)?,
        };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id: ContainerId = format!("kvrun-debug-{number}").parse()?;
        let (bundle, files) = Bundle::of_config(&self.root, config(args, terminal).to_string().into())?;
        let trees = Trees::of(&bundle, &files)?;
        let (spec, place) = self.share.upgrade().ok_or(RunError::Ending)?.add(&bundle, trees)?;
        let ended = match self.pod.create(&id, &spec, stdio).await {
            Ok(container) => stand_for(channel, container).await,
            Err(error) => Err(error.into()),
        };
        self.take_away(&place).await;
        ended
    }

    async fn take_away(&self, place: &Place) {
        // Not kept over the wait: who undoes the pod undoes its share.
        if let Some(removed) = self.share.upgrade().map(|share| share.remove(place)) {
            self.pod.forget_files(&removed).await;
        }
    }
}

/// Starts a container, is there for it until its end, and removes it.
async fn stand_for(channel: &AsyncChannel, mut container: Container) -> Result<Ended, RunError> {
    if let Err(error) = container.start().await {
        container.delete().await;
        return Err(error.into());
    }
    let mut asked = channel.send(&Answer::Running, &[]).await.is_ok();
    if !asked {
        kill(&container, libc::SIGKILL).await;
    }
    let exit = loop {
        tokio::select! {
            biased;
            exit = container.wait() => break exit,
            request = channel.receive(), if asked => match request {
                Ok(Some(Received { message: Request::Signal(signal), .. })) => kill(&container, signal).await,
                Ok(Some(Received { message: Request::Resize { rows, columns }, .. })) => {
                    if let Err(error) = container.resize(rows, columns).await {
                        tracing::debug!(%error, "resize a terminal");
                    }
                }
                Ok(Some(_)) => {}
                // With whoever asked for it.
                Ok(None) | Err(_) => {
                    asked = false;
                    kill(&container, libc::SIGKILL).await;
                }
            },
        }
    };
    container.drain().await;
    container.delete().await;
    Ok(match exit.state {
        ExitState::Exited(code) => Ended::Exited(code),
        ExitState::Signaled(signal) => Ended::Signaled(signal),
        ExitState::VmDied(death) => Ended::VmDied(death.to_string()),
    })
}

async fn kill(container: &Container, signal: i32) {
    // It may just have ended.
    if let Err(error) = container.kill(signal, signal == libc::SIGKILL).await {
        tracing::debug!(signal, %error, "signal a debugged program");
    }
}

/// A container with the guest's own namespaces, but for the mount namespace, and all capabilities and devices. The guest's own files are at `/proc/1/root`.
pub(super) fn config(args: &[String], terminal: Option<&Terminal>) -> Value {
    let mut env = vec![
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        "HOME=/tmp".to_owned(),
    ];
    env.extend(terminal.map(|terminal| format!("TERM={}", terminal.kind)));
    let all = CAPABILITIES.as_slice();
    let size = terminal.and_then(|terminal| terminal.size);
    let size = size.map(|(rows, columns)| json!({ "height": rows, "width": columns }));
    json!({
        "ociVersion": "1.2.0",
        "root": { "path": ".", "readonly": true },
        "process": {
            "args": args, "cwd": "/", "env": env, "terminal": terminal.is_some(), "consoleSize": size, "user": { "uid": 0, "gid": 0 },
            "capabilities": { "bounding": all, "effective": all, "permitted": all },
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" },
        ],
        "linux": {
            "namespaces": [{ "type": "mount" }],
            "resources": { "devices": [{ "allow": true, "access": "rwm" }] },
        },
    })
}
