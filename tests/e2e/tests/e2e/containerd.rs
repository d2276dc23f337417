//! containerd with our shim, by `ctr`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use kvrun_e2e::containerd::{Containerd, IMAGE, RUNTIME, SHIM, task_events};
use kvrun_e2e::loop_device::ext4;
use kvrun_e2e::{Case, Terminal, Test, cases, process, time};
use kvrun_pod::pod::{SHARE_SLOT, SLOTS};
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::Value;

use crate::cri::setting;
use crate::network::{look, namespace};
use crate::stdio::{Noise, SEED};

pub(crate) const CASES: &[Case] = cases![
    run_passes_streams_and_exit_codes,
    runtime_tells_what_it_is,
    default_profile_of_apparmor_is_left_out,
    output_arrives_complete_and_in_order,
    output_goes_to_files_and_logging_programs,
    client_comes_and_goes_while_the_output_waits,
    child_that_keeps_output_open_holds_nobody_up,
    task_is_used_by_every_call_and_its_events_are_in_order,
    oom_kill_is_an_event_when_it_happens,
    signals_reach_one_process_or_all,
    task_that_is_killed_with_its_machine_or_shim_leaves_nothing,
    task_outlives_containerd,
    pod_is_on_the_network_of_its_namespace,
    root_file_system_is_on_a_disk,
    root_file_system_is_in_layers_of_the_guest,
    layers_are_there_once_for_all_containers_of_a_pod,
    layers_that_have_no_room_are_served_as_files,
];

/// An image of several layers.
const LAYERED: &str = "localhost/layered:latest";
/// That the guest has them.
pub(crate) const IN_LAYERS: &str =
    "grep -q '^overlay / overlay rw,.*lowerdir=/run/kvrun/layers/' /proc/mounts";

/// The arguments of `ctr run`.
fn run<'a>(flags: &[&'a str], id: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["run", "--runtime", RUNTIME];
    all.extend(flags);
    all.extend([IMAGE, id]);
    all.extend(args);
    all
}

fn run_passes_streams_and_exit_codes(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let script = "cat; echo problem >&2; uname -r >&2; exit 7";
    let mut started = containerd.start(&run(&["--rm"], t.id(), &["sh", "-c", script]))?;
    let mut stdin = started.stdin.take().context("no stdin")?;
    stdin.write_all(b"from outside\n")?;
    // `ctr` misses an end of its input that comes before the container is there.
    started.until("from outside")?;
    drop(stdin);
    let outcome = started.wait()?.exited(7).stdout("from outside\n");
    let guest = outcome.stderr.strip_prefix("problem\n").context("no stderr")?;
    ensure!(guest != fs::read_to_string("/proc/sys/kernel/osrelease")?, "the kernel of the host: {guest}");

    let outcome = containerd.ctr(&run(&["--rm"], t.id(), &["/no/such/program"]))?.failed();
    ensure!(outcome.stderr.contains("\"/no/such/program\" does not exist in the container"), "{outcome}");

    let terminal = Terminal::open(31, 97)?;
    let shell = containerd.start_on(&terminal, &run(&["--rm", "--tty"], t.id(), &["sh"]))?;
    shell.until("# ")?;
    terminal.keys(b"stty size; tty\n")?;
    shell.until("31 97")?;
    shell.until("/dev/pts/0")?;
    terminal.keys(b"exit 9\n")?;
    shell.wait()?.exited(9);
    containerd.end()
}

fn runtime_tells_what_it_is(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let text = containerd.ctr(&["plugins", "inspect-runtime", "--runtime", RUNTIME])?.exited(0).text();
    let info: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(info["Name"] == RUNTIME, "{text}");
    let features: Value = serde_json::from_str(&t.invoke(&["features"])?.exited(0).text())?;
    for field in ["/ociVersionMax", "/hooks", "/mountOptions", "/linux/namespaces", "/linux/seccomp/actions"]
    {
        let told = info["Features"].pointer(field);
        ensure!(told.is_some() && told == features.pointer(field), "{field}: {text}");
    }
    containerd.end()
}

