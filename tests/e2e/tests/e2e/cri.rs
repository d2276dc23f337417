//! Pods, as a kubelet has containerd's CRI plugin run them with our shim; [`limits`] is about what they may do and have.

pub(crate) mod limits;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1 as api;
use k8s_cri::v1::NamespaceMode as Mode;
use kvrun_e2e::containerd::{
    EMPTY, IMAGE, INSTALLED, OLDER, RUNTIME, Release, SHIM, runtime_on, task_events,
};
use kvrun_e2e::cri::stream::{STATUS, STDIN, STDOUT, Stream};
use kvrun_e2e::cri::{Cri, HOST, LINKS, Pod, processes, script};
use kvrun_e2e::loop_device::Loop;
use kvrun_e2e::netns::{self, Wire};
use kvrun_e2e::{Case, Test, cases, time};
use rustix::mount::{MountFlags, UnmountFlags, unmount};
use serde_json::{Value, json};

use crate::containerd::{IN_LAYERS, blockfile, erofs, forget_layers};
use crate::engines::is_served;
use crate::pod_faults::{is_not_ready, nothing_is_left};
use crate::vm::fs::program;

pub(crate) const CASES: &[Case] = cases![
    containers_of_a_pod_share_a_machine_and_come_and_go,
    processes_are_seen_by_whom_it_is_asked_for,
    sandbox_has_a_process_only_where_one_is_needed,
    pod_is_deleted_while_its_container_starts,
    pods_reach_each_other_by_every_way,
    pod_is_on_links_of_every_kind_of_cni,
    volumes_are_seen_as_they_change,
    changes_of_volumes_that_a_kubelet_keeps_are_heard,
    root_file_systems_are_of_the_snapshotter_of_a_runtime,
    raw_block_volume_is_a_disk_of_the_containers_that_have_it,
];

pub(crate) const OLDER_CASES: &[Case] = cases![needs "/opt/containerd-1.7/usr/bin/containerd":
    pods_and_tasks_of_containerd_1_7,
];

/// How long a container has to end when it is asked to.
const GRACE: Duration = Duration::from_secs(30);
pub(crate) const SLEEP: &str = "trap 'exit 3' TERM; echo up; sleep 1000 & wait";

/// A number that an environment variable has, or else this one.
pub(crate) fn setting(variable: &str, default: usize) -> Result<usize> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text} is no number")),
        Err(_) => Ok(default),
    }
}

/// Waits for what a container writes.
pub(crate) fn until_logged(pod: &Pod<'_>, name: &str, words: &str) -> Result<()> {
    time::until(words, || Ok(pod.log(name)?.contains(words)))
}

pub(crate) fn mount(host: &Path, container: &str, readonly: bool) -> api::Mount {
    api::Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        readonly,
        ..Default::default()
    }
}

/// What a pod is allowed.
pub(crate) fn of_pod(config: &mut api::PodSandboxConfig) -> Result<&mut api::LinuxSandboxSecurityContext> {
    let linux = config.linux.as_mut();
    linux.and_then(|linux| linux.security_context.as_mut()).context("no security context")
}

/// What a container is allowed.
pub(crate) fn of_container(
    config: &mut api::ContainerConfig,
) -> Result<&mut api::LinuxContainerSecurityContext> {
    let linux = config.linux.as_mut();
    linux.and_then(|linux| linux.security_context.as_mut()).context("no security context")
}

fn containers_of_a_pod_share_a_machine_and_come_and_go(t: &Test) -> Result<()> {
    come_and_go(t, &INSTALLED)
}

fn pods_and_tasks_of_containerd_1_7(t: &Test) -> Result<()> {
    come_and_go(t, &OLDER)
}

