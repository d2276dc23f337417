//! docker.

use std::fs;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::engine::{Docker, Engine, IMAGE};
use kvrun_e2e::{Case, Running, Terminal, Test, cases};

use super::{SERVICE, SERVICE_OPTIONS, is_a_guests_kernel, is_served, run_with_options, words};

pub(crate) const CASES: &[Case] = cases![needs "dockerd":
    container_has_what_its_options_say,
    running_container_is_used_and_stopped,
    build_runs_its_steps_in_machines,
    shim_of_containerd_runs_containers,
];

fn container_has_what_its_options_say(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    run_with_options(t, |args| docker.start(args))?;
    docker.invoke(&["run", "--rm", IMAGE, "/no/such/program"])?.exited(127);
    let outcome = docker.invoke(&["run", "--rm", "--device", "/dev/kvm", IMAGE, "true"])?.failed();
    ensure!(outcome.stderr.contains("linux.devices"), "{outcome}");
    docker.end()
}

fn running_container_is_used_and_stopped(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let inspect = |what: &str| docker.say(&["inspect", "--format", what, "web"]);
    let limits = ["--health-interval", "1s", "--health-timeout", "60s"];
    let service = [&["test -e /healthy"][..], &limits, &[IMAGE, "sh", "-c", SERVICE]].concat();
    docker.say(&words(SERVICE_OPTIONS, &service))?;
    docker.start(&["logs", "-f", "web"])?.until("started 1")?;
    let address = inspect("{{.NetworkSettings.IPAddress}}")?;
    let address = address.trim();
    is_served(&format!("{address}:80"))?;
    is_served("127.0.0.1:8080")?;
    // From a container in the same network namespace, and so in the same machine, and from one that has its own.
    for (network, address) in [("container:web", "127.0.0.1"), ("bridge", address)] {
        let url = format!("http://{address}/page");
        let client = words("run --rm --network", &[network, IMAGE, "wget", "-q", "-O", "-", &url]);
        docker.invoke(&client)?.exited(0).stderr("").stdout("served\n");
    }
    let exec = ["exec", "--user", "1000", "-e", "A=b", "web", "sh", "-c", "echo $A $(id -u); exit 4"];
    docker.invoke(&exec)?.exited(4).stdout("b 1000\n");
    let processes = docker.say(&["top", "web"])?;
    ensure!(processes.contains("kvrun"), "{processes}");
    let stats = docker.say(&["stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", "web"])?;
    ensure!(stats.starts_with("web ") && !stats.starts_with("web 0B"), "{stats}");
    docker.say(&["exec", "web", "touch", "/healthy"])?;
    let events = "events --since 0 --filter container=web --filter event=health_status --format {{.Action}}";
    docker.start(&words(events, &[]))?.until("health_status: healthy")?;
    docker.say(&["pause", "web"])?;
    ensure!(inspect("{{.State.Status}}")?.trim() == "paused");
    docker.say(&["unpause", "web"])?;
    docker.say(&["update", "--pids-limit", "50", "web"])?;
    docker.invoke(&["exec", "web", "cat", "/sys/fs/cgroup/pids.max"])?.exited(0).stdout("50\n");
    docker.say(&["stop", "web"])?;
    docker.invoke(&["logs", "web"])?.exited(0).stdout("started 1\nbye\n");
    ensure!(inspect("{{.State.ExitCode}}")?.trim() == "3");
    docker.say(&["start", "web"])?;
    docker.start(&["logs", "-f", "web"])?.until("started 2")?;
    docker.say(&["kill", "web"])?;
    ensure!(docker.say(&["wait", "web"])?.trim() == "137");
    docker.end()
}

fn build_runs_its_steps_in_machines(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let context = t.scratch().join("context");
    fs::create_dir(&context)?;
    fs::write(context.join("input"), "input\n")?;
    let file =
        format!("FROM {IMAGE}\nCOPY input /input\nRUN uname -r > /kernel && cat /input > /output\nCMD sh\n");
    fs::write(context.join("Dockerfile"), file)?;
    let context = context.to_str().context("a path of ASCII")?;
    let mut build = docker.command(&words("build -t built", &[context]));
    build.env("DOCKER_BUILDKIT", "0");
    let said = Running::start(&mut build)?.without_input().wait()?;
    ensure!(said.status.success(), "{said}");
    // What was built runs on a terminal, without a network.
    let terminal = Terminal::open(33, 99)?;
    let run = docker.start_on(&terminal, &words("run --rm -it --network none built", &[]))?;
    run.until("# ")?;
    // docker sets the size after the start.
    let look = "until stty size | grep '33 99'; do :; done; cat /output; ls /sys/class/net; test -t 0 && echo is-$((1 + 1))-tty; \
                echo kernel=$(cat /kernel)=\r";
    terminal.keys(look.as_bytes())?;
    run.until("is-2-tty")?;
    run.until("kernel=")?;
    terminal.keys(b"exit 5\r")?;
    let text = run.wait()?.exited(5).text();
    ensure!(text.contains("input\r\nlo\r\nis-2-tty"), "{text}");
    let kernel = text.rsplit("kernel=").next().and_then(|rest| rest.split('=').next());
    is_a_guests_kernel(&format!("{}\n", kernel.context("not what was built")?))?;
    docker.end()
}

fn shim_of_containerd_runs_containers(t: &Test) -> Result<()> {
    let docker = Docker::new(t)?;
    let service = ["io.containerd.kvrun.v2", "--name", "web", "-p", "8080:80", IMAGE, "sh", "-c", SERVICE];
    docker.say(&words("run -d -v named:/named --runtime", &service))?;
    docker.start(&["logs", "-f", "web"])?.until("started 1")?;
    is_served("127.0.0.1:8080")?;
    let script = "uname -r; exit 4";
    let outcome = docker.invoke(&["exec", "web", "sh", "-c", script])?.exited(4);
    is_a_guests_kernel(&outcome.text())?;
    docker.say(&["stop", "web"])?;
    docker.invoke(&["logs", "web"])?.exited(0).stdout("started 1\nbye\n");
    let code = docker.say(&["inspect", "--format", "{{.State.ExitCode}}", "web"])?;
    ensure!(code.trim() == "3", "{code}");
    docker.end()
}