/// containerd's CRI asks for it for every container of a host with AppArmor that is not privileged.
fn default_profile_of_apparmor_is_left_out(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let flags = |profile| ["--rm", "--apparmor-profile", profile];
    containerd.ctr(&run(&flags("cri-containerd.apparmor.d"), t.id(), &["true"]))?.exited(0);
    let outcome = containerd.ctr(&run(&flags("mine"), t.id(), &["true"]))?.failed();
    ensure!(outcome.stderr.contains("process.apparmorProfile is \"mine\""), "{outcome}");
    containerd.end()
}

/// The environment variable with how many MiB a container writes, if not 1024.
const OUTPUT_VARIABLE: &str = "KVRUN_E2E_OUTPUT_MIB";

fn output_arrives_complete_and_in_order(t: &Test) -> Result<()> {
    const BLOCK: usize = 4 << 20;
    let blocks = (setting(OUTPUT_VARIABLE, 1024)? << 20).div_ceil(BLOCK);
    let containerd = Containerd::new(t)?;
    let volume = t.scratch().join("volume");
    fs::create_dir(&volume)?;
    let mut block = vec![0; BLOCK];
    Noise(SEED).fill(&mut block);
    fs::write(volume.join("block"), &block)?;
    let bind = format!("type=bind,src={},dst=/volume,options=rbind:ro", volume.display());
    let script = format!(
        "cp /volume/block /dev/shm; i=0; while [ $i -lt {blocks} ]; do echo $i; cat /dev/shm/block; i=$((i+1)); done; exit 6"
    );
    let args = run(&["--rm", "--mount", &bind], t.id(), &["sh", "-c", &script]);
    let mut ctr = containerd.command(&args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut stdout = BufReader::new(ctr.stdout.take().context("no stdout")?);
    let (mut line, mut got) = (String::new(), vec![0; BLOCK]);
    for number in 0..blocks {
        line.clear();
        stdout.read_line(&mut line)?;
        ensure!(line == format!("{number}\n"), "block {number} begins with {line:?}");
        stdout.read_exact(&mut got)?;
        ensure!(got == block, "block {number} of {blocks} has changed");
    }
    ensure!(stdout.read(&mut got)? == 0, "more than was written");
    let status = process::wait_within(&mut ctr, time::scaled(time::RUN))?;
    ensure!(status.code() == Some(6), "ctr ended with {status}");
    containerd.end()
}

fn output_goes_to_files_and_logging_programs(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let (log, program) = (t.scratch().join("log"), t.scratch().join("logger"));
    // What it is told, and how (containerd's core/runtime/v2/README.md, "Logging").
    let text = "#!/bin/sh\nexec 9>>\"$2\" 5>&-\necho $1 $CONTAINER_NAMESPACE $CONTAINER_ID >&9\n\
        cat <&3 >&9 & cat <&4 >&9; wait; echo written >&9\n";
    fs::write(&program, text)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let to_program = format!("binary://{}?to={}", program.display(), log.display());
    let begin = format!("to default {}\n", t.id());
    let expected: [(&str, &str, &str); 2] =
        [(&format!("file://{}", log.display()), "", ""), (&to_program, &begin, "written\n")];
    for (uri, begin, end) in expected {
        let script = "echo out; echo err >&2; exit 2";
        let task = ["--detach", "--log-uri", uri];
        containerd.ctr(&run(&task, t.id(), &["sh", "-c", script]))?.exited(0);
        time::until("the container has ended", || {
            Ok(containerd.ctr(&["task", "list"])?.exited(0).text().contains("STOPPED"))
        })?;
        // What it wrote is there when it is deleted, or soon after: nobody waits for a logging program.
        containerd.ctr(&["task", "delete", t.id()])?.exited(0);
        time::until("all is written down", || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            Ok(text.starts_with(begin)
                && text.ends_with(end)
                && text.contains("out\n")
                && text.contains("err\n"))
        })?;
        fs::remove_file(&log)?;
        containerd.ctr(&["container", "delete", t.id()])?.exited(0);
    }
    containerd.end()
}

