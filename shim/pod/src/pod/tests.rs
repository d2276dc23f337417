//! The whole engine against a fake VMM and a fake agent behind it.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use async_trait::async_trait;
use futures::StreamExt;
use kvrun_agent_api::agent as api;
use kvrun_agent_api::agent_ttrpc::create_agent;
use kvrun_agent_api::{STREAM_PORT, TOKEN_LEN};
use kvrun_vmm_api::{DeviceMetrics, Event, ExitReason, Reply, Request, VcpuConfig, VmMetrics, VmState};
use oci_spec::runtime::Spec;
use tokio::sync::{mpsc, watch};
use ttrpc::r#async::{Server, TtrpcContext, transport};

use super::*;
use crate::assets::Asset;
use crate::container::{Exit, ExitState};
use crate::vmm::Death;
use crate::vmm::tests::{FakeVmm, fake};

/// What the fake guest's only container does once it is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// Copies its input to its output and exits with 3.
    Cat,
    /// Writes a line and exits with 0, but leaves its output open.
    LeaveOutputOpen,
    /// Waits for a signal.
    Sleep,
    /// Is not there.
    Missing,
    /// Panics the guest's kernel.
    Panic,
    /// Takes no signal and never ends.
    Hang,
    /// Waits for a signal, while ever more of its children are killed for want of memory: so the agent says.
    Hungry,
}

/// How large the fake guest is asked to be, and whether it obeys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    /// As the agent was asked last; 0: never.
    pub(crate) cpus: u32,
    /// As the VMM was asked last.
    pub(crate) plugged_mib: u32,
    /// Devices of memory.
    pub(crate) devices: u32,
    /// File systems that are mounted beside the share.
    pub(crate) mounted: u32,
    /// It plugs nothing, mounts no overlay, and takes no volume.
    pub(crate) is_stubborn: bool,
}

/// What the fake guest was told of volumes, in order: a number, and what is to be in it, or that it is to go.
pub(crate) type Volumes = Arc<watch::Sender<Vec<(u64, Option<Vec<api::VolumeEntry>>)>>>;

type Streams = Arc<Mutex<HashMap<u64, StdUnixStream>>>;

struct FakeAgent {
    program: Program,
    streams: Streams,
    stdio: Mutex<api::Stdio>,
    end: watch::Sender<Option<api::WaitProcessResponse>>,
    panic: std::sync::mpsc::Sender<()>,
    left_open: Mutex<Vec<StdUnixStream>>,
    /// How many killed processes it has told of.
    kills: AtomicU64,
    extent: Arc<Mutex<Extent>>,
    volumes: Volumes,
}

fn exited(code: u32) -> Option<api::WaitProcessResponse> {
    let mut response = api::WaitProcessResponse::new();
    response.set_exit_code(code);
    Some(response)
}

impl FakeAgent {
    /// The stream of a token. The header is read before the VMM's answer, so it is there.
    fn stream(&self, token: u64) -> StdUnixStream {
        loop {
            if let Some(stream) = self.streams.lock().unwrap().remove(&token) {
                return stream;
            }
            thread::yield_now();
        }
    }
}

#[async_trait]
impl kvrun_agent_api::agent_ttrpc::Agent for FakeAgent {
    async fn bind_slot(
        &self,
        _: &TtrpcContext,
        request: api::BindSlotRequest,
    ) -> ttrpc::Result<api::BindSlotResponse> {
        assert!(request.slot >= u32::from(SHARE_SLOT));
        let mut response = api::BindSlotResponse::new();
        if request.slot > u32::from(SHARE_SLOT) {
            response.block_device = format!("pmem{}", request.slot);
        }
        Ok(response)
    }

    async fn get_info(
        &self,
        _: &TtrpcContext,
        _: api::GetInfoRequest,
    ) -> ttrpc::Result<api::GetInfoResponse> {
        Ok(api::GetInfoResponse { cpus: 3, ..Default::default() })
    }

