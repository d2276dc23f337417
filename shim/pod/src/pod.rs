//! One micro-VM: from the spawn of its VMM to its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvrun_agent_api::{READY_PORT, RPC_PORT};
use kvrun_vmm_api::config::{FIRST_FREE_SLOT, MAX_BLK_QUEUES};
use kvrun_vmm_api::{DeviceConfig, FsCache, RateLimit, VmConfig};
use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, clock_gettime};
use tokio::time::timeout;
use ttrpc::Code;

use crate::agent::{Agent, AgentError, BlockDevice};
use crate::assets::Assets;
use crate::container::{Container, CreateError, ProgramFault};
use crate::container_id::ContainerId;
use crate::disks::{self, Disks};
use crate::growth::{self, Growth};
use crate::layers::{self, Layers};
use crate::process::Process;
use crate::root_disk;
use crate::share::{GUEST_SHARE_DIR, Place, SHARE_TAG, Share};
use crate::size::VmSize;
use crate::stdio::{Copying, Planned, Stdio, Streams, Wanted};
use crate::sys;
use crate::vmm::{Booting, GuestConnection, VmEnd, Vmm, VmmError};
use crate::watched::{self, Watched};

/// The guest's kernel command line; the VMM appends the declaration of its slots. In order:
///
/// * `console=ttyS0 quiet`: the serial console is what a dead guest is explained by; every byte on it costs an exit, so only
///   warnings and worse.
/// * `panic=-1 reboot=k`: a panic resets the machine at once, by the keyboard controller, which the VMM notices.
/// * `noreplace-smp`: leave the lock prefixes in a kernel that starts with one CPU. Patching them out, one page-table switch each, takes
///   longer than most of the boot's steps, and a CPU that comes online later would have them patched in again.
/// * `memory_hotplug.online_policy=auto-movable`: most memory that is plugged holds only what can be moved, so that it can be unplugged.
/// * `dummy.numdummies=0`: the driver of dummy links is for who asks for one, and makes none of its own.
///
/// What other machine monitors add here (`nomodule`, `pci=off`, `i8042.*`, `cryptomgr.notests`) is not in the guest kernel at all.
pub const KERNEL_CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k noreplace-smp memory_hotplug.online_policy=auto-movable dummy.numdummies=0";

/// The version of the KVM API; it will not change (Linux Documentation/virt/kvm/api.rst, 4.1).
const KVM_API_VERSION: i32 = 12;
/// How many virtio-mmio slots a machine has: vsock, rng, the share, and room for thirteen block devices or links.
pub const SLOTS: u8 = 16;
/// The slot of the share.
pub const SHARE_SLOT: u8 = FIRST_FREE_SLOT;
/// How long a guest may take from its first instruction to an agent that answers. 0.1 s on hardware; an emulated machine
/// with several guests at once takes tens of seconds.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a VMM whose guest has broken its connection may take to end by itself, for example because the guest panicked.
const DEATH_GRACE: Duration = Duration::from_secs(2);

/// What can go wrong with a virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The host has no KVM, or we may not use it.
    #[error("{}: {}", path.display(), kvm_hint(source))]
    Kvm {
        /// `/dev/kvm`.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM would not build the machine.
    #[error("boot the guest kernel {}", kernel.display())]
    Boot {
        /// The kernel.
        kernel: PathBuf,
        /// Why.
        #[source]
        source: VmmError,
    },
    /// The VMM failed.
    #[error(transparent)]
    Vmm(VmmError),
    /// The agent failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine ended before it should.
    #[error("the virtual machine died: {0}")]
    Died(Arc<VmEnd>),
    /// All slots are filled.
    #[error("the machine has no slot left for one more device")]
    NoSlot,
    /// The guest does not have what was attached.
    #[error("the guest has no disk in the slot in which there is one")]
    NoDisk,
    /// The guest does not come up.
    #[error("the guest was not ready within {} s", READY_TIMEOUT.as_secs())]
    NotReady,
}

impl PodError {
    /// If it is about the program to run: what. Only meaningful for the creation and the start of a container.
    pub fn program_fault(&self) -> Option<ProgramFault> {
        match self {
            Self::Agent(AgentError::Refused { code: Code::NOT_FOUND, .. }) => Some(ProgramFault::NotFound),
            Self::Agent(AgentError::Refused { code: Code::PERMISSION_DENIED, .. }) => {
                Some(ProgramFault::NotExecutable)
            }
            _ => None,
        }
    }

    /// If it is that the machine ended: how.
    pub fn vm_end(&self) -> Option<&VmEnd> {
        match self {
            Self::Died(end) => Some(end),
            _ => None,
        }
    }
}

impl From<VmmError> for PodError {
    fn from(error: VmmError) -> Self {
        match error {
            VmmError::Ended(end) => Self::Died(end),
            error => Self::Vmm(error),
        }
    }
}

