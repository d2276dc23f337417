//! The RPCs of `agent.proto`. A request is checked here, once; errors get their gRPC code here.
//!
//! What changes something runs in a task of its own: ttrpc drops a handler when its connection closes or its deadline passes,
//! and half a creation helps nobody. What may block on a file system runs on the blocking pool.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::{join_all, try_join3};
use futures::stream;
use kvrun_agent_api::agent::{
    BindSlotRequest, BindSlotResponse, ConnectPortRequest, ContainerRequest, ContainerStatsResponse,
    CreateContainerRequest, CreateContainerResponse, Empty, ExecProcessRequest, ForgetRequest,
    GetInfoRequest, GetInfoResponse, ListProcessesResponse, LookAtProcRequest, LookAtProcResponse,
    MountRequest, ProcessInfo, ProcessRequest, ReadLogResponse, RemoveVolumeRequest, ResizeTerminalRequest,
    SetCpusRequest, SetUpNetworkRequest, SetUpSandboxRequest, SignalProcessRequest, Stdio, UnbindSlotRequest,
    UnmountRequest, UpdateContainerRequest, UpdateVolumeRequest, WaitOomKillRequest, WaitOomKillResponse,
    WaitProcessResponse,
};
use kvrun_agent_api::agent_ttrpc::{Agent, create_agent};
use oci_spec::runtime::{LinuxResources, Process};
use tokio::time::timeout;
use ttrpc::r#async::transport;
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::cgroup::limits::{self, LimitError};
use crate::cgroup::stats;
use crate::container::list::list;
use crate::container::own_proc;
use crate::container::spec::{SpecError, find_namespaces};
use crate::container::{Container, ContainerError, ContainerId, ContainerSpec, Containers, Engine};
use crate::cpus::{CpuError, Cpus};
use crate::descriptor::{Descriptor, Listener};
use crate::forward::{self, ForwardError};
use crate::kmsg;
use crate::mounts::{Mount, MountError, Mounts, forget};
use crate::network::plan::Plan;
use crate::network::{self, NetworkError};
use crate::oci::create::OciError;
use crate::oci::error_chain;
use crate::path::RunPath;
use crate::power::{Connection, Power};
use crate::reaper::{End, Reaper};
use crate::sandbox::Sandbox;
use crate::slots::{SlotError, Slots};
use crate::stdio::EngineStreams;
use crate::streams::{StreamBroker, StreamError};
use crate::volumes::{VolumeError, Volumes};

/// How long unmounting and syncing may hold `Shutdown` up.
const SYNC_TIMEOUT: Duration = Duration::from_secs(20);
/// Highest signal number on Linux.
const SIGNAL_MAX: u32 = 64;

/// The service.
#[derive(Clone)]
pub struct AgentService(Arc<Parts>);

struct Parts {
    engine: Engine,
    containers: Containers,
    streams: StreamBroker,
    mounts: Mounts,
    volumes: Volumes,
    slots: Slots,
    cpus: Cpus,
    sandbox: Sandbox,
    power: Arc<Power>,
}

impl AgentService {
    /// The service, with `helper` as the program that creates containers.
    #[must_use]
    pub fn new(helper: PathBuf, reaper: Arc<Reaper>) -> Self {
        Self(Arc::new(Parts {
            engine: Engine { helper, reaper },
            containers: Containers::default(),
            streams: StreamBroker::default(),
            mounts: Mounts::default(),
            volumes: Volumes::default(),
            slots: Slots::default(),
            cpus: Cpus::default(),
            sandbox: Sandbox::default(),
            power: Arc::default(),
        }))
    }

    /// Answers on these listeners, in tasks of the current runtime.
    ///
    /// # Errors
    ///
    /// None but those of ttrpc without a listener.
    pub async fn serve(&self, rpc: Listener, streams: Listener) -> ttrpc::Result<Server> {
        tokio::spawn(self.0.streams.clone().serve(streams));
        let power = self.0.power.clone();
        let connections = stream::unfold(rpc, move |listener| {
            let power = power.clone();
            async move {
                let accepted = listener.accept().await;
                Some((accepted.map(|stream| Connection::new(stream, power)), listener))
            }
        });
        let mut server = Server::new()
            .add_listener(transport::Listener::new(connections))
            .register_service(create_agent(Arc::new(self.clone())));
        server.start().await?;
        Ok(server)
    }

