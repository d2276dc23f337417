//! The network of a container is that of its network namespace on the host.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use kvrun_e2e::netns::{self, MTU, Namespace, Wire};
use kvrun_e2e::{Bundle, Case, Test, cases, time};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::process::Signal;
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = cases![
    links_addresses_and_routes_are_those_of_the_namespace,
    tcp_and_udp_go_both_ways,
    tcp_and_udp_go_both_ways_on_a_host_without_vhost_net,
    container_is_on_several_links,
    namespace_is_afterwards_as_it_was,
    namespace_is_free_again_after_a_crash,
    engine_configures_a_new_namespace_by_the_process_before_the_start,
    hook_configures_a_new_namespace_by_the_state_it_reads,
    namespace_of_another_machine_is_refused,
    container_that_joins_the_namespace_of_another_is_in_its_machine,
    what_a_guest_cannot_have_is_refused_by_name,
];

/// Makes the bundle's network namespace this one.
fn in_namespace(bundle: Bundle, path: &str) -> Result<Bundle> {
    bundle.with(|spec| set_network(spec, &json!({"type": "network", "path": path})))
}

fn set_network(spec: &mut Value, network: &Value) {
    for namespace in spec["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
        if namespace["type"] == "network" {
            namespace.clone_from(network);
        }
    }
}

pub(crate) fn namespace(t: &Test) -> Result<Namespace> {
    Namespace::new(&t.scratch().join("netns"))
}

/// A script that may ping.
fn pinging(t: &Test, script: &str) -> Result<Bundle> {
    t.script(script)?.with(|spec| {
        let capabilities =
            spec["process"]["capabilities"].as_object_mut().into_iter().flat_map(|sets| sets.values_mut());
        for set in capabilities.filter_map(Value::as_array_mut) {
            set.push(json!("CAP_NET_RAW"));
        }
    })
}

fn script(t: &Test, namespace: &Namespace, script: &str) -> Result<Bundle> {
    in_namespace(pinging(t, script)?, namespace.path().to_str().context("a path of ASCII")?)
}

fn links_addresses_and_routes_are_those_of_the_namespace(t: &Test) -> Result<()> {
    let namespace = namespace(t)?;
    let wire = namespace.connect("eth0", 1)?;
    namespace.run("ip route add 10.10.0.0/16 via 10.9.1.77 dev eth0 metric 5 mtu 1300")?;
    namespace.run("ip neigh add 10.9.1.77 lladdr 02:00:00:00:00:77 nud permanent dev eth0")?;
    let (host, host6) = (wire.host_address(), wire.host_address6());
    let container = script(
        t,
        &namespace,
        &format!(
            "ls /sys/class/net; ip -o addr show dev eth0 | grep -v fe80:; ip link show eth0; ip route; ip -6 route; ip neigh; \
             ping -c 2 -q {host} && ping -c 2 -q {host6}"
        ),
    )?;
    let text = t.run(&container)?.exited(0).stderr("").text();
    for words in [
        "eth0\nlo\n",
        "inet 10.9.1.2/24",
        "inet6 fd09:1::2/64",
        &format!("mtu {MTU}"),
        &wire.mac(),
        "default via 10.9.1.1 dev eth0",
        "10.9.1.0/24 dev eth0",
        "10.10.0.0/16 via 10.9.1.77 dev eth0",
        "metric 5",
        "default via fd09:1::1 dev eth0",
        "10.9.1.77 dev eth0 lladdr 02:00:00:00:00:77",
        "2 packets transmitted, 2 packets received",
    ] {
        ensure!(text.contains(words), "{words:?} is missing: {text}");
    }
    Ok(())
}

const VHOST_NET: &str = "/dev/vhost-net";

fn tcp_and_udp_go_both_ways(t: &Test) -> Result<()> {
    both_ways(t, File::open(VHOST_NET).is_ok())
}

fn tcp_and_udp_go_both_ways_on_a_host_without_vhost_net(t: &Test) -> Result<()> {
    // A device that no driver has, where one of the test's mounts covers it.
    let nothing = t.scratch().join("nothing");
    mknodat(CWD, &nothing, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, 0)?;
    let covered = Path::new(VHOST_NET).exists();
    if covered {
        mount_bind(&nothing, VHOST_NET)?;
    }
    let result = both_ways(t, false);
    if covered {
        unmount(VHOST_NET, UnmountFlags::empty())?;
    }
    result
}