fn kvm_hint(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::NotFound => "no such file: this host has no KVM; run `kvrun check`".into(),
        io::ErrorKind::PermissionDenied => {
            "permission denied: run as root or as a member of group kvm".into()
        }
        _ if source.raw_os_error() == Some(libc::ENOTTY) => "not a KVM device; run `kvrun check`".into(),
        _ => format!("{source}; run `kvrun check`"),
    }
}

/// The machine a pod of this size is given.
pub fn machine(size: VmSize) -> VmConfig {
    VmConfig {
        memory_mib: size.memory_mib,
        hotplug_mib: size.max_memory_mib - size.memory_mib,
        vcpus: size.vcpus,
        cmdline: KERNEL_CMDLINE.to_owned(),
        slots: SLOTS,
        vsock_listen: vec![READY_PORT],
    }
}

/// When the engine had the machine boot, in nanoseconds of `CLOCK_MONOTONIC`, by which the VMM tells what it has seen of that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BootTimes {
    /// The VMM was about to be started.
    pub(crate) spawned_ns: u64,
    /// The guest had the share.
    pub(crate) ready_ns: u64,
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// A machine whose guest boots.
#[derive(Debug)]
pub struct Starting {
    vmm: Vmm,
    booting: Booting,
    ready: GuestConnection,
    kernel: PathBuf,
    growth: Arc<Growth>,
    spawned_ns: u64,
}

impl Starting {
    /// Starts the VMM with the share and sends it the machine ([`machine`]), without waiting for either. Must be called in a
    /// tokio runtime.
    ///
    /// `share` may be any directory of this process's mount namespace.
    ///
    /// # Errors
    /// [`PodError`].
    pub fn spawn(assets: &Assets, config: VmConfig, share: BorrowedFd<'_>) -> Result<Self, PodError> {
        let spawned_ns = monotonic_ns();
        let kvm = open_kvm()?;
        Self::boot(Vmm::spawn(&assets.vmm.path, Some(share))?, &kvm, assets, config, spawned_ns)
    }

    fn boot(
        vmm: Vmm,
        kvm: &File,
        assets: &Assets,
        config: VmConfig,
        spawned_ns: u64,
    ) -> Result<Self, PodError> {
        tracing::debug!(memory_mib = config.memory_mib, vcpus = config.vcpus.boot, "booting");
        let ready = vmm.expect(READY_PORT);
        let growth = Growth::new(&config);
        let booting =
            vmm.boot(config, kvm.as_fd(), assets.kernel.file.as_fd(), assets.initramfs.file.as_fd());
        Ok(Self { booting: booting?, vmm, ready, kernel: assets.kernel.path.clone(), growth, spawned_ns })
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// Gives the guest the share and waits for the agent.
    ///
    /// # Errors
    /// [`PodError`]; the machine is then killed.
    pub async fn ready(self) -> Result<Pod, PodError> {
        let Self { vmm, booting, ready, kernel, growth, spawned_ns } = self;
        booting.running().await.map_err(|source| match source {
            VmmError::Ended(_) => source.into(),
            source => PodError::Boot { kernel, source },
        })?;
        // The share is in its slot before the agent is there to bind it.
        let device = DeviceConfig::Fs {
            directory: ".".to_owned(),
            tag: SHARE_TAG.to_owned(),
            read_only: false,
            cache: FsCache::Auto,
            writeback: false,
        };
        let attached = async { vmm.attach(SHARE_SLOT, device, &[]).await.map_err(PodError::from) };
        let answering = async {
            timeout(READY_TIMEOUT, ready.accepted()).await.map_err(|_| PodError::NotReady)??;
            tracing::debug!("the agent answers");
            Ok(Agent::over(vmm.connect_async(RPC_PORT).await?))
        };
        let ((), agent) = tokio::try_join!(attached, answering)?;
        let boot = BootTimes { spawned_ns, ready_ns: spawned_ns };
        let mut pod = Pod {
            vmm,
            agent,
            growth,
            slots: Arc::default(),
            disks: Arc::default(),
            layers: Arc::default(),
            watched: Arc::default(),
            boot,
        };
        pod.or_death(pod.agent.bind_slot(SHARE_SLOT)).await?;
        pod.or_death(pod.agent.mount_virtiofs(SHARE_TAG, GUEST_SHARE_DIR)).await?;
        pod.boot.ready_ns = monotonic_ns();
        tracing::debug!("the guest has the share");
        Ok(pod)
    }
}

fn open_kvm() -> Result<File, PodError> {
    let path = PathBuf::from("/dev/kvm");
    let opened =
        rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from);
    match opened.and_then(|fd| sys::kvm_api_version(&fd).map(|version| (fd, version))) {
        Ok((fd, KVM_API_VERSION)) => Ok(fd.into()),
        Ok((_, version)) => {
            let source = io::Error::other(format!("KVM API version {version} instead of {KVM_API_VERSION}"));
            Err(PodError::Kvm { path, source })
        }
        Err(source) => Err(PodError::Kvm { path, source }),
    }
}

