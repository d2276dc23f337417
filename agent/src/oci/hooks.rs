//! The hooks that run in the guest, `createContainer` and `startContainer` (config.md, "POSIX-platform Hooks"). The guest has no programs but the
//! container's, so the paths of both are paths in the container's root.

use std::collections::HashMap;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;

use super::error::{SetupError, system};
use super::{one_line, sys};

/// How much of what a failed hook wrote to standard error is repeated, in bytes.
const STDERR_MAX: u64 = 1024;

/// What a hook reads on its standard input (runtime.md, "State").
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    /// Of the specification.
    pub oci_version: &'a str,
    /// The container's.
    pub id: &'a str,
    /// "creating" or "created".
    pub status: &'a str,
    /// The container's process, as it sees itself.
    pub pid: u32,
    /// The bundle directory, on the host.
    pub bundle: &'a Path,
    /// The config's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<&'a HashMap<String, String>>,
}

/// Runs hooks in order; the first that fails is the last. With `root`, that is their root directory.
///
/// # Errors
///
/// [`SetupError`]: a hook could not be started, failed, or took too long.
pub fn run(
    kind: &str,
    hooks: &[Hook],
    state: &State<'_>,
    root: Option<BorrowedFd<'_>>,
    default_env: &[String],
) -> Result<(), SetupError> {
    for (index, hook) in hooks.iter().enumerate() {
        run_one(
            &format!("hooks.{kind}[{index}] ({})", hook.path().display()),
            hook,
            state,
            root,
            default_env,
        )?;
    }
    Ok(())
}

fn run_one(
    name: &str,
    hook: &Hook,
    state: &State<'_>,
    root: Option<BorrowedFd<'_>>,
    default_env: &[String],
) -> Result<(), SetupError> {
    let json = serde_json::to_vec(state).map_err(system(format!("{name}: write the state")))?;
    let stdin = sys::file_of(&json).map_err(system(format!("{name}: write the state")))?;
    let mut stderr = sys::file_of(b"").map_err(system(format!("{name}: make a file")))?;
    let mut command = Command::new(hook.path());
    // args[0] is the name the program sees, as for execv(3).
    if let Some((first, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(first).args(rest);
    }
    command.env_clear().stdin(stdin).stdout(Stdio::null());
    command.stderr(stderr.try_clone().map_err(system(format!("{name}: duplicate a descriptor")))?);
    for variable in hook.env().as_deref().unwrap_or(default_env) {
        if let Some((key, value)) = variable.split_once('=') {
            command.env(key, value);
        }
    }
    let root = root.map(|root| root.as_raw_fd());
    // SAFETY: the closure makes system calls only, on a descriptor that stays open until the child has been started.
    unsafe {
        command.pre_exec(move || {
            if let Some(root) = root {
                let root = BorrowedFd::borrow_raw(root);
                rustix::process::fchdir(root)?;
                rustix::process::chroot(".")?;
            }
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(system(format!("{name}: start it")))?;
    // runtime-spec: whole seconds, greater than 0; checked by the pod engine.
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    if !ended_within(&child, limit).map_err(system(format!("{name}: wait for it")))? {
        let _ = child.kill();
        let _ = child.wait();
        return Err(SetupError::field(name, format!("did not end within {:?}", limit.unwrap_or_default())));
    }
    let status = child.wait().map_err(system(format!("{name}: wait for it")))?;
    if status.success() {
        return Ok(());
    }
    let mut said = Vec::new();
    // What cannot be read is left out.
    let _ = stderr.rewind().and_then(|()| stderr.take(STDERR_MAX).read_to_end(&mut said));
    let said = one_line(String::from_utf8_lossy(&said).trim());
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit code {code}"),
        (None, signal) => format!("was killed by signal {}", signal.unwrap_or_default()),
    };
    let problem = if said.is_empty() { how } else { format!("{how}: {said}") };
    Err(SetupError::field(name, problem))
}

fn ended_within(child: &std::process::Child, limit: Option<Duration>) -> std::io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let deadline = limit.map(|limit| Instant::now() + limit);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose().map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], left.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