fn client_comes_and_goes_while_the_output_waits(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let id = t.id();
    let script =
        "echo one; until [ -e /go ]; do sleep 0.1; done; echo two; read line; echo got $line; exit 8";
    let mut first = containerd.start(&run(&["--rm"], id, &["sh", "-c", script]))?;
    first.until("one")?;
    // Detached: nobody reads what it writes meanwhile.
    first.kill()?;
    containerd.ctr(&["task", "exec", "--exec-id", "first", id, "touch", "/go"])?.exited(0);
    let mut second = containerd.start(&["task", "attach", id])?;
    second.until("two\n")?;
    second.stdin.as_ref().context("no stdin")?.write_all(b"three\n")?;
    second.until("got three\n")?;
    second.stdin = None;
    second.wait()?.exited(8).stdout("two\ngot three\n");
    containerd.ctr(&["container", "delete", id])?.exited(0);

    // A terminal: its size follows that of the client's, also in a further process.
    containerd.ctr(&run(&["--detach"], id, &["sleep", "1000"]))?.exited(0);
    let terminal = Terminal::open(31, 97)?;
    let shell = containerd.start_on(&terminal, &["task", "exec", "--tty", "--exec-id", "shell", id, "sh"])?;
    shell.until("# ")?;
    terminal.keys(b"stty size\n")?;
    shell.until("31 97")?;
    terminal.resize(17, 53)?;
    let asked = || -> Result<bool> {
        terminal.keys(b"stty size\n")?;
        Ok(shell.stdout.text().contains("17 53"))
    };
    time::until("the new size is there", asked)?;
    terminal.keys(b"exit 9\n")?;
    shell.wait()?.exited(9);
    containerd.ctr(&["task", "kill", "--signal", "KILL", id])?.exited(0);
    containerd.ctr(&["task", "attach", id])?.exited(137);
    containerd.ctr(&["container", "delete", id])?.exited(0);
    containerd.end()
}

fn child_that_keeps_output_open_holds_nobody_up(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let id = t.id();
    containerd.ctr(&run(&["--detach"], id, &["sleep", "1000"]))?.exited(0);
    // The child outlives the command, and has its output.
    let exec = ["task", "exec", "--exec-id", "first", id, "sh", "-c", "sleep 1000 & echo done; exit 4"];
    containerd.ctr(&exec)?.exited(4).stdout("done\n");
    let exec = ["task", "exec", "--exec-id", "second", id, "sh", "-c", "ps | grep -c '[s]leep 1000'"];
    containerd.ctr(&exec)?.exited(0).stdout("2\n");
    containerd.ctr(&["task", "kill", "--signal", "KILL", id])?.exited(0);
    containerd.ctr(&["task", "attach", id])?.exited(137);
    containerd.ctr(&["container", "delete", id])?.exited(0);
    containerd.end()
}

