//! What can be seen of a machine from outside: its metrics, and the log of its guest.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use kvrun_agent_api::STREAM_PORT;
use kvrun_e2e::vm::{Machine, Shape};
use kvrun_e2e::{Case, Test, cases, time};

pub(crate) const CASES: &[Case] =
    cases![machine_is_looked_at_from_outside, guest_and_agent_are_heard_in_the_log];

/// The value of a sample of this pod.
fn sample(text: &str, pod: &str, metric: &str, labels: &str) -> Result<f64> {
    let name = format!("{metric}{{namespace=\"\",pod=\"{pod}\"{labels}}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&name));
    Ok(value.with_context(|| format!("no {name}: {text}"))?.parse()?)
}

fn machine_is_looked_at_from_outside(t: &Test) -> Result<()> {
    let id = t.id();
    t.invoke(&["metrics"])?.exited(0).stdout("").stderr("");
    let container = t.start(&t.script("echo ready; sleep 1000")?)?.without_input();
    container.until("ready\n")?;

    let text = t.invoke(&["metrics", id])?.exited(0).stderr("").text();
    for (metric, labels, least, most) in [
        ("kvrun_boot_seconds", ",phase=\"vmm\"", 0.0, 60.0),
        ("kvrun_boot_seconds", ",phase=\"kernel\"", 0.001, 60.0),
        ("kvrun_boot_seconds", ",phase=\"agent\"", 0.0, 60.0),
        ("kvrun_boot_seconds", ",phase=\"share\"", 0.0, 60.0),
        ("kvrun_boot_seconds", ",phase=\"all\"", 0.001, 120.0),
        ("kvrun_vm_memory_bytes", ",kind=\"boot\"", 536_870_912.0, 536_870_912.0),
        ("kvrun_vm_memory_bytes", ",kind=\"plugged\"", 0.0, 0.0),
        ("kvrun_process_resident_memory_bytes", ",process=\"vmm\"", 1e6, 1e9),
        ("kvrun_process_resident_memory_bytes", ",process=\"engine\"", 1e6, 1e8),
        ("kvrun_agent_up", "", 1.0, 1.0),
        ("kvrun_guest_vcpus_online", "", 1.0, 1.0),
        ("kvrun_guest_memory_available_bytes", "", 1e8, 536_870_912.0),
        ("kvrun_agent_request_seconds_count", ",request=\"start the container\"", 1.0, 1.0),
        ("kvrun_agent_request_seconds_bucket", ",request=\"start the container\",le=\"+Inf\"", 1.0, 1.0),
        ("kvrun_agent_requests_failed_total", ",request=\"start the container\"", 0.0, 0.0),
    ] {
        let value = sample(&text, id, metric, labels)?;
        ensure!((least..=most).contains(&value), "{metric}{labels} is {value}: {text}");
    }
    let sum = |metric: &str| -> u64 {
        let of = |line: &str| {
            line.strip_prefix(metric)?.strip_prefix('{')?.rsplit(' ').next()?.parse::<u64>().ok()
        };
        text.lines().filter_map(of).sum::<u64>()
    };
    ensure!(sum("kvrun_vm_exits_total") > 0 && sum("kvrun_virtio_total") > 0, "{text}");
    let all = t.invoke(&["metrics"])?.exited(0).stderr("").text();
    ensure!(sample(&all, id, "kvrun_agent_up", "")? == 1.0, "{all}");

    // As what scrapes metrics asks for them.
    let dir = t.state().join(id);
    ensure!(fs::metadata(&dir)?.mode() & 0o077 == 0, "{} is not root's alone", dir.display());
    let mut stream = UnixStream::connect(dir.join("pod.sock"))?;
    stream.set_read_timeout(Some(time::scaled(time::RUN)))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: pod\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(
        answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.contains("\r\n\r\n# HELP kvrun_"),
        "{answer}"
    );

    let log = t.invoke(&["logs", "--guest", id])?.exited(0).stderr("").text();
    ensure!(log.contains("] Linux version ") && log.lines().all(|line| line.starts_with('[')), "{log}");
    t.invoke(&["logs", id])?.exited(1).stdout("").error(&["--guest"]);
    t.invoke(&["metrics", "no-such"])?.exited(1).stdout("").error(&["no-such", "kvrun list"]);
    t.invoke(&["kill", id, "KILL"])?.exited(0);
    container.wait()?.exited(137);
    Ok(())
}

fn guest_and_agent_are_heard_in_the_log(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape::default())?;
    // So bad that it is written to the console too.
    vm.sh("printf '<0>a \\033[31mred\\033[0m word\\n' > /dev/kmsg")?;
    let mut stream = vm.block_on(vm.pod().vmm().connect(STREAM_PORT))?;
    stream.set_read_timeout(Some(time::scaled(time::RUN)))?;
    // A stream that nobody can ask for: the agent says so, and closes it.
    stream.write_all(&[0; 8])?;
    stream.read_to_end(&mut Vec::new())?;
    let log = String::from_utf8(vm.block_on(vm.pod().agent().read_log())?)?;
    for words in ["] Linux version ", "word\n", "] kvrun-agent: a stdio stream with token 0 was closed\n"] {
        ensure!(log.contains(words), "{words:?}: {log}");
    }
    let console = vm.block_on(vm.pod().vmm().console())?;
    ensure!(console.contains("word") && !console.contains("kvrun-agent"), "{console}");
    Ok(())
}