fn come_and_go(t: &Test, release: &'static Release) -> Result<()> {
    let cri = Cri::of(t, release)?;
    let pod = cri.run_pod(cri.pod_config("web"))?;
    ensure!(pod.pod_status()?.state() == api::PodSandboxState::SandboxReady);
    let volume = t.scratch().join("volume");
    fs::create_dir(&volume)?;
    let with_volume = |name: &str, text: &str| {
        let mut config = script(name, text);
        config.mounts.push(mount(&volume, "/volume", false));
        config
    };
    // Init containers end one after the other before the others begin, and leave them something.
    for (name, text) in [
        ("init", "mkdir /volume/first; hostname; exit 0"),
        ("second", "rmdir /volume/first && echo made > /volume/page; hostname; exit 0"),
    ] {
        let ended = pod.wait(&pod.start(with_volume(name, text))?)?;
        ensure!(ended.exit_code == 0 && ended.reason == "Completed", "{ended:?}");
        ensure!(pod.log(name)? == "web\n", "{}", pod.log(name)?);
    }

    let mut server = with_volume(
        "server",
        "trap 'echo asked >> /volume/order; exit 3' TERM; httpd -h /volume -p 80; echo up $A; sleep 1000 & wait",
    );
    server.envs.push(api::KeyValue { key: "A".to_owned(), value: "b".to_owned() });
    let server = pod.start(server)?;
    until_logged(&pod, "server", "up b")?;
    let client = pod.start(script("client", SLEEP))?;
    let boot = |id: &str| pod.sh(id, "cat /proc/sys/kernel/random/boot_id; ls /sys/class/net | tr '\\n' ' '");
    ensure!(boot(&server)? == boot(&client)?, "one machine");
    ensure!(t.vmms()?.len() == 1, "one machine");
    let shared = |id: &str| pod.sh(id, "cd /proc/self/ns; for ns in ipc net uts; do readlink $ns; done");
    ensure!(shared(&server)? == shared(&client)?, "IPC, network and host name are the pod's");
    let own = |id: &str| pod.sh(id, "cd /proc/self/ns; for ns in cgroup mnt pid; do readlink $ns; done");
    ensure!(own(&server)?.lines().zip(own(&client)?.lines()).all(|(one, other)| one != other));
    pod.sh(&server, "echo shared > /dev/shm/memory")?;
    ensure!(pod.sh(&client, "cat /dev/shm/memory")? == "shared\n");
    ensure!(pod.sh(&client, "wget -q -O - http://127.0.0.1/page")? == "made\n");
    // Each sees its own processes.
    ensure!(pod.sh(&client, "ps -o comm | grep -c httpd || true")? == "0\n");
    let finished = pod.exec(&server, "echo out; echo problem >&2; exit 5")?;
    ensure!(
        (finished.code, &*finished.stdout, &*finished.stderr) == (5, "out\n", "problem\n"),
        "{finished:?}"
    );

    // A probe that takes too long is killed.
    let error = pod.probe(&client, "exec sleep 4321", 1).err().context("a probe of more than 1 s")?;
    ensure!(format!("{error:#}").contains("DeadlineExceeded"), "{error:#}");
    time::until("the probe is gone", || Ok(pod.sh(&client, "pgrep -f 'sleep 432[1]' || true")?.is_empty()))?;

    streams_go_both_ways(&pod, &client)?;
    // What a kubelet does before it asks a container to stop, which comes after it.
    ensure!(pod.sh(&server, "echo before > /volume/order")?.is_empty());
    pod.stop(&server, GRACE)?;
    ensure!(
        pod.sh(&client, "true")?.is_empty() && fs::read_to_string(volume.join("order"))? == "before\nasked\n"
    );
    let ended = pod.status(&server)?;
    ensure!(ended.exit_code == 3 && ended.reason == "Error", "{ended:?}");
    pod.remove_container(&server)?;
    // Restarted: the same name, another attempt.
    let mut again = with_volume("server", "cat /volume/page; exit 7");
    again.metadata = Some(api::ContainerMetadata { name: "server".to_owned(), attempt: 1 });
    let again = pod.start(again)?;
    ensure!(pod.wait(&again)?.exit_code == 7);
    ensure!(pod.log("server")?.ends_with("made\n"), "{}", pod.log("server")?);
    // One that does not end when it is asked is killed; one whose program is not there is told so.
    let stubborn = pod
        .start(script("stubborn", "trap 'echo asked' TERM; echo up; sleep 1000 & while :; do wait; done"))?;
    until_logged(&pod, "stubborn", "up")?;
    pod.stop(&stubborn, Duration::from_secs(2))?;
    ensure!(pod.status(&stubborn)?.exit_code == 137, "{:?}", pod.status(&stubborn)?);
    ensure!(pod.log("stubborn")? == "up\nasked\n", "asked once: {}", pod.log("stubborn")?);
    let mut missing = script("missing", "");
    missing.command = vec!["/no/such/program".to_owned()];
    let error = pod.start(missing).err().context("it cannot run")?;
    ensure!(format!("{error:#}").contains("does not exist in the container"), "{error:#}");
    let mut empty = script("empty", "");
    empty.image = Some(api::ImageSpec { image: EMPTY.to_owned(), ..Default::default() });
    let error = pod.start(empty).err().context("there is nothing to run")?;
    ensure!(format!("{error:#}").contains("executable file not found in $PATH"), "{error:#}");
    // The pod outlives containerd.
    cri.containerd().kill()?;
    cri.start_again()?;
    ensure!(pod.sh(&client, "hostname")? == "web\n");
    pod.remove()?;

    let script = "cat; echo problem >&2; exit 7";
    let ctr = cri.containerd();
    let mut started = ctr.start(&["run", "--rm", "--runtime", RUNTIME, IMAGE, t.id(), "sh", "-c", script])?;
    let mut stdin = started.stdin.take().context("no stdin")?;
    stdin.write_all(b"from outside\n")?;
    started.until("from outside")?;
    drop(stdin);
    ensure!(started.wait()?.exited(7).stdout("from outside\n").stderr == "problem\n");
    cri.end()
}