fn task_is_used_by_every_call_and_its_events_are_in_order(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let events = containerd.events()?;
    let id = t.id();
    let script = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
    let limit = ["--detach", "--memory-limit", "67108864"];
    containerd.ctr(&run(&limit, id, &["sh", "-c", script]))?.exited(0);
    let refused = |args: &[&str], words: &str| -> Result<()> {
        let outcome = containerd.ctr(args)?.failed();
        ensure!(outcome.stderr.contains(words), "{args:?}: {outcome}");
        Ok(())
    };
    refused(&["task", "delete", id], "failed precondition")?;
    refused(&["task", "kill", "--exec-id", "none", id], "process none does not exist")?;
    refused(&["task", "checkpoint", id], "cannot be checkpointed")?;

    let exec = ["task", "exec", "--exec-id", "first", id, "sh", "-c", "cat; ps; exit 5"];
    let mut exec = containerd.start(&exec)?;
    let mut stdin = exec.stdin.take().context("no stdin")?;
    stdin.write_all(b"input\n")?;
    exec.until("input")?;
    refused(&["task", "exec", "--exec-id", "first", id, "true"], "process first exists already")?;
    let pids = containerd.ctr(&["task", "ps", id])?.exited(0).text();
    // The first one's script, that of the further one, and its `cat`.
    let pids = pids.lines().skip(1).filter_map(|line| line.split_whitespace().next()?.parse().ok());
    let pids: Vec<u32> = pids.collect();
    ensure!(pids.len() >= 3 && pids.contains(&1), "{pids:?}");
    drop(stdin);
    let outcome = exec.wait()?.exited(5);
    ensure!(
        outcome.text().starts_with("input\n") && outcome.text().contains("1 root     sh -c trap"),
        "{outcome}"
    );

    let text = containerd.ctr(&["task", "metrics", "--format", "json", id])?.exited(0).text();
    let metrics: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(metrics["memory"]["usage_limit"] == 67_108_864, "{text}");
    ensure!(metrics["cpu"]["usage_usec"].as_u64().is_some_and(|used| used > 0), "{text}");

    // What can be seen of the machine, by its ID, or that and the namespace.
    let seen = t.invoke(&["metrics", id])?.exited(0).stderr("").text();
    let up = format!("kvrun_agent_up{{namespace=\"default\",pod=\"{id}\"}} 1");
    ensure!(seen.lines().any(|line| line == up), "{up}: {seen}");
    let log = t.invoke(&["logs", "--guest", &format!("default/{id}")])?.exited(0).stderr("").text();
    ensure!(log.contains("] Linux version "), "{log}");

    let statuses = |status: &str| -> Result<()> {
        let list = containerd.ctr(&["task", "list"])?.exited(0).text();
        ensure!(list.lines().any(|line| line.starts_with(id) && line.ends_with(status)), "{status}: {list}");
        Ok(())
    };
    statuses("RUNNING")?;
    containerd.ctr(&["task", "pause", id])?.exited(0);
    statuses("PAUSED")?;
    containerd.ctr(&["task", "resume", id])?.exited(0);
    statuses("RUNNING")?;
    containerd.ctr(&["task", "kill", "--signal", "TERM", id])?.exited(0);
    // It deletes the task once that has ended.
    containerd.ctr(&["task", "attach", id])?.exited(3);
    containerd.ctr(&["container", "delete", id])?.exited(0);

    events.until("/tasks/delete")?;
    events.signal(Signal::TERM)?;
    let seen = events.stdout.text();
    let happened = task_events(&seen)?;
    let topics: Vec<&str> = happened.iter().map(|(topic, _)| *topic).collect();
    let checkpoint = ["paused", "resumed"];
    let expected = ["create", "start"].iter().chain(&checkpoint).chain(&[
        "exec-added",
        "exec-started",
        "exit",
        "paused",
        "resumed",
        "exit",
        "delete",
    ]);
    ensure!(topics.iter().eq(expected), "{topics:?}: {seen}");
    events_tell_what_has_happened(&happened, id)?;
    drop(events);
    containerd.end()
}

/// The payloads of the events of a task that ran the process `first`.
fn events_tell_what_has_happened(happened: &[(&str, Value)], id: &str) -> Result<()> {
    let mut pid = None;
    for (topic, payload) in happened {
        ensure!(payload["container_id"] == id, "{topic}: {payload}");
        let exec = payload.get("exec_id").or(payload.get("id")).and_then(Value::as_str);
        match (*topic, exec) {
            ("create" | "start", _) => {
                ensure!(payload["pid"].as_u64() > Some(0), "{topic}: {payload}");
                ensure!(
                    pid.is_none() || pid == payload["pid"].as_u64(),
                    "another process: {topic}: {payload}"
                );
                pid = payload["pid"].as_u64();
            }
            ("exec-added", exec) => ensure!(exec == Some("first"), "{topic}: {payload}"),
            ("exec-started", exec) => {
                ensure!(exec == Some("first") && payload["pid"].as_u64() > Some(0), "{topic}: {payload}");
            }
            ("exit", Some("first")) => {
                ensure!(
                    payload["exit_status"] == 5 && payload.get("exited_at").is_some(),
                    "{topic}: {payload}"
                );
            }
            ("exit", exec) => {
                ensure!(exec == Some(id) && payload["pid"].as_u64() == pid, "{topic}: {payload}");
                ensure!(
                    payload["exit_status"] == 3 && payload.get("exited_at").is_some(),
                    "{topic}: {payload}"
                );
            }
            ("delete", _) => ensure!(payload["exit_status"] == 3, "{topic}: {payload}"),
            _ => {}
        }
    }
    ensure!(pid.is_some(), "{happened:?}");
    Ok(())
}

