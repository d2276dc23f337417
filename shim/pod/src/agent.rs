//! The connection to the agent in the guest.
//!
//! Requests go out from whoever has an [`Agent`]; every one is bounded in time, except waiting for a process. What the agent answers is
//! hostile: ttrpc bounds its size, and its error messages are made one short line before anything else sees them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrun_agent_api::agent as api;
use kvrun_agent_api::agent_ttrpc::AgentClient;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

use crate::container_id::ContainerId;
use crate::observe::latency::Latencies;
use crate::text;

/// Name and version of the protocol.
pub const PROTOCOL: &str = "kvrun.agent.v1";
/// How long the agent may take over a request. Creating a container takes tens of milliseconds on hardware and a second
/// in an emulated machine; this is for a guest that hangs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the agent may take to create a process: longer than it gives itself (60 s, and 10 s for the streams), so that it is the agent that gives up, and leaves
/// nothing behind.
const CREATE_TIMEOUT: Duration = Duration::from_secs(75);
/// How long the agent may take to start a container: longer than hooks run on the host ([`crate::hooks`]), because some run there.
const START_TIMEOUT: Duration = Duration::from_secs(610);
/// How long the agent may take to shut the guest down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the agent may take to forget a directory, which nobody waits for but the host's memory.
const FORGET_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the agent may take to tell of the guest: whoever asks is there to learn whether it answers.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest error message taken from the agent, in characters.
const MAX_MESSAGE: usize = 1000;

/// What can go wrong with a request to the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent said no.
    #[error("{message}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its answer, by kind.
        code: Code,
        /// Its answer.
        message: String,
    },
    /// The agent did not answer in time.
    #[error("the guest did not {what} within {} s", bound.as_secs())]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long it had.
        bound: Duration,
    },
    /// The connection broke.
    #[error("the connection to the guest broke while it should {what}")]
    Disconnected {
        /// What was asked.
        what: &'static str,
        /// As ttrpc put it.
        #[source]
        source: ttrpc::Error,
    },
    /// The agent answered what the protocol does not know.
    #[error("the guest gave a senseless answer when it should {what}")]
    Senseless {
        /// What was asked.
        what: &'static str,
    },
}

/// How a process in the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessEnd {
    /// Exited with this code.
    Exited(u8),
    /// Killed by this signal.
    Signaled(u8),
}

/// The agent of one guest. Clones share a connection.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    /// How long it took over requests.
    pub(crate) latencies: Arc<Latencies>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

/// A block device of the guest, as it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// As in `/dev`.
    pub name: String,
    /// Its device numbers.
    pub major: u32,
    /// The second of them.
    pub minor: u32,
}

/// What a container's own `/proc` has at a path, as the guest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcEntry {
    /// A directory, with these names in it.
    Directory(Vec<String>),
    /// A file that says this.
    File(Vec<u8>),
    /// A symbolic link to this.
    Link(Vec<u8>),
}

impl Agent {
    /// Speaks over a stream connected to [`kvrun_agent_api::RPC_PORT`]. Must be called in a tokio runtime.
    pub fn over(stream: UnixStream) -> Self {
        Self { client: AgentClient::new(Client::new(Socket::new(stream))), latencies: Arc::default() }
    }