    /// Completes when `Shutdown` has been answered.
    pub async fn power_off(&self) {
        self.0.power.off().await;
    }

    async fn create(&self, request: CreateContainerRequest) -> Result<CreateContainerResponse, Failure> {
        let parts = &self.0;
        let id = container_id(&request.container_id)?;
        let mut spec = ContainerSpec::parse(&request.spec_json, &id, request.bundle.into())?;
        let running = |id: &str| {
            let container = parts.containers.get(&ContainerId::parse(id).ok()?).ok()?;
            let process = container.process().ok()?;
            (!process.has_ended()).then_some(process.pid)
        };
        find_namespaces(&mut spec.spec, |id, kind| running(id).or_else(|| parts.sandbox.process(id, kind)))?;
        let stdio = request.stdio.unwrap_or_default();
        check_tokens(&stdio, spec.terminal)?;
        let container = parts.containers.reserve(&id, &spec.cgroup)?;
        let created = async {
            let streams = self.streams(&stdio).await?;
            Ok(container.create(&parts.engine, spec, streams).await?)
        };
        let created: Result<i32, Failure> = created.await;
        if created.is_err() {
            parts.containers.forget(&container);
        }
        let mut response = CreateContainerResponse::new();
        response.pid = created? as u32;
        Ok(response)
    }

    async fn exec(&self, request: ExecProcessRequest) -> Result<CreateContainerResponse, Failure> {
        let parts = &self.0;
        let container = parts.containers.get(&container_id(&request.container_id)?)?;
        let process: Process = serde_json::from_slice(&request.process_json)
            .map_err(|err| Failure::invalid(format!("the process to run cannot be read: {err}")))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(Failure::invalid("the process to run has no args".to_owned()));
        }
        let stdio = request.stdio.unwrap_or_default();
        check_tokens(&stdio, process.terminal().unwrap_or(false))?;
        let streams = self.streams(&stdio).await?;
        let mut response = CreateContainerResponse::new();
        response.pid = container.exec(&parts.engine, &request.exec_id, process, streams).await? as u32;
        Ok(response)
    }

    async fn connect_to_port(&self, request: &ConnectPortRequest) -> Result<(), Failure> {
        let port = u16::try_from(request.port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| Failure::invalid(format!("there is no TCP port {}", request.port)))?;
        if request.token == 0 {
            return Err(Failure::invalid("a connection to a port needs a stream".to_owned()));
        }
        // The stream is taken first, so that none is left behind by a port on which nothing listens.
        let stream = self.0.streams.claim(request.token).await?;
        let connection = forward::connect(port).await?;
        tokio::spawn(forward::copy(stream, connection));
        Ok(())
    }

    async fn streams(&self, stdio: &Stdio) -> Result<EngineStreams, StreamError> {
        let (stdin, stdout, stderr) = try_join3(
            self.claim(stdio.stdin_token),
            self.claim(stdio.stdout_token),
            self.claim(stdio.stderr_token),
        )
        .await?;
        Ok(EngineStreams { stdin, stdout, stderr })
    }

    async fn claim(&self, token: u64) -> Result<Option<Descriptor>, StreamError> {
        match token {
            0 => Ok(None),
            token => self.0.streams.claim(token).await.map(Some),
        }
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), Failure> {
        let parts = &self.0;
        let container = match parts.containers.get(id) {
            Err(ContainerError::Unknown(_)) => return Ok(()),
            other => other?,
        };
        container.remove(&parts.engine.reaper).await?;
        parts.containers.forget(&container);
        Ok(())
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Failure> {
        Ok(self.0.containers.get(&container_id(id)?)?)
    }

    async fn freeze(&self, request: &ContainerRequest, frozen: bool) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        detached(async move { Ok(container.freeze(frozen).await?) }).await?;
        Ok(Empty::new())
    }

    async fn go_down(&self) {
        let parts = self.0.clone();
        let containers = parts.containers.all();
        for result in
            join_all(containers.iter().map(|container| container.remove(&parts.engine.reaper))).await
        {
            if let Err(err) = result {
                log::warn!("{}", error_chain(&err));
            }
        }
        let sync = tokio::task::spawn_blocking(move || {
            parts.mounts.unmount_all();
            rustix::fs::sync();
        });
        if timeout(SYNC_TIMEOUT, sync).await.is_err() {
            log::error!("file systems were not synced within {SYNC_TIMEOUT:?}");
        }
        self.0.power.request_off();
    }
}

