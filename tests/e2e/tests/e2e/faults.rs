//! Whatever dies: the caller gets 137 and the reason, and nothing stays.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvrun_e2e::{Bundle, Case, Test, cases, process, time};
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::json;

pub(crate) const CASES: &[Case] = cases![
    guest_kernel_panic_is_137_with_reason_and_console,
    death_of_the_agent_is_137_with_reason_and_console,
    guest_that_hangs_is_killed_with_137_and_reason,
    killed_vmm_is_137_with_reason,
    killed_kvrun_takes_its_vmm_along_and_frees_the_id,
    killed_kvrun_frees_the_id_before_anything_runs,
];

/// What is bounded by 2 s, and the time it takes to start the command.
const BOUND: Duration = Duration::from_secs(3);

/// PID 1 of the guest takes no signal it does not handle; but root in its PID namespace can wipe its stack. The agent
/// returns into the wiped stack when it next wakes up, here for the end of the script.
pub(crate) const KILL_AGENT: &str = "range=$(grep '\\[stack\\]' /proc/1/maps | cut -d' ' -f1)
    from=$((0x${range%-*} / 4096)) to=$((0x${range#*-} / 4096))
    exec dd conv=notrunc if=/dev/zero of=/proc/1/mem bs=4096 seek=$from count=$((to - from)) 2>/dev/null";

/// The guest's kernel stands still and the VMM goes on: a panic that does not reset the machine.
pub(crate) const HANG_KERNEL: &str = "echo 0 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger";

/// A container that may do what only a kernel's owner may: the guest's kernel is not the host's.
fn privileged(bundle: Bundle) -> Result<Bundle> {
    bundle.without_namespace("pid")?.with(|spec| {
        spec["linux"]["readonlyPaths"] = json!([]);
        spec["linux"]["maskedPaths"] = json!([]);
        let all = json!(["CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"]);
        spec["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    })
}

fn guest_kernel_panic_is_137_with_reason_and_console(t: &Test) -> Result<()> {
    let bundle = privileged(t.script("echo c > /proc/sysrq-trigger; sleep 1000")?)?;
    let outcome = t.run(&bundle)?.exited(137).stdout("").report(&["guest"]);
    ensure!(
        outcome.stderr.contains("Kernel panic") && outcome.stderr.contains("sysrq"),
        "no console: {outcome}"
    );
    Ok(())
}

fn death_of_the_agent_is_137_with_reason_and_console(t: &Test) -> Result<()> {
    let outcome = t.run(&privileged(t.script(KILL_AGENT)?)?)?.exited(137).stdout("").report(&["guest"]);
    ensure!(outcome.stderr.contains("Attempted to kill init"), "no console: {outcome}");
    Ok(())
}

fn guest_that_hangs_is_killed_with_137_and_reason(t: &Test) -> Result<()> {
    // Not before all know that it runs: the guest would never say so.
    let script = format!("echo ready; read go; {HANG_KERNEL}");
    let mut run = t.start(&privileged(t.script(&script)?)?)?;
    run.until("ready\n")?;
    run.stdin.take().context("no stdin")?.write_all(b"go\n")?;
    // Of a guest that does not answer, it is the console.
    time::until("the kernel stands still", || {
        Ok(t.invoke(&["logs", "--guest", t.id()])?.text().contains("end Kernel panic"))
    })?;
    let began = Instant::now();
    t.invoke(&["kill", t.id(), "KILL"])?.exited(0).stdout("").stderr("");
    run.wait()?.exited(137).stdout("ready\n").error(&["the guest did not take a signal in time"]);
    ensure!(began.elapsed() < time::scaled(BOUND), "it took {:?}", began.elapsed());
    Ok(())
}

fn killed_vmm_is_137_with_reason(t: &Test) -> Result<()> {
    let run = t.start(&t.script("echo ready; sleep 1000")?)?.without_input();
    run.until("ready\n")?;
    for (_, vmm) in t.vmms()? {
        pidfd_send_signal(&vmm, Signal::KILL)?;
    }
    run.wait()?.exited(137).stdout("ready\n").error(&["kvrun-vmm", "signal 9"]);
    Ok(())
}

fn killed_kvrun_takes_its_vmm_along_and_frees_the_id(t: &Test) -> Result<()> {
    let run = t.start(&t.script("echo ready; sleep 1000")?)?.without_input();
    run.until("ready\n")?;
    let vmms = t.vmms()?;
    run.signal(Signal::KILL)?;
    for (pid, vmm) in &vmms {
        process::gone_within(vmm, time::scaled(time::RUN))
            .with_context(|| format!("VMM {pid} outlived kvrun"))?;
    }
    drop(run);
    // The same ID works at once, and this run clears what the dead one left.
    t.run(&t.script("echo again")?)?.exited(0).stdout("again\n").stderr("");
    Ok(())
}

fn killed_kvrun_frees_the_id_before_anything_runs(t: &Test) -> Result<()> {
    let run = t.start(&t.script("sleep 1000")?)?.without_input();
    t.until_vmm(&run)?;
    let vmms = t.vmms()?;
    run.signal(Signal::KILL)?;
    for (pid, vmm) in &vmms {
        process::gone_within(vmm, time::scaled(time::RUN))
            .with_context(|| format!("VMM {pid} outlived kvrun"))?;
    }
    drop(run);
    t.run(&t.bundle(&["/bin/true"])?)?.exited(0).stdout("").stderr("");
    Ok(())
}