/// Files are copied as `kubectl cp` does it, and a container is attached to.
fn streams_go_both_ways(pod: &Pod<'_>, client: &str) -> Result<()> {
    let sum = pod.sh(
        client,
        "mkdir /out /in; dd if=/dev/urandom of=/out/file bs=64k count=16 2>/dev/null; md5sum < /out/file",
    )?;
    let archive = pod
        .exec_stream(client, &["tar", "cf", "-", "-C", "/out", "file"])?
        .rest(STDOUT)
        .context("copy out")?;
    // The version of the protocol has no end of standard input, and tar reads up to it.
    let unpack = format!("head -c {} | tar xf - -C /in", archive.len());
    let mut copied = pod.exec_stream(client, &["sh", "-c", &unpack])?;
    copied.send(STDIN, &archive)?;
    let status = String::from_utf8(copied.rest(STATUS).context("copy in")?)?;
    ensure!(status.contains("Success"), "{status}");
    ensure!(pod.sh(client, "md5sum < /in/file")? == sum, "{sum}");

    // containerd takes input to a container before output from it, so who answers at once may not be heard.
    let mut config = script(
        "attached",
        "for word in one two; do
            until [ -e /$word ]; do echo waiting; sleep 0.1; done
            read line; echo got $line
        done; exit 6",
    );
    config.stdin = true;
    let attached = pod.start(config)?;
    // Detached by its end of the stream, a container goes on, and can be attached to again.
    for word in ["one", "two"] {
        let mut stream = pod.attach(&attached).context(word)?;
        let mut heard = Vec::new();
        let mut until_heard = |stream: &mut Stream, words: &str| -> Result<()> {
            while !String::from_utf8_lossy(&heard).contains(words) {
                let (channel, bytes) = stream.receive()?.with_context(|| format!("{words} is not heard"))?;
                ensure!(channel == STDOUT, "{channel}");
                heard.extend(bytes);
            }
            Ok(())
        };
        until_heard(&mut stream, "waiting\n")?;
        pod.sh(&attached, &format!("touch /{word}"))?;
        stream.send(STDIN, format!("{word}\n").as_bytes())?;
        until_heard(&mut stream, &format!("got {word}\n"))?;
    }
    ensure!(pod.wait(&attached)?.exit_code == 6);
    let log = pod.log("attached")?;
    let got: Vec<_> = log.lines().filter(|line| *line != "waiting").collect();
    ensure!(got == ["got one", "got two"], "{log}");
    Ok(())
}

fn processes_are_seen_by_whom_it_is_asked_for(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let container = |name: &str, options: api::NamespaceOption| -> Result<api::ContainerConfig> {
        let mut config = script(name, SLEEP);
        of_container(&mut config)?.namespace_options = Some(options);
        Ok(config)
    };
    let first_process = |pod: &Pod<'_>, id: &str| pod.sh(id, "tr '\\0' ' ' < /proc/1/cmdline");
    // shareProcessNamespace: the first process is the sandbox's.
    let mut config = cri.pod_config("shared");
    of_pod(&mut config)?.namespace_options = Some(processes(Mode::Pod));
    let pod = cri.run_pod(config)?;
    let first = pod.start(container("first", processes(Mode::Pod))?)?;
    let second = pod.start(container("second", processes(Mode::Pod))?)?;
    for id in [&first, &second] {
        ensure!(first_process(&pod, id)?.starts_with("/bin/sh /pause"), "{}", first_process(&pod, id)?);
        ensure!(pod.sh(id, "ps -o args | grep -c '[s]leep 1000'")? == "4\n", "{}", pod.sh(id, "ps")?);
    }
    // What a container has started ends with it.
    pod.stop(&first, GRACE)?;
    ensure!(pod.sh(&second, "ps -o args | grep -c '[s]leep 1000'")? == "2\n", "{}", pod.sh(&second, "ps")?);
    pod.remove()?;
    // An ephemeral container looks at one that is there already.
    let pod = cri.run_pod(cri.pod_config("looked-at"))?;
    let first = pod.start(container("first", processes(Mode::Container))?)?;
    let its = api::NamespaceOption { target_id: first, ..processes(Mode::Target) };
    let debugger = pod.start(container("debugger", its)?)?;
    ensure!(first_process(&pod, &debugger)?.starts_with("sh -c trap"), "{}", first_process(&pod, &debugger)?);
    ensure!(
        pod.sh(&debugger, "ps -o args | grep -c '[s]leep 1000'")? == "4\n",
        "{}",
        pod.sh(&debugger, "ps")?
    );
    pod.remove()?;
    cri.end()
}