    async fn read_log(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::ReadLogResponse> {
        if self.program == Program::Hang {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, "no log")));
        }
        let text = b"[    0.000001] one\x1b[2J\n[    0.000002] two\n".to_vec();
        Ok(api::ReadLogResponse { text, ..Default::default() })
    }

    async fn set_cpus(&self, _: &TtrpcContext, request: api::SetCpusRequest) -> ttrpc::Result<api::Empty> {
        self.extent.lock().unwrap().cpus = request.online;
        Ok(api::Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: api::UpdateContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let resources: oci_spec::runtime::LinuxResources =
            serde_json::from_slice(&request.resources_json).unwrap();
        if resources.pids().is_some() {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INVALID_ARGUMENT, "no")));
        }
        Ok(api::Empty::new())
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        _: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::new())
    }

    async fn mount(&self, _: &TtrpcContext, request: api::MountRequest) -> ttrpc::Result<api::Empty> {
        let mut extent = self.extent.lock().unwrap();
        match request.kind.unwrap() {
            api::mount_request::Kind::VIRTIOFS => assert_eq!(
                (request.source.as_str(), request.mount_point.as_str()),
                (SHARE_TAG, GUEST_SHARE_DIR)
            ),
            api::mount_request::Kind::OVERLAY if extent.is_stubborn => {
                return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, "no")));
            }
            _ => extent.mounted += 1,
        }
        Ok(api::Empty::new())
    }

    async fn unmount(&self, _: &TtrpcContext, _: api::UnmountRequest) -> ttrpc::Result<api::Empty> {
        self.extent.lock().unwrap().mounted -= 1;
        Ok(api::Empty::new())
    }

    async fn update_volume(
        &self,
        _: &TtrpcContext,
        request: api::UpdateVolumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        if self.extent.lock().unwrap().is_stubborn {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, "no")));
        }
        self.volumes.send_modify(|told| told.push((request.number, Some(request.entries))));
        Ok(api::Empty::new())
    }

    async fn remove_volume(
        &self,
        _: &TtrpcContext,
        request: api::RemoveVolumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.volumes.send_modify(|told| told.push((request.number, None)));
        Ok(api::Empty::new())
    }

    async fn unbind_slot(&self, _: &TtrpcContext, _: api::UnbindSlotRequest) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::CreateContainerResponse> {
        if self.program == Program::Missing {
            let text = "no\nsuch\x1b[2J program".to_owned();
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::NOT_FOUND, text)));
        }
        let _: Spec = serde_json::from_slice(&request.spec_json).unwrap();
        *self.stdio.lock().unwrap() = request.stdio.unwrap();
        Ok(api::CreateContainerResponse::new())
    }

    async fn start_container(&self, _: &TtrpcContext, _: api::ContainerRequest) -> ttrpc::Result<api::Empty> {
        let stdio = self.stdio.lock().unwrap().clone();
        match self.program {
            Program::Cat => {
                let (mut stdin, mut stdout) =
                    (self.stream(stdio.stdin_token), self.stream(stdio.stdout_token));
                let end = self.end.clone();
                thread::spawn(move || {
                    io::copy(&mut stdin, &mut stdout).unwrap();
                    drop(stdout);
                    end.send_replace(exited(3));
                });
            }
            Program::LeaveOutputOpen => {
                let mut stdout = self.stream(stdio.stdout_token);
                stdout.write_all(b"a line\n").unwrap();
                self.left_open.lock().unwrap().push(stdout);
                self.end.send_replace(exited(0));
            }
            Program::Panic => self.panic.send(()).unwrap(),
            Program::Sleep | Program::Missing | Program::Hang | Program::Hungry => {}
        }
        Ok(api::Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        _: api::ProcessRequest,
    ) -> ttrpc::Result<api::WaitProcessResponse> {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await.unwrap().clone();
        Ok(end.unwrap())
    }

    async fn wait_oom_kill(
        &self,
        _: &TtrpcContext,
        request: api::WaitOomKillRequest,
    ) -> ttrpc::Result<api::WaitOomKillResponse> {
        let mut response = api::WaitOomKillResponse::new();
        if self.program == Program::Hungry {
            response.kills = self.kills.fetch_add(1, Ordering::Relaxed) + 1;
            return Ok(response);
        }
        let _ = self.end.subscribe().wait_for(Option::is_some).await;
        response.kills = request.seen;
        Ok(response)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: api::SignalProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        if self.program == Program::Hang {
            std::future::pending::<()>().await;
        }
        let mut response = api::WaitProcessResponse::new();
        response.set_signal(request.signal);
        // Each request is made for what the one before has told.
        response.oom_kills = self.kills.load(Ordering::Relaxed).max(1);
        self.end.send_replace(Some(response));
        Ok(api::Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::new())
    }
}

