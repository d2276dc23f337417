//! containerd and `ctr`, its command line: each test has a containerd of its own, whose files are among the test's.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::bundle::{self, userland};
use crate::fixture::Test;
use crate::process::{Outcome, Running, gone_within};
use crate::terminal::{Terminal, on_terminal};
use crate::time;

/// The image that it has: busybox and nothing else.
pub const IMAGE: &str = "localhost/busybox:latest";
/// The same, whose containers do nothing: for the sandboxes of pods.
pub const PAUSE: &str = "localhost/pause:latest";
/// What Kubernetes' program of that name does.
const PAUSE_PROGRAM: &str = "#!/bin/sh\ntrap 'exit 0' INT TERM\nwhile :; do sleep 2147483647 & wait; done\n";
/// One that has no layers, so that its containers have no files.
pub const EMPTY: &str = "localhost/empty:latest";
/// What containerd calls us.
pub const RUNTIME: &str = "io.containerd.kvrun.v2";
/// The name of a shim's process.
pub const SHIM: &str = "containerd-shim";
/// Where shims listen, and clients have their FIFOs: fixed by `containerd` and `ctr`.
const RUN: &str = "/run/containerd";
/// The layer with busybox, in the directory of its files.
const USERLAND: &str = "layer.tar";
/// That with the program of a sandbox.
const PAUSE_LAYER: &str = "pause.tar";
/// Its configuration, in the directory of its files.
const CONFIG: &str = "config.toml";

/// A containerd that can be started.
#[derive(Debug)]
pub struct Release {
    /// Where its programs are; empty: on the path.
    programs: &'static str,
    /// The version of its configuration.
    config: u8,
}

/// The host's, of version 2.1 or later.
pub const INSTALLED: Release = Release { programs: "", config: 3 };
/// One of version 1.7, beside that.
pub const OLDER: Release = Release { programs: "/opt/containerd-1.7/usr/bin", config: 2 };

impl Release {
    fn program(&self, name: &str) -> PathBuf {
        Path::new(self.programs).join(name)
    }

    /// The part of its configuration that is about CRI: a runtime by the name of `handler` that is us, with the network that is configured in
    /// `cni_config`; and another one, whose pods are on all networks of a directory of its own.
    pub(crate) fn cri(
        &self,
        handler: &str,
        cni_plugins: &str,
        cni_config: &Path,
        (other, networks): (&str, &Path),
    ) -> String {
        let (cni_config, networks) = (cni_config.display(), networks.display());
        let runtime = format!(
            "runtime_type = \"{RUNTIME}\"\nprivileged_without_host_devices = true\n\
             privileged_without_host_devices_all_devices_allowed = true\n"
        );
        let on_networks = format!("cni_conf_dir = \"{networks}\"\ncni_max_conf_num = 8\n");
        if self.config < 3 {
            let plugin = "plugins.'io.containerd.grpc.v1.cri'";
            return format!(
                "[{plugin}]\nsandbox_image = \"{PAUSE}\"\nstream_server_port = \"0\"\n\
                 [{plugin}.containerd]\ndefault_runtime_name = \"{handler}\"\n\
                 [{plugin}.containerd.runtimes.{handler}]\n{runtime}\
                 [{plugin}.containerd.runtimes.{other}]\n{runtime}{on_networks}\
                 [{plugin}.cni]\nbin_dir = \"{cni_plugins}\"\nconf_dir = \"{cni_config}\"\n"
            );
        }
        let plugin = "plugins.'io.containerd.cri.v1.runtime'";
        format!(
            "[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = \"{PAUSE}\"\n\
             [{plugin}.containerd]\ndefault_runtime_name = \"{handler}\"\n\
             [{plugin}.containerd.runtimes.{handler}]\n{runtime}\
             [{plugin}.containerd.runtimes.{other}]\n{runtime}{on_networks}\
             [{plugin}.cni]\nbin_dirs = [\"{cni_plugins}\"]\nconf_dir = \"{cni_config}\"\n\
             [plugins.'io.containerd.grpc.v1.cri']\nstream_server_port = \"0\"\n"
        )
    }
}

/// The configuration of a further runtime of [`INSTALLED`] that is us, whose pods have their root file systems from another snapshotter.
pub fn runtime_on(snapshotter: &str, handler: &str) -> String {
    format!(
        "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{handler}]\nruntime_type = \"{RUNTIME}\"\n\
         snapshotter = \"{snapshotter}\"\n"
    )
}

/// Of each event of a task that `ctr events` has printed: what happened, as in `/tasks/WHAT`, and its payload.
///
/// # Errors
/// When that is not JSON.
pub fn task_events(printed: &str) -> Result<Vec<(&str, Value)>> {
    let lines = printed.lines().filter_map(|line| line.split_once(" /tasks/"));
    let events = lines.map(|(_, event)| {
        let (what, payload) = event.split_once(' ').context(event.to_owned())?;
        Ok((what, serde_json::from_str(payload).context(event.to_owned())?))
    });
    events.collect()
}