fn sandbox_has_a_process_only_where_one_is_needed(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let ctr = cri.containerd();
    let mut config = cri.pod_config("empty");
    of_pod(&mut config)?.namespace_options = Some(processes(Mode::Node));
    let sysctls = [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_unprivileged_port_start", "7")];
    config.linux.as_mut().context("none")?.sysctls =
        sysctls.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let pod = cri.run_pod(config)?;
    let sandbox = pod.id().to_owned();
    // It sees all processes of the guest.
    let mut looker = script("looker", SLEEP);
    of_container(&mut looker)?.namespace_options = Some(processes(Mode::Node));
    let looker = pod.start(looker)?;
    let pauses = || pod.sh(&looker, "cat /proc/[0-9]*/comm 2>/dev/null | grep -c pause || true");
    ensure!(pauses()? == "0\n", "nobody needs it: {}", pod.sh(&looker, "ps")?);
    ensure!(
        pod.sh(&looker, "hostname; sysctl -n kernel.shm_rmid_forced net.ipv4.ip_unprivileged_port_start")?
            == "empty\n1\n7\n"
    );
    let task = |args: &[&str]| ctr.ctr(&[&["task"], args].concat());
    ensure!(task(&["ps", &sandbox])?.exited(0).text().lines().count() == 2, "a heading and its task");
    ensure!(task(&["metrics", "--format", "json", &sandbox])?.exited(0).text().contains("\"memory\""));
    ensure!(
        task(&["ls"])?
            .exited(0)
            .text()
            .lines()
            .any(|line| line.starts_with(&sandbox) && line.ends_with("RUNNING"))
    );
    // Somebody does.
    task(&["exec", "--exec-id", "look", &sandbox, "hostname"])?.exited(0).stdout("empty\n");
    ensure!(pauses()? == "1\n", "{}", pauses()?);
    ensure!(task(&["ps", &sandbox])?.exited(0).text().lines().count() > 1);
    ensure!(pod.sh(&looker, "hostname; sysctl -n net.ipv4.ip_unprivileged_port_start")? == "empty\n7\n");
    // It ends as the program does.
    pod.stop(&looker, GRACE)?;
    pod.remove_container(&looker)?;
    task(&["kill", "--signal", "SIGTERM", &sandbox])?.exited(0);
    is_not_ready(&pod)?;
    pod.remove()?;

    // Without a process, as with one. It takes no signal but those that end it.
    for (signals, code) in [(&["SIGHUP", "SIGTERM"][..], None), (&["SIGKILL"], Some(137))] {
        let pod = cri.run_pod(cri.pod_config("ends"))?;
        let sandbox = pod.id().to_owned();
        let events = ctr.events()?;
        for signal in signals {
            ensure!(pod.pod_status()?.state() == api::PodSandboxState::SandboxReady, "before {signal}");
            ctr.ctr(&["task", "kill", "--signal", signal, &sandbox])?.exited(0);
        }
        is_not_ready(&pod)?;
        events.until("/tasks/exit")?;
        let seen = events.stdout.text();
        let happened = task_events(&seen)?;
        let is_its_end =
            |(topic, payload): &&(&str, Value)| *topic == "exit" && payload["container_id"] == *sandbox;
        let (_, exit) = happened.iter().find(is_its_end).context("its end")?;
        ensure!(exit.get("exit_status").and_then(Value::as_u64) == code, "{exit}");
        pod.remove()?;
        nothing_is_left(&cri)?;
        drop(events);
    }
    cri.end()
}

fn pod_is_deleted_while_its_container_starts(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    // Before containerd has heard of the container, or once it has.
    for (name, known) in [("at-once", 0), ("later", 1)] {
        let pod = cri.run_pod(cri.pod_config(name))?;
        thread::scope(|scope| -> Result<()> {
            let starting = scope.spawn(|| pod.start(script("main", SLEEP)));
            time::until("the container is known", || Ok(cri.containers()?.len() >= known))?;
            let removed = cri.remove_all();
            // It may have come first, or too late: then it is an error, which is containerd's to word.
            let _started = starting.join().map_err(|_| anyhow::anyhow!("a panic"))?;
            removed
        })?;
        // What came too late a kubelet removes when it finds it.
        for container in cri.containers()? {
            pod.remove_container(&container)?;
        }
        cri.remove_all()?;
        nothing_is_left(&cri).context(name)?;
    }
    cri.end()
}

fn pods_reach_each_other_by_every_way(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let mut config = cri.pod_config("server");
    config.port_mappings.push(api::PortMapping {
        protocol: api::Protocol::Tcp.into(),
        container_port: 80,
        host_port: 8080,
        host_ip: String::new(),
    });
    let server = cri.run_pod(config)?;
    server.start(script(
        "web",
        "mkdir /www; echo served > /www/page; httpd -h /www -p 80; httpd -h /www -p 127.0.0.1:81; httpd -h /www -p [::1]:82; echo up; exec sleep 1000",
    ))?;
    until_logged(&server, "web", "up")?;
    let mut config = cri.pod_config("client");
    config.dns_config = Some(api::DnsConfig {
        servers: vec![HOST.to_owned()],
        searches: vec!["default.svc".to_owned()],
        options: vec!["ndots:5".to_owned()],
    });
    let client = cri.run_pod(config)?;
    let id = client.start(script("shell", SLEEP))?;
    ensure!(t.vmms()?.len() == 2, "a machine each");
    let status = server.pod_status()?.network.context("no network")?;
    let address6 = &status.additional_ips.first().context("no second address")?.ip;
    let address = status.ip;
    ensure!(client.sh(&id, &format!("wget -q -O - http://{address}/page"))? == "served\n");
    ensure!(client.sh(&id, &format!("wget -q -O - http://[{address6}]/page"))? == "served\n");
    client.sh(&id, &format!("ping -c 2 -q {address} && ping -c 2 -q {HOST}"))?;
    is_served(&format!("{address}:80"))?;
    // By the port of the host, which CNI's portmap leads on.
    is_served(&format!("{HOST}:8080"))?;
    // Port-forward enters the pod's network namespace and connects to localhost, which is the guest's: also what listens there only.
    for port in [81, 82] {
        let answer = server.ask_port(port, b"GET /page HTTP/1.0\r\n\r\n")?;
        ensure!(answer.ends_with(b"\r\n\r\nserved\n"), "{port}: {:?}", String::from_utf8_lossy(&answer));
    }
    ensure!(server.ask_port(83, b"anybody?").map_or(true, |answer| answer.is_empty()), "nobody listens");
    ensure!(is_served("127.0.0.1:81").is_err(), "the host's own loopback is its own");
    let resolver = client.sh(&id, "cat /etc/resolv.conf")?;
    ensure!(resolver == "search default.svc\nnameserver 10.88.0.1\noptions ndots:5\n", "{resolver}");
    ensure!(client.sh(&id, "cat /etc/hostname")? == "client\n");
    let names = Names::serve(&format!("{HOST}:53"), &address)?;
    ensure!(client.sh(&id, "wget -q -O - http://server.default.svc/page")? == "served\n");
    names.end()?;
    server.remove()?;
    client.remove()?;
    cri.end()
}

/// The environment variable with how many MiB go to a pod and come back, if not 1024.
const TCP_VARIABLE: &str = "KVRUN_E2E_TCP_MIB";

fn pod_is_on_links_of_every_kind_of_cni(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    // Masters of the plugins, and the host as somebody on the network of each.
    let wires = [Wire::loose(1)?, Wire::loose(2)?, Wire::loose(3)?];
    for number in 1..=3 {
        netns::run(&format!("ip link set peer{number} up"))?;
    }
    // In mode l3 it is the host that sends the packets of a pod on, by its own routes, and nobody answers to ARP for the pod; nor does the host to
    // itself, at the other end of the wire.
    let (pod_mac, host_mac) = (wires[2].mac(), "02:6b:76:00:09:ff");
    for command in [
        format!("ip link set host3 address {host_mac}"),
        "ip route add 10.9.3.0/24 dev peer3 metric 100".to_owned(),
        format!("ip neigh add {} lladdr {host_mac} nud permanent dev peer3", wires[2].host_address()),
        format!("ip neigh add {} lladdr {pod_mac} nud permanent dev host3", wires[2].address()),
    ] {
        netns::run(&command)?;
    }
    cri.add_network(0, json!({"type": "ptp", "mtu": 1400}), ["10.9.8.0/24", "fd09:8::/64"])?;
    cri.add_network(1, json!({"type": "macvlan", "master": "peer1"}), ["10.9.1.0/24", "fd09:1::/64"])?;
    let ipvlan = |master: &str, mode: &str| json!({"type": "ipvlan", "master": master, "mode": mode});
    cri.add_network(2, ipvlan("peer2", "l2"), ["10.9.2.0/24", "fd09:2::/64"])?;
    cri.add_network(3, ipvlan("peer3", "l3"), ["10.9.3.0/24", "fd09:3::/64"])?;
    let mut config = cri.pod_config("links");
    config.linux.as_mut().context("none")?.resources =
        Some(api::LinuxContainerResources { cpu_period: 100_000, cpu_quota: 200_000, ..Default::default() });
    let pod = cri.run_pod_by(LINKS, config)?;
    let id = pod.start(script("shell", SLEEP))?;

    let links =
        pod.sh(&id, "cd /sys/class/net; ls -d * eth0/queues/rx-* | tr '\\n' ' '; cat eth0/mtu eth1/mtu")?;
    ensure!(links == "eth0 eth0/queues/rx-0 eth0/queues/rx-1 eth1 eth2 eth3 lo 1400\n1500\n", "{links}");
    // The plugin ptp leads everything over the host.
    let routes = pod.sh(&id, "ip route; ip -6 route")?;
    for route in [
        "10.9.8.0/24 via 10.9.8.1 dev eth0",
        "fd09:8::/64 via fd09:8::1 dev eth0",
        "default via 10.9.8.1 dev eth0",
    ] {
        ensure!(routes.contains(route), "{route}: {routes}");
    }
    for route in ["10.9.8.0/24 dev eth0", "fd09:8::/64 dev eth0"] {
        ensure!(!routes.contains(route), "{route}: {routes}");
    }
    let mut hosts = vec!["10.9.8.1".to_owned(), "fd09:8::1".to_owned(), wires[2].host_address()];
    for wire in &wires[..2] {
        hosts.extend([wire.host_address(), wire.host_address6()]);
    }
    for host in &hosts {
        let finished = pod.exec(&id, &format!("ping -c 1 -q {host} || {{ ip addr; ip neigh; }}"))?;
        ensure!(finished.stdout.contains("1 packets received"), "{host}: {finished:?}");
    }
    bytes_come_back(&pod, &id)?;
    pod.remove()?;
    cri.end()
}

/// Many bytes go to a container and back, over TCP.
fn bytes_come_back(pod: &Pod<'_>, id: &str) -> Result<()> {
    let listener = TcpListener::bind("10.9.8.1:0")?;
    let port = listener.local_addr()?.port();
    pod.sh(id, &format!("nc 10.9.8.1 {port} -e cat >/dev/null 2>&1 &"))?;
    let (mut stream, _) = listener.accept()?;
    // Of a length that divides no packet or buffer, so that what is out of order is told.
    let pattern: Vec<u8> =
        (0..65_521_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let rounds = (setting(TCP_VARIABLE, 1024)? << 20).div_ceil(pattern.len());
    let mut input = stream.try_clone()?;
    thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(|| -> Result<()> {
            for _ in 0..rounds {
                input.write_all(&pattern)?;
            }
            Ok(input.shutdown(Shutdown::Write)?)
        });
        let mut came = vec![0; pattern.len()];
        for round in 0..rounds {
            stream.read_exact(&mut came)?;
            ensure!(came == pattern, "what came back in round {round} is not what was sent");
        }
        ensure!(stream.read(&mut came)? == 0, "more came back than was sent");
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
    })
}