/// Serves the agent's protocol on the streams that come, until there are no more.
fn serve(agent: FakeAgent, mut connections: mpsc::UnboundedReceiver<StdUnixStream>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async move {
        let (finished, mut over) = mpsc::channel::<()>(1);
        let incoming = futures::stream::poll_fn(move |cx| {
            let _held = &finished;
            connections.poll_recv(cx)
        });
        let incoming = incoming.map(|stream| {
            stream.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(stream)
        });
        let mut server = Server::new()
            .add_listener(transport::Listener::new(incoming))
            .register_service(create_agent(Arc::new(agent)));
        server.start().await.unwrap();
        over.recv().await;
    });
}

/// A VMM with a guest that boots at once and whose container runs `program`.
pub(crate) fn guest(program: Program) -> impl FnOnce(FakeVmm) + Send + 'static {
    guest_with(program, Arc::default())
}

/// As [`guest`], which is as large as it is asked to be.
pub(crate) fn guest_with(
    program: Program,
    extent: Arc<Mutex<Extent>>,
) -> impl FnOnce(FakeVmm) + Send + 'static {
    guest_with_volumes(program, extent, Arc::default())
}

/// As [`guest_with`], which remembers what it is told of volumes.
pub(crate) fn guest_with_volumes(
    program: Program,
    extent: Arc<Mutex<Extent>>,
    volumes: Volumes,
) -> impl FnOnce(FakeVmm) + Send + 'static {
    move |vmm| {
        let (connections, receiver) = mpsc::unbounded_channel();
        let (panic, panicked) = std::sync::mpsc::channel();
        let streams = Streams::default();
        let agent = FakeAgent {
            program,
            streams: Arc::clone(&streams),
            stdio: Mutex::default(),
            end: watch::Sender::new(None),
            panic,
            left_open: Mutex::default(),
            kills: AtomicU64::new(0),
            extent: Arc::clone(&extent),
            volumes,
        };
        thread::spawn(move || serve(agent, receiver));
        let vmm = Arc::new(vmm);
        let dying = Arc::clone(&vmm);
        thread::spawn(move || {
            if panicked.recv().is_ok() {
                let console_tail = "Kernel panic\n".to_owned();
                dying.event(Event::Exited { reason: ExitReason::GuestReset, console_tail }, &[]);
                rustix::net::shutdown(&dying.channel, rustix::net::Shutdown::Both).unwrap();
            }
        });
        while let Ok(Some(received)) = vmm.channel.receive::<kvrun_vmm_api::ToVmm>() {
            let id = received.message.id;
            match received.message.request {
                Request::Boot(config) => {
                    assert_eq!(config.vsock_listen, [READY_PORT]);
                    vmm.done(id);
                    let (_agent, stream) = StdUnixStream::pair().unwrap();
                    vmm.event(Event::VsockAccepted { port: READY_PORT }, &[stream.as_fd()]);
                }
                Request::VsockConnect { port } => {
                    let [fd] = <[_; 1]>::try_from(received.fds).unwrap();
                    let mut stream = StdUnixStream::from(fd);
                    vmm.done(id);
                    if port == RPC_PORT {
                        connections.send(stream).unwrap();
                    } else {
                        assert_eq!(port, STREAM_PORT);
                        let streams = Arc::clone(&streams);
                        thread::spawn(move || {
                            let mut token = [0; TOKEN_LEN];
                            stream.read_exact(&mut token).unwrap();
                            streams.lock().unwrap().insert(u64::from_le_bytes(token), stream);
                        });
                    }
                }
                Request::Attach { device: DeviceConfig::Mem, .. } => {
                    extent.lock().unwrap().devices += 1;
                    vmm.done(id);
                }
                Request::ResizeMemory { plugged_mib } => {
                    extent.lock().unwrap().plugged_mib = plugged_mib;
                    vmm.done(id);
                }
                Request::State => {
                    let extent = *extent.lock().unwrap();
                    let plugged_mib = if extent.is_stubborn { 0 } else { extent.plugged_mib };
                    let state = Reply::State(VmState { plugged_mib, ..empty_state() });
                    vmm.send(&kvrun_vmm_api::FromVmm::Reply { id, result: Ok(state) });
                }
                Request::Metrics => {
                    let counters = [("bytes".to_owned(), 5), ("guest_free".to_owned(), 6)].into();
                    let rng = DeviceMetrics { device: "rng".to_owned(), counters };
                    let exits = [("io\"out".to_owned(), 7)].into();
                    let metrics = Reply::Metrics(VmMetrics { exits, slots: vec![None, Some(rng)] });
                    vmm.send(&kvrun_vmm_api::FromVmm::Reply { id, result: Ok(metrics) });
                }
                Request::Console => {
                    let console = Reply::Console("a \x1b[31mwarning\n".to_owned());
                    vmm.send(&kvrun_vmm_api::FromVmm::Reply { id, result: Ok(console) });
                }
                Request::Stop => {
                    vmm.done(id);
                    let event = Event::Exited { reason: ExitReason::Stopped, console_tail: String::new() };
                    vmm.event(event, &[]);
                    return;
                }
                _ => vmm.done(id),
            }
        }
    }
}

