//! A machine for the service: a mount namespace with its own `/run` and a cgroup v2 root, a root file system from the
//! host's static busybox, and Unix sockets where a guest has vsock. Needs root.

#![allow(clippy::unwrap_used, dead_code, reason = "a test fails by panic; not every test uses all of it")]

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvrun_agent::descriptor::Listener;
use kvrun_agent::reaper::Reaper;
use kvrun_agent::service::AgentService;
use kvrun_agent_api::agent::{
    ContainerRequest, CreateContainerRequest, ProcessRequest, SignalProcessRequest, Stdio,
    WaitOomKillRequest, WaitProcessResponse,
};
use kvrun_agent_api::agent_ttrpc::AgentClient;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::r#async::Client;
use ttrpc::context::Context;

pub(crate) const ROOTFS: &str = "/run/kvrun/rootfs";
const RPC: &str = "/run/kvrun/rpc.sock";
const STREAMS: &str = "/run/kvrun/streams.sock";

/// `SIGCHLD` and wait are the process's, so one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub(crate) struct Lab {
    pub(crate) agent: AgentClient,
    pub(crate) service: AgentService,
    pub(crate) reaper: Arc<Reaper>,
}

/// Runs a test in a machine of its own.
pub(crate) fn lab<F: Future<Output = ()>>(test: impl FnOnce(Lab) -> F) {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    prepare();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = |path| Listener::new(UnixListener::bind(path).unwrap().into()).unwrap();
        let helper = env!("CARGO_BIN_EXE_kvrun-agent").into();
        let reaper = Reaper::start().unwrap();
        let service = AgentService::new(helper, reaper.clone());
        let _server = service.serve(listener(RPC), listener(STREAMS)).await.unwrap();
        let agent = AgentClient::new(Client::connect(&format!("unix://{RPC}")).await.unwrap());
        let time_limit = Duration::from_secs(60);
        tokio::time::timeout(time_limit, test(Lab { agent, service, reaper })).await.expect("the test hangs");
    });
    // Containers are gone if the test removed them: then this parent is empty.
    fs::remove_dir("/sys/fs/cgroup/kvrun").expect("a container's cgroup is left");
}

fn prepare() {
    const NOTHING: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).expect("these tests need root");
    mount(NOTHING, "/", NOTHING, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NOTHING).unwrap();
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), NOTHING).unwrap();
    // Where the host has it already (EBUSY), it stays.
    let cgroup = mount(Some("cgroup"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), NOTHING);
    assert!(matches!(cgroup, Ok(()) | Err(Errno::EBUSY)), "{cgroup:?}");
    fs::create_dir_all("/sys/fs/cgroup/kvrun").unwrap();
    // SAFETY: takes integers. Orphans of containers come to this process, as they come to PID 1.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, 0);
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(Path::new(ROOTFS).join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", format!("{ROOTFS}/bin/busybox")).expect("these tests need busybox-static");
    for name in
        ["sh", "cat", "head", "sleep", "true", "stty", "id", "grep", "sed", "kill", "trap", "wc", "seq"]
    {
        let _ = std::os::unix::fs::symlink("busybox", format!("{ROOTFS}/bin/{name}"));
    }
}

/// A config: `sh -c SCRIPT` in namespaces of its own.
pub(crate) fn config(script: &str) -> Value {
    let namespaces: Vec<Value> =
        ["pid", "mount", "ipc", "uts", "cgroup"].iter().map(|kind| json!({ "type": kind })).collect();
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": ROOTFS },
        "hostname": "box",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755", "size=64k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["newinstance", "ptmxmode=0666", "mode=0620"] },
        ],
        "linux": { "namespaces": namespaces },
    })
}

/// One stdio stream, the engine's end.
pub(crate) struct Stream {
    pub(crate) token: u64,
    pub(crate) socket: tokio::net::UnixStream,
}

