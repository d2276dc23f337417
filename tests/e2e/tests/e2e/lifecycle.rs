//! `create`, `start`, `state`, `kill`, `delete`, `list`: what each command does in each state (runtime.md, "Lifecycle", "Operations").

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvrun_e2e::{Case, Test, cases, process, time};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = cases![
    container_goes_through_its_states,
    process_of_the_pid_file_ends_with_the_exit_code,
    process_of_the_pid_file_dies_of_the_containers_signal,
    unknown_container_is_named,
    refused_command_leaves_the_state_as_it_is,
    created_container_can_be_killed,
    signal_to_the_process_of_the_pid_file_reaches_the_container,
    creation_that_fails_leaves_nothing,
    killed_monitor_leaves_a_stopped_container_that_can_be_deleted,
    killed_vmm_leaves_a_stopped_container_that_can_be_deleted,
    container_whose_monitor_hangs_can_be_killed_and_deleted,
    container_of_a_hanging_guest_is_killed_in_time,
    output_that_nobody_reads_does_not_hold_the_end_up,
    detached_run_is_create_and_start,
    detached_run_that_cannot_start_leaves_nothing,
    foreground_run_is_seen_and_can_be_killed_by_others,
    kept_run_is_there_until_it_is_deleted,
    list_shows_every_container_and_its_state,
    error_goes_to_the_log_file_as_json,
    cgroup_on_the_host_goes_with_the_container,
];

fn container_goes_through_its_states(t: &Test) -> Result<()> {
    let late = t.scratch().join("late");
    fs::write(&late, "")?;
    let bundle = t.script("echo started; cat /etc/late; read line; exit 3")?.with(|spec| {
        spec["annotations"] = json!({"org.example.key": "value"});
    })?;
    let bundle = bundle.with_bind(&late, "/etc/late", &["bind"])?;
    // The standard input of `create` is the container's; here, /dev/null.
    let left = t.create(&bundle)?;
    let expected = json!({
        "ociVersion": "1.2.0", "id": t.id(), "status": "created", "pid": left.pid(),
        "bundle": bundle.path(), "annotations": {"org.example.key": "value"},
    });
    ensure!(t.state_document()? == expected, "{}", t.state_document()?);
    ensure!(left.text()?.is_empty(), "the program runs before the start");
    // As engines do with /etc/resolv.conf. The guest has looked at the file already, when it was mounted.
    fs::write(&late, "written before the start\n")?;
    t.command("start")?;
    left.until("started\n")?;
    ensure!(left.end()? == 3, "another exit code");
    ensure!(left.text()? == "started\nwritten before the start\n", "{}", left.text()?);
    let expected = json!({
        "ociVersion": "1.2.0", "id": t.id(), "status": "stopped",
        "bundle": bundle.path(), "annotations": {"org.example.key": "value"},
    });
    ensure!(t.state_document()? == expected, "{}", t.state_document()?);
    t.command("delete")?;
    t.invoke(&["state", t.id()])?.exited(1).stdout("").error(&[t.id(), "does not exist"]);
    Ok(())
}

fn process_of_the_pid_file_ends_with_the_exit_code(t: &Test) -> Result<()> {
    let left = t.create(&t.script("exit 42")?)?;
    t.command("start")?;
    ensure!(left.end()? == 42, "another exit code");
    t.command("delete")?;
    Ok(())
}

fn process_of_the_pid_file_dies_of_the_containers_signal(t: &Test) -> Result<()> {
    let left = t.create(&t.script("echo up; sleep 1000")?)?;
    t.command("start")?;
    left.until("up\n")?;
    ensure!(t.status()? == "running", "not running");
    t.invoke(&["kill", t.id(), "KILL"])?.exited(0).stdout("").stderr("");
    ensure!(left.end()? == 1009, "another end");
    t.command("delete")?;
    Ok(())
}

fn unknown_container_is_named(t: &Test) -> Result<()> {
    for command in ["state", "start", "kill", "delete", "pause", "resume", "ps", "events"] {
        t.invoke(&[command, t.id()])?.exited(1).stdout("").error(&[t.id(), "does not exist"]);
    }
    t.invoke(&["exec", t.id(), "true"])?.exited(1).stdout("").error(&[t.id(), "does not exist"]);
    t.invoke(&["update", "--memory", "100", t.id()])?.exited(1).error(&[t.id(), "does not exist"]);
    t.invoke(&["delete", "--force", t.id()])?.exited(0).stdout("").stderr("");
    t.invoke(&["state", "../x"])?.exited(1).error(&["../x"]);
    Ok(())
}