/// A name server by whom every name has one IPv4 address.
struct Names {
    address: SocketAddr,
    thread: JoinHandle<Result<()>>,
}

impl Names {
    fn serve(at: &str, answer: &str) -> Result<Self> {
        let socket = UdpSocket::bind(at)?;
        let address = socket.local_addr()?;
        let answer: Ipv4Addr = answer.parse()?;
        let thread = thread::spawn(move || -> Result<()> {
            let mut message = [0; 512];
            loop {
                let (length, from) = socket.recv_from(&mut message)?;
                if length == 0 {
                    return Ok(());
                }
                // RFC 1035, 4.1: a response; of an address for the question (A), of nothing for any other. The name is that of the question.
                let mut response = message[..length].to_vec();
                response[2..4].copy_from_slice(&[0x81, 0x80]);
                let is_address = response[length - 4..] == [0, 1, 0, 1];
                response[7] = u8::from(is_address);
                if is_address {
                    response.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                    response.extend(answer.octets());
                }
                socket.send_to(&response, from)?;
            }
        });
        Ok(Self { address, thread })
    }

    fn end(self) -> Result<()> {
        UdpSocket::bind((HOST, 0))?.send_to(&[], self.address)?;
        self.thread.join().map_err(|_| anyhow::anyhow!("the name server panicked"))?
    }
}

