//! docker.

use std::fs;
use std::io::Write;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::engine::{Docker, IMAGE};
use kvrun_e2e::{Case, Terminal, Test, cases};

use super::http_get;

pub(crate) const CASES: &[Case] = cases![needs "dockerd":
    run_passes_streams_exit_codes_and_volumes,
    published_port_is_reached_from_the_host,
    running_container_is_used_and_stopped,
    container_has_its_limits_and_what_its_options_say,
    terminal_is_interactive,
    health_check_runs_in_the_container,
    build_runs_its_steps_in_machines,
];

fn run_passes_streams_exit_codes_and_volumes(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let mut run = docker.start(&[
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
    ensure!(guest != fs::read_to_string("/proc/sys/kernel/osrelease")?, "the kernel of the host: {guest}");
    docker.invoke(&["run", "--rm", IMAGE, "/no/such/program"])?.exited(127);
    let (dir, file) = (t.scratch().join("volume"), t.scratch().join("file"));
    fs::create_dir(&dir)?;
    fs::write(&file, "content\n")?;
    let volumes = [format!("{}:/dir", dir.display()), format!("{}:/etc/file:ro", file.display())];
    let script =
        "cat /etc/file; echo x > /etc/file || echo read-only; echo hello > /dir/new; echo kept > /named/file";
    docker
        .invoke(&[
            "run",
            "--rm",
            "-v",
            &volumes[0],
            "-v",
            &volumes[1],
            "-v",
            "named:/named",
            IMAGE,
            "sh",
            "-c",
            script,
        ])?
        .exited(0)
        .stdout("content\nread-only\n");
    ensure!(fs::read_to_string(dir.join("new"))? == "hello\n");
    docker
        .invoke(&["run", "--rm", "-v", "named:/named", IMAGE, "cat", "/named/file"])?
        .exited(0)
        .stdout("kept\n");
    docker.end()
}

fn published_port_is_reached_from_the_host(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let script = "mkdir /www; echo served > /www/page; exec httpd -f -h /www -p 80";
    docker.say(&["run", "-d", "--name", "web", "-p", "8080:80", IMAGE, "sh", "-c", script])?;
    docker.say(&["exec", "web", "sh", "-c", "until nc 127.0.0.1 80 < /dev/null; do :; done"])?;
    let address = docker.say(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web"])?;
    for address in [format!("{}:80", address.trim()), "127.0.0.1:8080".to_owned()] {
        let answer = http_get(&address, "/page")?;
        ensure!(answer.contains("200 OK") && answer.ends_with("served\n"), "{answer}");
    }
    // From a container in the same network namespace, and so in the same machine, and from one that has its own.
    docker
        .invoke(&[
            "run",
            "--rm",
            "--network",
            "container:web",
            IMAGE,
            "wget",
            "-q",
            "-O",
            "-",
            "http://127.0.0.1/page",
        ])?
        .exited(0)
        .stdout("served\n");
    let url = format!("http://{}/page", address.trim());
    docker.invoke(&["run", "--rm", IMAGE, "wget", "-q", "-O", "-", &url])?.exited(0).stdout("served\n");
    docker
        .invoke(&["run", "--rm", "--network", "none", IMAGE, "ls", "/sys/class/net"])?
        .exited(0)
        .stdout("lo\n");
    docker.end()
}

fn running_container_is_used_and_stopped(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let script = "trap 'echo bye; exit 3' TERM; echo started; sleep 1000 & wait";
    docker.say(&["run", "-d", "--name", "c", IMAGE, "sh", "-c", script])?;
    docker.invoke(&["exec", "-e", "A=b", "c", "sh", "-c", "echo $A; exit 4"])?.exited(4).stdout("b\n");
    let processes = docker.say(&["top", "c"])?;
    ensure!(processes.contains("kvrun"), "{processes}");
    let stats = docker.say(&["stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", "c"])?;
    ensure!(stats.starts_with("c ") && !stats.starts_with("c 0B"), "{stats}");
    docker.say(&["pause", "c"])?;
    ensure!(docker.say(&["inspect", "--format", "{{.State.Status}}", "c"])?.trim() == "paused");
    docker.say(&["unpause", "c"])?;
    docker.say(&["update", "--pids-limit", "50", "c"])?;
    docker.invoke(&["exec", "c", "cat", "/sys/fs/cgroup/pids.max"])?.exited(0).stdout("50\n");
    docker.say(&["stop", "c"])?;
    docker.invoke(&["logs", "c"])?.exited(0).stdout("started\nbye\n");
    ensure!(docker.say(&["inspect", "--format", "{{.State.ExitCode}}", "c"])?.trim() == "3");
    docker.say(&["start", "c"])?;
    docker.say(&["kill", "c"])?;
    ensure!(docker.say(&["wait", "c"])?.trim() == "137");
    docker.end()
}

fn container_has_its_limits_and_what_its_options_say(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; nproc";
    docker
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
    let script = "id; echo x > /file || echo no; echo x > /scratch/file && cat /scratch/file; \
                  df -k /scratch | tail -1 | awk '{print $2}'; grep CapBnd /proc/self/status; hostname; echo $GREETING; pwd";
    let text = docker
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
    docker
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
    let outcome = docker.invoke(&["run", "--rm", "--device", "/dev/kvm", IMAGE, "true"])?.failed();
    ensure!(outcome.stderr.contains("linux.devices"), "{outcome}");
    docker.end()
}

fn terminal_is_interactive(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let terminal = Terminal::open(33, 99)?;
    let run = docker.start_on(&terminal, &["run", "--rm", "-it", IMAGE, "sh"])?;
    run.until("# ")?;
    // docker sets the size after the start.
    terminal.keys(b"until stty size | grep '33 99'; do :; done; test -t 0 && echo is-$((1 + 1))-tty\r")?;
    run.until("is-2-tty")?;
    terminal.keys(b"exit 5\r")?;
    run.wait()?.exited(5);
    docker.end()
}

fn health_check_runs_in_the_container(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    docker.say(&[
        "run",
        "-d",
        "--name",
        "c",
        "--health-cmd",
        "test -e /healthy",
        "--health-interval",
        "1s",
        "--health-timeout",
        "60s",
        "--health-retries",
        "1",
        IMAGE,
        "sleep",
        "1000",
    ])?;
    docker.say(&["exec", "c", "touch", "/healthy"])?;
    loop {
        // Within the time of the test.
        if docker.say(&["inspect", "--format", "{{.State.Health.Status}}", "c"])?.trim() == "healthy" {
            break;
        }
    }
    docker.end()
}

fn build_runs_its_steps_in_machines(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let context = t.scratch().join("context");
    fs::create_dir(&context)?;
    fs::write(context.join("input"), "input\n")?;
    let file = format!(
        "FROM {IMAGE}\nCOPY input /input\nRUN uname -r > /kernel && cat /input > /output\nCMD cat /output /kernel\n"
    );
    fs::write(context.join("Dockerfile"), file)?;
    let mut build = docker.command(&["build", "-t", "built", context.to_str().context("a path of ASCII")?]);
    build.env("DOCKER_BUILDKIT", "0");
    let said = kvrun_e2e::Running::start(&mut build)?.without_input().wait()?;
    ensure!(said.status.success(), "{said}");
    let text = docker.invoke(&["run", "--rm", "built"])?.exited(0).text();
    let kernel = text.strip_prefix("input\n").context("not what was built")?;
    ensure!(
        kernel != fs::read_to_string("/proc/sys/kernel/osrelease")?,
        "built with the host's kernel: {kernel}"
    );
    docker.end()
}