/// Whether the host's kernel carries packets of the only VMM: then it has a thread in there.
fn has_vhost_thread(t: &Test) -> Result<bool> {
    let [(vmm, _)] = &t.vmms()?[..] else { bail!("not one VMM") };
    let threads = fs::read_dir(format!("/proc/{vmm}/task"))?;
    let names = threads.map(|thread| fs::read_to_string(thread?.path().join("comm")));
    Ok(names.collect::<io::Result<Vec<_>>>()?.iter().any(|name| name.starts_with("vhost")))
}

fn both_ways(t: &Test, vhost: bool) -> Result<()> {
    let namespace = namespace(t)?;
    let wire = namespace.connect("eth0", 1)?;
    let host = wire.host_address();
    // Many more bytes than fit into one packet, so that segmentation and checksums are at work.
    let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let listener = TcpListener::bind((host.as_str(), 4000))?;
    let container = script(
        t,
        &namespace,
        &format!(
            "nc {host} 4000 < /dev/null > /sent; nc -l -p 4001 < /dev/null > /got & \
             until grep -q ':0FA1 0*:0000 0A' /proc/net/tcp /proc/net/tcp6; do :; done; echo listening; wait; \
             cmp /got /sent && echo same; nslookup name.test {host} | grep -o NXDOMAIN"
        ),
    )?;
    let udp = std::net::UdpSocket::bind((host.as_str(), 53))?;
    udp.set_read_timeout(Some(time::scaled(time::RUN)))?;
    let sender = thread::spawn({
        let bytes = bytes.clone();
        move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(&bytes)?;
            Ok(stream.shutdown(Shutdown::Write)?)
        }
    });
    let run = t.start(&container)?.without_input();
    run.until("listening")?;
    ensure!(has_vhost_thread(t)? == vhost, "vhost-net is used: {}", !vhost);
    sender.join().map_err(|_| anyhow::anyhow!("the host's end panicked"))??;
    let mut stream =
        TcpStream::connect((wire.address().as_str(), 4001)).context("cannot connect to the container")?;
    stream.write_all(&bytes)?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    // A question to a name server: it is sent back as an answer (RFC 1035, 4.1.1: a response, of a name that does not exist).
    let mut message = [0; 512];
    let (length, from) = udp.recv_from(&mut message).context("no datagram from the container")?;
    ensure!(from.ip().to_string() == wire.address(), "{from}");
    message[2..4].copy_from_slice(&[0x81, 0x83]);
    udp.send_to(&message[..length], from)?;
    let text = run.wait()?.text();
    ensure!(text.starts_with("listening\nsame\nNXDOMAIN\n"), "{text}");
    Ok(())
}

fn container_is_on_several_links(t: &Test) -> Result<()> {
    let namespace = namespace(t)?;
    let (first, second) = (namespace.connect("eth0", 1)?, namespace.connect("net1", 2)?);
    // Down, and so none of the container's.
    namespace.run("ip link add unused type veth peer name unused2")?;
    let script_text = format!(
        "ls /sys/class/net; ping -c 1 -q {} && ping -c 1 -q {}",
        first.host_address(),
        second.host_address()
    );
    let text = t.run(&script(t, &namespace, &script_text)?)?.exited(0).stderr("").text();
    ensure!(text.starts_with("eth0\nlo\nnet1\n"), "{text}");
    ensure!(text.matches("1 packets received").count() == 2, "{text}");
    Ok(())
}

/// Links, addresses and traffic control of a namespace.
pub(crate) fn look(namespace: &Namespace) -> Result<String> {
    let mut all = namespace.run("ip -o addr")?;
    for command in ["ip -o link", "ip route", "tc qdisc show", "tc filter show dev eth0 ingress"] {
        all.push_str(&namespace.run(command)?);
    }
    // Until the kernel is sure that nobody else has an address, which takes a second.
    Ok(all.replace(" tentative", ""))
}

