//! What arrives by other ways than virtqueues.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kvrun_agent_api::agent::{
    BindSlotRequest, ContainerRequest, CreateContainerRequest, Empty, ForgetRequest, GetInfoRequest,
    LookAtProcRequest, ProcessRequest, WaitOomKillRequest,
};
use kvrun_agent_api::agent_ttrpc::AgentClient;
use kvrun_pod::bundle::Bundle;
use kvrun_vmm::arch::x86_64::kernel;
use kvrun_vmm::arch::{PlatformState, VcpuState};
use kvrun_vmm::devices::virtio::state::SlotState;
use kvrun_vmm::state::MachineState;
use kvrun_vmm_api::{Channel, ChannelError, FromVmm, ToVmm};
use libfuzzer_sys::Corpus;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendFlags, send};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::driver;

/// The control protocol, both ways: what the VMM reads from the engine, and the engine from a VMM that may have been taken over.
/// A message that is understood says the same when it is said again.
pub(crate) fn control(data: &[u8]) -> Corpus {
    let (near, far) = Channel::pair().expect("socket pair");
    for descriptors in [&[][..], &[near.as_fd()]] {
        let mut bytes = data;
        if descriptors.is_empty() {
            // A datagram of no bytes is the end of the connection to who reads it.
            bytes = if data.is_empty() { b" " } else { data };
            if send(&near, bytes, SendFlags::empty()).is_err() {
                return Corpus::Reject;
            }
            again::<ToVmm>(&far);
            send(&near, bytes, SendFlags::empty()).expect("as before");
            again::<FromVmm>(&far);
        } else if let Ok(message) = serde_json::from_slice::<ToVmm>(bytes) {
            near.send(&message, descriptors).expect("a message that fitted");
            let received =
                far.receive::<ToVmm>().expect("a message that was understood").expect("not the end");
            assert_eq!((received.message, received.fds.len()), (message, descriptors.len()));
        }
    }
    Corpus::Keep
}

fn again<T>(far: &Channel)
where
    T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug,
{
    match far.receive::<T>() {
        Ok(received) => {
            let message = received.expect("not the end").message;
            let text = serde_json::to_vec(&message).expect("serializable");
            assert_eq!(serde_json::from_slice::<T>(&text).expect("its own words"), message);
        }
        Err(ChannelError::Malformed(_) | ChannelError::TooLarge) => {}
        Err(e) => panic!("{e}"),
    }
}

/// The kernel image: an ELF file with a PVH note, from someone's disk.
pub(crate) fn kernel(data: &[u8]) -> Corpus {
    let mem = driver::memory();
    // What is loaded lies in memory, or loading failed: either way without a panic.
    let _ = kernel::load(&file(data), &mem);
    Corpus::Keep
}

/// A saved machine, or a part of one: whatever is understood says the same when it is said again.
pub(crate) fn state(data: &[u8]) -> Corpus {
    saved::<MachineState>(data);
    saved::<SlotState>(data);
    saved::<VcpuState>(data);
    saved::<PlatformState>(data);
    Corpus::Keep
}

fn saved<T: DeserializeOwned + Serialize>(data: &[u8]) {
    if let Ok(state) = serde_json::from_slice::<T>(data) {
        let text = serde_json::to_vec(&state).expect("serializable");
        let again = serde_json::from_slice::<T>(&text).expect("its own words");
        assert_eq!(serde_json::to_vec(&again).expect("serializable"), text);
    }
}

/// The agent's answers, as the engine reads them. The first byte says whether the rest is a message in a well-formed frame or the frame is
/// the fuzzer's too, and what was asked: something for each kind of answer.
pub(crate) fn agent(data: &[u8]) -> Corpus {
    let Some((kind, data)) = data.split_first() else { return Corpus::Reject };
    let (near, mut far) = UnixStream::pair().expect("socket pair");
    let mut sent = Vec::new();
    if kind & 1 == 0 {
        // ttrpc's header: length, stream, type (2: response), flags; big endian. The first request has stream 1.
        sent.extend((data.len() as u32).to_be_bytes());
        sent.extend([0, 0, 0, 1, 2, 0]);
    }
    sent.extend(data);
    far.set_nonblocking(true).expect("a socket");
    // More than the socket takes is more than an agent could have sent unread.
    if far.write_all(&sent).is_err() {
        return Corpus::Reject;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        near.set_nonblocking(true).expect("a socket");
        let near = tokio::net::UnixStream::from_std(near).expect("in the runtime");
        let client = AgentClient::new(ttrpc::asynchronous::Client::new(
            ttrpc::asynchronous::transport::Socket::new(near),
        ));
        let end = async {
            // Once the request is out there is nothing more to come.
            tokio::task::yield_now().await;
            let _ = far.shutdown(std::net::Shutdown::Write);
        };
        let context = ttrpc::context::with_timeout(0);
        macro_rules! ask {
            ($call:ident, $request:ty) => {{
                let request = <$request>::new();
                let _ = tokio::join!(client.$call(context, &request), end);
            }};
        }
        match (kind >> 1) % 10 {
            0 => ask!(get_info, GetInfoRequest),
            1 => ask!(wait_process, ProcessRequest),
            2 => ask!(read_log, Empty),
            3 => ask!(bind_slot, BindSlotRequest),
            4 => ask!(create_container, CreateContainerRequest),
            5 => ask!(list_processes, ContainerRequest),
            6 => ask!(look_at_proc, LookAtProcRequest),
            7 => ask!(container_stats, ContainerRequest),
            // All others are answered by the same.
            8 => ask!(forget, ForgetRequest),
            _ => ask!(wait_oom_kill, WaitOomKillRequest),
        }
    });
    Corpus::Keep
}

/// A bundle's config.json.
pub(crate) fn bundle(data: &[u8]) -> Corpus {
    let dir = tempfile::tempdir().expect("temporary directory");
    std::fs::create_dir(dir.path().join("rootfs")).expect("rootfs");
    std::fs::write(dir.path().join("config.json"), data).expect("config.json");
    let _ = Bundle::load(dir.path());
    Corpus::Keep
}

fn file(data: &[u8]) -> File {
    let file: OwnedFd = memfd_create("input", MemfdFlags::CLOEXEC).expect("memfd");
    let mut file = File::from(file);
    file.write_all(data).expect("memory");
    file
}