fn asset() -> Asset {
    Asset { path: "/dev/null".into(), file: File::open("/dev/null").unwrap(), size: 0 }
}

/// How large the machine is, and can be.
pub(crate) const SIZE: VmSize =
    VmSize { vcpus: VcpuConfig { boot: 1, max: 4 }, memory_mib: 128, max_memory_mib: 1024 };

fn empty_state() -> VmState {
    VmState {
        paused: false,
        slots: Vec::new(),
        first_entry_ns: 0,
        boot_marks: Vec::new(),
        exits: Vec::new(),
        plugged_mib: 0,
        balloon_mib: 0,
    }
}

/// A machine with that VMM.
pub(crate) async fn boot(behaviour: impl FnOnce(FakeVmm) + Send + 'static) -> Result<Pod, PodError> {
    let assets = Assets { kernel: asset(), initramfs: asset(), vmm: asset() };
    Starting::boot(fake(behaviour), &asset().file, &assets, machine(SIZE), monotonic_ns())?.ready().await
}

fn id() -> ContainerId {
    "c1".parse().unwrap()
}

pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bounded = async { timeout(Duration::from_secs(60), test).await.expect("the test ends") };
    runtime.block_on(bounded);
}

/// Runs the program to its end with these bytes as input; how it ended, and its output.
async fn run_to_end(pod: &Pod, input: &[u8]) -> (Exit, Vec<u8>) {
    let (stdin, mut to_stdin) = io::pipe().unwrap();
    let (mut from_stdout, stdout) = io::pipe().unwrap();
    let stdio = Stdio { stdin: Some(stdin.into()), stdout: Some(stdout.into()), stderr: None };
    let input = input.to_owned();
    let writer = thread::spawn(move || to_stdin.write_all(&input));
    let reader = thread::spawn(move || {
        let mut output = Vec::new();
        from_stdout.read_to_end(&mut output).unwrap();
        output
    });
    let mut container = pod.create(&id(), &Spec::default(), stdio).await.unwrap();
    container.start().await.unwrap();
    let exit = container.wait().await;
    container.drain().await;
    drop(container);
    let _ = writer.join().unwrap();
    (exit, reader.join().unwrap())
}