/// As a kubelet writes a configMap, a secret or a projected volume: a directory swapped as a whole, and the one before removed.
fn publish(volume: &Path, version: &str) -> Result<()> {
    let data = volume.join(format!("..{version}"));
    let before = fs::read_link(volume.join("..data"));
    fs::create_dir(&data)?;
    fs::write(data.join("key"), format!("{version}\n"))?;
    symlink(format!("..{version}"), volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    if !volume.join("key").exists() {
        symlink("..data/key", volume.join("key"))?;
    }
    if let Ok(before) = before {
        fs::remove_dir_all(volume.join(before))?;
    }
    Ok(())
}

fn volumes_are_seen_as_they_change(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let pod = cri.run_pod(cri.pod_config("volumes"))?;
    let path = |name: &str| t.scratch().join(name);
    for dir in ["config", "shared", "other", "empty", "memory"] {
        fs::create_dir(path(dir))?;
    }
    // An emptyDir in memory, of a size.
    rustix::mount::mount("tmpfs", path("memory"), "tmpfs", MountFlags::empty(), Some(c"size=1m"))?;
    publish(&path("config"), "one")?;
    for file in ["hosts", "log", "sub"] {
        fs::write(path(file), format!("{file}\n"))?;
    }
    fs::set_permissions(path("shared"), fs::Permissions::from_mode(0o777))?;
    let mut first = script("first", SLEEP);
    first.mounts = vec![
        mount(&path("config"), "/config", true),
        mount(&path("shared"), "/shared", false),
        mount(&path("other"), "/shared/nested", false),
        mount(&path("sub"), "/etc/sub/path", true),
        mount(&path("hosts"), "/etc/hosts", false),
        mount(&path("log"), "/dev/termination-log", false),
        mount(&path("empty"), "/empty", true),
        mount(&path("memory"), "/memory", false),
    ];
    let mut second = script("second", SLEEP);
    second.mounts = vec![mount(&path("shared"), "/shared", false)];
    let (first, second) = (pod.start(first)?, pod.start(second)?);
    ensure!(pod.sh(&first, "cat /config/key /etc/sub/path /etc/hosts")? == "one\nsub\nhosts\n");
    publish(&path("config"), "two")?;
    time::until("the new version is seen", || Ok(pod.sh(&first, "cat /config/key")? == "two\n"))?;
    for refused in ["/config/key", "/etc/sub/path"] {
        let finished = pod.exec(&first, &format!("echo x > {refused}"))?;
        ensure!(finished.code != 0 && finished.stderr.contains("Read-only file system"), "{finished:?}");
    }
    pod.sh(
        &first,
        "echo first > /shared/file; echo nested > /shared/nested/file; echo why > /dev/termination-log",
    )?;
    ensure!(pod.sh(&second, "cat /shared/file; ls /shared/nested")? == "first\n");
    ensure!(fs::read_to_string(path("other").join("file"))? == "nested\n");
    ensure!(fs::read_to_string(path("log"))? == "why\n");
    ensure!(pod.sh(&first, "ls -A /empty")?.is_empty());
    let finished = pod.exec(&first, "dd if=/dev/zero of=/memory/file bs=64k count=32")?;
    ensure!(finished.code != 0 && finished.stderr.contains("No space left on device"), "{finished:?}");
    let size = pod.sh(&first, "df -k /dev/shm | tail -n 1 | awk '{print $2}'")?;
    ensure!(size == "65536\n", "{size}");

    // A socket of one container is that of the others, and what a container that is gone has used with others is still there.
    pod.sh(&second, "ln -s /shared/log /dev/log && syslogd -O /shared/messages")?;
    pod.sh(&first, "ln -s /shared/log /dev/log && logger from first")?;
    time::until("it has been logged", || {
        Ok(pod.sh(&second, "cat /shared/messages")?.contains("from first"))
    })?;
    pod.remove_container(&first)?;
    fs::write(path("shared").join("file"), "later\n")?;
    ensure!(pod.sh(&second, "cat /shared/file && logger from second")? == "later\n");
    pod.remove()?;
    unmount(path("memory"), UnmountFlags::empty())?;
    cri.end()
}

/// How many directories and files the shims watch on the host.
fn watches_of_shims() -> Result<usize> {
    let mut watches = 0;
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        if !fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim_end() == SHIM) {
            continue;
        }
        for descriptor in fs::read_dir(process.join("fdinfo")).into_iter().flatten() {
            let info = fs::read_to_string(descriptor?.path()).unwrap_or_default();
            watches += info.lines().filter(|line| line.starts_with("inotify ")).count();
        }
    }
    Ok(watches)
}

