//! podman.

use std::fs;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::engine::{Engine, IMAGE, Podman};
use kvrun_e2e::{Case, Terminal, Test, cases};
use serde_json::Value;

use super::{SERVICE, SERVICE_OPTIONS, is_a_guests_kernel, is_served, run_with_options, words};

pub(crate) const CASES: &[Case] = cases![needs "podman":
    container_has_what_its_options_say,
    running_container_is_used_and_stopped,
    containers_of_a_network_reach_each_other,
    containers_of_a_pod_share_a_machine_and_its_network,
    build_runs_its_steps_in_machines,
];

fn container_has_what_its_options_say(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    run_with_options(t, |args| podman.start(args))?;
    podman.invoke(&["run", "--rm", IMAGE, "/no/such/program"])?.exited(127);
    for option in ["--device=/dev/kvm", "--privileged"] {
        let outcome = podman.invoke(&["run", "--rm", option, IMAGE, "true"])?.failed();
        ensure!(outcome.stderr.contains("linux.devices"), "{outcome}");
    }
    podman.end()
}

fn running_container_is_used_and_stopped(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let inspect = |what: &str| podman.say(&["inspect", "--format", what, "web"]);
    let service = ["test -e /healthy", "--health-interval", "disable", IMAGE, "sh", "-c", SERVICE];
    podman.say(&words(SERVICE_OPTIONS, &service))?;
    podman.start(&["logs", "-f", "web"])?.until("started 1")?;
    let address = inspect("{{.NetworkSettings.IPAddress}}")?;
    is_served(&format!("{}:80", address.trim()))?;
    is_served("127.0.0.1:8080")?;
    let processes = "echo $A $(id -u); ps; exit 4";
    let exec = ["exec", "--user", "1000", "-e", "A=b", "web", "sh", "-c", processes];
    let outcome = podman.invoke(&exec)?.exited(4).text();
    ensure!(outcome.starts_with("b 1000\n") && outcome.contains("sleep 1000"), "{outcome}");
    // Those of the guest, by the container's own numbers, and none of the host's.
    let processes = podman.say(&["top", "web", "pid", "ppid", "comm"])?;
    let processes: Vec<Vec<&str>> =
        processes.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    ensure!(processes.contains(&vec!["1", "0", "sh"]), "{processes:?}");
    ensure!(processes.iter().any(|process| process[1..] == ["1", "sleep"]), "{processes:?}");
    ensure!(processes.iter().all(|process| !process[2].contains("kvrun")), "{processes:?}");
    let processes = podman.say(&["top", "web"])?;
    ensure!(processes.contains("sleep 1000"), "{processes}");
    podman.invoke(&["healthcheck", "run", "web"])?.exited(1);
    podman.say(&["exec", "web", "touch", "/healthy"])?;
    podman.invoke(&["healthcheck", "run", "web"])?.exited(0);
    let stats = podman.say(&["stats", "--no-stream", "--format", "json", "web"])?;
    let stats: Value = serde_json::from_str(&stats)?;
    let memory = stats[0]["mem_usage"].as_str().context("no memory")?;
    ensure!(stats[0]["name"] == "web" && !memory.starts_with("0B"), "{stats}");
    podman.say(&["pause", "web"])?;
    ensure!(inspect("{{.State.Status}}")?.trim() == "paused");
    podman.say(&["unpause", "web"])?;
    // The container's files, also those of its bind mounts, and never the host's.
    let copied = podman.dir().join("copied");
    let path = copied.to_str().context("a path of ASCII")?;
    podman.say(&["exec", "web", "sh", "-c", "echo of the container > /made"])?;
    podman.say(&["cp", "web:/made", path])?;
    ensure!(fs::read_to_string(&copied)? == "of the container\n");
    podman.say(&["cp", path, "web:/back"])?;
    ensure!(podman.say(&["exec", "web", "cat", "/back"])? == "of the container\n");
    podman.say(&["cp", "web:/etc/hostname", path])?;
    ensure!(fs::read_to_string(&copied)? == podman.say(&["exec", "web", "cat", "/etc/hostname"])?);
    podman.say(&["stop", "web"])?;
    podman.invoke(&["logs", "web"])?.exited(0).stdout("started 1\nbye\n");
    ensure!(inspect("{{.State.ExitCode}}")?.trim() == "3");
    podman.say(&["start", "web"])?;
    podman.start(&["logs", "-f", "web"])?.until("started 2")?;
    podman.say(&["kill", "web"])?;
    ensure!(podman.say(&["wait", "web"])?.trim() == "137");
    podman.end()
}

