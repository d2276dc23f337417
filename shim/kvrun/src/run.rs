//! `kvrun run` in the foreground: a container, its machine and its monitor in this very process.

use std::io;
use std::os::fd::AsFd;

use kvrun_pod::bundle::Bundle;
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::pod::Pod;
use kvrun_pod::share;
use kvrun_pod::stdio::{Copying, Stdio};

use crate::attach::{Attended, End, How, aborted, attend};
use crate::cli::Global;
use crate::cli::process::CreateArgs;
use crate::commands::delete;
use crate::create::check_options;
use crate::daemon::write_pid_file;
use crate::engine::Prepared;
use crate::error::{Error, LastWords, host};
use crate::log::Log;
use crate::monitor::{Container, until_end};
use crate::signals;
use crate::terminal::Terminal;

/// Runs a container; its exit code. With `keep` it is there, stopped, until it is deleted.
pub(crate) fn run(global: &Global, args: &CreateArgs, keep: bool, log: &Log) -> Result<u8, Error> {
    let id: ContainerId = args.id.parse()?;
    let config = global.load_config()?;
    log.obey(&config);
    check_options(global, args)?;
    if args.console_socket.is_some() {
        return Err(Error::Option(
            "--console-socket is for --detach: in the foreground, the terminal is yours".into(),
        ));
    }
    // Before anything is opened that is to be shared: a mount of another namespace cannot be cloned.
    let namespace = share::enter_mount_namespace()?;
    let (mut bundle, files) = Bundle::load(&args.bundle)?;
    let terminal = if bundle.has_terminal() { Some(find_terminal()?) } else { None };
    if let Some((rows, columns)) = terminal.as_ref().and_then(Terminal::size) {
        bundle.set_console_size(rows, columns);
    }

    let signals = signals::block().map_err(host("block signals"))?;
    let mut prepared = Prepared::new(global, config, &namespace, &id, &bundle, !keep)?;
    let (record, home) = (prepared.record().clone(), prepared.home());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(host("start"))?;
    let code = runtime.block_on(async {
        let signals = signals.listen().map_err(host("listen for signals"))?;
        let stdio = own_stdio(terminal.is_some()).map_err(host("duplicate standard input and output"))?;
        let mut early = Vec::new();
        let created = tokio::select! {
            biased;
            created = prepared.create(&bundle, files, stdio.wanted()) => created?,
            signal = aborted(&signals, &mut early) => return Ok(128_u8.saturating_add(signal? as u8)),
        };
        let (pod, process, streams) = created;
        let copying = Copying::start(stdio, streams)?;
        let (monitor, container) = prepared.serve(&pod, process, bundle)?;
        if let Some(path) = &args.pid_file {
            write_pid_file(path)?;
        }
        tokio::select! {
            biased;
            started = monitor.start(&container) => started?,
            signal = aborted(&signals, &mut early) => return Ok(128_u8.saturating_add(signal? as u8)),
        }
        if keep {
            prepared.dir().keep();
        }
        let raw = terminal.as_ref().map(Terminal::raw).transpose();
        let raw = raw.map_err(host("put the terminal into raw mode"))?;
        let end = attend(&Own(&container), &signals, early, terminal.as_ref()).await?;
        // Whoever reads our output may be slow, or never read: only then a signal has something to end, or a `delete --force`.
        let mut ignored = Vec::new();
        tokio::select! {
            biased;
            () = copying.drain() => {}
            () = monitor.leave() => {}
            signal = aborted(&signals, &mut ignored) => drop(signal?),
        }
        drop(raw);
        finish(&pod, &end, &container, &id, log).await;
        Ok(end.code())
    });
    // In this order: the tasks, the machine and its files, and then what comes after them.
    drop(runtime);
    let kept = prepared.dir().is_kept();
    drop(prepared);
    if !kept {
        delete::run_poststop(&record, &home, log);
    }
    code
}

/// A container that this process serves.
pub(crate) struct Own<'a>(pub(crate) &'a Container);

impl Attended for Own<'_> {
    async fn wait(&self) -> End {
        until_end(self.0).await
    }

    async fn signal(&self, signal: i32) {
        Attended::signal(self.0.process(), signal).await;
    }

    async fn resize(&self, rows: u16, columns: u16) {
        Attended::resize(self.0.process(), rows, columns).await;
    }
}

/// As runc, `run` refuses a container with a terminal where there is none to connect it to.
pub(crate) fn find_terminal() -> Result<Terminal, Error> {
    Terminal::find().map_err(host("find a terminal"))?.ok_or(Error::NoTerminal)
}

/// Our own standard input, output and, without a terminal, error.
pub(crate) fn own_stdio(terminal: bool) -> io::Result<Stdio> {
    let stderr = if terminal { None } else { Some(io::stderr().as_fd().try_clone_to_owned()?) };
    Ok(Stdio {
        stdin: Some(io::stdin().as_fd().try_clone_to_owned()?),
        stdout: Some(io::stdout().as_fd().try_clone_to_owned()?),
        stderr,
    })
}

/// Ends the machine and reports what must be said.
pub(crate) async fn finish(pod: &Pod, end: &End, container: &Container, id: &ContainerId, log: &Log) {
    if let How::VmDied { reason, last_words } = &end.how {
        log.say(&format!("container {id}: the virtual machine died: {reason}"));
        if last_words.is_empty() {
            log.last_words(&LastWords::of(Some(&*pod.ended().await)));
        } else {
            log.last_words(last_words);
        }
    } else {
        pod.clone().shutdown().await;
    }
    if end.oom_killed {
        let limit = container
            .bundle()
            .memory_limit()
            .map_or_else(|| "of its machine".to_owned(), |bytes| format!("of {bytes} bytes"));
        log.say(&format!("container {id}: the guest kernel killed a process at its memory limit {limit}"));
    }
}
