//! `linux.resources`, as far as `crate::resources` does not have it: what the files of the container's cgroup say, and what they do.

use std::fs;

use anyhow::{Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

use super::output;

pub(crate) const CASES: &[Case] = cases![
    memory_reservation_and_swap,
    cpu_shares_period_and_burst,
    idle_cpu,
    cpus_and_memory_nodes,
    block_io_weight,
    huge_page_limit,
    huge_pages_of_the_host_are_the_guests,
    unified_files,
    limits_that_contradict_each_other_are_named,
    unified_file_that_is_not_there_is_named,
];

/// These files of the cgroup with these resources.
fn files(t: &Test, names: &str, resources: &Value) -> Result<String> {
    output(t, &format!("cd /sys/fs/cgroup; cat {names}"), |spec| {
        spec["linux"]["resources"] = resources.clone();
    })
}

fn memory_reservation_and_swap(t: &Test) -> Result<()> {
    let memory = json!({"memory": {"limit": 64 << 20, "swap": 96 << 20, "reservation": 32 << 20, "checkBeforeUpdate": true, "useHierarchy": true}});
    let text = files(t, "memory.max memory.swap.max memory.low", &memory)?;
    ensure!(text == "67108864\n33554432\n33554432\n", "{text}");
    Ok(())
}

fn cpu_shares_period_and_burst(t: &Test) -> Result<()> {
    let cpu = json!({"cpu": {"shares": 2048, "quota": 40_000, "period": 50_000, "burst": 20_000}});
    let text = files(t, "cpu.weight cpu.max cpu.max.burst", &cpu)?;
    ensure!(text == "79\n40000 50000\n20000\n", "{text}");
    Ok(())
}

fn idle_cpu(t: &Test) -> Result<()> {
    let text = files(t, "cpu.idle", &json!({"cpu": {"idle": 1, "shares": 1024}}))?;
    ensure!(text == "1\n", "{text}");
    Ok(())
}

fn cpus_and_memory_nodes(t: &Test) -> Result<()> {
    let resources = json!({"cpu": {"cpus": "1", "mems": "0"}});
    let script =
        "cd /sys/fs/cgroup; cat cpuset.cpus cpuset.mems; grep ^Cpus_allowed_list /proc/self/status; nproc";
    let text = output(t, script, |spec| spec["linux"]["resources"] = resources)?;
    ensure!(text == "1\n0\nCpus_allowed_list:\t1\n1\n", "{text}");
    Ok(())
}

fn block_io_weight(t: &Test) -> Result<()> {
    let text = files(t, "io.weight", &json!({"blockIO": {"weight": 505}}))?;
    ensure!(text.starts_with("default 5000\n"), "{text}");
    Ok(())
}

fn huge_page_limit(t: &Test) -> Result<()> {
    let limit = json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}]});
    let text = files(t, "hugetlb.2MB.max", &limit)?;
    ensure!(text == "4194304\n", "{text}");
    Ok(())
}

fn huge_pages_of_the_host_are_the_guests(t: &Test) -> Result<()> {
    let volume = t.scratch().join("huge");
    fs::create_dir(&volume)?;
    mount("hugetlbfs", &volume, "hugetlbfs", MountFlags::empty(), Some(c"pagesize=2M,mode=1770,gid=5"))?;
    let text = "grep -o '/huge hugetlbfs rw' /proc/mounts; stat -c '%a %g' /huge; fallocate -l 4194304 /huge/file && \
        cat /sys/fs/cgroup/hugetlb.2MB.current; fallocate -l 16777216 /huge/more 2>/dev/null || echo limited";
    let bundle = t.script(text)?.with_bind(&volume, "/huge", &["rbind", "rprivate"])?.with(|spec| {
        spec["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20}, "hugepageLimits": [{"pageSize": "2MB", "limit": 8 << 20}],
        });
    })?;
    let seen = t.run(&bundle)?.exited(0).stderr("").text();
    ensure!(seen == "/huge hugetlbfs rw\n1770 5\n4194304\nlimited\n", "{seen}");
    unmount(&volume, UnmountFlags::empty())?;
    Ok(())
}

fn unified_files(t: &Test) -> Result<()> {
    let unified = json!({"unified": {"memory.high": "50331648", "pids.max": "99", "cpu.weight": "321"}});
    let text = files(t, "memory.high pids.max cpu.weight", &unified)?;
    ensure!(text == "50331648\n99\n321\n", "{text}");
    Ok(())
}

fn refused(t: &Test, resources: Value, words: &[&str]) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?.with(|spec| spec["linux"]["resources"] = resources)?;
    t.run(&bundle)?.failed().stdout("").error(words);
    Ok(())
}

fn limits_that_contradict_each_other_are_named(t: &Test) -> Result<()> {
    let memory = json!({"memory": {"limit": 64 << 20, "swap": 32 << 20}});
    refused(t, memory, &["linux.resources.memory.swap", "memory.limit"])
}

fn unified_file_that_is_not_there_is_named(t: &Test) -> Result<()> {
    refused(t, json!({"unified": {"memory.flavour": "1"}}), &["linux.resources.unified", "memory.flavour"])?;
    refused(t, json!({"unified": {"cgroup.procs": "1"}}), &["linux.resources.unified", "cgroup.procs"])
}
