//! A virtual machine started cold: `kvrun-vmm` spawned, booted, and its agent asked for its state.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use kvrun_agent_api::agent::GetInfoRequest;
use kvrun_agent_api::agent_ttrpc::AgentClient;
use kvrun_agent_api::{READY_PORT, RPC_PORT};
use kvrun_pod::pod;
use kvrun_pod::size::{Sizes, VmSize};
use kvrun_pod::vmm::Vmm;
use kvrun_vmm_api::control::BOOT_MARK_INIT;
use rustix::time::{ClockId, clock_gettime};

use crate::report::Report;
use crate::{MEMORY_MIB, Stage};

/// One boot, in nanoseconds of `CLOCK_MONOTONIC`.
struct Boot {
    spawned: u64,
    first_entry: u64,
    init: u64,
    ready: u64,
    guest_used_kib: f64,
}

/// Measures `runs` cold boots.
pub(crate) fn measure(stage: &Stage, runs: usize, report: &mut Report) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let boots = (0..runs).map(|_| runtime.block_on(boot(stage))).collect::<Result<Vec<_>>>()?;
    let phase = |from: fn(&Boot) -> u64, to: fn(&Boot) -> u64| -> Vec<f64> {
        boots.iter().map(|boot| (to(boot) - from(boot)) as f64 / 1e6).collect()
    };
    report.median("boot.vmm_ms", phase(|b| b.spawned, |b| b.first_entry));
    report.median("boot.kernel_ms", phase(|b| b.first_entry, |b| b.init));
    report.median("boot.agent_ms", phase(|b| b.init, |b| b.ready));
    report.median("boot.cold.init_ms", phase(|b| b.spawned, |b| b.init));
    report.median("boot.cold.ready_ms", phase(|b| b.spawned, |b| b.ready));
    report.median("mem.guest_used_kib", boots.iter().map(|b| b.guest_used_kib).collect());
    Ok(())
}

/// `CLOCK_MONOTONIC` in nanoseconds, as the VMM reads it.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

async fn boot(stage: &Stage) -> Result<Boot> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("cannot open /dev/kvm")?;
    let kernel = File::open(&stage.kernel).context("cannot open the kernel image")?;
    let initramfs = File::open(&stage.initramfs).context("cannot open the initramfs")?;
    let config = pod::machine(VmSize::with_room(1, MEMORY_MIB, &Sizes::default()));

    let spawned = now_ns();
    let vmm = Vmm::spawn(&stage.vmm, None)?;
    let agent_up = vmm.expect(READY_PORT);
    vmm.boot(config, kvm.as_fd(), kernel.as_fd(), initramfs.as_fd())?.running().await?;
    agent_up.accepted().await?;
    let socket = ttrpc::asynchronous::transport::Socket::new(vmm.connect_async(RPC_PORT).await?);
    let client = AgentClient::new(ttrpc::asynchronous::Client::new(socket));
    let info = client.get_info(ttrpc::context::with_timeout(0), &GetInfoRequest::new()).await?;
    let ready = now_ns();

    let state = vmm.state().await?;
    let init =
        state.boot_marks.iter().find(|(mark, _)| *mark == BOOT_MARK_INIT).context("no boot mark of init")?.1;
    Ok(Boot {
        spawned,
        first_entry: state.first_entry_ns,
        init,
        ready,
        guest_used_kib: f64::from(MEMORY_MIB * 1024) - info.memory_available_kib as f64,
    })
}