#[async_trait]
impl Agent for AgentService {
    async fn get_info(&self, _: &TtrpcContext, _: GetInfoRequest) -> ttrpc::Result<GetInfoResponse> {
        let memory = meminfo().map_err(|err| Failure::internal(error_chain(&err)))?;
        let mut response = GetInfoResponse::new();
        env!("CARGO_PKG_VERSION").clone_into(&mut response.agent_version);
        response.kernel_release = rustix::system::uname().release().to_string_lossy().into_owned();
        response.memory_total_kib = memory.total_kib;
        response.memory_available_kib = memory.available_kib;
        let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        response.cpus = cpus.and_then(|cpus| u32::try_from(cpus).ok()).unwrap_or(1);
        Ok(response)
    }

    async fn read_log(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<ReadLogResponse> {
        let read =
            || kmsg::read().map_err(|err| Failure::internal(format!("cannot read {}: {err}", kmsg::PATH)));
        let mut response = ReadLogResponse::new();
        response.text = blocking(read).await?;
        Ok(response)
    }

    async fn bind_slot(&self, _: &TtrpcContext, request: BindSlotRequest) -> ttrpc::Result<BindSlotResponse> {
        let slots = self.0.slots.clone();
        let mut response = BindSlotResponse::new();
        if let Some(device) = blocking(move || Ok(slots.bind(request.slot)?)).await? {
            (response.block_device, response.major, response.minor) =
                (device.name, device.major, device.minor);
        }
        Ok(response)
    }

    async fn unbind_slot(&self, _: &TtrpcContext, request: UnbindSlotRequest) -> ttrpc::Result<Empty> {
        let slots = self.0.slots.clone();
        blocking(move || Ok(slots.unbind(request.slot)?)).await?;
        Ok(Empty::new())
    }

    async fn set_cpus(&self, _: &TtrpcContext, request: SetCpusRequest) -> ttrpc::Result<Empty> {
        let cpus = self.0.cpus.clone();
        blocking(move || Ok(cpus.set_online(request.online)?)).await?;
        Ok(Empty::new())
    }

    async fn mount(&self, _: &TtrpcContext, request: MountRequest) -> ttrpc::Result<Empty> {
        let kind = request.kind.enum_value().ok();
        let MountRequest { source, mount_point, read_only, layers, .. } = &request;
        let mount = Mount::parse(kind, source, mount_point, *read_only, layers).map_err(Failure::from)?;
        let parts = self.0.clone();
        blocking(move || Ok(parts.mounts.mount(&mount)?)).await?;
        Ok(Empty::new())
    }

    async fn unmount(&self, _: &TtrpcContext, request: UnmountRequest) -> ttrpc::Result<Empty> {
        let mount_point =
            RunPath::parse(&request.mount_point).map_err(MountError::from).map_err(Failure::from)?;
        let parts = self.0.clone();
        blocking(move || Ok(parts.mounts.unmount(&mount_point)?)).await?;
        Ok(Empty::new())
    }

    async fn forget(&self, _: &TtrpcContext, request: ForgetRequest) -> ttrpc::Result<Empty> {
        let paths: Result<Vec<_>, _> = request.paths.iter().map(|path| RunPath::parse(path)).collect();
        let paths = paths.map_err(MountError::from).map_err(Failure::from)?;
        blocking(move || Ok(paths.iter().try_for_each(forget)?)).await?;
        Ok(Empty::new())
    }

    async fn update_volume(&self, _: &TtrpcContext, request: UpdateVolumeRequest) -> ttrpc::Result<Empty> {
        let parts = self.0.clone();
        blocking(move || Ok(parts.volumes.update(request.number, &request.entries)?)).await?;
        Ok(Empty::new())
    }

    async fn remove_volume(&self, _: &TtrpcContext, request: RemoveVolumeRequest) -> ttrpc::Result<Empty> {
        let parts = self.0.clone();
        blocking(move || Ok(parts.volumes.remove(request.number)?)).await?;
        Ok(Empty::new())
    }

    async fn set_up_network(&self, _: &TtrpcContext, request: SetUpNetworkRequest) -> ttrpc::Result<Empty> {
        let plan = Plan::parse(&request).map_err(|err| Failure::invalid(err.to_string()))?;
        let slots = self.0.slots.clone();
        blocking(move || Ok(network::set_up(&slots, &plan)?)).await?;
        Ok(Empty::new())
    }

    async fn connect_port(&self, _: &TtrpcContext, request: ConnectPortRequest) -> ttrpc::Result<Empty> {
        let service = self.clone();
        detached(async move { service.connect_to_port(&request).await }).await?;
        Ok(Empty::new())
    }

    async fn set_up_sandbox(&self, _: &TtrpcContext, request: SetUpSandboxRequest) -> ttrpc::Result<Empty> {
        let SetUpSandboxRequest { container_id: id, hostname, domainname, sysctl, .. } = request;
        let set_up = self.0.sandbox.stand_for(container_id(&id)?, &hostname, &domainname, &sysctl);
        set_up.map_err(|err| Failure::internal(error_chain(&err)))?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let service = self.clone();
        Ok(detached(async move { service.create(request).await }).await?)
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        detached(async move { Ok(container.start().await?) }).await?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let service = self.clone();
        Ok(detached(async move { service.exec(request).await }).await?)
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.freeze(&request, true).await
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.freeze(&request, false).await
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let container = self.container(&request.container_id)?;
        let init = container.process().map_err(Failure::from)?.pid;
        let cgroup = container.cgroup().clone();
        let listed = blocking(move || Ok(list(init, &cgroup.processes()))).await?;
        let mut response = ListProcessesResponse::new();
        response.processes = listed
            .into_iter()
            .map(|listed| ProcessInfo {
                pid: listed.pid,
                parent_pid: listed.parent_pid,
                uid: listed.uid,
                started_s: listed.started_s,
                cpu_ms: listed.cpu_ms,
                terminal: listed.terminal,
                command: listed.command,
                ..Default::default()
            })
            .collect();
        Ok(response)
    }

    async fn look_at_proc(
        &self,
        _: &TtrpcContext,
        request: LookAtProcRequest,
    ) -> ttrpc::Result<LookAtProcResponse> {
        let container = self.container(&request.container_id)?;
        let init = container.process().map_err(Failure::from)?.pid;
        let look = move || {
            let looked = own_proc::look(init, Path::new(&request.path));
            looked.map_err(|error| Failure::new(Code::NOT_FOUND, error.to_string()))
        };
        Ok(LookAtProcResponse { entry: Some(blocking(look).await?), ..Default::default() })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        let dir = self.container(&request.container_id)?.cgroup().dir();
        let mut response = ContainerStatsResponse::new();
        response.counters = blocking(move || Ok(stats::read(&dir))).await?;
        Ok(response)
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let id = container_id(&request.container_id)?;
        let resources: LinuxResources = serde_json::from_slice(&request.resources_json)
            .map_err(|err| Failure::invalid(format!("the limits cannot be read: {err}")))?;
        let dir = self.0.containers.get(&id).map_err(Failure::from)?.cgroup().dir();
        blocking(move || Ok(limits::apply(&dir, &resources)?)).await?;
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let container = self.container(&request.container_id)?;
        let process = container.process_named(&request.exec_id).map_err(Failure::from)?;
        // The container may be removed meanwhile.
        let container = Arc::downgrade(&container);
        let exit = process.exit().await.ok_or_else(|| Failure::internal("the agent is going down"))?;
        if let Some(container) = container.upgrade().filter(|_| !request.exec_id.is_empty()) {
            container.forget_process(&request.exec_id);
        }
        let mut response = WaitProcessResponse::new();
        match exit.end {
            End::Exited(code) => response.set_exit_code(code.into()),
            End::Signaled(signal) => response.set_signal(signal.into()),
        }
        response.oom_kills = exit.oom_kills;
        Ok(response)
    }

    async fn wait_oom_kill(
        &self,
        _: &TtrpcContext,
        request: WaitOomKillRequest,
    ) -> ttrpc::Result<WaitOomKillResponse> {
        let container = self.container(&request.container_id)?;
        let process = Arc::clone(container.process().map_err(Failure::from)?);
        let cgroup = container.cgroup().clone();
        // It may be removed meanwhile.
        drop(container);
        let mut response = WaitOomKillResponse::new();
        response.kills = tokio::select! {
            biased;
            () = process.ended() => request.seen,
            kills = cgroup.more_oom_kills(request.seen) => {
                kills.map_err(|err| Failure::internal(format!("cannot watch the container's memory.events: {err}")))?
            }
        };
        Ok(response)
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let id = container_id(&request.container_id)?;
        if request.signal > SIGNAL_MAX {
            return Err(Failure::invalid(format!("{} is not the number of a signal", request.signal)).into());
        }
        let container = self.0.containers.get(&id).map_err(Failure::from)?;
        container.signal(&request.exec_id, request.signal, request.all).map_err(Failure::from)?;
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let id = container_id(&request.container_id)?;
        let (Ok(rows), Ok(columns)) = (u16::try_from(request.rows), u16::try_from(request.columns)) else {
            let text =
                format!("a terminal cannot have {} rows and {} columns", request.rows, request.columns);
            return Err(Failure::invalid(text).into());
        };
        let container = self.0.containers.get(&id).map_err(Failure::from)?;
        container.resize(&request.exec_id, rows, columns).map_err(Failure::from)?;
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let id = container_id(&request.container_id)?;
        let service = self.clone();
        detached(async move { service.remove(&id).await }).await?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let service = self.clone();
        detached(async move {
            service.go_down().await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}

/// Runs to its end even if nobody waits for it any more.
async fn detached<T: Send + 'static>(
    future: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    tokio::spawn(future).await.unwrap_or_else(|err| Err(Failure::internal(error_chain(&err))))
}

/// Runs where a file system or a driver may keep it waiting.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(call).await.unwrap_or_else(|err| Err(Failure::internal(error_chain(&err))))
}

fn container_id(text: &str) -> Result<ContainerId, Failure> {
    ContainerId::parse(text).map_err(|err| Failure::new(Code::INVALID_ARGUMENT, error_chain(&err)))
}

fn check_tokens(stdio: &Stdio, terminal: bool) -> Result<(), Failure> {
    if terminal && stdio.stderr_token != 0 {
        return Err(Failure::invalid("a terminal has no stream for standard error".to_owned()));
    }
    let mut tokens: Vec<u64> = [stdio.stdin_token, stdio.stdout_token, stdio.stderr_token].into();
    tokens.retain(|token| *token != 0);
    tokens.sort_unstable();
    if tokens.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Failure::invalid("the tokens of a container's streams must differ".to_owned()));
    }
    Ok(())
}