/// A containerd that runs.
#[derive(Debug)]
pub struct Containerd<'a> {
    test: &'a Test,
    release: &'static Release,
    dir: PathBuf,
    daemon: Mutex<Running>,
    /// In which its containers are.
    namespace: &'static str,
}

/// An image to import.
struct Image<'a> {
    name: &'a str,
    /// The names of its archives, the lowest first.
    layers: &'a [&'a str],
    command: &'a [&'a str],
}

/// Plugins that no test needs: each costs time at the start.
pub(crate) const UNUSED: [&str; 6] = [
    "io.containerd.internal.v1.tracing",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];
/// Likewise, of a containerd whose clients do not speak CRI.
pub(crate) const CRI: [&str; 2] = ["io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"];

impl<'a> Containerd<'a> {
    /// One that has [`IMAGE`].
    ///
    /// # Errors
    /// When it does not come up.
    pub fn new(test: &'a Test) -> Result<Self> {
        Self::with_config(test, "")
    }

    /// One that has [`IMAGE`], with more configuration.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn with_config(test: &'a Test, config: &str) -> Result<Self> {
        Self::with(test, &INSTALLED, &[&UNUSED[..], &CRI].concat(), config, "default")
    }

    /// One that has [`IMAGE`] and [`PAUSE`] for its CRI plugin, with more configuration.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn with_cri(test: &'a Test, release: &'static Release, config: &str) -> Result<Self> {
        Self::with(test, release, &UNUSED, config, "k8s.io")
    }

    fn with(
        test: &'a Test,
        release: &'static Release,
        disabled: &[&str],
        more: &str,
        namespace: &'static str,
    ) -> Result<Self> {
        let dir = test.scratch().join("containerd");
        fs::create_dir_all(&dir)?;
        let here = dir.display();
        let config = format!(
            "version = {}\nroot = \"{here}/root\"\nstate = \"{here}/state\"\ndisabled_plugins = {disabled:?}\n\
             [grpc]\naddress = \"{here}/containerd.sock\"\n[debug]\nlevel = \"debug\"\n{more}",
            release.config
        );
        let path = dir.join(CONFIG);
        fs::write(&path, config)?;
        let daemon = Mutex::new(start(test, release, &path)?);
        let containerd = Self { test, release, daemon, dir, namespace };
        let root = containerd.dir.join("image");
        userland(&root)?;
        bundle::archive(&root, &containerd.dir.join(USERLAND), &["."])?;
        let program = containerd.dir.join("pause");
        fs::write(&program, PAUSE_PROGRAM)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        bundle::archive(&containerd.dir, &containerd.dir.join(PAUSE_LAYER), &["pause"])?;
        containerd.import(&[
            Image { name: IMAGE, layers: &[USERLAND], command: &["sh"] },
            Image { name: PAUSE, layers: &[USERLAND, PAUSE_LAYER], command: &["/pause"] },
            Image { name: EMPTY, layers: &[], command: &["sh"] },
        ])?;
        Ok(containerd)
    }

    /// Gives it an image of the userland and further layers, the lowest first: each has files by their names and contents.
    ///
    /// # Errors
    /// When they cannot be written, or it does not take them.
    pub fn import_layers(&self, name: &str, layers: &[&[(&str, &str)]]) -> Result<()> {
        let mut names = vec![USERLAND.to_owned()];
        for (number, files) in layers.iter().enumerate() {
            let (root, layer) = (self.dir.join(format!("layer{number}")), format!("layer{number}.tar"));
            for (path, text) in *files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap_or(&root))?;
                fs::write(path, text)?;
            }
            bundle::archive(&root, &self.dir.join(&layer), &["."])?;
            names.push(layer);
        }
        let layers: Vec<&str> = names.iter().map(String::as_str).collect();
        self.import(&[Image { name, layers: &layers, command: &["sh"] }])
    }

    /// Gives it images whose layers are archives in its directory, in the format of `docker save`.
    fn import(&self, images: &[Image<'_>]) -> Result<()> {
        let dir = &self.dir;
        let mut files = vec!["manifest.json".to_owned()];
        let mut manifest = Vec::new();
        for (number, image) in images.iter().enumerate() {
            let digests = image.layers.iter().map(|layer| digest(&dir.join(layer)));
            let config = json!({
                "architecture": "amd64", "os": "linux",
                "config": {"Env": ["PATH=/bin"], "Cmd": image.command},
                "rootfs": {"type": "layers", "diff_ids": digests.collect::<Result<Vec<_>>>()?},
            });
            let file = format!("config{number}.json");
            fs::write(dir.join(&file), config.to_string())?;
            manifest.push(json!({"Config": file, "RepoTags": [image.name], "Layers": image.layers}));
            files.push(file);
            files.extend(image.layers.iter().map(|layer| (*layer).to_owned()));
        }
        files.sort();
        files.dedup();
        fs::write(dir.join("manifest.json"), Value::from(manifest).to_string())?;
        let archive = dir.join("image.tar");
        bundle::archive(dir, &archive, &files.iter().map(String::as_str).collect::<Vec<_>>())?;
        self.ctr(&["image", "import", "--local", &archive.to_string_lossy()])?.exited(0);
        Ok(())
    }

    /// A `ctr` command that runs in the background, with its streams on pipes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, args: &[&str]) -> Result<Running> {
        Running::start(&mut self.command(args))
    }

    /// `ctr events`, which hears of all that happens from now on: just started, it may not have subscribed yet.
    ///
    /// # Errors
    /// When it cannot be started, or hears of nothing in time.
    pub fn events(&self) -> Result<Running> {
        let events = self.start(&["events"])?;
        time::until("events are heard", || {
            self.ctr(&["image", "label", IMAGE, "a=b"])?.exited(0);
            Ok(events.stdout.text().contains("/images/update"))
        })?;
        Ok(events)
    }

    /// A `ctr` command.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.release.program("ctr"));
        self.complete(&mut command, args);
        command
    }

    /// What a `ctr` command becomes, without input.
    ///
    /// # Errors
    /// When it cannot be started, or does not end in time.
    pub fn ctr(&self, args: &[&str]) -> Result<Outcome> {
        self.start(args)?.without_input().wait()
    }

    /// A `ctr` command on a terminal.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_on(&self, terminal: &Terminal, args: &[&str]) -> Result<Running> {
        let mut command = on_terminal("ctr");
        self.complete(&mut command, args);
        terminal.attach(command)
    }

    fn complete(&self, command: &mut Command, args: &[&str]) {
        self.test.environment(command);
        command.arg("--address").arg(self.socket()).args(["--namespace", self.namespace]).args(args);
    }

    /// The socket it listens on.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// Its configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.join(CONFIG)
    }

    /// Where it has what is gone after a restart of the host.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// What containerd and its shims have said so far.
    pub fn log(&self) -> String {
        self.daemon().stderr.text()
    }

    fn daemon(&self) -> MutexGuard<'_, Running> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills it, and starts it again over the same files.
    ///
    /// # Errors
    /// When it does not end, or not come up.
    pub fn restart(&self) -> Result<()> {
        self.kill()?;
        self.start_again()
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(&self) -> Result<()> {
        self.daemon().kill()
    }

    /// Starts it over the same files, once it was killed.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&self) -> Result<()> {
        *self.daemon() = start(self.test, self.release, &self.config())?;
        Ok(())
    }

    /// Ends it, once the shims have ended, which containerd does not wait for. None may have left its socket.
    ///
    /// # Errors
    /// When it does not end, or a shim does not.
    pub fn end(self) -> Result<()> {
        for (pid, shim) in self.test.processes(SHIM).unwrap_or_default() {
            gone_within(shim, time::scaled(time::RUN))
                .with_context(|| format!("shim {pid}; containerd said {}", self.log()))?;
        }
        let daemon = self.daemon.into_inner().unwrap_or_else(PoisonError::into_inner);
        daemon.signal(Signal::TERM)?;
        let log = daemon.anew().wait()?.exited(0).stderr;
        let sockets = Path::new(RUN).join("s");
        let left =
            fs::read_dir(&sockets).map(|dir| dir.flatten().map(|entry| entry.path()).collect::<Vec<_>>());
        let left = left.unwrap_or_default();
        ensure!(left.is_empty(), "shims have left their sockets: {left:?}; containerd said {log}");
        if Path::new(RUN).exists() {
            fs::remove_dir_all(RUN).with_context(|| format!("cannot remove {RUN}"))?;
        }
        remove_state(self.namespace).with_context(|| format!("containerd said {log}"))
    }
}

