//! `ps`, `events`, `spec`, `features`: what commands tell of a container, and of kvrun.

use anyhow::{Context, Result, ensure};
use kvrun_e2e::{Case, Running, Test, cases};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = cases![
    ps_lists_the_processes_of_the_guest,
    events_count_what_the_container_uses,
    oom_kill_is_an_event,
    update_changes_limits_of_a_running_container,
    spec_writes_a_config_that_runs,
    features_are_a_document,
];

fn ps_lists_the_processes_of_the_guest(t: &Test) -> Result<()> {
    let left = t.create(&t.script("sleep 1111 & echo up; wait")?)?;
    t.command("start")?;
    left.until("up\n")?;
    let text = t.invoke(&["ps", t.id(), "-o", "pid,ppid,uid,cmd"])?.exited(0).stderr("").text();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    ensure!(rows[0] == ["PID", "PPID", "UID", "CMD"] && rows.len() == 3, "{text}");
    ensure!(rows[1][..4] == ["1", "0", "0", "/bin/sh"], "{text}");
    ensure!(rows[2][1..] == ["1", "0", "sleep", "1111"], "{text}");
    let text = t.invoke(&["ps", t.id()])?.exited(0).stderr("").text();
    ensure!(text.lines().count() == 3 && text.starts_with("UID"), "{text}");
    let json = t.invoke(&["ps", "--format", "json", t.id()])?.exited(0).text();
    ensure!(json == format!("[{}]\n", left.pid()), "{json}");
    t.invoke(&["ps", t.id(), "--sort=pid"])?.exited(1).error(&["--sort=pid"]);
    t.invoke(&["delete", "-f", t.id()])?.exited(0);
    left.end()?;
    Ok(())
}

fn events_count_what_the_container_uses(t: &Test) -> Result<()> {
    let bundle =
        t.script("i=0; while [ $i -lt 5000 ]; do i=$((i + 1)); done; echo up; sleep 1000")?.with(|spec| {
            spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
            spec["linux"]["resources"]["pids"] = json!({"limit": 33});
        })?;
    let left = t.create(&bundle)?;
    t.command("start")?;
    left.until("up\n")?;
    let event: Value = serde_json::from_slice(&t.invoke(&["events", "--stats", t.id()])?.exited(0).stdout)?;
    ensure!(event["type"] == "stats" && event["id"] == t.id(), "{event}");
    let data = &event["data"];
    ensure!(data["memory"]["usage"]["limit"] == 64 << 20, "{data}");
    ensure!(data["memory"]["usage"]["usage"].as_u64().is_some_and(|n| n > 0 && n < 64 << 20), "{data}");
    ensure!(data["pids"]["limit"] == 33 && data["pids"]["current"].as_u64().is_some_and(|n| n > 0), "{data}");
    ensure!(data["cpu"]["usage"]["total"].as_u64().is_some_and(|ns| ns > 100_000), "{data}");
    // Without --stats: a line, and another one, until the container ends.
    let run = Running::start(&mut t.kvrun(["events", "--interval", "10ms", t.id()]))?.without_input();
    run.until("}\n{")?;
    t.invoke(&["kill", t.id(), "KILL"])?.exited(0);
    left.end()?;
    run.wait()?.exited(0).stderr("");
    t.command("delete")?;
    Ok(())
}

fn oom_kill_is_an_event(t: &Test) -> Result<()> {
    let script =
        "echo up; read line < /fifo; dd if=/dev/zero of=/dev/null bs=100M count=1; echo over; sleep 1000";
    let bundle = t.script(&format!("mkfifo /fifo; {script}"))?.with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20});
    })?;
    let left = t.create(&bundle)?;
    t.command("start")?;
    left.until("up\n")?;
    let run = Running::start(&mut t.kvrun(["events", "--interval", "10ms", t.id()]))?.without_input();
    run.until("stats")?;
    t.invoke(&["exec", t.id(), "sh", "-c", "echo go > /fifo"])?.exited(0);
    run.until("\"type\":\"oom\"")?;
    t.invoke(&["delete", "-f", t.id()])?.exited(0);
    left.end()?;
    run.wait()?;
    Ok(())
}