/// A running machine with an agent that answers. Dropping it kills the machine; [`Pod::shutdown`] ends it in order.
#[derive(Clone, Debug)]
pub struct Pod {
    pub(crate) vmm: Vmm,
    pub(crate) agent: Agent,
    pub(crate) growth: Arc<Growth>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) disks: Arc<Disks>,
    pub(crate) layers: Arc<Layers>,
    pub(crate) watched: Arc<Watched>,
    pub(crate) boot: BootTimes,
}

/// The slots behind that of the share that are taken, as bits.
#[derive(Debug, Default)]
pub(crate) struct Slots(AtomicU64);

impl Slots {
    /// A slot for a device, if there is one left.
    pub(crate) fn take(&self) -> Option<u8> {
        self.take_leaving(0)
    }

    /// The same, if so many are left after that.
    pub(crate) fn take_leaving(&self, left: usize) -> Option<u8> {
        let free = |taken: u64| (SHARE_SLOT + 1..SLOTS).filter(move |slot| taken & (1 << slot) == 0);
        let first_free = |taken| if free(taken).count() > left { free(taken).next() } else { None };
        let take = |taken| first_free(taken).map(|slot| taken | 1 << slot);
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        first_free(before)
    }

    /// It is empty again.
    pub(crate) fn free(&self, slot: u8) {
        self.0.fetch_and(!(1 << slot), Ordering::Relaxed);
    }
}

impl Pod {
    /// Creates a container from a spec whose paths are the guest's ([`Share::add`]), up to but not including its process,
    /// and copies its streams.
    ///
    /// # Errors
    /// [`CreateError`].
    pub async fn create(
        &self,
        id: &ContainerId,
        spec: &oci_spec::runtime::Spec,
        stdio: Stdio,
    ) -> Result<Container, CreateError> {
        let (process, streams) = self.create_process(id, Path::new(""), spec, stdio.wanted()).await?;
        Ok(Container::new(process, Copying::start(stdio, streams)?))
    }

    /// As [`Pod::create`], for streams that somebody else copies; `bundle` is what hooks in the guest are told. The machine grows as the
    /// limits in the spec ask, and block devices of the host that it names are attached.
    ///
    /// # Errors
    /// [`CreateError`].
    pub async fn create_process(
        &self,
        id: &ContainerId,
        bundle: &Path,
        spec: &oci_spec::runtime::Spec,
        wanted: Wanted,
    ) -> Result<(Process, Streams), CreateError> {
        let claim = growth::claim(self, spec).await?;
        let (spec, disks) = match disks::attach(self, spec).await {
            Ok(attached) => attached,
            Err(error) => {
                growth::release(self, &claim);
                return Err(error.into());
            }
        };
        let created = async {
            let spec_json = serde_json::to_vec(&*spec).map_err(CreateError::Serialize)?;
            let planned = Planned::new(wanted)?;
            let created = self.agent.create(id, bundle, spec_json, planned.tokens());
            self.with_streams(created, planned).await
        };
        match created.await {
            Ok(streams) => {
                tracing::debug!(%id, "created");
                Ok((Process::containers_own(self.clone(), id.clone(), disks, claim), streams))
            }
            Err(error) => {
                disks::detach(self, &disks).await;
                growth::release(self, &claim);
                Err(error)
            }
        }
    }

    /// Runs a further process in a running container; `exec_id` is to be a new one.
    ///
    /// # Errors
    /// [`CreateError`].
    pub async fn exec(
        &self,
        id: &ContainerId,
        exec_id: String,
        process: &oci_spec::runtime::Process,
        wanted: Wanted,
    ) -> Result<(Process, Streams), CreateError> {
        let process_json = serde_json::to_vec(process).map_err(CreateError::Serialize)?;
        let planned = Planned::new(wanted)?;
        let started = self.agent.exec(id, &exec_id, process_json, planned.tokens());
        let streams = self.with_streams(started, planned).await?;
        Ok((Process::further(self.clone(), id.clone(), exec_id), streams))
    }

    /// Connects to a TCP port of the guest's loopback.
    ///
    /// # Errors
    /// [`CreateError`].
    pub async fn connect_port(&self, port: u16) -> Result<UnixStream, CreateError> {
        let planned = Planned::new(Wanted { stdin: true, stdout: false, stderr: false })?;
        let connected = self.agent.connect_port(port, planned.tokens().stdin_token);
        let Streams([stream, ..]) = self.with_streams(connected, planned).await?;
        Ok(stream.ok_or(PodError::Agent(AgentError::Senseless { what: "connect to a port" }))?)
    }