fn oom_kill_is_an_event_when_it_happens(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let events = containerd.events()?;
    let id = t.id();
    // A child of the container's process, and then that itself.
    let script = "echo up; read line; dd if=/dev/zero of=/dev/null bs=100M count=1; echo over; read line; \
        exec dd if=/dev/zero of=/dev/null bs=100M count=1";
    let limit = ["--rm", "--memory-limit", "33554432"];
    let mut started = containerd.start(&run(&limit, id, &["sh", "-c", script]))?;
    let mut stdin = started.stdin.take().context("no stdin")?;
    started.until("up\n")?;
    stdin.write_all(b"go\n")?;
    events.until("/tasks/oom")?;
    started.until("over\n")?;
    let list = containerd.ctr(&["task", "list"])?.exited(0).text();
    ensure!(list.lines().any(|line| line.starts_with(id) && line.ends_with("RUNNING")), "{list}");
    stdin.write_all(b"go\n")?;
    started.wait()?.exited(137);

    events.until("/tasks/delete")?;
    events.signal(Signal::TERM)?;
    let seen = events.stdout.text();
    let happened = task_events(&seen)?;
    let topics: Vec<&str> = happened.iter().map(|(topic, _)| *topic).collect();
    ensure!(topics == ["create", "start", "oom", "oom", "exit", "delete"], "{topics:?}: {seen}");
    for (topic, payload) in happened.iter().filter(|(topic, _)| *topic == "oom") {
        ensure!(payload["container_id"] == id, "{topic}: {payload}");
    }
    drop(events);
    containerd.end()
}

/// `ctr task kill` of one further process, and of all there is.
fn signals_reach_one_process_or_all(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let id = t.id();
    // Only a signal for all processes reaches the child, for which the first one waits.
    let child = "trap 'echo heard > /said; exit' TERM; touch /ready; while :; do sleep 0.1; done";
    let script = format!("trap : TERM; sh -c \"{child}\" & while ! [ -e /said ]; do wait; done; exit 7");
    containerd.ctr(&run(&["--detach"], id, &["sh", "-c", &script]))?.exited(0);
    let ready =
        ["task", "exec", "--exec-id", "ready", id, "sh", "-c", "until [ -e /ready ]; do sleep 0.1; done"];
    containerd.ctr(&ready)?.exited(0);
    let exec = containerd.start(&[
        "task",
        "exec",
        "--exec-id",
        "one",
        id,
        "sh",
        "-c",
        "echo up; exec sleep 1000",
    ])?;
    exec.until("up")?;
    containerd.ctr(&["task", "kill", "--signal", "KILL", "--exec-id", "one", id])?.exited(0);
    exec.wait()?.exited(137);
    let list = containerd.ctr(&["task", "list"])?.exited(0).text();
    ensure!(list.lines().any(|line| line.starts_with(id) && line.ends_with("RUNNING")), "{list}");
    containerd.ctr(&["task", "kill", "--signal", "TERM", "--all", id])?.exited(0);
    containerd.ctr(&["task", "attach", id])?.exited(7);
    containerd.ctr(&["container", "delete", id])?.exited(0);
    containerd.end()
}

fn task_that_is_killed_with_its_machine_or_shim_leaves_nothing(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let id = t.id();
    let running = containerd.start(&run(&["--rm"], id, &["sh", "-c", "echo up; sleep 1000"]))?;
    running.until("up")?;
    for (_, vmm) in t.vmms()? {
        pidfd_send_signal(vmm, Signal::KILL)?;
    }
    running.wait()?.exited(137);
    ensure!(containerd.log().contains("the virtual machine died"), "{}", containerd.log());

    let running = containerd.start(&run(&["--rm"], id, &["sh", "-c", "echo up; sleep 1000"]))?;
    running.until("up")?;
    for (_, shim) in t.processes(SHIM)? {
        pidfd_send_signal(shim, Signal::KILL)?;
    }
    // Nobody is left to say how it ended; that containerd cleans up is what counts.
    running.wait()?.exited(1);
    containerd.end()
}

fn task_outlives_containerd(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let id = t.id();
    let script = "until [ -e /go ]; do sleep 0.1; done; exit 4";
    containerd.ctr(&run(&["--detach"], id, &["sh", "-c", script]))?.exited(0);
    containerd.restart()?;
    containerd.ctr(&["task", "exec", "--exec-id", "first", id, "touch", "/go"])?.exited(0);
    containerd.ctr(&["task", "attach", id])?.exited(4);
    containerd.ctr(&["container", "delete", id])?.exited(0);
    containerd.end()
}

