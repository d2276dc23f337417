//! `kvrun exec`: a further process in a container, for which this process stands, or a child of it that stays.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use kvrun_pod::bundle::{MAX_CONFIG, Process, is_default_apparmor_profile};
use kvrun_pod::record::Status;
use kvrun_pod::stdio::{Copying, Stdio};

use crate::attach::{Attended, End, How, attend};
use crate::cli::Global;
use crate::cli::process::ExecArgs;
use crate::create::{Console, drained, runtime};
use crate::daemon::{self, write_pid_file};
use crate::error::{Error, host};
use crate::log::Log;
use crate::monitor::client::{Known, PATIENCE};
use crate::monitor::exec::{Changes, Program};
use crate::monitor::protocol::{Request, payload};
use crate::run::{find_terminal, own_stdio};
use crate::signals;
use crate::terminal::Terminal;

/// Runs a process; its exit code, or 0 if it is detached.
pub(crate) fn exec(global: &Global, args: &ExecArgs, log: &Log) -> Result<u8, Error> {
    check(args)?;
    let container = Known::get(&global.root, &args.id)?;
    let status = container.record.status();
    match status {
        Status::Stopped => return Err(Error::NotRunning { id: container.id().clone(), status }),
        Status::Paused if !args.ignore_paused => {
            return Err(Error::WrongState { what: "run a process in", id: container.id().clone(), status });
        }
        _ => {}
    }
    let (program, terminal) = program(args)?;
    let call = Call { global, args, container, program };
    if args.detach {
        let console = Console::new(terminal, args.console_socket.as_deref())?;
        daemon::start(|parent| call.run(|| console.open(), || parent.ready()))?;
        return Ok(0);
    }
    let open = || match &args.console_socket {
        Some(_) => Console::new(terminal, args.console_socket.as_deref())?.open(),
        None => {
            let terminal = if terminal { Some(find_terminal()?) } else { None };
            let stdio = own_stdio(terminal.is_some()).map_err(host("duplicate standard input and output"))?;
            Ok((stdio, terminal))
        }
    };
    let end = call.run(open, || Ok(()))?;
    if let How::VmDied { reason, .. } = &end.how {
        log.say(&format!("container {}: the virtual machine died: {reason}", args.id));
    }
    Ok(end.code())
}

/// What cannot be obeyed.
fn check(args: &ExecArgs) -> Result<(), Error> {
    let refuse = |text: String| Err(Error::Option(text));
    if args.preserve_fds > 0 {
        return refuse(format!(
            "--preserve-fds {}: descriptors of the host do not reach into a guest; leave it out",
            args.preserve_fds
        ));
    }
    if let Some(profile) = args.apparmor.as_deref().filter(|profile| !is_default_apparmor_profile(profile)) {
        return refuse(format!("--apparmor {profile}: the guest kernel has no AppArmor; leave it out"));
    }
    if let Some(label) = args.process_label.as_deref().filter(|label| !label.is_empty()) {
        return refuse(format!("--process-label {label}: the guest kernel has no SELinux; leave it out"));
    }
    if args.process.is_none() && args.command.is_empty() {
        return refuse("exec needs a command to run, or --process".to_owned());
    }
    Ok(())
}

/// What is to be run, and whether it has a terminal.
fn program(args: &ExecArgs) -> Result<(Program, bool), Error> {
    if let Some(path) = &args.process {
        let mut process = read(path)?;
        // As with runc, the option wins.
        if args.tty {
            process.set_terminal(Some(true));
        }
        let terminal = process.terminal().unwrap_or(false);
        return Ok((Program::Process(Box::new(process)), terminal));
    }
    let (uid, gid) = args.user.as_deref().map(user).transpose()?.unwrap_or((None, None));
    let changes = Changes {
        args: args.command.clone(),
        terminal: args.tty,
        cwd: args.cwd.clone(),
        env: args.env.clone(),
        uid,
        gid,
        additional_gids: args.additional_gids.clone(),
        capabilities: args.cap.iter().map(|cap| capability(cap)).collect(),
        no_new_privs: args.no_new_privs,
    };
    Ok((Program::Like(Box::new(changes)), args.tty))
}

fn read(path: &Path) -> Result<Process, Error> {
    let error = |e: &dyn std::fmt::Display| Error::Option(format!("--process {}: {e}", path.display()));
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_CONFIG).read_to_end(&mut bytes)).map_err(|e| error(&e))?;
    serde_json::from_slice(&bytes).map_err(|e| error(&e))
}

/// `UID[:GID]`. Names are the container's, and whoever knows them has resolved them.
fn user(text: &str) -> Result<(Option<u32>, Option<u32>), Error> {
    let error = || Error::Option(format!("--user {text:?} is not of the form UID[:GID], in numbers"));
    let number = |text: &str| text.parse::<u32>().map_err(|_| error());
    Ok(match text.split_once(':') {
        Some((uid, gid)) => (Some(number(uid)?), Some(number(gid)?)),
        None => (Some(number(text)?), None),
    })
}

/// With `CAP_`, and in capitals.
fn capability(text: &str) -> String {
    let name = text.to_ascii_uppercase();
    if name.starts_with("CAP_") { name } else { format!("CAP_{name}") }
}

/// One process to run.
struct Call<'a> {
    global: &'a Global,
    args: &'a ExecArgs,
    container: Known,
    program: Program,
}

impl Call<'_> {
    /// Runs it to its end. `ready` is called when it runs.
    fn run(
        &self,
        open: impl FnOnce() -> Result<(Stdio, Option<Terminal>), Error>,
        ready: impl FnOnce() -> Result<(), Error>,
    ) -> Result<End, Error> {
        let signals = signals::block().map_err(host("block signals"))?;
        let foreground = !self.args.detach && self.args.console_socket.is_none();
        runtime()?.block_on(async {
            let signals = signals.listen().map_err(host("listen for signals"))?;
            let (stdio, terminal) = open()?;
            let wanted = stdio.wanted();
            let payload = payload(&self.program).map_err(host("write the process"))?;
            let request = Request::Exec { ignore_paused: self.args.ignore_paused, wanted };
            let connection = self.container.connect(&self.global.root, PATIENCE)?;
            let (process, streams) = connection.attach(request, &[payload.as_fd()], wanted)?;
            if let Some((rows, columns)) = terminal.as_ref().and_then(Terminal::size) {
                process.resize(rows, columns).await;
            }
            let copying = Copying::start(stdio, streams)?;
            if let Some(path) = &self.args.pid_file {
                write_pid_file(path)?;
            }
            ready()?;
            let raw = if foreground { terminal.as_ref().map(Terminal::raw).transpose() } else { Ok(None) };
            let raw = raw.map_err(host("put the terminal into raw mode"))?;
            let end = attend(&process, &signals, Vec::new(), terminal.as_ref()).await?;
            drained(copying, &signals).await;
            drop(raw);
            Ok(end)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        assert_eq!(user("5").unwrap(), (Some(5), None));
        assert_eq!(user("5:6").unwrap(), (Some(5), Some(6)));
        for text in ["", "root", "5:", ":6", "-1", "5:6:7"] {
            assert!(user(text).is_err(), "{text}");
        }
    }

    #[test]
    fn capabilities_may_be_written_short() {
        assert_eq!(capability("net_admin"), "CAP_NET_ADMIN");
        assert_eq!(capability("CAP_KILL"), "CAP_KILL");
    }
}
