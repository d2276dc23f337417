//! The Container Runtime Interface, as a kubelet speaks it to containerd: pods whose containers our shim runs, on a network that CNI makes.

pub mod stream;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1 as api;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

use crate::containerd::{Containerd, IMAGE, INSTALLED, Release, SHIM};
use crate::fixture::{Test, VMM};
use crate::leaks;
use crate::netns;
use crate::time;

/// The name of the runtime in containerd's configuration, as a RuntimeClass names it.
pub const HANDLER: &str = "kvrun";
/// Another one, whose pods have a link, called `eth` and its number, on each network of [`Cri::add_network`].
pub const LINKS: &str = "kvrun-links";
/// Debian's plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// The network of the pods.
const NETWORK: &str = "10.88.0.0/16";
const NETWORK6: &str = "fd88::/64";
/// The host on it.
pub const HOST: &str = "10.88.0.1";

type Client = RuntimeServiceClient<Channel>;

/// A containerd with its CRI plugin.
#[derive(Debug)]
pub struct Cri<'a> {
    test: &'a Test,
    containerd: Containerd<'a>,
    runtime: tokio::runtime::Runtime,
    client: Client,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod<'c> {
    cri: &'c Cri<'c>,
    config: api::PodSandboxConfig,
    id: String,
}