impl Stream {
    pub(crate) fn open() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0x1122_3344_5566_7788);
        let token = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut socket = UnixStream::connect(STREAMS).unwrap();
        socket.write_all(&token.to_le_bytes()).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { token, socket: tokio::net::UnixStream::from_std(socket).unwrap() }
    }

    /// All there is until the agent ends it.
    pub(crate) async fn read(mut self) -> String {
        let mut bytes = Vec::new();
        self.socket.read_to_end(&mut bytes).await.unwrap();
        String::from_utf8(bytes).unwrap()
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }
}

/// How a container ended, for comparison.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Exit(u32),
    Signal(u32),
}

impl Lab {
    pub(crate) fn context(&self) -> Context {
        Context::default()
    }

    pub(crate) async fn create(&self, id: &str, config: &Value, stdio: Stdio) -> ttrpc::Result<u32> {
        let mut request = CreateContainerRequest::new();
        request.container_id = id.to_owned();
        request.spec_json = serde_json::to_vec(config).unwrap();
        request.stdio = Some(stdio).into();
        Ok(self.agent.create_container(self.context(), &request).await?.pid)
    }

    pub(crate) async fn start(&self, id: &str) -> ttrpc::Result<()> {
        self.agent.start_container(self.context(), &container(id)).await.map(drop)
    }

    pub(crate) async fn wait_response(&self, id: &str) -> ttrpc::Result<WaitProcessResponse> {
        let mut request = ProcessRequest::new();
        request.container_id = id.to_owned();
        self.agent.wait_process(self.context(), &request).await
    }

    pub(crate) async fn wait(&self, id: &str) -> Ended {
        let response = self.wait_response(id).await.unwrap();
        if response.has_exit_code() {
            Ended::Exit(response.exit_code())
        } else {
            Ended::Signal(response.signal())
        }
    }

    pub(crate) async fn wait_oom_kill(&self, id: &str, seen: u64) -> ttrpc::Result<u64> {
        let mut request = WaitOomKillRequest::new();
        request.container_id = id.to_owned();
        request.seen = seen;
        Ok(self.agent.wait_oom_kill(self.context(), &request).await?.kills)
    }

    pub(crate) async fn signal(&self, id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let mut request = SignalProcessRequest::new();
        request.container_id = id.to_owned();
        request.signal = signal;
        request.all = all;
        self.agent.signal_process(self.context(), &request).await.map(drop)
    }

    pub(crate) async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        self.agent.remove_container(self.context(), &container(id)).await.map(drop)
    }

    /// Creates, starts, waits and removes, and gives standard output and how it ended.
    pub(crate) async fn run(&self, id: &str, config: &Value) -> (String, Ended) {
        let stdout = Stream::open();
        self.create(id, config, stdio(None, Some(&stdout), None)).await.unwrap();
        self.start(id).await.unwrap();
        let (output, ended) = tokio::join!(stdout.read(), self.wait(id));
        self.remove(id).await.unwrap();
        (output, ended)
    }
}

pub(crate) fn container(id: &str) -> ContainerRequest {
    let mut request = ContainerRequest::new();
    request.container_id = id.to_owned();
    request
}

pub(crate) fn stdio(stdin: Option<&Stream>, stdout: Option<&Stream>, stderr: Option<&Stream>) -> Stdio {
    let token = |stream: Option<&Stream>| stream.map_or(0, |stream| stream.token);
    let mut stdio = Stdio::new();
    stdio.stdin_token = token(stdin);
    stdio.stdout_token = token(stdout);
    stdio.stderr_token = token(stderr);
    stdio
}

/// The code and the line of a refusal.
pub(crate) fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a refusal: {other}"),
    }
}

/// What the agent keeps of containers, by path; empty when all are removed.
pub(crate) fn left_behind() -> BTreeMap<&'static str, usize> {
    ["/run/kvrun/oci/bundles", "/run/kvrun/oci/state"]
        .into_iter()
        .filter_map(|dir| Some((dir, fs::read_dir(dir).ok()?.count())))
        .filter(|(_, count)| *count > 0)
        .collect()
}