fn containers_of_a_network_reach_each_other(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    podman.say(&["network", "create", "--ipv6", "own"])?;
    let server = "echo served > /page; httpd -h / -p 80; echo started; sleep 1000";
    podman.say(&words("run -d --network own --name server", &[IMAGE, "sh", "-c", server]))?;
    podman.start(&["logs", "-f", "server"])?.until("started")?;
    let inspected: Value = serde_json::from_str(&podman.say(&["inspect", "server"])?)?;
    let network = &inspected[0]["NetworkSettings"]["Networks"]["own"];
    let address6 = network["GlobalIPv6Address"].as_str().context("no IPv6 address")?;
    // By its name, which podman's name server on the bridge knows.
    let client = format!("wget -q -O - http://server/page; wget -q -O - http://[{address6}]/page");
    let run = words("run --rm --network own", &[IMAGE, "sh", "-c", &client]);
    podman.invoke(&run)?.exited(0).stderr("").stdout("served\nserved\n");
    podman.end()
}

fn containers_of_a_pod_share_a_machine_and_its_network(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    podman.say(&words("pod create --name p -p 8081:80", &[]))?;
    let server = "echo served > /page; exec httpd -f -h / -p 80";
    podman.say(&words("run -d --pod p --name server", &[IMAGE, "sh", "-c", server]))?;
    let client =
        "until wget -q -O - http://127.0.0.1/page; do :; done; hostname; cat /proc/sys/kernel/random/boot_id";
    let client = words("run --pod p --name client", &[IMAGE, "sh", "-c", client]);
    let text = podman.invoke(&client)?.exited(0).text();
    let boot_id = podman.say(&["exec", "server", "cat", "/proc/sys/kernel/random/boot_id"])?;
    ensure!(text == format!("served\np\n{boot_id}"), "{text}");
    ensure!(t.vmms()?.len() == 1, "one machine for all");
    let processes = podman.say(&["top", "server", "pid", "comm"])?;
    ensure!(processes.split_whitespace().eq(["PID", "COMMAND", "1", "httpd"]), "{processes}");
    is_served("127.0.0.1:8081")?;
    podman.say(&words("pod stop -t 0 p", &[]))?;
    podman.say(&["pod", "rm", "p"])?;
    podman.end()
}

fn build_runs_its_steps_in_machines(t: &Test) -> Result<()> {
    let podman = Podman::new(t)?;
    let context = t.scratch().join("context");
    fs::create_dir(&context)?;
    fs::write(context.join("input"), "input\n")?;
    let file =
        format!("FROM {IMAGE}\nCOPY input /input\nRUN uname -r > /kernel && cat /input > /output\nCMD sh\n");
    fs::write(context.join("Containerfile"), file)?;
    let (kvrun, context) = (t.program().to_str(), context.to_str());
    let (kvrun, context) = (kvrun.context("a path of ASCII")?, context.context("a path of ASCII")?);
    podman.say(&words("build -t localhost/built --runtime", &[kvrun, context]))?;
    // What was built runs on a terminal, under podman's init.
    let terminal = Terminal::open(33, 99)?;
    let run = podman.start_on(&terminal, &words("run --rm -it --init localhost/built", &[]))?;
    run.until("# ")?;
    let look = "cat /output /proc/1/comm; stty size; test -t 0 && echo is-$((1 + 1))-tty; echo kernel=$(cat /kernel)=\r";
    terminal.keys(look.as_bytes())?;
    run.until("is-2-tty")?;
    run.until("kernel=")?;
    terminal.keys(b"exit 5\r")?;
    let text = run.wait()?.exited(5).text();
    ensure!(["input\r\n", "podman-init\r\n", "33 99\r\n"].iter().all(|words| text.contains(words)), "{text}");
    let kernel = text.rsplit("kernel=").next().and_then(|rest| rest.split('=').next());
    is_a_guests_kernel(&format!("{}\n", kernel.context("not what was built")?))?;
    podman.end()
}
