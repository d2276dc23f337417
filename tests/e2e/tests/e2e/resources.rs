//! CPUs, memory, and where both are accounted.

use anyhow::{Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use serde_json::json;

pub(crate) const CASES: &[Case] = cases![
    two_cpus_are_two_vcpus,
    memory_limit_is_seen_in_the_containers_cgroup,
    memory_limit_kills_and_says_so,
    child_killed_by_the_memory_limit_leaves_the_container_running,
    number_of_processes_is_limited,
    vmm_is_accounted_in_the_containers_cgroup_on_the_host,
];

const MIB: u64 = 1 << 20;

fn two_cpus_are_two_vcpus(t: &Test) -> Result<()> {
    let bundle = t.script("nproc; grep -c ^processor /proc/cpuinfo; cat /sys/fs/cgroup/cpu.max")?;
    let bundle = bundle
        .with(|spec| spec["linux"]["resources"]["cpu"] = json!({"quota": 200_000, "period": 100_000}))?;
    t.run(&bundle)?.exited(0).stdout("2\n2\n200000 100000\n").stderr("");
    Ok(())
}

fn memory_limit_is_seen_in_the_containers_cgroup(t: &Test) -> Result<()> {
    let bundle = t.script("cat /sys/fs/cgroup/memory.max")?;
    let bundle = bundle.with(|spec| spec["linux"]["resources"]["memory"] = json!({"limit": 40 * MIB}))?;
    t.run(&bundle)?.exited(0).stdout("41943040\n").stderr("");
    Ok(())
}

fn memory_limit_kills_and_says_so(t: &Test) -> Result<()> {
    // dd fills a buffer twice the limit.
    let bundle = t.bundle(&["/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"])?;
    let bundle = bundle.with(|spec| spec["linux"]["resources"]["memory"] = json!({"limit": 32 * MIB}))?;
    t.run(&bundle)?.exited(137).stdout("").error(&["memory limit"]);
    Ok(())
}

fn child_killed_by_the_memory_limit_leaves_the_container_running(t: &Test) -> Result<()> {
    let bundle =
        t.script("dd if=/dev/zero of=/dev/null bs=64M count=1 2>/dev/null; echo dd ended with $?")?;
    let bundle = bundle.with(|spec| spec["linux"]["resources"]["memory"] = json!({"limit": 32 * MIB}))?;
    t.run(&bundle)?.exited(0).stdout("dd ended with 137\n");
    Ok(())
}

fn number_of_processes_is_limited(t: &Test) -> Result<()> {
    let bundle = t.script("sleep 1000 & sleep 1000 & sleep 1000 & echo not reached")?;
    let bundle = bundle.with(|spec| spec["linux"]["resources"]["pids"] = json!({"limit": 3}))?;
    let outcome = t.run(&bundle)?.failed().stdout("");
    ensure!(outcome.stderr.contains("can't fork"), "{outcome}");
    Ok(())
}

fn vmm_is_accounted_in_the_containers_cgroup_on_the_host(t: &Test) -> Result<()> {
    let path = format!("/{}-group", t.id());
    let bundle =
        t.script("echo ready; read line")?.with(|spec| spec["linux"]["cgroupsPath"] = json!(path))?;
    let run = t.start(&bundle)?;
    run.until("ready\n")?;
    for (pid, _) in t.vmms()? {
        let found = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        ensure!(found.lines().any(|line| line.ends_with(&path)), "VMM is in {found}, not in {path}");
    }
    run.without_input().wait()?.exited(1).stdout("ready\n").stderr("");
    Ok(())
}