fn refused_command_leaves_the_state_as_it_is(t: &Test) -> Result<()> {
    let bundle = t.script("echo up; sleep 1000")?;
    let path = bundle.path().to_str().context("a path of ASCII")?;
    let refused = |args: &[&str], status: &str, words: &[&str]| -> Result<()> {
        t.invoke(args)?.exited(1).stdout("").error(words);
        ensure!(t.status()? == status, "{args:?} has changed the state to {}", t.status()?);
        Ok(())
    };
    let left = t.create(&bundle)?;
    refused(&["create", "--bundle", path, t.id()], "created", &[t.id(), "in use"])?;
    refused(&["delete", t.id()], "created", &["not stopped"])?;
    refused(&["resume", t.id()], "created", &["resume"])?;
    t.command("start")?;
    left.until("up\n")?;
    refused(&["start", t.id()], "running", &["start", "running"])?;
    refused(&["delete", t.id()], "running", &["not stopped", "running"])?;
    refused(&["kill", t.id(), "NOSUCH"], "running", &["NOSUCH"])?;
    refused(&["create", "--bundle", path, t.id()], "running", &[t.id(), "in use"])?;
    t.invoke(&["kill", "--all", t.id(), "9"])?.exited(0);
    left.end()?;
    refused(&["start", t.id()], "stopped", &["start", "stopped"])?;
    refused(&["kill", t.id(), "TERM"], "stopped", &["not running"])?;
    refused(&["exec", t.id(), "true"], "stopped", &["not running"])?;
    refused(&["pause", t.id()], "stopped", &["pause"])?;
    refused(&["ps", t.id()], "stopped", &["not running"])?;
    refused(&["create", "--bundle", path, t.id()], "stopped", &[t.id(), "in use"])?;
    t.invoke(&["kill", "--all", t.id(), "9"])?.exited(0).stderr("");
    t.command("delete")?;
    Ok(())
}

fn created_container_can_be_killed(t: &Test) -> Result<()> {
    let left = t.create(&t.bundle(&["/bin/true"])?)?;
    t.invoke(&["kill", t.id(), "SIGKILL"])?.exited(0).stdout("").stderr("");
    ensure!(left.end()? == 1009, "another end");
    ensure!(t.status()? == "stopped", "not stopped");
    t.command("delete")?;
    Ok(())
}

fn signal_to_the_process_of_the_pid_file_reaches_the_container(t: &Test) -> Result<()> {
    let left = t.create(&t.script("trap 'echo term; exit 7' TERM; echo up; sleep 1000 & wait")?)?;
    t.command("start")?;
    left.until("up\n")?;
    left.signal(Signal::TERM)?;
    ensure!(left.end()? == 7, "another exit code");
    ensure!(left.text()? == "up\nterm\n", "{:?}", left.text()?);
    t.command("delete")?;
    Ok(())
}

fn creation_that_fails_leaves_nothing(t: &Test) -> Result<()> {
    let missing = t.bundle(&["/bin/no-such-command"])?;
    let path = missing.path().to_str().context("a path of ASCII")?;
    let words = ["/bin/no-such-command", "no such file or directory"];
    t.invoke(&["create", "--bundle", path, t.id()])?.failed().stdout("").error(&words);
    t.invoke(&["state", t.id()])?.exited(1).error(&["does not exist"]);
    let pid_file = t.scratch().join("no/such/directory/pid").display().to_string();
    let good = t.bundle(&["/bin/true"])?;
    let path = good.path().to_str().context("a path of ASCII")?;
    let args = ["create", "--bundle", path, "--pid-file", &pid_file, t.id()];
    t.invoke(&args)?.exited(1).stdout("").error(&["pid file", &pid_file]);
    t.invoke(&["create", "--bundle", path, "--preserve-fds", "1", t.id()])?
        .exited(1)
        .error(&["preserve-fds"]);
    t.invoke(&["list", "-q"])?.exited(0).stdout("");
    Ok(())
}

/// The monitor and the VMM are gone, and the state says so.
fn stopped_for_good(t: &Test) -> Result<()> {
    ensure!(t.status()? == "stopped", "not stopped");
    ensure!(t.vmms().is_err(), "there is still a VMM");
    t.invoke(&["kill", t.id()])?.exited(1).error(&["not running"]);
    t.command("delete")?;
    t.invoke(&["list", "-q"])?.exited(0).stdout("");
    Ok(())
}

fn killed_monitor_leaves_a_stopped_container_that_can_be_deleted(t: &Test) -> Result<()> {
    let left = t.create(&t.script("sleep 1000")?)?;
    t.command("start")?;
    let vmms = t.vmms()?;
    left.signal(Signal::KILL)?;
    ensure!(left.end()? == 1009, "another end");
    for (_, vmm) in &vmms {
        process::gone_within(vmm, time::scaled(time::RUN)).context("the VMM outlived its monitor")?;
    }
    stopped_for_good(t)
}