/// Removes the directories of ours for a namespace of containerd, which stay, and must be empty.
pub(crate) fn remove_state(namespace: &str) -> Result<()> {
    let root = Path::new("/run/kvrun/containerd");
    for dir in [&root.join(namespace), root, Path::new("/run/kvrun")] {
        if dir.exists() {
            fs::remove_dir(dir).with_context(|| format!("a shim has left something in {}", dir.display()))?;
        }
    }
    Ok(())
}

/// Starts a containerd, which finds our shim, with a file of configuration.
pub(crate) fn start(test: &Test, release: &Release, config: &Path) -> Result<Running> {
    let mut command = Command::new(release.program("containerd"));
    test.environment(&mut command);
    // Shims are looked for on the path.
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", test.prefix().join("bin").display());
    command.env("PATH", path).arg("--config").arg(config);
    let daemon = Running::start(&mut command)?.without_input();
    let booted = daemon.stderr.until("successfully booted");
    booted.with_context(|| format!("containerd: {:?}", daemon.stderr))?;
    Ok(daemon)
}

/// How an image names a file.
fn digest(file: &Path) -> Result<String> {
    let sum = Command::new("sha256sum").arg(file).output()?;
    let text = String::from_utf8(sum.stdout)?;
    Ok(format!("sha256:{}", text.split(' ').next().unwrap_or_default()))
}
