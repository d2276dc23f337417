//! A virtual machine for a test of devices, vCPUs or clocks: the real VMM, guest kernel and agent, without `kvrun` around them.
//!
//! ```ignore
//! let vm = Machine::boot(t, Shape { vcpus: 2, ..Shape::default() })?;
//! let disk = vm.attach(FIRST_SLOT, DeviceConfig::Blk { .. }, &[image.as_fd()])?;
//! vm.sh("mke2fs /dev/vda && mount /dev/vda /mnt && echo hello > /mnt/file")?;
//! ```
//!
//! Scripts run in containers that are not contained: root with every capability, the guest's own `/dev`, `/proc`, `/sys` and `/run`, and
//! no namespace but that of mounts. Their root file system is busybox, on a share of the host's directory [`Machine::rootfs`]; what
//! [`Machine::install`] copies there, they can run.
//!
//! Everything else goes through the same doors as the engine's own pods: [`Machine::pod`] has them.

pub mod kernel;
pub mod link;
mod script;

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use kvrun_pod::assets::{Assets, Named, Paths};
use kvrun_pod::pod::{self, Pod, SHARE_SLOT, SLOTS, Starting};
use kvrun_pod::size::VmSize;
use kvrun_pod::vmm::{Death, VmEnd};
use kvrun_vmm_api::{DeviceConfig, VcpuConfig, VmMetrics, VmState};
use tokio::runtime::{Builder, Runtime};

use crate::bundle;
use crate::fixture::Test;

pub use script::{Finished, Script};

/// The first slot of a machine that is a test's to fill; those before it are vsock, rng and the root file system.
pub const FIRST_SLOT: u8 = SHARE_SLOT + 1;

/// What a machine is like; see [`VmConfig`](kvrun_vmm_api::VmConfig).
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// vCPUs at boot.
    pub vcpus: u8,
    /// vCPUs that can be brought online; no fewer than `vcpus`.
    pub max_vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// By how many MiB virtio-mem may make it grow.
    pub hotplug_mib: u32,
    /// virtio-mmio slots.
    pub slots: u8,
    /// What is added to the guest kernel's command line.
    pub cmdline: &'static str,
}

impl Default for Shape {
    fn default() -> Self {
        Self { vcpus: 1, max_vcpus: 1, memory_mib: 256, hotplug_mib: 0, slots: SLOTS, cmdline: "" }
    }
}

/// A machine whose agent answers. Dropping it stops it.
#[derive(Debug)]
pub struct Machine {
    pod: Pod,
    runtime: Runtime,
    rootfs: PathBuf,
    scripts: AtomicUsize,
}

impl Machine {
    /// Boots a machine.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot(test: &Test, shape: Shape) -> Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let share = test.scratch().join(format!("vm{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let rootfs = share.join("rootfs");
        bundle::userland(&rootfs)?;
        for dir in ["run", "mnt"] {
            fs::create_dir(rootfs.join(dir))?;
        }
        let share = File::open(&share)?;

        let vcpus = VcpuConfig { boot: shape.vcpus, max: shape.max_vcpus.max(shape.vcpus) };
        let max_memory_mib = shape.memory_mib + shape.hotplug_mib;
        let mut config = pod::machine(VmSize { vcpus, memory_mib: shape.memory_mib, max_memory_mib });
        config.slots = shape.slots;
        config.cmdline = format!("{} {}", config.cmdline, shape.cmdline);