fn update_changes_limits_of_a_running_container(t: &Test) -> Result<()> {
    let left = t.create(&t.script("echo up; sleep 1000")?)?;
    t.command("start")?;
    left.until("up\n")?;
    let limits = || -> Result<String> {
        let script = "cd /sys/fs/cgroup; cat memory.max memory.low pids.max cpu.max cpu.weight";
        Ok(t.invoke(&["exec", t.id(), "sh", "-c", script])?.exited(0).stderr("").text())
    };
    let options = [
        "--memory",
        "33554432",
        "--memory-reservation",
        "16777216",
        "--pids-limit",
        "44",
        "--cpu-quota",
        "50000",
        "--cpu-period",
        "100000",
        "--cpu-share",
        "2048",
    ];
    t.invoke(&[&["update"], &options[..], &[t.id()]].concat())?.exited(0).stdout("").stderr("");
    let text = limits()?;
    ensure!(text.starts_with("33554432\n16777216\n44\n50000 100000\n"), "{text}");
    // What is not named stays.
    let file = t.scratch().join("resources.json");
    std::fs::write(&file, json!({"pids": {"limit": 55}}).to_string())?;
    t.invoke(&["update", "--resources", &file.display().to_string(), t.id()])?.exited(0).stderr("");
    let text = limits()?;
    ensure!(text.starts_with("33554432\n16777216\n55\n50000 100000\n"), "{text}");
    // More than the machine has, and then more than any has.
    t.invoke(&["update", "--memory", "1073741824", t.id()])?.exited(0).stdout("").stderr("");
    let text = limits()?;
    ensure!(text.starts_with("1073741824\n"), "{text}");
    t.invoke(&["update", "--memory", "1099511627776", t.id()])?.exited(1).error(&["memory.limit", "machine"]);
    t.invoke(&["update", "--cpu-rt-period", "1", t.id()])?.exited(1).error(&["--cpu-rt-period"]);
    t.invoke(&["delete", "-f", t.id()])?.exited(0);
    left.end()?;
    Ok(())
}

fn spec_writes_a_config_that_runs(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["true"])?;
    let path = bundle.path().to_str().context("ASCII")?;
    std::fs::remove_file(bundle.path().join("config.json"))?;
    t.invoke(&["spec", "--bundle", path])?.exited(0).stdout("").stderr("");
    t.invoke(&["spec", "--bundle", path])?.exited(1).error(&["config.json", "exists"]);
    let text = std::fs::read_to_string(bundle.path().join("config.json"))?;
    let mut config: Value = serde_json::from_str(&text)?;
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(["sh", "-c", "echo $TERM; hostname"]);
    let bundle = bundle.with_text(&config.to_string())?;
    t.run(&bundle)?.exited(0).stdout("xterm\nkvrun\n").stderr("");
    Ok(())
}

fn features_are_a_document(t: &Test) -> Result<()> {
    let features: Value = serde_json::from_slice(&t.invoke(&["features"])?.exited(0).stderr("").stdout)?;
    ensure!(features["ociVersionMin"] == "1.0.0" && features["ociVersionMax"] == "1.2.0", "{features}");
    ensure!(
        features["linux"]["cgroup"]["v2"] == true && features["linux"]["seccomp"]["enabled"] == true,
        "{features}"
    );
    let hooks = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    ensure!(features["hooks"] == json!(hooks), "{features}");
    // Each option that is named makes a mount, and one that is not named is left to the file system, which knows none of that name.
    let options: Vec<&str> =
        features["mountOptions"].as_array().context("no options")?.iter().filter_map(Value::as_str).collect();
    let bundle = t.script("true")?.with(|spec| {
        for (number, option) in options.iter().enumerate().filter(|(_, option)| !option.ends_with("bind") && !option.ends_with("idmap")) {
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(json!({"destination": format!("/mnt/{number}"), "type": "tmpfs", "source": "tmpfs", "options": [option]}));
            }
        }
    })?;
    t.run(&bundle)?.exited(0).stdout("").stderr("");
    Ok(())
}