    async fn with_streams(
        &self,
        request: impl Future<Output = Result<(), AgentError>>,
        planned: Planned,
    ) -> Result<Streams, CreateError> {
        let (made, connected) = tokio::join!(self.or_death(request), planned.connect(&self.vmm));
        // What the agent says comes first: it drops the streams of a process it refuses.
        made?;
        Ok(connected?)
    }

    /// The machine: to attach devices to it, to pause it, to look at it.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// The agent in it.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Takes files away that no process of the guest uses any more.
    pub async fn take_from_share(&self, share: &Share, place: &Place) {
        if let Some(disk) = &place.root_disk {
            root_disk::unmount(self, disk).await;
        }
        if let Some(layers) = &place.layers {
            layers::unmount(self, layers).await;
        }
        watched::release(self, place).await;
        self.forget_files(&share.remove(place)).await;
    }

    /// Has the guest forget files that are no longer in the share. Else what it remembers of them keeps them open here, and their file systems with them.
    pub(crate) async fn forget_files(&self, removed: &[PathBuf]) {
        if let Err(error) = self.or_death(self.agent.forget(removed)).await {
            tracing::debug!(%error, "have the guest forget a container's files");
        }
    }

    /// Ends the machine: in order if the guest answers within 2 s, and in any case within another second.
    pub async fn shutdown(self) -> Arc<VmEnd> {
        if let Err(error) = self.agent.shutdown().await {
            tracing::debug!(%error, "the guest did not shut down");
        }
        tracing::debug!("the guest is down");
        self.vmm.stop().await
    }

    /// Puts a device into a slot that was taken for it, and has the guest use it; the block device that it is there, if it is one. When
    /// this fails, the slot is given back.
    pub(crate) async fn add_device(
        &self,
        slot: u8,
        device: DeviceConfig,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<BlockDevice>, PodError> {
        if let Err(error) = self.vmm.attach(slot, device, fds).await {
            self.slots.free(slot);
            return Err(error.into());
        }
        let bound = self.or_death(self.agent.bind_slot(slot)).await;
        if bound.is_err() {
            self.give_back(slot).await;
        }
        bound
    }

    /// Puts a disk into a free slot; which one, and what the guest has there.
    ///
    /// # Errors
    /// [`PodError`]; nothing is attached then.
    pub(crate) async fn add_disk(
        &self,
        file: BorrowedFd<'_>,
        read_only: bool,
    ) -> Result<(u8, BlockDevice), PodError> {
        let slot = self.slots.take().ok_or(PodError::NoSlot)?;
        let config = DeviceConfig::Blk {
            read_only,
            serial: String::new(),
            queues: self.growth.boot_vcpus().clamp(1, MAX_BLK_QUEUES),
            limit: RateLimit::default(),
        };
        match self.add_device(slot, config, &[file]).await? {
            Some(disk) => Ok((slot, disk)),
            None => {
                self.remove_device(slot).await;
                Err(PodError::NoDisk)
            }
        }
    }

    /// Takes a device out, once the guest has let go of it. Its slot stays taken if that does not go well.
    pub(crate) async fn remove_device(&self, slot: u8) {
        let removed = async {
            self.or_death(self.agent.unbind_slot(slot)).await?;
            Ok::<_, PodError>(self.vmm.detach(slot).await?)
        };
        match removed.await {
            Ok(()) => self.slots.free(slot),
            Err(error) => tracing::warn!(slot, error = %crate::text::chain(&error), "take a device out"),
        }
    }

    /// Takes a device out that the guest does not use. Its slot stays taken if the machine does not let go of it.
    pub(crate) async fn give_back(&self, slot: u8) {
        if self.vmm.detach(slot).await.is_ok() {
            self.slots.free(slot);
        }
    }

    /// Why the machine has ended; waits for it.
    pub async fn ended(&self) -> Arc<VmEnd> {
        self.vmm.ended().await
    }

    /// Does a request to the agent, unless the machine dies first.
    ///
    /// # Errors
    /// [`PodError::Died`], or what the agent says.
    pub async fn or_death<T>(
        &self,
        request: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, PodError> {
        let result = tokio::select! {
            biased;
            result = request => result,
            end = self.vmm.ended() => return Err(PodError::Died(end)),
        };
        match result {
            Ok(value) => Ok(value),
            // A connection breaks when the machine dies; its death is the better explanation, a moment later.
            Err(error @ AgentError::Disconnected { .. }) => {
                match timeout(DEATH_GRACE, self.vmm.ended()).await {
                    Ok(end) => Err(PodError::Died(end)),
                    Err(_) => Err(error.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
