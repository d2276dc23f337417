//! The process is what the spec's `process`, `hostname` and `linux.namespaces` say, on a kernel of its own.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use serde_json::json;

pub(crate) const CASES: &[Case] = cases![
    another_kernel_runs_it,
    it_is_pid_1_and_sees_only_its_own_processes,
    environment_is_exactly_the_specs,
    working_directory_is_the_specs,
    missing_working_directory_is_made,
    user_and_groups_are_the_specs,
    umask_is_the_specs,
    hostname_is_the_specs_and_not_the_hosts,
    capabilities_are_bounded,
    no_new_privileges_is_set,
    resource_limits_are_the_specs,
    its_cgroup_is_the_root_of_its_view,
    network_namespace_has_only_loopback,
    masked_paths_are_empty_and_readonly_paths_refuse_writes,
    standard_devices_are_there,
    sysctl_is_set_in_the_guest_and_not_on_the_host,
    search_path_finds_the_command,
];

fn another_kernel_runs_it(t: &Test) -> Result<()> {
    let here = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let script = "cat /proc/sys/kernel/osrelease /proc/sys/kernel/random/boot_id; grep -c '^flags.* hypervisor' /proc/cpuinfo";
    let text = t.run(&t.script(script)?)?.exited(0).stderr("").text();
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines.len() == 3 && lines[0].ends_with("-kvrun") && lines[2] == "1", "unexpected: {text}");
    ensure!(lines[0] != here.trim() && lines[1] != boot.trim(), "the host's kernel: {text}");
    Ok(())
}

fn it_is_pid_1_and_sees_only_its_own_processes(t: &Test) -> Result<()> {
    t.run(&t.script("echo $$; cd /proc; echo [0-9]*")?)?.exited(0).stdout("1\n1\n").stderr("");
    Ok(())
}

fn environment_is_exactly_the_specs(t: &Test) -> Result<()> {
    let environment = ["PATH=/bin", "HOME=/nowhere", "EMPTY=", "WITH=a=b c", "UTF8=\u{e4}\u{20ac}"];
    let bundle = t.bundle(&["/bin/env"])?.with(|spec| spec["process"]["env"] = json!(environment))?;
    let text = t.run(&bundle)?.exited(0).stderr("").text();
    // Its order means nothing (environ(7)).
    ensure!(text.lines().collect::<BTreeSet<_>>() == environment.into(), "environment: {text}");
    ensure!(text.lines().count() == environment.len(), "environment: {text}");
    Ok(())
}

fn working_directory_is_the_specs(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/pwd"])?.with(|spec| spec["process"]["cwd"] = json!("/etc"))?;
    t.run(&bundle)?.exited(0).stdout("/etc\n").stderr("");
    Ok(())
}

fn missing_working_directory_is_made(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/pwd"])?.with(|spec| spec["process"]["cwd"] = json!("/not/yet"))?;
    t.run(&bundle)?.exited(0).stdout("/not/yet\n").stderr("");
    Ok(())
}

fn user_and_groups_are_the_specs(t: &Test) -> Result<()> {
    let user = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 2000]});
    let bundle = t.script("id -u; id -g; grep ^Groups /proc/self/status")?;
    let bundle = bundle.with(|spec| spec["process"]["user"] = user)?;
    let text = t.run(&bundle)?.exited(0).stderr("").text();
    let words: Vec<&str> = text.split_whitespace().collect();
    ensure!(words == ["1000", "1001", "Groups:", "5", "2000"], "unexpected: {text}");
    Ok(())
}

fn umask_is_the_specs(t: &Test) -> Result<()> {
    let bundle = t.script("umask")?.with(|spec| spec["process"]["user"]["umask"] = json!(0o027))?;
    t.run(&bundle)?.exited(0).stdout("0027\n").stderr("");
    Ok(())
}

fn hostname_is_the_specs_and_not_the_hosts(t: &Test) -> Result<()> {
    let before = std::fs::read("/proc/sys/kernel/hostname")?;
    let bundle = t.script("hostname")?.with(|spec| spec["hostname"] = json!("a-name.of-its-own"))?;
    t.run(&bundle)?.exited(0).stdout("a-name.of-its-own\n").stderr("");
    ensure!(std::fs::read("/proc/sys/kernel/hostname")? == before, "the host's name changed");
    Ok(())
}

