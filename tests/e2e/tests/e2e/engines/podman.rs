//! podman.

use std::fs;
use std::io::Write;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::engine::{IMAGE, Podman};
use kvrun_e2e::{Case, Terminal, Test, cases};
use serde_json::Value;

use super::http_get;

pub(crate) const CASES: &[Case] = cases![needs "podman":
    run_passes_streams_and_exit_codes,
    volumes_are_directories_and_files_of_the_host,
    published_port_is_reached_from_the_host,
    containers_of_a_network_reach_each_other,
    running_container_is_used_and_stopped,
    limits_hold_in_the_container,
    container_has_what_its_options_say,
    terminal_is_interactive,
    health_check_runs_in_the_container,
    containers_of_a_pod_share_a_machine_and_its_network,
    build_runs_its_steps_in_machines,
    devices_of_the_host_are_refused,
];

fn run_passes_streams_and_exit_codes(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let mut run = podman.start(&[
        "run",
        "--rm",
        "-i",
        IMAGE,
        "sh",
        "-c",
        "cat; echo problem >&2; uname -r >&2; exit 7",
    ])?;
    run.stdin.take().context("no stdin")?.write_all(b"from outside\n")?;
    let outcome = run.wait()?.exited(7).stdout("from outside\n");
    let guest = outcome.stderr.strip_prefix("problem\n").context("no stderr")?;
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(!guest.is_empty() && guest != host, "the container has the kernel of the host: {guest}");
    podman.invoke(&["run", "--rm", IMAGE, "/no/such/program"])?.exited(127);
    podman.invoke(&["run", "--rm", IMAGE, "/etc/passwd"])?.exited(126);
    podman.end()
}

fn volumes_are_directories_and_files_of_the_host(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let (dir, file) = (t.scratch().join("volume"), t.scratch().join("file"));
    fs::create_dir(&dir)?;
    fs::write(&file, "content\n")?;
    let volumes = [
        format!("{}:/dir", dir.display()),
        format!("{}:/etc/file:ro", file.display()),
        "named:/named".to_owned(),
    ];
    let script =
        "cat /etc/file; echo x > /etc/file || echo read-only; echo hello > /dir/new; echo kept > /named/file";
    podman
        .invoke(&[
            "run",
            "--rm",
            "-v",
            &volumes[0],
            "-v",
            &volumes[1],
            "-v",
            &volumes[2],
            IMAGE,
            "sh",
            "-c",
            script,
        ])?
        .exited(0)
        .stdout("content\nread-only\n");
    ensure!(fs::read_to_string(dir.join("new"))? == "hello\n");
    podman
        .invoke(&["run", "--rm", "-v", &volumes[2], IMAGE, "cat", "/named/file"])?
        .exited(0)
        .stdout("kept\n");
    podman.end()
}

