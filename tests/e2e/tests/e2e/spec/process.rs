//! `process`, as far as `crate::process` does not have it.

use anyhow::{Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use serde_json::json;

use super::{mount, output};

pub(crate) const CASES: &[Case] = cases![
    capabilities_in_all_five_sets,
    no_capabilities_are_none,
    oom_score_is_the_specs,
    batch_scheduler_and_its_nice_value,
    real_time_scheduler_and_its_priority,
    io_priority_is_the_specs,
    no_new_privileges_can_be_left_out,
    home_comes_from_the_containers_passwd,
    personality_is_that_of_another_machine,
    working_directory_in_a_mount_is_made,
    environment_keeps_its_order_and_its_duplicates,
];

fn capabilities_in_all_five_sets(t: &Test) -> Result<()> {
    let text = output(t, "grep ^Cap /proc/self/status", |spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_KILL"],
            "inheritable": ["CAP_KILL"],
            "ambient": ["CAP_KILL"],
        });
    })?;
    // capabilities(7): at exec of a program without capabilities by another user than root, what is ambient is what stays.
    let bits = |number: u32| format!("{:016x}", 1_u64 << number);
    let bounding = format!("{:016x}", 1 | 1 << 5 | 1 << 13);
    for (name, set) in
        [("Inh", bits(5)), ("Prm", bits(5)), ("Eff", bits(5)), ("Bnd", bounding), ("Amb", bits(5))]
    {
        ensure!(text.contains(&format!("Cap{name}:\t{set}\n")), "Cap{name} is not {set}: {text}");
    }
    Ok(())
}

fn no_capabilities_are_none(t: &Test) -> Result<()> {
    let text = output(t, "grep -E '^Cap(Eff|Bnd)' /proc/self/status; id -u", |spec| {
        _ = spec["process"].as_object_mut().map(|process| process.remove("capabilities"));
    })?;
    ensure!(text == "CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n0\n", "{text}");
    Ok(())
}

fn oom_score_is_the_specs(t: &Test) -> Result<()> {
    let text =
        output(t, "cat /proc/self/oom_score_adj", |spec| spec["process"]["oomScoreAdj"] = json!(-321))?;
    ensure!(text == "-321\n", "{text}");
    Ok(())
}

/// Nice value, real-time priority and policy (proc_pid_stat(5)).
const SCHEDULING: &str = "cut -d' ' -f19,40,41 /proc/self/stat";

fn batch_scheduler_and_its_nice_value(t: &Test) -> Result<()> {
    let text = output(t, SCHEDULING, |spec| {
        spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 7});
    })?;
    ensure!(text == "7 0 3\n", "{text}");
    Ok(())
}

fn real_time_scheduler_and_its_priority(t: &Test) -> Result<()> {
    let text = output(t, &format!("{SCHEDULING}; cut -d' ' -f41 /proc/1/stat"), |spec| {
        spec["process"]["scheduler"] =
            json!({"policy": "SCHED_RR", "priority": 11, "flags": ["SCHED_RESET_ON_FORK"]});
    })?;
    // Reset for the child, which is what the flag asks for.
    ensure!(text == "0 0 0\n2\n", "{text}");
    Ok(())
}

fn io_priority_is_the_specs(t: &Test) -> Result<()> {
    let text = output(t, "ionice -p $$", |spec| {
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    })?;
    ensure!(text == "best-effort: prio 6\n", "{text}");
    Ok(())
}

fn no_new_privileges_can_be_left_out(t: &Test) -> Result<()> {
    let text = output(t, "grep ^NoNewPrivs /proc/self/status", |spec| {
        spec["process"]["noNewPrivileges"] = json!(false);
    })?;
    ensure!(text == "NoNewPrivs:\t0\n", "{text}");
    Ok(())
}

fn home_comes_from_the_containers_passwd(t: &Test) -> Result<()> {
    let text = output(t, "echo $HOME", |_| {})?;
    ensure!(text == "/root\n", "{text}");
    Ok(())
}

fn personality_is_that_of_another_machine(t: &Test) -> Result<()> {
    let text = output(t, "uname -m", |spec| spec["linux"]["personality"] = json!({"domain": "LINUX32"}))?;
    ensure!(text == "i686\n", "{text}");
    Ok(())
}

fn working_directory_in_a_mount_is_made(t: &Test) -> Result<()> {
    let text = output(t, "pwd", |spec| {
        mount(spec, json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
        spec["process"]["cwd"] = json!("/tmp/not/yet");
    })?;
    ensure!(text == "/tmp/not/yet\n", "{text}");
    Ok(())
}

fn environment_keeps_its_order_and_its_duplicates(t: &Test) -> Result<()> {
    let env = ["PATH=/bin", "B=2", "A=1", "B=3", "HOME=/"];
    let text =
        output(t, "tr '\\0' '\\n' < /proc/1/environ; true", |spec| spec["process"]["env"] = json!(env))?;
    ensure!(text.lines().eq(env), "{text}");
    Ok(())
}
