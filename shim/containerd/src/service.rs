//! The Task API (containerd's `api/runtime/task/v2/shim.proto`): what is asked, put to the [`Pod`], and the answer in containerd's words.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim::protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim::protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskIO, TaskPaused, TaskResumed,
};
use containerd_shim::protos::protobuf::{EnumOrUnknown, MessageField};
use containerd_shim::protos::shim_async::Task as TaskApi;
use kvrun_pod::bundle::{LinuxResources, Process as OciProcess};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;

use crate::error::{Error, host};
use crate::pod::{Plan, Pod};
use crate::stdio::Names;
use crate::{metrics, options};

type Answer<T> = ttrpc::Result<T>;

/// What answers containerd.
#[derive(Debug)]
pub(crate) struct Service {
    pod: Arc<Pod>,
    leave: Arc<Notify>,
}

impl Service {
    /// For a pod; `leave` is notified when this process is to end.
    pub(crate) fn new(pod: Arc<Pod>, leave: Arc<Notify>) -> Self {
        Self { pod, leave }
    }
}

/// What JSON an `Any` holds (containerd's `typeurl` writes these types so).
fn json<T: serde::de::DeserializeOwned>(value: &[u8], what: &str) -> Result<T, Error> {
    serde_json::from_slice(value).map_err(|error| Error::Invalid(format!("{what}: {error}")))
}

#[async_trait]
impl TaskApi for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        let container = self.pod.get(&request.id)?;
        let task = container.task(&request.exec_id)?;
        let ended = task.ended();
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle_path.clone(),
            pid: task.pid(),
            status: EnumOrUnknown::new(task.status()),
            stdin: task.names.stdin.clone(),
            stdout: task.names.stdout.clone(),
            stderr: task.names.stderr.clone(),
            terminal: task.names.terminal,
            exit_status: ended.as_ref().map_or(0, |ended| ended.status),
            exited_at: ended.map(|ended| ended.at).into(),
            ..Default::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("a machine cannot be restored from a checkpoint").into());
        }
        let config = options::source(request.options.get_or_default())?;
        let names = Names {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let plan = Plan {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            names: names.clone(),
            config,
        };
        let container = self.pod.create(plan).await.inspect_err(|error| {
            tracing::error!(container = request.id, error = %kvrun_pod::text::chain(error), "create");
        })?;
        let pid = container.task.pid();
        tracing::info!(container = request.id, "created");
        self.pod.events().publish(TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(TaskIO {
                stdin: names.stdin,
                stdout: names.stdout,
                stderr: names.stderr,
                terminal: names.terminal,
                ..Default::default()
            }),
            pid,
            ..Default::default()
        });
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let container = self.pod.get(&request.id)?;
        let task = self.pod.start(&container, &request.exec_id).await.inspect_err(|error| {
            tracing::error!(container = request.id, error = %kvrun_pod::text::chain(error), "start");
        })?;
        tracing::info!(container = request.id, exec = request.exec_id, "started");
        Ok(StartResponse { pid: task.pid(), ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        let container = self.pod.get(&request.id)?;
        let (task, ended) = if request.exec_id.is_empty() {
            let ended = self.pod.delete(&container).await?;
            tracing::info!(container = request.id, "deleted");
            self.pod.events().publish(TaskDelete {
                container_id: request.id,
                pid: container.task.pid(),
                exit_status: ended.status,
                exited_at: MessageField::some(ended.at.clone()),
                ..Default::default()
            });
            (Arc::clone(&container.task), ended)
        } else {
            container.delete_exec(&request.exec_id).await?
        };
        Ok(DeleteResponse {
            pid: task.pid(),
            exit_status: ended.status,
            exited_at: MessageField::some(ended.at),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        let pids = self.pod.get(&request.id)?.pids().await?;
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        self.pod.get_with_process(&request.id).await?.pause().await?;
        self.pod.events().publish(TaskPaused { container_id: request.id, ..Default::default() });
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        self.pod.get_with_process(&request.id).await?.resume().await?;
        self.pod.events().publish(TaskResumed { container_id: request.id, ..Default::default() });
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(Error::Unimplemented("a container in a machine cannot be checkpointed").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let signal = i32::try_from(request.signal).ok().filter(|signal| (1..=64).contains(signal));
        let signal =
            signal.ok_or_else(|| Error::Invalid(format!("there is no signal {}", request.signal)))?;
        self.pod.get(&request.id)?.kill(&request.exec_id, signal, request.all).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        if request.exec_id.is_empty() {
            return Err(Error::Invalid("a further process needs an ID".into()).into());
        }
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let mut process: OciProcess = json(&request.spec.value, "process")?;
        // The request's word is the one that counts (containerd's runc shim does the same).
        process.set_terminal(Some(request.terminal));
        self.pod.get(&request.id)?.add_exec(&request.exec_id, process, names)?;
        self.pod.events().publish(TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        });
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let size = |n: u32| {
            u16::try_from(n).map_err(|_| Error::Invalid(format!("no terminal has {n} rows or columns")))
        };
        let (rows, columns) = (size(request.height)?, size(request.width)?);
        let task = self.pod.get_with_process(&request.id).await?.task(&request.exec_id)?;
        task.process()?.resize(rows, columns).await.map_err(Error::from)?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        let task = self.pod.get(&request.id)?.task(&request.exec_id)?;
        if request.stdin {
            task.close_input();
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        let resources: LinuxResources = json(&request.resources.value, "resources")?;
        self.pod.get_with_process(&request.id).await?.update(&resources).await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let task = self.pod.get(&request.id)?.task(&request.exec_id)?;
        let ended = task.wait().await;
        Ok(WaitResponse {
            exit_status: ended.status,
            exited_at: MessageField::some(ended.at),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let counters = self.pod.get(&request.id)?.counters().await?;
        let stats =
            metrics::cgroup_v2(&counters).map_err(host::<containerd_shim::Error>("write the metrics"))?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Answer<ConnectResponse> {
        let task_pid = self.pod.get(&request.id).map(|container| container.task.pid()).unwrap_or_default();
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        // Asked after each container of a pod: it is about this process only once there is none left.
        if self.pod.is_empty() {
            self.leave.notify_one();
        }
        Ok(Empty::default())
    }
}