fn namespace_is_afterwards_as_it_was(t: &Test) -> Result<()> {
    let namespace = namespace(t)?;
    let _wire = namespace.connect("eth0", 1)?;
    let before = look(&namespace)?;
    // The second is on the links that the first has given back.
    for _ in 0..2 {
        let container = script(t, &namespace, "ping -c 1 -q 10.9.1.1; exit 5")?;
        let outcome = t.run(&container)?.exited(5);
        ensure!(outcome.text().contains("1 packets received"), "{outcome}");
        ensure!(look(&namespace)? == before, "before:\n{before}after:\n{}", look(&namespace)?);
    }
    // One that cannot be created leaves nothing either.
    let container =
        script(t, &namespace, "true")?.with(|spec| spec["process"]["args"] = json!(["/no/such"]))?;
    t.run(&container)?.exited(127);
    ensure!(look(&namespace)? == before, "before:\n{before}after:\n{}", look(&namespace)?);
    Ok(())
}

fn namespace_is_free_again_after_a_crash(t: &Test) -> Result<()> {
    let namespace = namespace(t)?;
    let _wire = namespace.connect("eth0", 1)?;
    let before = look(&namespace)?;
    let left = t.create(&script(t, &namespace, "sleep 1000")?)?;
    t.command("start")?;
    left.signal(Signal::KILL)?;
    ensure!(left.end()? == 1009, "it is killed");
    t.command("delete")?;
    ensure!(look(&namespace)? == before, "before:\n{before}after:\n{}", look(&namespace)?);
    let outcome = t.run(&script(t, &namespace, "ping -c 1 -q 10.9.1.1")?)?.exited(0);
    ensure!(outcome.text().contains("1 packets received"), "{outcome}");
    Ok(())
}

/// As docker does it.
fn engine_configures_a_new_namespace_by_the_process_before_the_start(t: &Test) -> Result<()> {
    let left = t.create(&pinging(t, "ip -o addr show dev eth0; ping -c 1 -q 10.9.1.1")?)?;
    let wire = Wire::loose(1)?;
    netns::run(&format!("ip link set peer1 netns {} name eth0", left.pid()))?;
    for command in wire.commands("eth0") {
        netns::run(&format!("nsenter --net=/proc/{}/ns/net {command}", left.pid()))?;
    }
    t.command("start")?;
    ensure!(left.end()? == 0, "{}", left.text()?);
    let text = left.text()?;
    ensure!(text.contains("10.9.1.2/24") && text.contains("1 packets received"), "{text}");
    t.command("delete")?;
    Ok(())
}

/// As CNI's and docker's hooks do it: they see the host's links, and reach the container's by the process in the state document.
fn hook_configures_a_new_namespace_by_the_state_it_reads(t: &Test) -> Result<()> {
    let wire = Wire::loose(1)?;
    let mut hook = "set -e; pid=$(jq .pid); ip link set peer1 netns $pid name eth0".to_owned();
    for command in wire.commands("eth0") {
        hook.push_str(&format!("; nsenter --net=/proc/$pid/ns/net {command}"));
    }
    let path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    let container = pinging(t, "ping -c 1 -q 10.9.1.1")?.with(|spec| {
        spec["hooks"]["createRuntime"] =
            json!([{"path": "/bin/sh", "args": ["sh", "-c", hook], "env": [path]}]);
    })?;
    let text = t.run(&container)?.exited(0).stderr("").text();
    ensure!(text.contains("1 packets received"), "{text}");
    Ok(())
}

fn namespace_of_another_machine_is_refused(t: &Test) -> Result<()> {
    let namespace = namespace(t)?;
    let _wire = namespace.connect("eth0", 1)?;
    let left = t.create(&script(t, &namespace, "sleep 1000")?)?;
    let other = script(t, &namespace, "true")?;
    let path = other.path().to_str().context("a path of ASCII")?;
    let other_id = format!("{}-2", t.id());
    t.invoke(&["run", "--bundle", path, &other_id])?.exited(1).error(&[
        "network namespace",
        "kvrun0",
        "same pod",
    ]);
    // The first still has its network.
    t.command("start")?;
    let ping = ["exec", t.id(), "ping", "-c", "1", "-q", "10.9.1.1"];
    t.invoke(&ping)?.exited(0);
    t.invoke(&["kill", t.id(), "9"])?.exited(0);
    ensure!(left.end()? == 1009);
    t.command("delete")?;
    Ok(())
}