/// What a command in a container became.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl<'a> Cri<'a> {
    /// One that has [`IMAGE`].
    ///
    /// # Errors
    /// When it does not come up.
    pub fn new(test: &'a Test) -> Result<Self> {
        Self::of(test, &INSTALLED)
    }

    /// As [`Cri::new`], with more configuration.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn with_config(test: &'a Test, config: &str) -> Result<Self> {
        Self::with(test, &INSTALLED, config)
    }

    /// As [`Cri::new`], of another release.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn of(test: &'a Test, release: &'static Release) -> Result<Self> {
        Self::with(test, release, "")
    }

    fn with(test: &'a Test, release: &'static Release, config: &str) -> Result<Self> {
        netns::run("ip link set lo up")?;
        let dir = test.scratch().join("cni");
        fs::create_dir_all(links(test))?;
        // A kubelet makes the cgroups of pods.
        fs::create_dir(cgroup(test)).context("cannot make a cgroup")?;
        let list = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": false,
                "ipam": ipam(test, [NETWORK, NETWORK6], true)},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ]});
        fs::write(dir.join("pods.conflist"), list.to_string())?;
        let cri = release.cri(HANDLER, PLUGINS, &dir, (LINKS, &links(test)));
        let containerd = Containerd::with_cri(test, release, &(cri + config))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let address = format!("unix://{}", containerd.socket().display());
        let channel = runtime.block_on(async { Endpoint::new(address)?.connect().await })?;
        Ok(Self { test, containerd, runtime, client: Client::new(channel) })
    }

    /// The containerd.
    pub fn containerd(&self) -> &Containerd<'a> {
        &self.containerd
    }

    /// What a kubelet says of a pod of this name.
    pub fn pod_config(&self, name: &str) -> api::PodSandboxConfig {
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{}-{name}", self.test.id()),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs(name).display().to_string(),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.test.id()),
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: Some(processes(api::NamespaceMode::Container)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn logs(&self, pod: &str) -> PathBuf {
        self.test.scratch().join("logs").join(pod)
    }

    /// Runs a pod without containers.
    ///
    /// # Errors
    /// What containerd says.
    pub fn run_pod(&self, config: api::PodSandboxConfig) -> Result<Pod<'_>> {
        self.run_pod_by(HANDLER, config)
    }

    /// Adds a network of a CNI plugin for the pods of [`LINKS`], with addresses of an IPv4 and an IPv6 network. Number 0 has the default routes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add_network(&self, number: u8, mut plugin: Value, addresses: [&str; 2]) -> Result<()> {
        plugin["ipam"] = ipam(self.test, addresses, number == 0);
        let list = json!({"cniVersion": "1.0.0", "name": format!("link{number}"), "plugins": [plugin]});
        Ok(fs::write(links(self.test).join(format!("{number}.conflist")), list.to_string())?)
    }

    /// As [`Cri::run_pod`], by a runtime of containerd's configuration: [`HANDLER`], [`LINKS`], one that was added, or `runc`, which is
    /// always there.
    ///
    /// # Errors
    /// What containerd says.
    pub fn run_pod_by(&self, handler: &str, config: api::PodSandboxConfig) -> Result<Pod<'_>> {
        fs::create_dir_all(&config.log_directory)?;
        let request =
            api::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let answer =
            self.call(async |mut client| client.run_pod_sandbox(request).await).context("run a pod")?;
        Ok(Pod { cri: self, config, id: answer.pod_sandbox_id })
    }

    /// Kills containerd and starts it again over the same files.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&self) -> Result<()> {
        self.containerd.kill()?;
        self.start_again()
    }

    /// Starts containerd over the same files, once it was killed.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&self) -> Result<()> {
        self.containerd.start_again()?;
        // The connection is made anew by the first request after it was found broken.
        time::until("containerd answers again", || {
            let request = api::VersionRequest::default();
            Ok(self.call(async |mut client| client.version(request).await).is_ok())
        })
    }

    /// Removes all pods, as a kubelet does with those it does not know.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove_all(&self) -> Result<()> {
        let request = api::ListPodSandboxRequest::default();
        let list = self.call(async |mut client| client.list_pod_sandbox(request).await)?;
        list.items.into_iter().try_for_each(|pod| {
            self.stop_sandbox(&pod.id)?;
            self.remove_sandbox(&pod.id)
        })
    }

    /// The IDs of all containers there are.
    ///
    /// # Errors
    /// What containerd says.
    pub fn containers(&self) -> Result<Vec<String>> {
        let request = api::ListContainersRequest::default();
        let list = self.call(async |mut client| client.list_containers(request).await)?;
        Ok(list.containers.into_iter().map(|container| container.id).collect())
    }

    fn stop_sandbox(&self, id: &str) -> Result<()> {
        let request = api::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let stopped = self.call(async |mut client| client.stop_pod_sandbox(request).await);
        stopped.context("stop a pod").map(drop)
    }

    fn remove_sandbox(&self, id: &str) -> Result<()> {
        let request = api::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let removed = self.call(async |mut client| client.remove_pod_sandbox(request).await);
        removed.context("remove a pod").map(drop)
    }

    /// What there is on the host of pods, which must be nothing when all have been removed.
    ///
    /// # Errors
    /// When something cannot be looked at.
    pub fn left_of_pods(&self) -> Result<Vec<String>> {
        let running = leaks::running()?.into_iter().map(|(_, name)| name);
        let mut left: Vec<String> = running.filter(|name| name == SHIM || name == VMM).collect();
        let bundles = self.containerd.state().join("io.containerd.runtime.v2.task/k8s.io");
        let here = [&*cgroup(self.test), &bundles, &leases(self.test).join("pods")];
        let fixed = ["/run/kvrun/containerd/k8s.io", "/run/containerd/s", "/run/netns"].map(Path::new);
        for dir in here.into_iter().chain(fixed) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                // Of cgroups, the files are always there; so are those by which CNI's host-local remembers where it was.
                let is_ours = dir != here[0] || path.is_dir();
                let is_memory = ["last_reserved_ip", "lock"].iter().any(|name| {
                    path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name))
                });
                if is_ours && !is_memory {
                    left.push(path.display().to_string());
                }
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let state = self.containerd.state().display().to_string();
        left.extend(mounts.lines().filter(|line| line.contains(&state)).map(str::to_owned));
        let links = netns::run("ip -o link")?;
        let links = links.lines().filter(|link| !link.contains(": lo:") && !link.contains(": pods0:"));
        left.extend(links.map(str::to_owned));
        Ok(left)
    }

    /// Ends it; all pods must have been removed.
    ///
    /// # Errors
    /// When something is left.
    pub fn end(self) -> Result<()> {
        let Self { test, containerd, runtime, client } = self;
        drop((client, runtime));
        containerd.end()?;
        fs::remove_dir(cgroup(test)).context("a pod has left something in its cgroup")?;
        // What the bridge plugin makes stays, as on every host.
        if netns::run("ip -o link")?.contains(": pods0:") {
            netns::run("ip link delete pods0")?;
        }
        fs::remove_dir("/run/netns")?;
        Ok(())
    }

    fn call<T>(
        &self,
        call: impl AsyncFnOnce(Client) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T> {
        let answer = call(self.client.clone());
        let bounded = async { tokio::time::timeout(time::scaled(time::RUN), answer).await };
        match self.runtime.block_on(bounded) {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => {
                anyhow::bail!("{:?}: {}\n{}", status.code(), status.message(), self.containerd.log())
            }
            Err(_) => anyhow::bail!("no answer in time\n{}", self.containerd.log()),
        }
    }
}

