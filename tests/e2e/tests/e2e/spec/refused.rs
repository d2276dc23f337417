//! What a guest cannot do is refused, in a line that names the field.

use anyhow::Result;
use kvrun_e2e::{Case, Test, cases};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] =
    cases![labels, security_agents, resources, other_sections, namespaces, devices, guest_kernel];

/// `field` with `value` is refused in a line with these words.
fn refused(t: &Test, pointer: &str, value: Value, words: &[&str]) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?.with(|spec| {
        let mut at = spec;
        for name in pointer.split('.') {
            at = &mut at[name];
        }
        *at = value;
    })?;
    t.run(&bundle)?.failed().stdout("").error(words);
    Ok(())
}

fn labels(t: &Test) -> Result<()> {
    refused(t, "process.selinuxLabel", json!("a:b:c"), &["process.selinuxLabel"])?;
    refused(t, "process.apparmorProfile", json!("some-profile"), &["process.apparmorProfile"])?;
    refused(t, "linux.mountLabel", json!("a:b:c"), &["linux.mountLabel"])
}

fn security_agents(t: &Test) -> Result<()> {
    let notify = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]});
    refused(t, "linux.seccomp", notify, &["linux.seccomp", "SCMP_ACT_NOTIFY"])?;
    let listener = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent.sock"});
    refused(t, "linux.seccomp", listener, &["linux.seccomp", "listenerPath"])
}

fn resources(t: &Test) -> Result<()> {
    let throttle = json!([{"major": 8, "minor": 0, "rate": 1}]);
    for (pointer, value) in [
        ("memory.kernel", json!(1 << 30)),
        ("memory.kernelTCP", json!(1 << 30)),
        ("memory.swappiness", json!(60)),
        ("memory.disableOOMKiller", json!(true)),
        ("memory.useHierarchy", json!(false)),
        ("cpu.mems", json!("1")),
        ("blockIO.leafWeight", json!(500)),
        ("blockIO.weightDevice", json!([{"major": 8, "minor": 0, "weight": 500}])),
        ("blockIO.throttleReadBpsDevice", throttle.clone()),
        ("blockIO.throttleWriteBpsDevice", throttle.clone()),
        ("blockIO.throttleReadIOPSDevice", throttle.clone()),
        ("blockIO.throttleWriteIOPSDevice", throttle),
        ("rdma", json!({"mlx5_1": {"hcaHandles": 3}})),
    ] {
        let field = format!("linux.resources.{pointer}");
        refused(t, &field, value, &[&field])?;
    }
    refused(
        t,
        "linux.resources.cpu.realtimeRuntime",
        json!(1000),
        &["linux.resources.cpu", "realtimeRuntime"],
    )?;
    refused(t, "linux.resources.network.classID", json!(1), &["linux.resources.network", "classID"])?;
    refused(t, "linux.resources.cpu.cpus", json!("0-99"), &["linux.resources.cpu.cpus", "0-99"])
}

fn other_sections(t: &Test) -> Result<()> {
    refused(t, "linux.intelRdt", json!({"closID": "x"}), &["linux.intelRdt"])?;
    refused(t, "linux.rootfsPropagation", json!("shared"), &["linux.rootfsPropagation", "shared"])?;
    refused(t, "windows", json!({"layerFolders": ["a"]}), &["windows"])?;
    refused(t, "vm", json!({"kernel": {"path": "/k"}}), &["vm"])
}

fn namespaces(t: &Test) -> Result<()> {
    for kind in ["ipc", "uts", "pid"] {
        let path = format!("/proc/1/ns/{kind}");
        let list = json!([{"type": "mount"}, {"type": "uts"}, {"type": kind, "path": path}]);
        let list =
            if kind == "uts" { json!([{"type": "mount"}, {"type": "uts", "path": path}]) } else { list };
        refused(t, "linux.namespaces", list, &["linux.namespaces", ".path", &path])?;
    }
    Ok(())
}

fn devices(t: &Test) -> Result<()> {
    let rule = json!([{"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rx"}]);
    refused(t, "linux.resources.devices", rule, &["linux.resources.devices[0]", "'x'"])
}

fn guest_kernel(t: &Test) -> Result<()> {
    refused(t, "process.scheduler", json!({"policy": "SCHED_ISO"}), &["process.scheduler", "SCHED_ISO"])?;
    let personality = json!({"domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"]});
    refused(t, "linux.personality", personality, &["linux.personality.flags"])?;
    refused(t, "linux.sysctl", json!({"net.no.such": "1"}), &["linux.sysctl", "net.no.such"])
}