fn published_port_is_reached_from_the_host(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let script = "mkdir /www; echo served > /www/page; exec httpd -f -h /www -p 80";
    podman.say(&["run", "-d", "--name", "web", "-p", "8080:80", IMAGE, "sh", "-c", script])?;
    // Until it listens.
    podman.say(&["exec", "web", "sh", "-c", "until nc 127.0.0.1 80 < /dev/null; do :; done"])?;
    let address = podman.say(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web"])?;
    for address in [format!("{}:80", address.trim()), "127.0.0.1:8080".to_owned()] {
        let answer = http_get(&address, "/page")?;
        ensure!(answer.contains("200 OK") && answer.ends_with("served\n"), "{answer}");
    }
    podman.say(&["rm", "-f", "-t", "0", "web"])?;
    podman.end()
}

fn containers_of_a_network_reach_each_other(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    podman.say(&["network", "create", "--ipv6", "own"])?;
    let server = "echo hello > /page; exec httpd -f -h / -p 80";
    podman.say(&["run", "-d", "--network", "own", "--name", "server", IMAGE, "sh", "-c", server])?;
    podman.say(&["exec", "server", "sh", "-c", "until nc 127.0.0.1 80 < /dev/null; do :; done"])?;
    // By its name, which podman's name server on the bridge knows.
    podman
        .invoke(&["run", "--rm", "--network", "own", IMAGE, "wget", "-q", "-O", "-", "http://server/page"])?
        .exited(0)
        .stdout("hello\n");
    let inspected: Value = serde_json::from_str(&podman.say(&["inspect", "server"])?)?;
    let network = &inspected[0]["NetworkSettings"]["Networks"]["own"];
    let address6 = network["GlobalIPv6Address"].as_str().context("no IPv6 address")?;
    let url = format!("http://[{address6}]/page");
    podman
        .invoke(&["run", "--rm", "--network", "own", IMAGE, "wget", "-q", "-O", "-", &url])?
        .exited(0)
        .stdout("hello\n");
    podman
        .invoke(&["run", "--rm", "--network", "none", IMAGE, "ls", "/sys/class/net"])?
        .exited(0)
        .stdout("lo\n");
    podman.end()
}

fn running_container_is_used_and_stopped(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let script = "trap 'echo bye; exit 3' TERM; echo started; sleep 1000 & wait";
    podman.say(&["run", "-d", "--name", "c", IMAGE, "sh", "-c", script])?;
    podman.invoke(&["exec", "-e", "A=b", "c", "sh", "-c", "echo $A; exit 4"])?.exited(4).stdout("b\n");
    let processes = podman.say(&["exec", "c", "ps"])?;
    ensure!(processes.contains("sleep 1000"), "{processes}");
    let stats: Value =
        serde_json::from_str(&podman.say(&["stats", "--no-stream", "--format", "json", "c"])?)?;
    ensure!(
        stats[0]["name"] == "c" && stats[0]["mem_usage"].as_str().is_some_and(|used| !used.starts_with("0B")),
        "{stats}"
    );
    podman.say(&["pause", "c"])?;
    ensure!(podman.say(&["inspect", "--format", "{{.State.Status}}", "c"])?.trim() == "paused");
    podman.say(&["unpause", "c"])?;
    podman.say(&["cp", "c:/etc/passwd", podman.dir().join("copied").to_str().context("ASCII")?])?;
    podman.say(&["stop", "c"])?;
    podman.invoke(&["logs", "c"])?.exited(0).stdout("started\nbye\n");
    ensure!(podman.say(&["inspect", "--format", "{{.State.ExitCode}}", "c"])?.trim() == "3");
    podman.say(&["start", "c"])?;
    podman.say(&["kill", "c"])?;
    ensure!(podman.say(&["wait", "c"])?.trim() == "137");
    podman.end()
}

fn limits_hold_in_the_container(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; nproc";
    podman
        .invoke(&[
            "run",
            "--rm",
            "--memory",
            "96m",
            "--cpus",
            "1.5",
            "--pids-limit",
            "40",
            IMAGE,
            "sh",
            "-c",
            script,
        ])?
        .exited(0)
        .stdout("100663296\n150000 100000\n40\n2\n");
    // More than the limit: the kernel of the guest kills it.
    let hungry = "head -c 200m /dev/zero | tail";
    podman.invoke(&["run", "--name", "oom", "--memory", "64m", IMAGE, "sh", "-c", hungry])?.failed();
    podman.end()
}

fn container_has_what_its_options_say(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let script = "id; echo x > /file || echo no; echo x > /scratch/file && cat /scratch/file; \
                  df -k /scratch | tail -1 | awk '{print $2}'; grep CapBnd /proc/self/status; hostname; echo $GREETING; pwd";
    let text = podman
        .invoke(&[
            "run",
            "--rm",
            "--read-only",
            "--tmpfs",
            "/scratch:size=1m,mode=1777",
            "--user",
            "1000:1001",
            "--cap-drop",
            "all",
            "--hostname",
            "named",
            "--env",
            "GREETING=hello",
            "--workdir",
            "/tmp",
            IMAGE,
            "sh",
            "-c",
            script,
        ])?
        .exited(0)
        .text();
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines[0].starts_with("uid=1000 gid=1001"), "{text}");
    ensure!(lines[1..4] == ["no", "x", "1024"], "{text}");
    ensure!(lines[4].ends_with("0000000000000000"), "{text}");
    ensure!(lines[5..] == ["named", "hello", "/tmp"], "{text}");
    podman
        .invoke(&[
            "run",
            "--rm",
            "--sysctl",
            "net.ipv4.ip_forward=1",
            IMAGE,
            "cat",
            "/proc/sys/net/ipv4/ip_forward",
        ])?
        .exited(0)
        .stdout("1\n");
    let mounts = "mkdir /there && mount -t tmpfs x /there && echo mounted";
    podman
        .invoke(&["run", "--rm", "--cap-add", "all", IMAGE, "sh", "-c", mounts])?
        .exited(0)
        .stdout("mounted\n");
    podman.invoke(&["run", "--rm", "--init", IMAGE, "cat", "/proc/1/comm"])?.exited(0).stdout("catatonit\n");
    podman.end()
}