fn pod_is_on_the_network_of_its_namespace(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let id = t.id();
    let own = namespace(t)?;
    let _wire = own.connect("eth0", 1)?;
    let before = look(&own)?;
    let network = format!("network:{}", own.path().display());
    let on = ["--rm", "--with-ns", &network];
    let script = "ip -o addr show dev eth0; ping -c 1 -q 10.9.1.1";
    let is_on_it = || -> Result<()> {
        let text = containerd.ctr(&run(&on, id, &["sh", "-c", script]))?.exited(0).text();
        ensure!(text.contains("10.9.1.2/24") && text.contains("1 packets received"), "{text}");
        ensure!(look(&own)? == before, "before:\n{before}after:\n{}", look(&own)?);
        Ok(())
    };
    is_on_it()?;
    // Who is killed gives it back, too.
    let running = containerd.start(&run(&on, id, &["sh", "-c", "echo up; sleep 1000"]))?;
    running.until("up")?;
    for (_, shim) in t.processes(SHIM)? {
        pidfd_send_signal(shim, Signal::KILL)?;
    }
    running.wait()?.exited(1);
    is_on_it()?;

    let refused = ["--rm", "--with-ns", "network:/proc/1/ns/net"];
    let outcome = containerd.ctr(&run(&refused, id, &["true"]))?.failed();
    ensure!(outcome.stderr.contains("/proc/1/ns/net is the network namespace of the host"), "{outcome}");
    containerd.end()
}

/// The configuration of a snapshotter that has file systems in files, in such a directory.
pub(crate) fn blockfile(t: &Test, disks: &Path) -> Result<String> {
    let empty = t.scratch().join("empty.ext4");
    ext4(&empty, 24)?;
    Ok(format!(
        "[plugins.'io.containerd.snapshotter.v1.blockfile']\nroot_path = {disks:?}\nscratch_file = {empty:?}\n\
         fs_type = \"ext4\"\nmount_options = [\"loop\"]\n"
    ))
}

fn root_file_system_is_on_a_disk(t: &Test) -> Result<()> {
    let disks = t.scratch().join("blockfile");
    let containerd = Containerd::with_config(t, &blockfile(t, &disks)?)?;
    let volume = t.scratch().join("volume");
    fs::create_dir(&volume)?;
    let bind = format!("type=bind,src={},dst=/made/for/it,options=rbind", volume.display());
    let flags = ["--snapshotter", "blockfile", "--cwd", "/new/directory", "--mount", &bind];

    // Machine by machine: what the first has written is there for the second.
    let script =
        "[ -e /sum ] && exec sha256sum -c /sum; grep ' / ' /proc/mounts; pwd; echo out > /made/for/it/file
        head -c 4000000 /dev/urandom > /data; sha256sum /data > /sum; exit 3";
    let create = ["container", "create", "--runtime", RUNTIME];
    containerd.ctr(&[&create[..], &flags, &[IMAGE, t.id(), "sh", "-c", script]].concat())?.exited(0);
    let first = containerd.ctr(&["task", "start", t.id()])?.exited(3);
    let said = first.text();
    let mut lines = said.lines();
    let mount = lines.next().unwrap_or_default();
    ensure!(mount.starts_with("/dev/vd") && mount.contains(" ext4 rw"), "{first}");
    ensure!(lines.next() == Some("/new/directory"), "{first}");
    ensure!(fs::read_to_string(volume.join("file"))? == "out\n");
    for disk in fs::read_dir(disks.join("snapshots"))? {
        let checked = Command::new("e2fsck").arg("-fn").arg(disk?.path()).output().context("e2fsck")?;
        ensure!(checked.status.success(), "e2fsck: {}", String::from_utf8_lossy(&checked.stdout));
    }
    let second = containerd.ctr(&["task", "start", t.id()])?.exited(0);
    ensure!(second.text() == "/data: OK\n", "{second}");
    containerd.ctr(&["container", "delete", t.id()])?.exited(0);

    // Its mount points are made all the same.
    let script = "cat /made/for/it/file; pwd; touch /x";
    let args = run(&[&["--rm", "--read-only"][..], &flags].concat(), t.id(), &["sh", "-c", script]);
    let outcome = containerd.ctr(&args)?.exited(1);
    ensure!(outcome.text() == "out\n/new/directory\n", "{outcome}");
    ensure!(outcome.stderr.contains("Read-only file system"), "{outcome}");
    containerd.end()
}