fn changes_of_volumes_that_a_kubelet_keeps_are_heard(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let pod = cri.run_pod(cri.pod_config("volumes"))?;
    let volumes = t.scratch().join("volumes");
    let (config, large) =
        (volumes.join("kubernetes.io~configmap/config"), volumes.join("kubernetes.io~projected/large"));
    for volume in [&config, &large] {
        fs::create_dir_all(volume)?;
        publish(volume, "one")?;
    }
    File::create(large.join("rest"))?.set_len(1 << 20)?;
    let programs = t.scratch().join("programs");
    fs::create_dir(&programs)?;
    fs::copy(program()?, programs.join("fs-semantics"))?;
    let watcher = |name: &str| {
        let mut watcher = script(name, &format!("/programs/fs-semantics hear /config & {SLEEP}"));
        watcher.mounts = vec![
            mount(&programs, "/programs", true),
            mount(&config, "/config", true),
            mount(&large, "/large", true),
        ];
        watcher
    };
    let (first, second) = (pod.start(watcher("first"))?, pod.start(watcher("second"))?);
    for name in ["first", "second"] {
        until_logged(&pod, name, "listening")?;
    }
    let look = "stat -c '%d %i' /config; stat -f -c %T /config; cat /config/key /large/key";
    let seen = pod.sh(&first, look)?;
    ensure!(seen.ends_with("tmpfs\none\none\n"), "{seen}");
    ensure!(pod.sh(&second, look)? == seen, "both have one copy");
    ensure!(watches_of_shims()? == 1);
    let log = cri.containerd().log();
    ensure!(log.contains("not heard by inotify") && log.contains("kubernetes.io~projected/large"), "{log}");

    publish(&config, "two")?;
    for (name, id) in [("first", &first), ("second", &second)] {
        until_logged(&pod, name, "moved ..data")?;
        ensure!(pod.sh(id, "cat /config/key")? == "two\n");
        until_logged(&pod, name, "removed ..one")?;
        let heard = pod.log(name)?;
        let heard: Vec<_> = heard.lines().filter(|line| !["up", "listening"].contains(line)).collect();
        ensure!(heard == ["made ..two", "moved ..data", "removed ..one"], "{heard:?}");
    }
    publish(&large, "two")?;
    time::until("the new version is seen", || Ok(pod.sh(&first, "cat /large/key")? == "two\n"))?;
    let finished = pod.exec(&first, "echo x > /config/key")?;
    ensure!(finished.code != 0 && finished.stderr.contains("Read-only file system"), "{finished:?}");

    pod.remove_container(&first)?;
    publish(&config, "three")?;
    until_logged(&pod, "second", "removed ..two")?;
    ensure!(pod.sh(&second, "cat /config/key")? == "three\n");
    pod.remove_container(&second)?;
    ensure!(watches_of_shims()? == 0, "it watches what nobody has any more");
    // A kubelet removes volumes before the pod.
    fs::remove_dir_all(&volumes)?;
    let again = pod.start(script("again", SLEEP))?;
    ensure!(pod.sh(&again, "echo fine")? == "fine\n");
    pod.remove()?;
    nothing_is_left(&cri)?;
    cri.end()
}

