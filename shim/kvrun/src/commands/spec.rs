//! `kvrun spec`: a `config.json` to begin with, which says what `runc spec` does.

use std::fs::File;
use std::io::Write;

use kvrun_pod::record::OCI_VERSION;
use serde_json::{Value, json};

use crate::cli::SpecArgs;
use crate::error::{Error, host};

/// Writes it; one that is there is not touched.
pub(crate) fn spec(args: &SpecArgs) -> Result<(), Error> {
    let path = args.bundle.join("config.json");
    let error = |e: std::io::Error| Error::Option(format!("{}: {e}", path.display()));
    let text = serde_json::to_string_pretty(&template()).map_err(host("write JSON"))?;
    let mut file = File::options().write(true).create_new(true).open(&path).map_err(error)?;
    file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")).map_err(error)
}

fn template() -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mount = |destination: &str, kind: &str, options: &[&str]| {
        let source = if kind == "tmpfs" && destination == "/dev/shm" { "shm" } else { kind };
        json!({"destination": destination, "type": kind, "source": source, "options": options})
    };
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "kvrun",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

#[cfg(test)]
mod tests {
    use kvrun_pod::bundle::Bundle;

    use super::*;

    #[test]
    fn template_is_a_good_config_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        let args = SpecArgs { bundle: dir.path().to_owned() };
        spec(&args).unwrap();
        Bundle::load(dir.path()).unwrap();
        assert!(spec(&args).is_err());
    }
}