struct MemInfo {
    total_kib: u64,
    available_kib: u64,
}

fn meminfo() -> io::Result<MemInfo> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/meminfo has no {name}")))
    };
    Ok(MemInfo { total_kib: field("MemTotal:")?, available_kib: field("MemAvailable:")? })
}

/// A refused request: the code and the line for the user.
#[derive(Debug)]
struct Failure {
    code: Code,
    text: String,
}

impl Failure {
    fn new(code: Code, text: String) -> Self {
        Self { code, text }
    }

    fn invalid(text: String) -> Self {
        Self::new(Code::INVALID_ARGUMENT, text)
    }

    fn internal(text: impl Into<String>) -> Self {
        Self::new(Code::INTERNAL, text.into())
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(failure: Failure) -> Self {
        Self::RpcStatus(get_status(failure.code, failure.text))
    }
}

impl From<ContainerError> for Failure {
    fn from(err: ContainerError) -> Self {
        let code = match &err {
            ContainerError::Exists(_) | ContainerError::ExecExists(..) => Code::ALREADY_EXISTS,
            ContainerError::Unknown(_)
            | ContainerError::UnknownExec(..)
            | ContainerError::Oci(OciError::NotFound(_)) => Code::NOT_FOUND,
            ContainerError::BadExecId(_) => Code::INVALID_ARGUMENT,
            ContainerError::Oci(OciError::NotExecutable(_)) => Code::PERMISSION_DENIED,
            ContainerError::CgroupTaken(..)
            | ContainerError::Removed(_)
            | ContainerError::State { .. }
            | ContainerError::NoTerminal(_) => Code::FAILED_PRECONDITION,
            ContainerError::CreateTimeout(_)
            | ContainerError::KillTimeout(_)
            | ContainerError::FreezeTimeout(_)
            | ContainerError::Oci(_)
            | ContainerError::System { .. } => Code::INTERNAL,
        };
        Self::new(code, error_chain(&err))
    }
}

impl From<SpecError> for Failure {
    fn from(err: SpecError) -> Self {
        Self::invalid(error_chain(&err))
    }
}

impl From<LimitError> for Failure {
    fn from(err: LimitError) -> Self {
        let code = match &err {
            LimitError::Field { .. } => Code::INVALID_ARGUMENT,
            LimitError::Write { .. } | LimitError::HugePages(_) => Code::INTERNAL,
        };
        Self::new(code, error_chain(&err))
    }
}

impl From<StreamError> for Failure {
    fn from(err: StreamError) -> Self {
        Self::new(Code::FAILED_PRECONDITION, error_chain(&err))
    }
}

impl From<ForwardError> for Failure {
    fn from(err: ForwardError) -> Self {
        Self::new(Code::FAILED_PRECONDITION, error_chain(&err))
    }
}

impl From<SlotError> for Failure {
    fn from(err: SlotError) -> Self {
        let code = match &err {
            SlotError::Unknown(_) => Code::NOT_FOUND,
            SlotError::Bind { .. } | SlotError::NoDriver(_) => Code::FAILED_PRECONDITION,
            SlotError::Unbind { .. } => Code::INTERNAL,
        };
        Self::new(code, error_chain(&err))
    }
}

impl From<NetworkError> for Failure {
    fn from(err: NetworkError) -> Self {
        match err {
            NetworkError::Slot(err) => err.into(),
            NetworkError::NoInterface(_) | NetworkError::Refused { .. } => {
                Self::new(Code::FAILED_PRECONDITION, error_chain(&err))
            }
        }
    }
}

impl From<CpuError> for Failure {
    fn from(err: CpuError) -> Self {
        let code = match &err {
            CpuError::Range { .. } => Code::INVALID_ARGUMENT,
            CpuError::Change { .. } => Code::FAILED_PRECONDITION,
            CpuError::List(_) => Code::INTERNAL,
        };
        Self::new(code, error_chain(&err))
    }
}

impl From<MountError> for Failure {
    fn from(err: MountError) -> Self {
        use crate::path::PathError;
        let code = match &err {
            MountError::Path(PathError::Outside(_) | PathError::Reserved(_))
            | MountError::Kind(_)
            | MountError::Source(..) => Code::INVALID_ARGUMENT,
            MountError::Taken(_) => Code::ALREADY_EXISTS,
            MountError::NotMounted(_) => Code::NOT_FOUND,
            MountError::Unmount { errno: nix::errno::Errno::EBUSY, .. } => Code::FAILED_PRECONDITION,
            MountError::Path(PathError::Open { .. })
            | MountError::Mount { .. }
            | MountError::Changes(..)
            | MountError::Sync { .. }
            | MountError::Unmount { .. } => Code::INTERNAL,
        };
        Self::new(code, error_chain(&err))
    }
}

impl From<VolumeError> for Failure {
    fn from(err: VolumeError) -> Self {
        let code = match &err {
            VolumeError::Entry { .. } | VolumeError::Long => Code::INVALID_ARGUMENT,
            VolumeError::Path(_) | VolumeError::Mount { .. } | VolumeError::Change { .. } => Code::INTERNAL,
        };
        Self::new(code, error_chain(&err))
    }
}