/// The snapshotter is a setting of the runtime, which a RuntimeClass names.
fn root_file_systems_are_of_the_snapshotter_of_a_runtime(t: &Test) -> Result<()> {
    const SNAPSHOTTERS: [(&str, &str); 2] =
        [("blockfile", "grep -q '^/dev/vd[a-z]* / ext4 rw' /proc/mounts"), ("erofs", IN_LAYERS)];
    let runtimes = SNAPSHOTTERS.map(|(snapshotter, _)| runtime_on(snapshotter, snapshotter));
    let config = blockfile(t, &t.scratch().join("blockfile"))? + erofs()? + &runtimes.concat();
    let cri = Cri::with_config(t, &config)?;
    for (snapshotter, is_on_it) in SNAPSHOTTERS {
        let pod = cri.run_pod_by(snapshotter, cri.pod_config(snapshotter))?;
        let neighbour = pod.start(script("neighbour", SLEEP))?;
        // Restarted, it has the files of its image again.
        let text = format!(
            "{is_on_it} || exec cat /proc/mounts; ls /written; rm /etc/group
            head -c 1000000 /dev/urandom > /written && sha256sum /written > /sum && sync && sha256sum -c /sum; exit 3"
        );
        for attempt in 0..2 {
            let mut config = script("main", &text);
            config.metadata = Some(api::ContainerMetadata { name: "main".to_owned(), attempt });
            let id = pod.start(config)?;
            let ended = pod.wait(&id)?;
            ensure!(ended.exit_code == 3, "{snapshotter}: {ended:?}: {}", pod.log("main")?);
            pod.remove_container(&id)?;
        }
        let once = "ls: /written: No such file or directory\n/written: OK\n";
        ensure!(pod.log("main")? == once.repeat(2), "{snapshotter}: {}", pod.log("main")?);
        ensure!(pod.sh(&neighbour, "ls /etc")? == "group\nhostname\nhosts\npasswd\nresolv.conf\n");
        pod.remove()?;
        nothing_is_left(&cri).context(snapshotter)?;
    }
    forget_layers(cri.containerd())?;
    cri.end()
}

/// `volumeDevices` of Kubernetes, as a kubelet says them.
fn raw_block_volume_is_a_disk_of_the_containers_that_have_it(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let file = t.scratch().join("volume");
    fs::write(&file, "from the host\n")?;
    File::options().write(true).open(&file)?.set_len(4 << 20)?;
    let volume = Loop::over(&file)?;
    let with_volume = |name: &str, permissions: &str| {
        let device = api::Device {
            container_path: "/dev/volume".to_owned(),
            host_path: volume.path().display().to_string(),
            permissions: permissions.to_owned(),
        };
        api::ContainerConfig { devices: vec![device], ..script(name, SLEEP) }
    };
    let pod = cri.run_pod(cri.pod_config("block"))?;
    let writer = pod.start(with_volume("writer", "rwm"))?;
    let reader = pod.start(with_volume("reader", "r"))?;
    let other = pod.start(script("other", SLEEP))?;
    let look = "stat -c %F /dev/volume; cat /sys/class/block/vda/size; head -n 1 /dev/volume";
    let seen = pod.sh(&writer, look)?;
    ensure!(seen == "block special file\n8192\nfrom the host\n", "{seen}");
    pod.sh(&writer, "echo from the guest | dd of=/dev/volume conv=fsync")?;
    ensure!(fs::read(&file)?.starts_with(b"from the guest\n"), "it has not reached the host");
    // It is one disk for both.
    let seen = pod.sh(&reader, "head -n 1 /dev/volume; ls -d /sys/class/block/vd*")?;
    ensure!(seen == "from the guest\n/sys/class/block/vda\n", "{seen}");
    let finished = pod.exec(&reader, "echo x > /dev/volume")?;
    ensure!(finished.code != 0 && finished.stderr.contains("Operation not permitted"), "{finished:?}");
    let finished = pod.exec(&other, "ls /dev/volume")?;
    ensure!(finished.code != 0, "{finished:?}");
    for container in [&writer, &reader] {
        pod.stop(container, GRACE)?;
        pod.remove_container(container)?;
    }
    let left = pod.sh(&other, "ls /sys/class/block | grep -c vd || :")?;
    ensure!(left == "0\n", "{left}");
    pod.remove()?;
    cri.end()
}