fn killed_vmm_leaves_a_stopped_container_that_can_be_deleted(t: &Test) -> Result<()> {
    let left = t.create(&t.script("sleep 1000")?)?;
    t.command("start")?;
    for (_, vmm) in t.vmms()? {
        pidfd_send_signal(&vmm, Signal::KILL)?;
    }
    ensure!(left.end()? == 137, "another end");
    stopped_for_good(t)
}

/// What is bounded by 2 s, and the time it takes to start the command.
const BOUND: Duration = Duration::from_secs(3);

fn container_whose_monitor_hangs_can_be_killed_and_deleted(t: &Test) -> Result<()> {
    for command in [&["kill", t.id(), "KILL"][..], &["delete", "--force", t.id()]] {
        let left = t.create(&t.script("sleep 1000")?)?;
        t.command("start")?;
        left.signal(Signal::STOP)?;
        let began = Instant::now();
        t.invoke(command)?.exited(0).stdout("").stderr("");
        ensure!(began.elapsed() < time::scaled(BOUND), "it took {:?}", began.elapsed());
        ensure!(left.end()? == 1009, "another end");
        if command[0] == "kill" {
            stopped_for_good(t)?;
        }
    }
    t.invoke(&["state", t.id()])?.exited(1).error(&["does not exist"]);
    Ok(())
}

fn container_of_a_hanging_guest_is_killed_in_time(t: &Test) -> Result<()> {
    for command in [&["kill", t.id(), "KILL"][..], &["delete", "--force", t.id()]] {
        let left = t.create(&t.script("sleep 1000")?)?;
        t.command("start")?;
        // A VMM that does not run is a guest that does not answer.
        for (_, vmm) in t.vmms()? {
            pidfd_send_signal(&vmm, Signal::STOP)?;
        }
        let began = Instant::now();
        t.invoke(command)?;
        left.end()?;
        ensure!(began.elapsed() < time::scaled(BOUND), "it took {:?}", began.elapsed());
        if command[0] == "kill" {
            stopped_for_good(t)?;
        }
    }
    t.invoke(&["state", t.id()])?.exited(1).error(&["does not exist"]);
    Ok(())
}

fn output_that_nobody_reads_does_not_hold_the_end_up(t: &Test) -> Result<()> {
    let bundle = t.script("while :; do echo 0123456789; done")?;
    let (reader, writer) = std::io::pipe()?;
    let probe = writer.try_clone()?;
    let mut command = t.kvrun(["create", "-b", bundle.path().to_str().context("ASCII")?, t.id()]);
    let status = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "create: {status}");
    drop(command);
    t.command("start")?;
    let deadline = Instant::now() + time::scaled(time::RUN);
    let room = || poll(&mut [PollFd::new(&probe, PollFlags::OUT)], Some(&Timespec::default()));
    while room()? > 0 {
        ensure!(Instant::now() < deadline, "the pipe is not filled");
        std::thread::yield_now();
    }
    let began = Instant::now();
    t.invoke(&["kill", t.id(), "KILL"])?.exited(0).stderr("");
    while t.status()? != "stopped" {
        ensure!(began.elapsed() < time::scaled(BOUND), "it has not stopped after {:?}", began.elapsed());
    }
    let began = Instant::now();
    t.command("delete")?;
    ensure!(began.elapsed() < time::scaled(BOUND), "it took {:?}", began.elapsed());
    drop(reader);
    Ok(())
}

fn detached_run_is_create_and_start(t: &Test) -> Result<()> {
    let bundle = t.script("echo here; exit 4")?;
    let left = t.leave(&["run", "-d", "-b", bundle.path().to_str().context("ASCII")?], t.id())?;
    ensure!(left.end()? == 4, "another exit code");
    ensure!(left.text()? == "here\n", "{:?}", left.text()?);
    ensure!(t.status()? == "stopped", "not stopped");
    t.command("delete")?;
    Ok(())
}

fn detached_run_that_cannot_start_leaves_nothing(t: &Test) -> Result<()> {
    let bundle = t.script("true")?.with(|spec| {
        spec["hooks"] =
            json!({"poststart": [{"path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 9"]}]});
    })?;
    let path = bundle.path().to_str().context("ASCII")?;
    t.invoke(&["run", "-d", "-b", path, t.id()])?.exited(1).stdout("").error(&["poststart hook", "why"]);
    t.invoke(&["list", "-q"])?.exited(0).stdout("");
    Ok(())
}

