//! Pods and their output through containerd, with kvrun's shim and with runc's, by the clients that the end-to-end tests have, in
//! namespaces of their own.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::containerd::{Containerd, IMAGE, RUNTIME, SHIM};
use kvrun_e2e::cri::{Cri, HANDLER, cgroup, script};
use kvrun_e2e::{Test, isolation, time};

use crate::boot::now_ns;
use crate::report::Report;
use crate::{MEMORY_MIB, Stage, process};

/// The runtime of containerd that pods without a machine have, and its handler's name.
const PEER: &str = "io.containerd.runc.v2";
const PEER_HANDLER: &str = "runc";
const MIB: usize = 1 << 20;

/// How long a pod is left alone to see what it costs when nothing is asked of it.
const IDLE: Duration = Duration::from_secs(10);

/// What the pods of a test have used of the CPU, in microseconds.
fn cpu_us(test: &Test) -> Result<f64> {
    let stat = fs::read_to_string(cgroup(test).join("cpu.stat"))?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
    Ok(used.context("no usage_usec")?.parse()?)
}

/// Measures `runs` starts of a pod with one container, from the first request to the last answer; then what the processes of one hold.
pub(crate) fn measure(stage: &Stage, runs: usize, report: &mut Report) -> Result<()> {
    let test = isolated(stage)?;
    let cri = Cri::new(&test)?;
    for (key, handler) in [("pod.start_ms", HANDLER), ("pod.runc_start_ms", PEER_HANDLER)] {
        // Once without counting.
        let times = (0..=runs).map(|run| start(&cri, handler, &format!("{handler}-{run}")));
        let times = times.collect::<Result<Vec<_>>>()?.split_off(1);
        report.median(key, times);
    }
    report.ratio("pod.start_ms", "pod.runc_start_ms");

    let pod = cri.run_pod(cri.pod_config("rest"))?;
    // What it costs beside its containers: the processes, the guest's memory, and what the host's kernel keeps for both.
    let all = fs::read_to_string(cgroup(&test).join("memory.current"))?;
    report.number("mem.pod_overhead_kib", all.trim().parse::<f64>()? / 1024.0);
    let before = cpu_us(&test)?;
    thread::sleep(IDLE);
    report.number("cpu.pod_idle_millicores", (cpu_us(&test)? - before) / IDLE.as_secs_f64() / 1000.0);
    let container = pod.start(script("sleeper", "echo up; sleep 1000"))?;
    time::until("the container runs", || Ok(pod.log("sleeper")?.contains("up")))?;
    let (shim, vmm) = (only(&test.processes(SHIM)?)?, only(&test.vmms()?)?);
    let (shim, vmm) = (process::private_kib(shim, MEMORY_MIB)?, process::private_kib(vmm, MEMORY_MIB)?);
    report.number("mem.pod_shim_private_kib", shim);
    report.number("mem.pod_vmm_private_kib", vmm);
    report.number("mem.pod_host_private_kib", shim + vmm);
    let free: f64 = pod.sh(&container, "awk '/MemAvailable/ {print $2}' /proc/meminfo")?.trim().parse()?;
    let all: f64 = pod.sh(&container, "awk '/MemTotal/ {print $2}' /proc/meminfo")?.trim().parse()?;
    report.number("mem.pod_guest_used_kib", all - free);
    pod.remove()?;
    cri.end()
}

fn start(cri: &Cri<'_>, handler: &str, name: &str) -> Result<f64> {
    let config = cri.pod_config(name);
    let started = now_ns();
    let pod = cri.run_pod_by(handler, config)?;
    pod.start(script("sleeper", "sleep 1000"))?;
    let running = now_ns();
    pod.remove()?;
    Ok((running - started) as f64 / 1e6)
}

/// Measures how long so much output of a container takes through containerd's client, from its first byte to its last.
pub(crate) fn measure_output(stage: &Stage, mib: u32, runs: usize, report: &mut Report) -> Result<()> {
    let test = isolated(stage)?;
    let containerd = Containerd::new(&test)?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..runs {
        for (runtime, times) in [RUNTIME, PEER].into_iter().zip(&mut times) {
            times.push(output(&containerd, runtime, mib).with_context(|| runtime.to_owned())?);
        }
    }
    let [ours, theirs] = times;
    let ours = report.median("pod.stdio_ms", ours);
    let theirs = report.median("pod.runc_stdio_ms", theirs);
    report.number("pod.stdio_mib", mib.into());
    report.number("pod.stdio_ratio", theirs / ours);
    containerd.end()
}

fn output(containerd: &Containerd<'_>, runtime: &str, mib: u32) -> Result<f64> {
    let count = format!("count={}", mib * 16);
    let program = ["dd", "if=/dev/zero", "bs=64k", &count];
    let args = [&["run", "--rm", "--runtime", runtime, IMAGE, "output"][..], &program].concat();
    let mut command = containerd.command(&args);
    let mut ctr = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdout = ctr.stdout.take().context("no pipe")?;
    let mut chunk = vec![0; MIB];
    let mut received = stdout.read(&mut chunk)?;
    let first = now_ns();
    received += kvrun_bench::copy::read(&mut stdout, &mut chunk)?;
    let last = now_ns();
    // It is less than a pipe holds.
    let ended = ctr.wait_with_output()?;
    ensure!(ended.status.success(), "ctr: {}: {}", ended.status, String::from_utf8_lossy(&ended.stderr));
    let all = usize::try_from(mib)? * MIB;
    ensure!(received == all, "{received} of {all} bytes have arrived");
    Ok((last - first) as f64 / 1e6)
}

/// A place for containerd, in namespaces that this process has to itself; it is started again for them.
fn isolated(stage: &Stage) -> Result<Test> {
    if std::process::id() != 1 {
        let me = std::env::current_exe()?;
        Err(isolation::command(&me).args(std::env::args_os().skip(1)).exec())
            .context("cannot start in namespaces of its own")?;
    }
    isolation::enter(&stage.kvrun)?;
    Test::new("bench".to_owned(), stage.kvrun.clone())
}

/// The process ID of the one process there is.
fn only(processes: &[(i32, OwnedFd)]) -> Result<u32> {
    let [(pid, _)] = processes else { anyhow::bail!("{} processes instead of one", processes.len()) };
    Ok(pid.unsigned_abs())
}
