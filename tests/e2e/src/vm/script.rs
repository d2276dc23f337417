//! Shell scripts in the guest of a [`Machine`].

use std::fmt;
use std::io::{PipeWriter, Write, pipe};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use kvrun_pod::container::Container;
use kvrun_pod::share::GUEST_SHARE_DIR;
use kvrun_pod::stdio::Stdio;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::Machine;
use crate::process::Captured;
use crate::time;

/// A script that runs. Dropped before its end, it is killed.
#[derive(Debug)]
pub struct Script<'m> {
    machine: &'m Machine,
    container: Option<Container>,
    stdin: Option<PipeWriter>,
    deadline: Instant,
    /// What it has written to standard output.
    pub stdout: Captured,
    /// What it has written to standard error.
    pub stderr: Captured,
}

impl<'m> Script<'m> {
    pub(super) fn start(machine: &'m Machine, id: &str, script: &str) -> Result<Self> {
        let spec = serde_json::from_value(spec(script)).context("the spec of a script")?;
        let (stdin, input) = pipe()?;
        let (output, stdout) = pipe()?;
        let (errors, stderr) = pipe()?;
        let stdio =
            Stdio { stdin: Some(stdin.into()), stdout: Some(stdout.into()), stderr: Some(stderr.into()) };
        let started = async {
            let container = machine.pod.create(&id.parse()?, &spec, stdio).await?;
            container.start().await?;
            anyhow::Ok(container)
        };
        let container = machine.block_on(started).with_context(|| format!("cannot start {script:?}"))?;
        Ok(Self {
            machine,
            container: Some(container),
            stdin: Some(input),
            deadline: Instant::now() + time::scaled(time::RUN),
            stdout: Captured::new(output),
            stderr: Captured::new(errors),
        })
    }

    /// Waits until its standard output contains `text`.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn until(&self, text: &str) -> Result<()> {
        let waited = self.stdout.wait(Some(text), self.deadline);
        waited.with_context(|| format!("stdout {:?}, stderr {:?}", self.stdout, self.stderr))
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// When nobody reads it any more.
    pub fn write(&mut self, text: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        Ok(stdin.write_all(text.as_bytes())?)
    }

    /// Waits for its end, after that of its standard input.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn wait(mut self) -> Result<Finished> {
        self.stdin = None;
        let mut container = self.container.take().context("waits only once")?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let ended = async {
            let exit = container.wait().await;
            container.drain().await;
            container.delete().await;
            exit
        };
        let Ok(exit) = self.machine.block_on(async { timeout(left, ended).await }) else {
            bail!("a script does not end; stdout {:?}, stderr {:?}", self.stdout, self.stderr);
        };
        for stream in [&self.stdout, &self.stderr] {
            stream.wait(None, self.deadline)?;
        }
        Ok(Finished {
            code: exit.state.code(),
            state: format!("{:?}", exit.state),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        })
    }
}

impl Drop for Script<'_> {
    fn drop(&mut self) {
        if let Some(container) = self.container.take() {
            self.machine.block_on(container.delete());
        }
    }
}

/// What became of a script.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its exit code, by the shell's rule.
    pub code: u8,
    /// How it ended, in the engine's words.
    pub state: String,
    /// All it wrote to standard output.
    pub stdout: String,
    /// All it wrote to standard error.
    pub stderr: String,
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n--- stdout\n{}\n--- stderr\n{}", self.state, self.stdout, self.stderr)
    }
}

/// Runs `$0`. The agent makes the default devices of a container; the guest's own come over them.
const PRELUDE: &str = "mount -t devtmpfs devtmpfs /dev && exec /bin/sh -c \"$0\"";

/// A container that contains nothing.
fn spec(script: &str) -> Value {
    let capabilities: Vec<String> = CAPABILITIES.iter().map(|name| format!("CAP_{name}")).collect();
    let whole =
        |path: &str| json!({"destination": path, "type": "bind", "source": path, "options": ["rbind", "rw"]});
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", PRELUDE, script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities, "inheritable": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024 * 1024, "soft": 1024 * 1024}],
            "noNewPrivileges": false,
        },
        "root": {"path": format!("{GUEST_SHARE_DIR}/rootfs"), "readonly": false},
        "mounts": [
            whole("/proc"), whole("/sys"), whole("/run"),
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": true, "access": "rwm"}]},
            "namespaces": [{"type": "mount"}],
        },
    })
}

/// capabilities(7), all.
const CAPABILITIES: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];