fn terminal_is_interactive(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let terminal = Terminal::open(33, 99)?;
    let run = podman.start_on(&terminal, &["run", "--rm", "-it", IMAGE, "sh"])?;
    run.until("# ")?;
    terminal.keys(b"stty size; test -t 0 && echo is-$((1 + 1))-tty\r")?;
    run.until("is-2-tty")?;
    ensure!(run.stdout.text().contains("33 99"), "{}", run.stdout.text());
    terminal.keys(b"exit 5\r")?;
    run.wait()?.exited(5);
    podman.end()
}

fn health_check_runs_in_the_container(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    podman.say(&[
        "run",
        "-d",
        "--name",
        "c",
        "--health-cmd",
        "test -e /healthy",
        "--health-interval",
        "disable",
        "--health-retries",
        "1",
        IMAGE,
        "sleep",
        "1000",
    ])?;
    podman.invoke(&["healthcheck", "run", "c"])?.exited(1);
    podman.say(&["exec", "c", "touch", "/healthy"])?;
    podman.invoke(&["healthcheck", "run", "c"])?.exited(0);
    podman.end()
}

fn containers_of_a_pod_share_a_machine_and_its_network(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    podman.say(&["pod", "create", "--name", "p", "-p", "8081:80"])?;
    let server = "echo of a pod > /page; exec httpd -f -h / -p 80";
    podman.say(&["run", "-d", "--pod", "p", "--name", "server", IMAGE, "sh", "-c", server])?;
    let client =
        "until wget -q -O - http://127.0.0.1/page; do :; done; hostname; cat /proc/sys/kernel/random/boot_id";
    let text = podman
        .invoke(&["run", "--pod", "p", "--name", "client", IMAGE, "sh", "-c", client])?
        .exited(0)
        .text();
    let boot_id = podman.say(&["exec", "server", "cat", "/proc/sys/kernel/random/boot_id"])?;
    ensure!(text == format!("of a pod\np\n{boot_id}"), "{text}");
    ensure!(t.vmms()?.len() == 1, "one machine for all");
    let answer = http_get("127.0.0.1:8081", "/page")?;
    ensure!(answer.ends_with("of a pod\n"), "{answer}");
    podman.say(&["pod", "stop", "-t", "0", "p"])?;
    podman.say(&["pod", "rm", "p"])?;
    podman.end()
}

fn build_runs_its_steps_in_machines(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let context = t.scratch().join("context");
    fs::create_dir(&context)?;
    fs::write(context.join("input"), "input\n")?;
    let file = format!(
        "FROM {IMAGE}\nCOPY input /input\nRUN uname -r > /kernel && cat /input > /output\nRUN echo more >> /output\nCMD cat /output /kernel\n"
    );
    fs::write(context.join("Containerfile"), file)?;
    let context = context.to_str().context("a path of ASCII")?;
    podman.say(&[
        "build",
        "--runtime",
        t.program().to_str().context("ASCII")?,
        "-t",
        "localhost/built",
        context,
    ])?;
    let text = podman.invoke(&["run", "--rm", "localhost/built"])?.exited(0).text();
    let kernel = text.strip_prefix("input\nmore\n").context("not what was built")?;
    ensure!(
        kernel != fs::read_to_string("/proc/sys/kernel/osrelease")?,
        "built with the host's kernel: {kernel}"
    );
    podman.end()
}

fn devices_of_the_host_are_refused(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    for option in ["--device=/dev/kvm", "--privileged"] {
        let outcome = podman.invoke(&["run", "--rm", option, IMAGE, "true"])?.failed();
        ensure!(outcome.stderr.contains("linux.devices"), "{outcome}");
    }
    podman.end()
}
