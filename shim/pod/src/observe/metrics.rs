//! The metrics of a pod. What the VMM and the guest say is hostile: numbers stay numbers, and names are values of labels.

use std::fs;
use std::time::Duration;

use kvrun_agent_api::agent::GetInfoResponse;
use kvrun_vmm_api::control::{BOOT_MARK_INIT, BOOT_MARK_READY};
use kvrun_vmm_api::{VmMetrics, VmState};

use super::exposition::{Exposition, Kind};
use super::latency::Latencies;
use crate::pod::{BootTimes, Pod, PodError};

const MIB: u64 = 1 << 20;

/// Gathers them.
pub(super) async fn gather(pod: &Pod, labels: &[(&str, &str)]) -> Result<String, PodError> {
    let (state, counted) = (pod.vmm.state().await?, pod.vmm.metrics().await?);
    // One that hangs is to be seen in the metrics, not to have none.
    let info = pod.or_death(pod.agent.info()).await.ok();
    let mut all = Exposition::new(labels);
    all.family("kvrun_info", Kind::Gauge, "The version of the engine that serves the pod.");
    all.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    boot(&mut all, pod.boot, &state);
    vm_exits(&mut all, &counted);
    guest(&mut all, info.as_ref());
    memory(&mut all, pod, &state);
    virtio(&mut all, &counted);
    requests(&mut all, &pod.agent.latencies);
    Ok(all.finish())
}

/// Each phase, from the end of the one before; those whose ends are not known, or make no sense, are left out.
fn boot(all: &mut Exposition, engine: BootTimes, state: &VmState) {
    let mark =
        |wanted: u8| state.boot_marks.iter().find(|(mark, _)| *mark == wanted).map(|(_, at_ns)| *at_ns);
    let phases = [
        ("vmm", Some(engine.spawned_ns), Some(state.first_entry_ns)),
        ("kernel", Some(state.first_entry_ns), mark(BOOT_MARK_INIT)),
        ("agent", mark(BOOT_MARK_INIT), mark(BOOT_MARK_READY)),
        ("share", mark(BOOT_MARK_READY), Some(engine.ready_ns)),
        ("all", Some(engine.spawned_ns), Some(engine.ready_ns)),
    ];
    all.family(
        "kvrun_boot_seconds",
        Kind::Gauge,
        "How long the machine took to boot, by phase: until its vCPUs run (vmm), to the agent's first instruction (kernel), until it answers (agent), until the guest has the files (share), and all of it.",
    );
    for (phase, from, to) in phases {
        if let Some(ns) = from.zip(to).and_then(|(from, to)| to.checked_sub(from)) {
            all.sample(&[("phase", phase)], Duration::from_nanos(ns).as_secs_f64());
        }
    }
}

fn vm_exits(all: &mut Exposition, counted: &VmMetrics) {
    all.family(
        "kvrun_vm_exits_total",
        Kind::Counter,
        "How often vCPUs left the guest for the VMM, by kind of exit.",
    );
    for (kind, count) in &counted.exits {
        all.sample(&[("kind", kind)], count);
    }
}

fn guest(all: &mut Exposition, info: Option<&GetInfoResponse>) {
    all.single(
        "kvrun_agent_up",
        Kind::Gauge,
        "Whether the agent in the guest answers.",
        u8::from(info.is_some()),
    );
    let Some(info) = info else { return };
    let bytes = |kib: u64| kib.saturating_mul(1024);
    let gauges = [
        ("kvrun_guest_vcpus_online", "vCPUs that the guest uses, as it says.", info.cpus.into()),
        (
            "kvrun_guest_memory_total_bytes",
            "Memory that the guest's kernel manages, as it says.",
            bytes(info.memory_total_kib),
        ),
        (
            "kvrun_guest_memory_available_bytes",
            "Memory of the guest that programs could still have, as it says.",
            bytes(info.memory_available_kib),
        ),
    ];
    for (name, help, value) in gauges {
        all.single(name, Kind::Gauge, help, value);
    }
}

fn memory(all: &mut Exposition, pod: &Pod, state: &VmState) {
    let (booted, most) = pod.growth.memory_mib();
    all.family(
        "kvrun_vm_memory_bytes",
        Kind::Gauge,
        "Memory of the machine: with which it booted (boot), what was plugged since (plugged), what of it is in the balloon (balloon), and as far as it can grow (most).",
    );
    let kinds =
        [("boot", booted), ("plugged", state.plugged_mib), ("balloon", state.balloon_mib), ("most", most)];
    for (kind, mib) in kinds {
        all.sample(&[("kind", kind)], u64::from(mib) * MIB);
    }
    all.family(
        "kvrun_process_resident_memory_bytes",
        Kind::Gauge,
        "Memory that processes of the pod have on the host: the VMM, with what the guest has touched of its memory, and the engine.",
    );
    let vmm = pod.vmm.process().ok().and_then(|process| resident(&process.pid.to_string()));
    for (process, bytes) in [("vmm", vmm), ("engine", resident("self"))] {
        if let Some(bytes) = bytes {
            all.sample(&[("process", process)], bytes);
        }
    }
}

/// The resident set of a process in bytes (proc_pid_status(5), `VmRSS`).
fn resident(process: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"))?;
    kib.parse::<u64>().ok()?.checked_mul(1024)
}

fn virtio(all: &mut Exposition, counted: &VmMetrics) {
    // What the guest says of itself may become less.
    let families = [
        (
            "kvrun_virtio_total",
            Kind::Counter,
            "What the virtio device in each slot has counted, by the name of the counter.",
            false,
        ),
        (
            "kvrun_virtio_guest",
            Kind::Gauge,
            "What the guest's driver of a virtio device said last, by the name of the figure.",
            true,
        ),
    ];
    for (name, kind, help, wanted) in families {
        all.family(name, kind, help);
        for (slot, device) in counted.slots.iter().enumerate() {
            let Some(device) = device else { continue };
            let slot = slot.to_string();
            for (counter, value) in
                device.counters.iter().filter(|(counter, _)| counter.starts_with("guest_") == wanted)
            {
                all.sample(&[("slot", &slot), ("device", &device.device), ("counter", counter)], value);
            }
        }
    }
}

fn requests(all: &mut Exposition, latencies: &Latencies) {
    let requests = latencies.all().clone();
    all.family(
        "kvrun_agent_request_seconds",
        Kind::Histogram,
        "How long the agent took over requests, by what it was asked.",
    );
    for (what, histogram) in &requests {
        all.histogram(&[("request", what)], histogram);
    }
    all.family(
        "kvrun_agent_requests_failed_total",
        Kind::Counter,
        "How many requests the agent refused, or did not answer in time.",
    );
    for (what, histogram) in &requests {
        all.sample(&[("request", what)], histogram.failed);
    }
}