#[test]
fn container_runs_and_its_exit_code_and_output_arrive() {
    run(async {
        let pod = boot(guest(Program::Cat)).await.unwrap();
        let input: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 253) as u8).collect();
        let (exit, output) = run_to_end(&pod, &input).await;
        assert_eq!(exit.state.code(), 3);
        assert!(output == input);
        assert_eq!(pod.shutdown().await.death, Death::Reported(ExitReason::Stopped));
    });
}

#[test]
fn output_that_nobody_ends_does_not_hold_up_the_end() {
    run(async {
        let pod = boot(guest(Program::LeaveOutputOpen)).await.unwrap();
        let (exit, output) = run_to_end(&pod, b"").await;
        assert_eq!(exit.state.code(), 0);
        assert_eq!(output, b"a line\n");
    });
}

#[test]
fn signal_ends_the_container_and_oom_is_told() {
    run(async {
        let pod = boot(guest(Program::Sleep)).await.unwrap();
        let container = pod.create(&id(), &Spec::default(), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.kill(libc::SIGTERM, false).await.unwrap();
        let exit = container.wait().await;
        assert_eq!(exit.state.code(), 128 + 15);
        assert!(exit.oom_killed);
    });
}

/// Waits for the end of a container that gets a signal when kills have been told so often; how often they were told by the end, and how long that took.
async fn kills_until(program: Program, times: usize) -> (usize, Duration) {
    let pod = boot(guest(program)).await.unwrap();
    let container = pod.create(&id(), &Spec::default(), Stdio::default()).await.unwrap();
    container.start().await.unwrap();
    let told = watch::Sender::new(0);
    let begun = Instant::now();
    let end = container.process().wait_and_tell_kills(|| async { told.send_modify(|told| *told += 1) });
    let kill = async {
        told.subscribe().wait_for(|told| *told == times).await.unwrap();
        container.kill(libc::SIGTERM, false).await.unwrap();
    };
    let (exit, ()) = tokio::join!(end, kill);
    assert!(exit.oom_killed);
    assert_eq!(exit.state.code(), 128 + 15);
    let told = *told.borrow();
    (told, begun.elapsed())
}

#[test]
fn oom_kill_is_told_before_the_end_and_once() {
    run(async {
        let (told, _) = kills_until(Program::Sleep, 0).await;
        assert_eq!(told, 1, "the one of the end");
        let (told, _) = kills_until(Program::Hungry, 1).await;
        assert_eq!(told, 1, "the end has no other one");
    });
}

#[test]
fn guest_that_invents_oom_kills_is_listened_to_once_a_second() {
    run(async {
        let (told, took) = kills_until(Program::Hungry, 3).await;
        assert_eq!(told, 3);
        assert!(took >= Duration::from_secs(2), "{took:?}");
    });
}

#[test]
fn missing_program_is_127_and_one_harmless_line() {
    run(async {
        let pod = boot(guest(Program::Missing)).await.unwrap();
        let error = pod.create(&id(), &Spec::default(), Stdio::default()).await.unwrap_err();
        assert_eq!(error.to_string(), "no such[2J program");
        let fault = error.pod_error().and_then(PodError::program_fault).unwrap();
        assert_eq!((fault, fault.code()), (ProgramFault::NotFound, 127));
    });
}

#[test]
fn death_of_the_guest_reaches_the_waiter_with_its_reason() {
    run(async {
        let pod = boot(guest(Program::Panic)).await.unwrap();
        let container = pod.create(&id(), &Spec::default(), Stdio::default()).await.unwrap();
        // The guest may be gone before or after its answer.
        let _ = container.start().await;
        let exit = container.wait().await;
        assert_eq!(exit.state.code(), 137);
        let ExitState::VmDied(crate::container::VmDeath::Died(end)) = exit.state else { panic!("{exit:?}") };
        assert_eq!(end.death, Death::Reported(ExitReason::GuestReset));
        assert_eq!(end.console_tail, "Kernel panic\n");
    });
}

#[test]
fn guest_that_does_not_take_sigkill_is_ended() {
    run(async {
        let pod = boot(guest(Program::Hang)).await.unwrap();
        let container = pod.create(&id(), &Spec::default(), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.kill(libc::SIGKILL, false).await.unwrap();
        let exit = container.wait().await;
        assert_eq!(exit.state.code(), 137);
        let ExitState::VmDied(death) = exit.state else { panic!("not dead") };
        assert!(death.to_string().contains("did not take a signal"), "{death}");
    });
}

#[test]
fn guest_that_dies_while_booting_is_told_with_its_console() {
    run(async {
        let panicking = |vmm: FakeVmm| {
            vmm.done(vmm.next().unwrap().message.id);
            let console_tail = "no init found\n".to_owned();
            vmm.event(Event::Exited { reason: ExitReason::GuestReset, console_tail }, &[]);
        };
        let error = boot(panicking).await.unwrap_err();
        assert_eq!(error.vm_end().unwrap().console_tail, "no init found\n");
        assert!(error.to_string().contains("the virtual machine died: the guest"), "{error}");
    });
}

#[test]
fn kernel_that_the_vmm_refuses_is_named() {
    run(async {
        let refusing = |vmm: FakeVmm| {
            let id = vmm.next().unwrap().message.id;
            let result = Err(kvrun_vmm_api::RequestError::Invalid("not an ELF file".into()));
            vmm.send(&kvrun_vmm_api::FromVmm::Reply { id, result });
            while vmm.next().is_some() {}
        };
        let error = boot(refusing).await.unwrap_err();
        let line = crate::text::chain(&error);
        assert_eq!(
            line,
            "boot the guest kernel /dev/null: the VMM refused to boot the machine: not an ELF file"
        );
    });
}

#[test]
fn slots_are_given_out_once_and_some_only_if_others_are_left() {
    let slots = Slots::default();
    let all: Vec<u8> = (SHARE_SLOT + 1..SLOTS).collect();
    let (few, last) = all.split_at(all.len() - 2);
    assert_eq!(few.iter().map_while(|_| slots.take_leaving(2)).collect::<Vec<_>>(), few);
    assert_eq!(slots.take_leaving(2), None);
    assert_eq!(last.iter().map_while(|_| slots.take()).collect::<Vec<_>>(), last);
    assert_eq!(slots.take(), None);
    slots.free(few[0]);
    assert_eq!((slots.take_leaving(1), slots.take_leaving(0)), (None, Some(few[0])));
}

#[test]
fn host_without_kvm_is_told_what_to_do() {
    let error = |source| PodError::Kvm { path: "/dev/kvm".into(), source }.to_string();
    assert_eq!(
        error(io::ErrorKind::NotFound.into()),
        "/dev/kvm: no such file: this host has no KVM; run `kvrun check`"
    );
    assert!(error(io::ErrorKind::PermissionDenied.into()).contains("permission denied"));
    let null = File::open("/dev/null").unwrap();
    let not_kvm = sys::kvm_api_version(&null).unwrap_err();
    assert_eq!(error(not_kvm), "/dev/kvm: not a KVM device; run `kvrun check`");
}