    /// What it says of the guest.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn info(&self) -> Result<api::GetInfoResponse, AgentError> {
        let request = api::GetInfoRequest::default();
        let call = self.client.get_info(Context::default(), &request);
        self.bounded("tell of the guest", LOOK_TIMEOUT, call).await
    }

    /// The log of the guest's kernel, with the agent's own in it, as it is: not a text for a terminal.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn read_log(&self) -> Result<Vec<u8>, AgentError> {
        let request = api::Empty::default();
        let call = self.client.read_log(Context::default(), &request);
        Ok(self.bounded("read its log", LOOK_TIMEOUT, call).await?.text)
    }

    /// Binds the driver to a slot; its block device, if it holds one.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn bind_slot(&self, slot: u8) -> Result<Option<BlockDevice>, AgentError> {
        let request = api::BindSlotRequest { slot: slot.into(), ..Default::default() };
        let answer = self
            .bounded("bind a device", REQUEST_TIMEOUT, self.client.bind_slot(Context::default(), &request))
            .await?;
        let api::BindSlotResponse { block_device: name, major, minor, .. } = answer;
        Ok(Some(BlockDevice { name, major, minor }).filter(|device| !device.name.is_empty()))
    }

    /// Unbinds the driver from a slot, so that it may be emptied.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn unbind_slot(&self, slot: u8) -> Result<(), AgentError> {
        let request = api::UnbindSlotRequest { slot: slot.into(), ..Default::default() };
        let call = self.client.unbind_slot(Context::default(), &request);
        self.bounded("let go of a device", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Sets up links, routes and neighbours.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn set_up_network(&self, request: &api::SetUpNetworkRequest) -> Result<(), AgentError> {
        let call = self.client.set_up_network(Context::default(), request);
        self.bounded("set up the network", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Has so many vCPUs online: 1 to as many as the machine was made with.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn set_cpus(&self, online: u8) -> Result<(), AgentError> {
        let request = api::SetCpusRequest { online: online.into(), ..Default::default() };
        let call = self.client.set_cpus(Context::default(), &request);
        self.bounded("change its number of CPUs", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Mounts the virtio-fs with this tag.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn mount_virtiofs(&self, tag: &str, mount_point: &str) -> Result<(), AgentError> {
        self.mount(api::mount_request::Kind::VIRTIOFS, tag, mount_point, false).await
    }

    /// Mounts an EROFS image from a block device, named as [`Agent::bind_slot`] does: with DAX if it is a pmem device.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn mount_erofs(&self, device: &str, mount_point: &str) -> Result<(), AgentError> {
        self.mount(api::mount_request::Kind::EROFS, &format!("/dev/{device}"), mount_point, true).await
    }

    /// Mounts an ext4 from a block device, named as [`Agent::bind_slot`] does.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn mount_ext4(
        &self,
        device: &str,
        mount_point: &str,
        read_only: bool,
    ) -> Result<(), AgentError> {
        self.mount(api::mount_request::Kind::EXT4, &format!("/dev/{device}"), mount_point, read_only).await
    }

    /// Mounts an overlay of mounted layers, the uppermost first; `changes` is a directory of the guest, made if it is missing, for what is changed in it.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn mount_overlay(
        &self,
        layers: Vec<String>,
        changes: &str,
        mount_point: &str,
    ) -> Result<(), AgentError> {
        self.request_mount(api::MountRequest {
            kind: api::mount_request::Kind::OVERLAY.into(),
            source: changes.to_owned(),
            mount_point: mount_point.to_owned(),
            layers,
            ..Default::default()
        })
        .await
    }

    async fn mount(
        &self,
        kind: api::mount_request::Kind,
        source: &str,
        mount_point: &str,
        read_only: bool,
    ) -> Result<(), AgentError> {
        self.request_mount(api::MountRequest {
            kind: kind.into(),
            source: source.to_owned(),
            mount_point: mount_point.to_owned(),
            read_only,
            ..Default::default()
        })
        .await
    }

    async fn request_mount(&self, request: api::MountRequest) -> Result<(), AgentError> {
        self.bounded("mount a file system", REQUEST_TIMEOUT, self.client.mount(Context::default(), &request))
            .await
            .map(drop)
    }

    /// Unmounts what was mounted there.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn unmount(&self, mount_point: &str) -> Result<(), AgentError> {
        let request = api::UnmountRequest { mount_point: mount_point.to_owned(), ..Default::default() };
        let call = self.client.unmount(Context::default(), &request);
        self.bounded("unmount a file system", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Forgets what is cached of paths that were removed from the share.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn forget(&self, paths: &[PathBuf]) -> Result<(), AgentError> {
        let paths = paths.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        let request = api::ForgetRequest { paths, ..Default::default() };
        let call = self.client.forget(Context::default(), &request);
        self.bounded("forget files", FORGET_TIMEOUT, call).await.map(drop)
    }

    /// Makes a volume of the guest's own as is said, or changes one.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn update_volume(&self, number: u64, entries: Vec<api::VolumeEntry>) -> Result<(), AgentError> {
        let request = api::UpdateVolumeRequest { number, entries, ..Default::default() };
        let call = self.client.update_volume(Context::default(), &request);
        self.bounded("update a volume", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Removes it.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn remove_volume(&self, number: u64) -> Result<(), AgentError> {
        let request = api::RemoveVolumeRequest { number, ..Default::default() };
        let call = self.client.remove_volume(Context::default(), &request);
        self.bounded("remove a volume", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Has the guest stand for a container, with a host name and a domain name, and with these sysctls.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn set_up_sandbox(
        &self,
        id: &ContainerId,
        [hostname, domainname]: [String; 2],
        sysctl: HashMap<String, String>,
    ) -> Result<(), AgentError> {
        let container_id = id.to_string();
        let request =
            api::SetUpSandboxRequest { container_id, hostname, domainname, sysctl, ..Default::default() };
        let call = self.client.set_up_sandbox(Context::default(), &request);
        self.bounded("set up the pod", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Creates a container; `spec_json` is its OCI config with paths of the guest, `bundle` the directory on the host that hooks in the
    /// guest are told.
    ///
    /// # Errors
    /// [`AgentError`]; the codes `NOT_FOUND` and `PERMISSION_DENIED` are about the program to run.
    pub async fn create(
        &self,
        id: &ContainerId,
        bundle: &Path,
        spec_json: Vec<u8>,
        stdio: api::Stdio,
    ) -> Result<(), AgentError> {
        let request = api::CreateContainerRequest {
            container_id: id.to_string(),
            bundle: bundle.to_string_lossy().into_owned(),
            spec_json,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let call = self.client.create_container(Context::default(), &request);
        self.bounded("create the container", CREATE_TIMEOUT, call).await.map(drop)
    }

    /// Runs the container's process.
    ///
    /// # Errors
    /// As [`Agent::create`].
    pub async fn start(&self, id: &ContainerId) -> Result<(), AgentError> {
        let request = container(id);
        let call = self.client.start_container(Context::default(), &request);
        self.bounded("start the container", START_TIMEOUT, call).await.map(drop)
    }

    /// Runs a further process in a running container; `process_json` is an OCI `process`.
    ///
    /// # Errors
    /// As [`Agent::create`].
    pub async fn exec(
        &self,
        id: &ContainerId,
        exec_id: &str,
        process_json: Vec<u8>,
        stdio: api::Stdio,
    ) -> Result<(), AgentError> {
        let request = api::ExecProcessRequest {
            container_id: id.to_string(),
            exec_id: exec_id.to_owned(),
            process_json,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let call = self.client.exec_process(Context::default(), &request);
        self.bounded("run the process", CREATE_TIMEOUT, call).await.map(drop)
    }

    /// Holds all processes of a container.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn pause(&self, id: &ContainerId) -> Result<(), AgentError> {
        let request = container(id);
        let call = self.client.pause_container(Context::default(), &request);
        self.bounded("pause the container", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Lets them run again.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn resume(&self, id: &ContainerId) -> Result<(), AgentError> {
        let request = container(id);
        let call = self.client.resume_container(Context::default(), &request);
        self.bounded("resume the container", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn processes(&self, id: &ContainerId) -> Result<api::ListProcessesResponse, AgentError> {
        let request = container(id);
        let call = self.client.list_processes(Context::default(), &request);
        self.bounded("list the processes", REQUEST_TIMEOUT, call).await
    }

    /// What a running container's own `/proc` has at a path below it; `None`: nothing.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn look_at_proc(
        &self,
        id: &ContainerId,
        path: String,
    ) -> Result<Option<ProcEntry>, AgentError> {
        let request = api::LookAtProcRequest { container_id: id.to_string(), path, ..Default::default() };
        let what = "look at the processes";
        let call = self.client.look_at_proc(Context::default(), &request);
        match self.bounded(what, REQUEST_TIMEOUT, call).await {
            Ok(response) => match response.entry.ok_or(AgentError::Senseless { what })? {
                api::look_at_proc_response::Entry::Directory(names) => {
                    Ok(Some(ProcEntry::Directory(names.names)))
                }
                api::look_at_proc_response::Entry::File(data) => Ok(Some(ProcEntry::File(data))),
                api::look_at_proc_response::Entry::Link(target) => Ok(Some(ProcEntry::Link(target))),
                _ => Err(AgentError::Senseless { what }),
            },
            Err(AgentError::Refused { code: Code::NOT_FOUND, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What the cgroup of a container counts.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stats(&self, id: &ContainerId) -> Result<api::ContainerStatsResponse, AgentError> {
        let request = container(id);
        let call = self.client.container_stats(Context::default(), &request);
        self.bounded("count", REQUEST_TIMEOUT, call).await
    }

    /// Connects the stream of a token to a TCP port of the guest's loopback.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn connect_port(&self, port: u16, token: u64) -> Result<(), AgentError> {
        let request = api::ConnectPortRequest { port: port.into(), token, ..Default::default() };
        let call = self.client.connect_port(Context::default(), &request);
        self.bounded("connect to a port", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Changes the limits of a container; `resources_json` is OCI `linux.resources`, of which what is there is changed.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn update(&self, id: &ContainerId, resources_json: Vec<u8>) -> Result<(), AgentError> {
        let request = api::UpdateContainerRequest {
            container_id: id.to_string(),
            resources_json,
            ..Default::default()
        };
        let call = self.client.update_container(Context::default(), &request);
        self.bounded("change the limits", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Waits for the end of a process, the container's own if `exec_id` is empty, without a bound; also tells how many processes of the container the guest's
    /// OOM killer had killed by then.
    ///
    /// # Errors
    /// [`AgentError`], never [`AgentError::Timeout`].
    pub async fn wait(&self, id: &ContainerId, exec_id: &str) -> Result<(ProcessEnd, u64), AgentError> {
        const WHAT: &str = "wait for the container";
        let request = api::ProcessRequest {
            container_id: id.to_string(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        let answer =
            self.client.wait_process(Context::default(), &request).await.map_err(|e| failure(WHAT, e))?;
        let number = |n: u32| u8::try_from(n).map_err(|_| AgentError::Senseless { what: WHAT });
        let end = match answer.end {
            Some(api::wait_process_response::End::ExitCode(code)) => ProcessEnd::Exited(number(code)?),
            Some(api::wait_process_response::End::Signal(signal @ 1..=64)) => {
                ProcessEnd::Signaled(number(signal)?)
            }
            _ => return Err(AgentError::Senseless { what: WHAT }),
        };
        Ok((end, answer.oom_kills))
    }

    /// Waits, without a bound, until the guest's OOM killer has killed more than `seen` processes of a container, and tells how many by now. `None`: the
    /// container's own process has ended, or the agent has another reason to tell nothing new.
    ///
    /// # Errors
    /// [`AgentError`], never [`AgentError::Timeout`].
    pub async fn more_oom_kills(&self, id: &ContainerId, seen: u64) -> Result<Option<u64>, AgentError> {
        let request = api::WaitOomKillRequest { container_id: id.to_string(), seen, ..Default::default() };
        let answer = self.client.wait_oom_kill(Context::default(), &request).await;
        let kills = answer.map_err(|e| failure("watch for OOM kills", e))?.kills;
        Ok(Some(kills).filter(|kills| *kills > seen))
    }

    /// Sends a signal to a process, or to all processes of the container.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn signal(
        &self,
        id: &ContainerId,
        exec_id: &str,
        signal: i32,
        all: bool,
        bound: Duration,
    ) -> Result<(), AgentError> {
        let signal = signal.unsigned_abs();
        let request = api::SignalProcessRequest {
            container_id: id.to_string(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.bounded("deliver a signal", bound, self.client.signal_process(Context::default(), &request))
            .await
            .map(drop)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn resize(
        &self,
        id: &ContainerId,
        exec_id: &str,
        rows: u16,
        columns: u16,
    ) -> Result<(), AgentError> {
        let request = api::ResizeTerminalRequest {
            container_id: id.to_string(),
            exec_id: exec_id.to_owned(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        let call = self.client.resize_terminal(Context::default(), &request);
        self.bounded("resize the terminal", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Removes a container with everything left in it.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn remove(&self, id: &ContainerId) -> Result<(), AgentError> {
        let request = container(id);
        let call = self.client.remove_container(Context::default(), &request);
        self.bounded("remove the container", REQUEST_TIMEOUT, call).await.map(drop)
    }

    /// Kills all containers, syncs and powers the guest off.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        let request = api::Empty::default();
        self.bounded("shut down", SHUTDOWN_TIMEOUT, self.client.shutdown(Context::default(), &request))
            .await
            .map(drop)
    }
}

impl Agent {
    /// Makes a request, for which the guest has so long; `what` completes "did not", and names it in the metrics.
    async fn bounded<T>(
        &self,
        what: &'static str,
        bound: Duration,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, AgentError> {
        let begun = Instant::now();
        let result = timeout(bound, call).await;
        self.latencies.add(what, begun.elapsed(), !matches!(result, Ok(Ok(_))));
        match result {
            Ok(result) => result.map_err(|e| failure(what, e)),
            Err(_) => Err(AgentError::Timeout { what, bound }),
        }
    }
}

fn container(id: &ContainerId) -> api::ContainerRequest {
    api::ContainerRequest { container_id: id.to_string(), ..Default::default() }
}

fn failure(what: &'static str, error: ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) => AgentError::Refused {
            what,
            code: status.code(),
            message: text::one_line(status.message(), MAX_MESSAGE),
        },
        source => AgentError::Disconnected { what, source },
    }
}
