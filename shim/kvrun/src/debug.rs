//! `kvrun debug`: a program in a guest, for which this process stands.

use kvrun_pod::debug::{self, Client, DebugError, Ended};
use rustix::stdio::{stdin, stdout};
use rustix::termios::isatty;

use crate::attach::{Attended, End, How, attend};
use crate::cli::{DebugArgs, Global};
use crate::commands::observe;
use crate::create::runtime;
use crate::error::{Error, host};
use crate::log::Log;
use crate::run::{find_terminal, own_stdio};
use crate::signals;
use crate::terminal::Terminal;

/// What is run unless something is named.
const SHELL: &str = "sh";

/// Runs a program in the guest of a container, or of a pod of containerd; its exit code. It has a terminal if it would read from ours and write to it.
pub(crate) fn debug(global: &Global, args: &DebugArgs, log: &Log) -> Result<u8, Error> {
    let error = |source: DebugError| Error::NotDebugged { id: args.id.clone(), source };
    let dir = observe::find(global, &args.id)?;
    let terminal = if isatty(stdin()) && isatty(stdout()) { Some(find_terminal()?) } else { None };
    let told = terminal.as_ref().map(|terminal| debug::Terminal {
        kind: std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned()),
        size: terminal.size(),
    });
    let command = if args.command.is_empty() { vec![SHELL.to_owned()] } else { args.command.clone() };
    let signals = signals::block().map_err(host("block signals"))?;
    let end = runtime()?.block_on(async {
        let signals = signals.listen().map_err(host("listen for signals"))?;
        let stdio = own_stdio(terminal.is_some()).map_err(host("duplicate standard input and output"))?;
        let program = Client::run(dir, command, told, stdio).await.map_err(error)?;
        let raw = terminal.as_ref().map(Terminal::raw).transpose();
        let _raw = raw.map_err(host("put the terminal into raw mode"))?;
        attend(&program, &signals, Vec::new(), terminal.as_ref()).await
    })?;
    if let How::VmDied { reason, .. } = &end.how {
        log.say(&format!("{}: the virtual machine died: {reason}", args.id));
    }
    Ok(end.code())
}

impl Attended for Client {
    async fn wait(&self) -> End {
        let how = match Self::wait(self).await {
            Ended::Exited(code) => How::Exited(code),
            Ended::Signaled(signal) => How::Signaled(signal),
            Ended::VmDied(reason) => How::VmDied { reason, last_words: Vec::new() },
        };
        End { how, oom_killed: false }
    }

    async fn signal(&self, signal: i32) {
        Self::signal(self, signal).await;
    }

    async fn resize(&self, rows: u16, columns: u16) {
        Self::resize(self, rows, columns).await;
    }
}