fn foreground_run_is_seen_and_can_be_killed_by_others(t: &Test) -> Result<()> {
    let bundle = t.script("echo ready; sleep 1000")?;
    let run = t.start(&bundle)?.without_input();
    run.until("ready\n")?;
    ensure!(t.status()? == "running", "not running");
    t.invoke(&["delete", t.id()])?.exited(1).error(&["not stopped"]);
    t.invoke(&["kill", t.id(), "9"])?.exited(0);
    run.wait()?.exited(137).stdout("ready\n").stderr("");
    t.invoke(&["state", t.id()])?.exited(1).error(&["does not exist"]);
    Ok(())
}

fn kept_run_is_there_until_it_is_deleted(t: &Test) -> Result<()> {
    let bundle = t.script("echo here; exit 6")?;
    let path = bundle.path().to_str().context("ASCII")?;
    t.invoke(&["run", "--keep", "-b", path, t.id()])?.exited(6).stdout("here\n").stderr("");
    ensure!(t.status()? == "stopped", "not stopped");
    t.invoke(&["run", "-b", path, t.id()])?.exited(1).error(&[t.id(), "in use"]);
    t.command("delete")?;
    t.run(&bundle)?.exited(6);
    t.invoke(&["list", "-q"])?.exited(0).stdout("");
    Ok(())
}

fn list_shows_every_container_and_its_state(t: &Test) -> Result<()> {
    let (one, two) = (format!("{}-one", t.id()), format!("{}-two", t.id()));
    t.invoke(&["list", "--format", "json"])?.exited(0).stdout("[]\n");
    let bundle = t.bundle(&["/bin/true"])?;
    let (first, second) = (t.create_as(&one, &bundle)?, t.create_as(&two, &bundle)?);
    t.invoke(&["start", &one])?.exited(0);
    first.end()?;
    t.invoke(&["list", "-q"])?.exited(0).stdout(&format!("{one}\n{two}\n"));
    let all: Vec<Value> = serde_json::from_slice(&t.invoke(&["list", "-f", "json"])?.stdout)?;
    let seen: Vec<Value> = all.iter().map(|c| json!([c["id"], c["status"], c["pid"], c["bundle"]])).collect();
    let expected =
        [json!([one, "stopped", 0, bundle.path()]), json!([two, "created", second.pid(), bundle.path()])];
    ensure!(seen == expected, "{all:?}");
    let table = t.invoke(&["list"])?.exited(0).text();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    ensure!(rows[0] == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"], "{table}");
    ensure!(rows[1][..3] == [one.as_str(), "0", "stopped"], "{table}");
    ensure!(rows[2][..3] == [two.as_str(), &second.pid().to_string(), "created"], "{table}");
    t.invoke(&["delete", &one])?.exited(0);
    t.invoke(&["delete", "--force", &two])?.exited(0).stderr("");
    second.end()?;
    t.invoke(&["list", "-q"])?.exited(0).stdout("");
    Ok(())
}

fn error_goes_to_the_log_file_as_json(t: &Test) -> Result<()> {
    let log = t.scratch().join("log.json");
    let log_path = log.display().to_string();
    t.invoke(&["--log", &log_path, "--log-format", "json", "state", t.id()])?.exited(1);
    let text = fs::read_to_string(&log)?;
    let line: Value = serde_json::from_str(text.lines().last().context("an empty log")?)?;
    ensure!(line["level"] == "error" && line["time"].is_string(), "{line}");
    ensure!(line["msg"].as_str().is_some_and(|msg| msg.contains("does not exist")), "{line}");
    Ok(())
}

fn cgroup_on_the_host_goes_with_the_container(t: &Test) -> Result<()> {
    let at = |path: &str| std::path::Path::new("/sys/fs/cgroup").join(path);
    for (path, option, directory) in [
        (format!("/{}/c", t.id()), "--cgroup-manager=cgroupfs", format!("{}/c", t.id())),
        (
            format!("{}.slice:kvrun:c", t.id().replace('-', "_")),
            "--systemd-cgroup",
            format!("{}.slice/kvrun-c.scope", t.id().replace('-', "_")),
        ),
    ] {
        for end in [Signal::TERM, Signal::KILL] {
            let bundle = t.script("trap 'exit 0' TERM; echo up; sleep 1000 & wait")?;
            let bundle = bundle.with(|spec| spec["linux"]["cgroupsPath"] = json!(path))?;
            let left =
                t.leave(&[option, "create", "-b", bundle.path().to_str().context("ASCII")?], t.id())?;
            t.command("start")?;
            left.until("up\n")?;
            let procs = fs::read_to_string(at(&directory).join("cgroup.procs"))?;
            ensure!(
                procs.lines().any(|pid| pid == left.pid().to_string()),
                "{procs:?} has no {}",
                left.pid()
            );
            left.signal(end)?;
            left.end()?;
            t.command("delete")?;
            ensure!(!at(&directory).exists(), "{directory} is still there");
        }
    }
    Ok(())
}
