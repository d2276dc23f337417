//! Hooks that run on the host (config.md, "POSIX-platform Hooks"): `prestart`, `createRuntime`, `poststart` and `poststop`.
//!
//! A hook gets the state document on standard input, the environment its config names and nothing of ours, a process group
//! of its own, and the time it asks for; then it is killed with its group. It runs in the network namespace of whoever called us, not in
//! that of the container.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::SigSet;
use oci_spec::runtime::Hook;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::network::NetworkNamespace;
use crate::text;

/// How long a hook without a timeout may run: the specification has no bound, and a container that nobody can delete helps nobody.
const TIMEOUT: Duration = Duration::from_secs(600);
/// How much of what a hook says on standard error goes into the error, in bytes.
const MAX_STDERR: usize = 4096;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started.
    #[error("{kind} hook {} cannot be run", path.display())]
    Start {
        /// `prestart` and so on.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("{kind} hook {} failed: {status}{}{said}", path.display(), if said.is_empty() { "" } else { ": " })]
    Failed {
        /// `prestart` and so on.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// How.
        status: ExitStatus,
        /// Its standard error.
        said: String,
    },
    /// It ran for too long.
    #[error("{kind} hook {} was killed: it did not end within {} s", path.display(), bound.as_secs())]
    TimedOut {
        /// `prestart` and so on.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// Its time.
        bound: Duration,
    },
}

/// Runs hooks of one kind one after the other, in a network namespace, until one fails. `state` is the state document. Must be called in a
/// tokio runtime.
///
/// # Errors
/// [`HookError`] of the first that fails; those after it have not run.
pub async fn run(
    kind: &'static str,
    hooks: &[Hook],
    network: &NetworkNamespace,
    state: &[u8],
) -> Result<(), HookError> {
    for hook in hooks {
        run_one(kind, hook, network, state).await?;
    }
    Ok(())
}

async fn run_one(
    kind: &'static str,
    hook: &Hook,
    network: &NetworkNamespace,
    state: &[u8],
) -> Result<(), HookError> {
    let path = hook.path().clone();
    let start = |source| HookError::Start { kind, path: path.clone(), source };
    // Not a pipe: a child that the hook leaves behind may hold it for as long as it likes.
    let said = File::from(memfd_create("hook", MemfdFlags::CLOEXEC).map_err(|e| start(e.into()))?);
    let mut command = Command::new(&path);
    // config.md: args as execv(3) has them, so the first is the name.
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    command.env_clear().envs(hook.env().iter().flatten().filter_map(|variable| variable.split_once('=')));
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(said.try_clone().map_err(start)?);
    let network = network.as_fd().try_clone_to_owned().map_err(start)?;
    let prepare = move || {
        setns(&network, CloneFlags::CLONE_NEWNET)?;
        // The signals we read from a descriptor are blocked, and a mask survives exec.
        Ok(SigSet::empty().thread_set_mask()?)
    };
    // SAFETY: two async-signal-safe system calls.
    unsafe { command.pre_exec(prepare) };
    let mut child = command.process_group(0).kill_on_drop(true).spawn().map_err(start)?;
    let group = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    let stdin = child.stdin.take();
    let write = async move {
        if let Some(mut stdin) = stdin {
            // A hook need not read it.
            let _ = stdin.write_all(state).await;
        }
    };
    let seconds =
        hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let bound = seconds.map_or(TIMEOUT, Duration::from_secs);
    match timeout(bound, async { tokio::join!(child.wait(), write).0 }).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => {
            let mut bytes = vec![0; MAX_STDERR];
            let length = said.read_at(&mut bytes, 0).unwrap_or(0);
            let said = text::one_line(&String::from_utf8_lossy(&bytes[..length]), MAX_STDERR);
            Err(HookError::Failed { kind, path, status, said })
        }
        Ok(Err(source)) => Err(start(source)),
        Err(_) => {
            if let Some(group) = group {
                let _ = kill_process_group(group, Signal::KILL);
            }
            Err(HookError::TimedOut { kind, path, bound })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["name", "-c", script], "env": ["A=b c"],
            "timeout": timeout});
        serde_json::from_value(hook).unwrap()
    }

    fn run_all(hooks: &[Hook]) -> Result<(), HookError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let network = NetworkNamespace::current().unwrap();
        runtime.block_on(run("prestart", hooks, &network, b"{\"id\":\"c1\"}"))
    }

    #[test]
    fn hook_reads_the_state_and_has_its_own_environment() {
        let script = r#"test "$(cat)" = '{"id":"c1"}' && test "$A" = "b c" && test -z "$CARGO""#;
        run_all(&[hook(script, None)]).unwrap();
        // One that does not read it, and one that leaves a child behind.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("child");
        let leaves = hook(&format!("sleep 1000 & echo $! >{}", file.display()), None);
        run_all(&[hook("exit 0", None), leaves]).unwrap();
        let child =
            std::fs::read_to_string(file).unwrap().trim().parse().ok().and_then(Pid::from_raw).unwrap();
        rustix::process::kill_process(child, Signal::KILL).unwrap();
    }

    #[test]
    fn first_failure_ends_the_list_and_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("second");
        let second = hook(&format!("touch {}", file.display()), None);
        let error = run_all(&[hook("echo why >&2; exit 3", None), second]).unwrap_err().to_string();
        assert!(error.contains("prestart hook /bin/sh failed") && error.ends_with(": why"), "{error}");
        assert!(!file.exists());
        let missing = serde_json::from_value(serde_json::json!({"path": "/no/such/hook"})).unwrap();
        assert!(matches!(run_all(&[missing]), Err(HookError::Start { .. })));
    }

    #[test]
    fn hook_that_hangs_is_killed() {
        assert!(matches!(run_all(&[hook("sleep 1000", Some(1))]), Err(HookError::TimedOut { .. })));
    }
}