/// The cgroup in which the pods of a test have theirs.
pub fn cgroup(test: &Test) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(test.id())
}

/// Where CNI's host-local keeps who has which address.
fn leases(test: &Test) -> PathBuf {
    test.scratch().join("cni/leases")
}

/// Where the networks of [`LINKS`] are configured.
fn links(test: &Test) -> PathBuf {
    test.scratch().join("cni/links")
}

/// Addresses as CNI's plugin `host-local` gives them.
fn ipam(test: &Test, addresses: [&str; 2], default_routes: bool) -> Value {
    let routes = if default_routes { json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]) } else { json!([]) };
    json!({
        "type": "host-local", "dataDir": leases(test),
        "ranges": addresses.map(|network| [json!({"subnet": network})]), "routes": routes,
    })
}

/// Whose processes are seen.
pub fn processes(mode: api::NamespaceMode) -> api::NamespaceOption {
    api::NamespaceOption { pid: mode.into(), ..Default::default() }
}

/// A container that runs a shell script.
pub fn script(name: &str, script: &str) -> api::ContainerConfig {
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(api::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
        command: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
        log_path: format!("{name}.log"),
        linux: Some(api::LinuxContainerConfig {
            resources: Some(api::LinuxContainerResources::default()),
            security_context: Some(api::LinuxContainerSecurityContext {
                namespace_options: Some(processes(api::NamespaceMode::Container)),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

impl Pod<'_> {
    /// Its ID, which is that of its own container.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Creates a container in it and starts it; its ID.
    ///
    /// # Errors
    /// What containerd says.
    pub fn start(&self, config: api::ContainerConfig) -> Result<String> {
        let id = self.create(config)?;
        self.start_created(&id)?;
        Ok(id)
    }

    /// Starts a container that was created.
    ///
    /// # Errors
    /// What containerd says.
    pub fn start_created(&self, container: &str) -> Result<()> {
        let request = api::StartContainerRequest { container_id: container.to_owned() };
        let started = self.cri.call(async |mut client| client.start_container(request).await);
        started.context("start a container").map(drop)
    }

    /// Creates a container in it; its ID.
    ///
    /// # Errors
    /// What containerd says.
    pub fn create(&self, config: api::ContainerConfig) -> Result<String> {
        let request = api::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        Ok(self
            .cri
            .call(async |mut client| client.create_container(request).await)
            .context("create a container")?
            .container_id)
    }

    /// Runs a shell script in a container that runs.
    ///
    /// # Errors
    /// What containerd says.
    pub fn exec(&self, container: &str, script: &str) -> Result<Finished> {
        self.probe(container, script, 0)
    }

    /// The same, within so many seconds; 0 is forever.
    ///
    /// # Errors
    /// What containerd says.
    pub fn probe(&self, container: &str, script: &str, timeout: i64) -> Result<Finished> {
        let request = api::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
            timeout,
        };
        let answer =
            self.cri.call(async |mut client| client.exec_sync(request).await).context("run a command")?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Finished { code: answer.exit_code, stdout: text(answer.stdout), stderr: text(answer.stderr) })
    }

    /// What a script that must succeed writes to standard output.
    ///
    /// # Errors
    /// When it does not.
    pub fn sh(&self, container: &str, script: &str) -> Result<String> {
        let finished = self.exec(container, script)?;
        ensure!(finished.code == 0, "{script:?}: {finished:?}");
        Ok(finished.stdout)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// What containerd says.
    pub fn stats(&self, container: &str) -> Result<api::ContainerStats> {
        let request = api::ContainerStatsRequest { container_id: container.to_owned() };
        self.cri.call(async |mut client| client.container_stats(request).await)?.stats.context("no stats")
    }

    /// The state of a container.
    ///
    /// # Errors
    /// What containerd says.
    pub fn status(&self, container: &str) -> Result<api::ContainerStatus> {
        let request = api::ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
        self.cri.call(async |mut client| client.container_status(request).await)?.status.context("no status")
    }

    /// Waits until a container has ended; how.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait(&self, container: &str) -> Result<api::ContainerStatus> {
        let mut last = None;
        time::until("the container has ended", || {
            let status = self.status(container)?;
            let ended = status.state() == api::ContainerState::ContainerExited;
            last = Some(status);
            Ok(ended)
        })?;
        last.context("no status")
    }

    /// What a container has written so far, without what containerd puts before each line.
    ///
    /// # Errors
    /// When there is no log.
    pub fn log(&self, name: &str) -> Result<String> {
        let text = fs::read_to_string(Path::new(&self.config.log_directory).join(format!("{name}.log")))?;
        // Time, stream, whether it is a whole line.
        Ok(text
            .lines()
            .filter_map(|line| line.splitn(4, ' ').nth(3))
            .map(|line| format!("{line}\n"))
            .collect())
    }

    /// Stops a container, within so many seconds or by force.
    ///
    /// # Errors
    /// What containerd says.
    pub fn stop(&self, container: &str, grace: Duration) -> Result<()> {
        let timeout = i64::try_from(grace.as_secs())?;
        let request = api::StopContainerRequest { container_id: container.to_owned(), timeout };
        self.cri
            .call(async |mut client| client.stop_container(request).await)
            .context("stop a container")
            .map(drop)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove_container(&self, container: &str) -> Result<()> {
        let request = api::RemoveContainerRequest { container_id: container.to_owned() };
        self.cri
            .call(async |mut client| client.remove_container(request).await)
            .context("remove a container")
            .map(drop)
    }

    /// Changes the limits of a container.
    ///
    /// # Errors
    /// What containerd says.
    pub fn update(&self, container: &str, resources: api::LinuxContainerResources) -> Result<()> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        self.cri
            .call(async |mut client| client.update_container_resources(request).await)
            .context("change limits")
            .map(drop)
    }

    /// Its state.
    ///
    /// # Errors
    /// What containerd says.
    pub fn pod_status(&self) -> Result<api::PodSandboxStatus> {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        self.cri
            .call(async |mut client| client.pod_sandbox_status(request).await)?
            .status
            .context("no status")
    }

    /// Stops all that is in it, and it.
    ///
    /// # Errors
    /// What containerd says.
    pub fn stop_sandbox(&self) -> Result<()> {
        self.cri.stop_sandbox(&self.id)
    }

    /// Removes it with all that is in it, which containerd stops if nobody has done so before.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove_sandbox(&self) -> Result<()> {
        self.cri.remove_sandbox(&self.id)
    }

    /// Stops it and removes it with all that is in it.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove(self) -> Result<()> {
        self.stop_sandbox()?;
        self.remove_sandbox()
    }
}