/// As `--network container:NAME` and pods of podman have it.
fn container_that_joins_the_namespace_of_another_is_in_its_machine(t: &Test) -> Result<()> {
    let namespace = namespace(t)?;
    let wire = namespace.connect("eth0", 1)?;
    let first = t.create(&script(t, &namespace, "sleep 1000")?)?;
    t.command("start")?;
    let joining = format!(
        "cat /proc/sys/kernel/random/boot_id; ip -o addr show dev eth0; ping -c 1 -q {}",
        wire.host_address()
    );
    let joining = in_namespace(pinging(t, &joining)?, &format!("/proc/{}/ns/net", first.pid()))?;
    let other_id = format!("{}-2", t.id());
    let second = t.create_as(&other_id, &joining)?;
    ensure!(t.vmms()?.len() == 1, "one machine for both");
    // An engine may name either.
    let netns_of = |pid| fs::read_link(format!("/proc/{pid}/ns/net"));
    ensure!(netns_of(first.pid())? == netns_of(second.pid())?);
    t.invoke(&["start", &other_id])?.exited(0);
    ensure!(second.end()? == 0, "{}", second.text()?);
    let text = second.text()?;
    let boot_id = t.invoke(&["exec", t.id(), "cat", "/proc/sys/kernel/random/boot_id"])?.exited(0).text();
    ensure!(text.starts_with(&boot_id) && text.contains("1 packets received"), "{boot_id}{text}");
    t.invoke(&["delete", &other_id])?.exited(0);
    // In the same machine, it can have none, but no other.
    let none = t.script("ls /sys/class/net")?.with(|spec| {
        spec["annotations"] =
            json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": t.id()});
    })?;
    let third = t.create_as(&other_id, &none)?;
    t.invoke(&["start", &other_id])?.exited(0);
    ensure!(third.end()? == 0 && third.text()? == "lo\n", "{}", third.text()?);
    t.invoke(&["delete", &other_id])?.exited(0);
    let third = t.create_as(&other_id, &none)?;
    let _loose = Wire::loose(3)?;
    netns::run(&format!("ip link set peer3 netns {} name eth0 up", third.pid()))?;
    t.invoke(&["start", &other_id])?.exited(1).error(&["eth0", "network of its own"]);
    t.invoke(&["delete", "--force", &other_id])?.exited(0);
    third.end()?;
    t.invoke(&["kill", t.id(), "9"])?.exited(0);
    ensure!(first.end()? == 1009);
    t.command("delete")?;
    Ok(())
}

fn what_a_guest_cannot_have_is_refused_by_name(t: &Test) -> Result<()> {
    let refused = |name: &str, commands: &[&str], words: &[&str]| -> Result<()> {
        let namespace = Namespace::new(&t.scratch().join(name))?;
        let _wire = namespace.connect("eth0", 1)?;
        for command in commands {
            namespace.run(command)?;
        }
        t.run(&script(t, &namespace, "true")?)?.exited(1).error(words);
        let qdiscs = namespace.run("tc qdisc show")?;
        ensure!(!qdiscs.contains("ingress"), "{qdiscs}");
        Ok(())
    };
    for path in ["/proc/1/ns/net", "/proc/self/ns/net"] {
        t.run(&in_namespace(t.script("true")?, path)?)?.exited(1).error(&[
            "linux.namespaces",
            path,
            "of the host",
        ]);
    }
    refused(
        "tun",
        &["ip tuntap add mode tun tun0", "ip link set tun0 up"],
        &["tun0", "not an Ethernet link"],
    )?;
    refused(
        "l3s",
        &["ip link add link eth0 name l3s0 type ipvlan mode l3s", "ip link set l3s0 up"],
        &["l3s0", "ipvlan link in mode l3s"],
    )?;
    refused(
        "route",
        &["ip route add 10.77.0.0/16 nexthop via 10.9.1.3 nexthop via 10.9.1.4"],
        &["10.77.0.0/16", "several next hops"],
    )?;
    let many: Vec<String> = (0..14)
        .flat_map(|i| {
            [format!("ip link add many{i} type veth peer name mate{i}"), format!("ip link set many{i} up")]
        })
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    refused("many", &many, &["one too many", "no slot left"])
}