        let runtime = Builder::new_current_thread().enable_all().build()?;
        let pod = runtime.block_on(async {
            let starting = Starting::spawn(&assets(test)?, config, share.as_fd())?;
            anyhow::Ok(starting.ready().await?)
        })?;
        Ok(Self { pod, runtime, rootfs, scripts: AtomicUsize::new(0) })
    }

    /// Fills a slot and has the guest bind its driver; the name of the block device, if there is one now.
    ///
    /// # Errors
    /// When the VMM or the guest refuses.
    pub fn attach(&self, slot: u8, device: DeviceConfig, fds: &[BorrowedFd<'_>]) -> Result<Option<String>> {
        let what = format!("cannot attach {device:?} to slot {slot}");
        let attached = async {
            self.pod.vmm().attach(slot, device, fds).await?;
            let device = self.pod.agent().bind_slot(slot).await?;
            anyhow::Ok(device.map(|device| device.name))
        };
        self.runtime.block_on(attached).context(what)
    }

    /// Has the guest unbind a slot's driver and empties the slot.
    ///
    /// # Errors
    /// When the VMM or the guest refuses.
    pub fn detach(&self, slot: u8) -> Result<()> {
        let detached = async {
            self.pod.agent().unbind_slot(slot).await?;
            anyhow::Ok(self.pod.vmm().detach(slot).await?)
        };
        self.runtime.block_on(detached).with_context(|| format!("cannot detach slot {slot}"))
    }

    /// Runs a shell script in the guest, which must succeed; what it wrote to standard output.
    ///
    /// # Errors
    /// When it exits with another code than 0, with all it wrote.
    pub fn sh(&self, script: &str) -> Result<String> {
        let finished = self.run(script)?;
        ensure!(finished.code == 0, "{script:?} failed: {finished}");
        Ok(finished.stdout)
    }

    /// Runs a shell script in the guest to its end.
    ///
    /// # Errors
    /// When it cannot be started or does not end in time.
    pub fn run(&self, script: &str) -> Result<Finished> {
        self.start(script)?.wait()
    }

    /// Starts a shell script in the guest.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, script: &str) -> Result<Script<'_>> {
        let number = self.scripts.fetch_add(1, Ordering::Relaxed);
        Script::start(self, &format!("script{number}"), script)
    }

    /// Holds the vCPUs.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn pause(&self) -> Result<()> {
        Ok(self.block_on(self.pod.vmm().pause())?)
    }

    /// Lets them run.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn resume(&self) -> Result<()> {
        Ok(self.block_on(self.pod.vmm().resume())?)
    }

    /// What the machine is doing.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn state(&self) -> Result<VmState> {
        Ok(self.block_on(self.pod.vmm().state())?)
    }

    /// What the machine has counted.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn metrics(&self) -> Result<VmMetrics> {
        Ok(self.block_on(self.pod.vmm().metrics())?)
    }

    /// A counter of the device in a slot.
    ///
    /// # Errors
    /// When the slot is empty, or its device counts no such thing.
    pub fn counter(&self, slot: u8, name: &str) -> Result<u64> {
        let metrics = self.metrics()?;
        let device = metrics.slots.get(usize::from(slot)).and_then(Option::as_ref);
        let device = device.with_context(|| format!("slot {slot} is empty"))?;
        device.counters.get(name).copied().with_context(|| format!("no counter {name} in {device:?}"))
    }

    /// The engine's doors to this machine.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Waits for a request made through [`Machine::pod`].
    pub fn block_on<T>(&self, request: impl Future<Output = T>) -> T {
        self.runtime.block_on(request)
    }

    /// The root directory of scripts, as the host has it.
    pub fn rootfs(&self) -> &Path {
        &self.rootfs
    }

    /// Copies a program of the host, with the shared libraries it names, to `/bin` of scripts; one of which busybox has its own, they
    /// must call by its path.
    ///
    /// # Errors
    /// When it is not there.
    pub fn install(&self, program: impl AsRef<Path>) -> Result<()> {
        let program = program.as_ref();
        let copy = |from: &Path, to: &Path| -> Result<()> {
            fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
            // A link of busybox of the same name must not be followed.
            let _ = fs::remove_file(to);
            fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
            Ok(())
        };
        let name = program.file_name().context("a program has a name")?;
        copy(program, &self.rootfs.join("bin").join(name))?;
        // ldd fails for a static program, which needs none.
        let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
        for word in String::from_utf8_lossy(&output.stdout).split_whitespace() {
            if let Some(relative) = word.strip_prefix('/') {
                copy(Path::new(word), &self.rootfs.join(relative))?;
            }
        }
        Ok(())
    }

    /// Shuts the guest down in order; how the machine ended.
    pub fn shutdown(self) -> std::sync::Arc<VmEnd> {
        self.runtime.block_on(self.pod.clone().shutdown())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // A machine that died is why the test failed; nobody looks at it otherwise.
        if let Some(end) = self.pod.vmm().try_ended()
            && !matches!(end.death, Death::Reported(_))
        {
            eprintln!("the machine ended: {end}");
        }
        self.runtime.block_on(self.pod.vmm().stop());
    }
}

/// What machines are made of, as installed beside the `kvrun` under test.
///
/// # Errors
/// When something is missing.
pub fn assets(test: &Test) -> Result<Assets> {
    let file = |path: &str| Some(test.prefix().join(path));
    let given = Paths {
        kernel: file("share/kvrun/vmlinux"),
        initramfs: file("share/kvrun/initramfs.cpio"),
        vmm: file("libexec/kvrun/kvrun-vmm"),
    };
    Ok(Assets::open(&Named { given, ..Named::default() })?)
}