fn capabilities_are_bounded(t: &Test) -> Result<()> {
    // CAP_KILL is 5, CAP_NET_BIND_SERVICE 10, CAP_AUDIT_WRITE 29 (linux/capability.h).
    let set = format!("{:016x}", (1 << 5) | (1 << 10) | (1 << 29));
    let text = t.run(&t.script("grep ^Cap /proc/self/status")?)?.exited(0).stderr("").text();
    for name in ["CapPrm", "CapEff", "CapBnd"] {
        ensure!(text.contains(&format!("{name}:\t{set}\n")), "{name} is not {set}: {text}");
    }
    ensure!(text.contains("CapAmb:\t0000000000000000\n"), "ambient capabilities: {text}");
    Ok(())
}

fn no_new_privileges_is_set(t: &Test) -> Result<()> {
    t.run(&t.script("grep ^NoNewPrivs /proc/self/status")?)?.exited(0).stdout("NoNewPrivs:\t1\n").stderr("");
    Ok(())
}

fn resource_limits_are_the_specs(t: &Test) -> Result<()> {
    let limits = json!([
        {"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]);
    let bundle =
        t.script("ulimit -Sn; ulimit -Hn; ulimit -Hc")?.with(|spec| spec["process"]["rlimits"] = limits)?;
    t.run(&bundle)?.exited(0).stdout("123\n456\n0\n").stderr("");
    Ok(())
}

fn its_cgroup_is_the_root_of_its_view(t: &Test) -> Result<()> {
    // A cgroup that is not the root of the hierarchy has cgroup.type (cgroup-v2.rst, Core Interface Files).
    let script =
        "cat /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.type; cat /sys/fs/cgroup/cgroup.procs | head -1";
    t.run(&t.script(script)?)?.exited(0).stdout("0::/\ndomain\n1\n").stderr("");
    Ok(())
}

fn network_namespace_has_only_loopback(t: &Test) -> Result<()> {
    t.run(&t.script("ls /sys/class/net")?)?.exited(0).stdout("lo\n").stderr("");
    Ok(())
}

fn masked_paths_are_empty_and_readonly_paths_refuse_writes(t: &Test) -> Result<()> {
    let bundle = t.script("cat /etc/passwd; echo 1 > /proc/sys/vm/drop_caches || echo refused")?;
    let bundle = bundle.with(|spec| spec["linux"]["maskedPaths"] = json!(["/etc/passwd"]))?;
    let outcome = t.run(&bundle)?.exited(0).stdout("refused\n");
    ensure!(outcome.stderr.contains("Read-only file system"), "{outcome}");
    Ok(())
}

fn standard_devices_are_there(t: &Test) -> Result<()> {
    // config-linux.md, Default Devices.
    let script = "cd /dev; for d in null zero full random urandom tty; do test -c $d || echo no $d; done
        test -e ptmx || echo no ptmx; echo x > null; head -c 8 urandom | wc -c; echo x 2>/dev/null > full || echo full";
    t.run(&t.script(script)?)?.exited(0).stdout("8\nfull\n");
    Ok(())
}

fn sysctl_is_set_in_the_guest_and_not_on_the_host(t: &Test) -> Result<()> {
    const FILE: &str = "/proc/sys/kernel/msgmax";
    let before = std::fs::read(FILE)?;
    let bundle = t.bundle(&["/bin/cat", FILE])?;
    let bundle = bundle.with(|spec| spec["linux"]["sysctl"] = json!({"kernel.msgmax": "12345"}))?;
    t.run(&bundle)?.exited(0).stdout("12345\n").stderr("");
    ensure!(std::fs::read(FILE)? == before, "the host's setting changed");
    Ok(())
}

fn search_path_finds_the_command(t: &Test) -> Result<()> {
    t.run(&t.bundle(&["echo", "found"])?)?.exited(0).stdout("found\n").stderr("");
    Ok(())
}
