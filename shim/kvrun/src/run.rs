//! `kvrun run`: a container in the foreground.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use kvrun_pod::assets::{AssetError, Assets};
use kvrun_pod::bundle::{Bundle, BundleError};
use kvrun_pod::cgroup::{CgroupError, HostCgroup};
use kvrun_pod::container::{Container, CreateError, Exit, ExitState, VmDeath};
use kvrun_pod::container_id::{ContainerId, InvalidContainerId};
use kvrun_pod::pod::{self, Pod, PodError, Starting};
use kvrun_pod::share::{self, Share, ShareError};
use kvrun_pod::size::{SizeError, VmSize};
use kvrun_pod::state_dir::{ContainerDir, StateError};
use kvrun_pod::stdio::Stdio;
use kvrun_pod::vmm::VmEnd;
use nix::sys::signal::Signal;

use crate::FAILED;
use crate::cli::{Global, RunArgs};
use crate::log::Log;
use crate::signals::{self, Signals};
use crate::terminal::Terminal;

/// What can go wrong before the container's process runs. Each message is complete in itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Id(#[from] InvalidContainerId),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Size(#[from] SizeError),
    #[error(transparent)]
    Assets(#[from] AssetError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("write the pid file {}", path.display())]
    PidFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "process.terminal is true, but none of standard input, output and error is a terminal: run kvrun on one, or set it to false"
    )]
    NoTerminal,
    #[error("{step}")]
    Host {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

impl RunError {
    /// The exit code: the shell's for a program that cannot be run, else that of a failure of ours.
    pub(crate) fn code(&self) -> u8 {
        self.pod_error()
            .and_then(PodError::program_fault)
            .map_or(FAILED, kvrun_pod::container::ProgramFault::code)
    }

    /// The end of the machine, if that is the error.
    pub(crate) fn vm_end(&self) -> Option<&VmEnd> {
        self.pod_error().and_then(PodError::vm_end)
    }

    fn pod_error(&self) -> Option<&PodError> {
        match self {
            Self::Create(error) => error.pod_error(),
            Self::Pod(error) => Some(error),
            _ => None,
        }
    }
}

fn host(step: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Host { step, source }
}

/// Runs a container; its exit code.
pub(crate) fn run(global: &Global, args: &RunArgs, log: &Log) -> Result<u8, RunError> {
    let id: ContainerId = args.id.parse()?;
    // Before anything is opened that is to be shared: a mount of another namespace cannot be cloned.
    let namespace = share::enter_mount_namespace()?;
    let mut bundle = Bundle::load(&args.bundle)?;
    let size = VmSize::for_spec(bundle.spec())?;
    let assets = Assets::open(&global.explicit())?;
    let terminal = if bundle.has_terminal() { Some(find_terminal()?) } else { None };
    if let Some((rows, columns)) = terminal.as_ref().and_then(Terminal::size) {
        bundle.set_console_size(rows, columns);
    }

    let signals = signals::block().map_err(host("block signals"))?;
    // From here on in the order in which it is undone, last first.
    let dir = ContainerDir::claim(&global.root, &id)?;
    let _cgroup = bundle.cgroups_path().map(|path| HostCgroup::join(path, &dir)).transpose()?;
    let share = Share::mount(&namespace, &dir.make_share_directory()?)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(host("start"))?;
    runtime.block_on(async {
        let signals = signals.listen().map_err(host("listen for signals"))?;
        let starting = Starting::spawn(&assets, pod::machine(size), share.directory())?;
        // While the guest boots.
        let spec = share.add(&id, &bundle)?;
        let stdio = stdio(terminal.is_some()).map_err(host("duplicate standard input and output"))?;
        let mut early = Vec::new();
        let started = tokio::select! {
            biased;
            started = start(starting, &id, &spec, stdio, args.pid_file.as_deref()) => started?,
            signal = aborted(&signals, &mut early) => return Ok(128_u8.saturating_add(signal? as u8)),
        };
        let raw = terminal.as_ref().map(Terminal::raw).transpose();
        let raw = raw.map_err(host("put the terminal into raw mode"))?;
        let (pod, mut container) = started;
        let exit = attend(&mut container, &signals, early, terminal.as_ref()).await?;
        drop(raw);
        Ok(finish(pod, exit, &bundle, &id, log).await)
    })
}

/// As runc, `run` refuses a container with a terminal where there is none to connect it to.
fn find_terminal() -> Result<Terminal, RunError> {
    Terminal::find().map_err(host("find a terminal"))?.ok_or(RunError::NoTerminal)
}

/// Our own standard input, output and, without a terminal, error.
fn stdio(terminal: bool) -> io::Result<Stdio> {
    let stderr = if terminal { None } else { Some(duplicate(io::stderr().as_fd())?) };
    Ok(Stdio {
        stdin: Some(duplicate(io::stdin().as_fd())?),
        stdout: Some(duplicate(io::stdout().as_fd())?),
        stderr,
    })
}

fn duplicate(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fd.try_clone_to_owned()
}

/// From a booting machine to a running container.
async fn start(
    starting: Starting,
    id: &ContainerId,
    spec: &kvrun_pod::bundle::Spec,
    stdio: Stdio,
    pid_file: Option<&Path>,
) -> Result<(Pod, Container), RunError> {
    let pod = starting.ready().await?;
    let container = pod.create(id, spec, stdio).await?;
    if let Some(path) = pid_file {
        write_pid_file(path).map_err(|source| RunError::PidFile { path: path.to_owned(), source })?;
    }
    container.start().await?;
    Ok((pod, container))
}

/// Waits for a signal that ends us before there is a container to forward it to; the others are kept for it.
async fn aborted(signals: &Signals, early: &mut Vec<Signal>) -> Result<Signal, RunError> {
    loop {
        let signal = signals.next().await.map_err(host("read signals"))?;
        if signals::asks_to_end(signal) {
            return Ok(signal);
        }
        // The first of each, as the kernel keeps pending signals.
        if !early.contains(&signal) {
            early.push(signal);
        }
    }
}

/// Forwards signals until the container's process has ended and its output has arrived.
async fn attend(
    container: &mut Container,
    signals: &Signals,
    early: Vec<Signal>,
    terminal: Option<&Terminal>,
) -> Result<Exit, RunError> {
    for signal in early {
        forward(container, signal, terminal).await;
    }
    let exit = {
        let mut ended = std::pin::pin!(container.wait());
        loop {
            tokio::select! {
                biased;
                exit = &mut ended => break exit,
                signal = signals.next() => {
                    forward(container, signal.map_err(host("read signals"))?, terminal).await;
                }
            }
        }
    };
    // Whoever reads our output may be slow, or never read: only then a signal has something to end.
    let mut ignored = Vec::new();
    tokio::select! {
        biased;
        () = container.drain() => {}
        signal = aborted(signals, &mut ignored) => drop(signal?),
    }
    Ok(exit)
}

async fn forward(container: &Container, signal: Signal, terminal: Option<&Terminal>) {
    let result = match signal {
        Signal::SIGWINCH => match terminal.and_then(Terminal::size) {
            Some((rows, columns)) => container.resize(rows, columns).await,
            None => Ok(()),
        },
        signal => container.kill(signal as i32, false).await,
    };
    if let Err(error) = result {
        // Most likely the process has just ended, which its exit tells better.
        tracing::debug!(%signal, %error, "forward a signal");
    }
}

/// Ends the machine and reports what must be said.
async fn finish(pod: Pod, exit: Exit, bundle: &Bundle, id: &ContainerId, log: &Log) -> u8 {
    if let ExitState::VmDied(death) = &exit.state {
        log.say(&format!("container {id}: the virtual machine died: {death}"));
        match death {
            VmDeath::Died(end) => log.last_words(Some(end)),
            VmDeath::AgentLost(_) => log.last_words(Some(&*pod.ended().await)),
        }
    } else {
        pod.shutdown().await;
    }
    if exit.oom_killed {
        let limit = bundle
            .memory_limit()
            .map_or_else(|| "of its machine".to_owned(), |bytes| format!("of {bytes} bytes"));
        log.say(&format!("container {id}: the guest kernel killed a process at its memory limit {limit}"));
    }
    exit.state.code()
}

/// Writes our process ID so that a reader sees all of it or nothing.
fn write_pid_file(path: &Path) -> io::Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&temporary)
        .and_then(|mut file| file.write_all(std::process::id().to_string().as_bytes()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // It may not have been made.
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_file_holds_our_process_id_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        fs::write(&path, "older").unwrap();
        write_pid_file(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_pid_file(&dir.path().join("none/pid")).is_err());
    }
}