/// The configuration of the EROFS snapshotter, on a host that is made to know that file system.
pub(crate) fn erofs() -> Result<&'static str> {
    let loaded = Command::new("modprobe").arg("erofs").status().context("modprobe")?;
    ensure!(loaded.success(), "modprobe erofs: {loaded}");
    Ok("[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['erofs', 'walking']\n")
}

/// A containerd with the EROFS snapshotter.
fn with_erofs(t: &Test) -> Result<Containerd<'_>> {
    Containerd::with_config(t, erofs()?)
}

/// The arguments of `ctr run` for [`LAYERED`].
fn run_layered<'a>(flags: &[&'a str], id: &'a str, script: &'a str) -> Vec<&'a str> {
    let run = ["run", "--runtime", RUNTIME, "--snapshotter", "erofs"];
    [&run[..], flags, &[LAYERED, id, "sh", "-c", script]].concat()
}

/// Has containerd forget all images, and so what the EROFS snapshotter has of them: it leaves them mounted as long as they are there.
pub(crate) fn forget_layers(containerd: &Containerd<'_>) -> Result<()> {
    let images = containerd.ctr(&["image", "list", "--quiet"])?.exited(0).text();
    let remove: Vec<&str> = ["image", "rm", "--sync"].into_iter().chain(images.lines()).collect();
    containerd.ctr(&remove)?.exited(0);
    let left = containerd.ctr(&["snapshot", "--snapshotter", "erofs", "list"])?.exited(0).text();
    ensure!(left.lines().count() == 1, "{left}");
    Ok(())
}

/// How many layers the VMMs have mapped.
fn mapped_layers(t: &Test) -> Result<Vec<usize>> {
    let count = |pid: i32| -> Result<usize> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        Ok(maps.lines().filter(|line| line.ends_with("/layer.erofs")).count())
    };
    t.vmms()?.into_iter().map(|(pid, _)| count(pid)).filter(|n| !matches!(n, Ok(0))).collect()
}

