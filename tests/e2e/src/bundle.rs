//! OCI bundles: busybox as userland, and the `config.json` that `runc spec` would write.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// Debian's busybox-static: one file, no libraries.
const BUSYBOX: &str = "/bin/busybox";

/// A bundle on disk.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    spec: Value,
}

impl Bundle {
    pub(crate) fn create(dir: &Path, args: &[&str]) -> Result<Self> {
        let bundle = Self { dir: dir.to_owned(), spec: spec(args) };
        userland(&bundle.rootfs()).with_context(|| format!("cannot make a userland in {}", dir.display()))?;
        bundle.save()?;
        Ok(bundle)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The container's root file system, seen from the host.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Changes the spec.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Result<Self> {
        change(&mut self.spec);
        self.save()?;
        Ok(self)
    }

    /// Adds a mount.
    ///
    /// # Errors
    /// When the spec cannot be written.
    pub fn with_bind(self, source: &Path, destination: &str, options: &[&str]) -> Result<Self> {
        self.with(|spec| {
            let mount =
                json!({"destination": destination, "type": "bind", "source": source, "options": options});
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(mount);
            }
        })
    }

    /// Takes a kind of namespace out of the spec, so that the container shares the guest's.
    ///
    /// # Errors
    /// When the spec cannot be written.
    pub fn without_namespace(self, kind: &str) -> Result<Self> {
        self.with(|spec| {
            if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
                namespaces.retain(|namespace| namespace["type"] != kind);
            }
        })
    }

    /// Replaces `config.json` by any text.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn with_text(self, text: &str) -> Result<Self> {
        fs::write(self.dir.join("config.json"), text)?;
        Ok(self)
    }

    fn save(&self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.spec)?;
        fs::write(self.dir.join("config.json"), text).context("cannot write config.json")
    }
}

/// A root file system with busybox and nothing else.
pub(crate) fn userland(rootfs: &Path) -> Result<()> {
    for dir in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    fs::copy(BUSYBOX, rootfs.join("bin/busybox"))
        .with_context(|| format!("no {BUSYBOX}: install busybox-static"))?;
    let list = Command::new(BUSYBOX).arg("--list").output()?;
    ensure!(list.status.success(), "busybox --list failed");
    for applet in String::from_utf8(list.stdout)?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", rootfs.join("bin").join(applet))?;
    }
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(rootfs.join("etc/group"), "root:x:0:\n")?;
    Ok(())
}

/// Writes files of a directory into a tar archive.
pub(crate) fn archive(dir: &Path, archive: &Path, files: &[&str]) -> Result<()> {
    let made = Command::new("tar").arg("-C").arg(dir).arg("-cf").arg(archive).args(files).status()?;
    ensure!(made.success(), "tar: {made}");
    Ok(())
}

/// The defaults of `runc spec`, without a terminal, and with a network namespace of its own.
fn spec(args: &[&str]) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "kvrun",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
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