fn root_file_system_is_in_layers_of_the_guest(t: &Test) -> Result<()> {
    let containerd = with_erofs(t)?;
    let lower = [("lower", "of the lower layer\n"), ("gone", ""), ("opaque/lower", ""), ("dir/lower", "")];
    let upper = [
        ("upper", "of the upper layer\n"),
        (".wh.gone", ""),
        ("opaque/.wh..wh..opq", ""),
        ("opaque/upper", ""),
    ];
    containerd.import_layers(LAYERED, &[&lower, &upper])?;

    // Machine by machine: what the first has changed is so for the second.
    let script = format!(
        "{IN_LAYERS} || exec cat /proc/mounts
        if [ ! -e /file ]; then
            cat /lower /upper; echo /gone /opaque/* /dir/* /sys/block/pmem*
            echo written > /file; echo more >> /lower; rm /upper; mv /etc/passwd /moved
            rm -r /dir; mkdir /dir; touch /dir/new; ln -s /file /link; chown 7:8 /root; chmod 700 /root
        fi
        cat /file /lower; head -c 4 /moved; echo; echo /dir/* /etc/*; stat -c '%u %g %a' /root
        readlink /link; ls -A /; exit 3"
    );
    let create =
        ["container", "create", "--runtime", RUNTIME, "--snapshotter", "erofs", "--cwd", "/new/directory"];
    containerd.ctr(&[&create[..], &[LAYERED, t.id(), "sh", "-c", &script]].concat())?.exited(0);
    let first = containerd.ctr(&["task", "start", t.id()])?.exited(3).text();
    let changed = "written\nof the lower layer\nmore\nroot\n/dir/new /etc/group\n7 8 700\n/file\n";
    let names = "bin\ndev\ndir\netc\nfile\nlink\nlower\nmoved\nnew\nopaque\nproc\nroot\nrun\nsys\ntmp\n";
    let before = "of the lower layer\nof the upper layer\n/gone /opaque/upper /dir/lower \
        /sys/block/pmem0 /sys/block/pmem1 /sys/block/pmem2\n";
    ensure!(first == format!("{before}{changed}{names}"), "{first}");
    let second = containerd.ctr(&["task", "start", t.id()])?.exited(3).text();
    ensure!(second == format!("{changed}{names}"), "{second}");
    containerd.ctr(&["container", "delete", t.id()])?.exited(0);

    // Its mount points are made all the same.
    let script = "pwd; touch /x";
    let flags = ["--rm", "--read-only", "--cwd", "/new/directory"];
    let outcome = containerd.ctr(&run_layered(&flags, t.id(), script))?.exited(1);
    ensure!(outcome.text() == "/new/directory\n", "{outcome}");
    ensure!(outcome.stderr.contains("Read-only file system"), "{outcome}");
    forget_layers(&containerd)?;
    containerd.end()
}

fn layers_are_there_once_for_all_containers_of_a_pod(t: &Test) -> Result<()> {
    let containerd = with_erofs(t)?;
    containerd.import_layers(LAYERED, &[&[("layer", "one\n")]])?;
    let (sandbox, member) = (t.id().to_owned(), format!("{}-member", t.id()));
    let of_pod = format!("io.kubernetes.cri.sandbox-id={sandbox}");
    let kind = |kind: &str| format!("io.kubernetes.cri.container-type={kind}");
    let (first, further) = (kind("sandbox"), kind("container"));
    let flags = |kind| ["--detach", "--annotation", &of_pod, "--annotation", kind];
    containerd.ctr(&run_layered(&flags(&first), &sandbox, "sleep 1000"))?.exited(0);
    // It comes and goes.
    for _ in 0..2 {
        let script = format!("{IN_LAYERS} && cat /layer && rm /layer && sleep 1000");
        containerd.ctr(&run_layered(&flags(&further), &member, &script))?.exited(0);
        let exec = [
            "task",
            "exec",
            "--exec-id",
            "look",
            &member,
            "sh",
            "-c",
            "while [ -e /layer ]; do sleep 0.1; done",
        ];
        containerd.ctr(&exec)?.exited(0);
        ensure!(mapped_layers(t)? == [2], "{:?}", mapped_layers(t)?);
        containerd.ctr(&["task", "kill", "--signal", "KILL", &member])?.exited(0);
        containerd.ctr(&["task", "attach", &member])?.exited(137);
        containerd.ctr(&["container", "delete", &member])?.exited(0);
    }
    ensure!(mapped_layers(t)? == [2], "{:?}", mapped_layers(t)?);
    let exec = ["task", "exec", "--exec-id", "look", &sandbox, "cat", "/layer"];
    containerd.ctr(&exec)?.exited(0).stdout("one\n");
    containerd.ctr(&["task", "kill", "--signal", "KILL", &sandbox])?.exited(0);
    containerd.ctr(&["task", "attach", &sandbox])?.exited(137);
    containerd.ctr(&["container", "delete", &sandbox])?.exited(0);
    forget_layers(&containerd)?;
    containerd.end()
}

fn layers_that_have_no_room_are_served_as_files(t: &Test) -> Result<()> {
    let containerd = with_erofs(t)?;
    // With the userland, one for each slot behind that of the share.
    let texts: Vec<String> = (SHARE_SLOT + 2..SLOTS).map(|slot| format!("{}\n", slot + 10)).collect();
    let files: Vec<_> = texts.iter().map(|text| [(&text[..text.len() - 1], text.as_str())]).collect();
    containerd.import_layers(LAYERED, &files.iter().map(|files| &files[..]).collect::<Vec<_>>())?;
    let script = "grep ' / ' /proc/mounts; cat /[0-9]*; rm /17; echo /sys/block/*; exec cat /17";
    let outcome = containerd.ctr(&run_layered(&["--rm"], t.id(), script))?.exited(1);
    let (mount, rest) =
        outcome.text().split_once('\n').map(|(a, b)| (a.to_owned(), b.to_owned())).context("no mount")?;
    ensure!(mount.contains(" virtiofs rw"), "{outcome}");
    ensure!(rest == format!("{}/sys/block/*\n", texts.concat()), "{outcome}");
    ensure!(containerd.log().contains("layers are served as files"), "{}", containerd.log());
    forget_layers(&containerd)?;
    containerd.end()
}
