//! Network links: attached to a running machine, set up by the agent, used by ordinary programs.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvrun_e2e::vm::link::{GUEST, GUEST_MAC, HOST, Link, NAME};
use kvrun_e2e::vm::{FIRST_SLOT, Machine, Shape};
use kvrun_e2e::{Case, Test, cases, time};
use kvrun_vmm_api::RateLimit;

pub(crate) const CASES: &[Case] = cases![
    guest_and_host_reach_each_other,
    tcp_carries_data_intact_both_ways,
    tcp_carries_data_intact_over_vhost,
    several_queues_serve_several_vcpus,
    link_is_taken_away_and_given_back,
    pausing_a_machine_breaks_no_connection,
    limit_of_a_link_can_be_changed_while_it_is_used,
    link_that_cannot_be_is_refused,
];

const SLOT: u8 = FIRST_SLOT;
const MIB: usize = 1 << 20;
/// The port on which the host, or the guest, listens.
const PORT: u16 = 5000;

/// How much goes through a connection: an emulated machine is given a sixteenth.
fn bulk() -> usize {
    if time::scaled(Duration::from_secs(1)) > Duration::from_secs(2) { 64 * MIB } else { 1024 * MIB }
}

fn machine(t: &Test, vcpus: u8) -> Result<Machine> {
    Machine::boot(t, Shape { vcpus, max_vcpus: vcpus, ..Shape::default() })
}

fn guest_and_host_reach_each_other(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    let link = Link::new(9000, 1)?;
    link.attach(&vm, SLOT)?;
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let seen = vm.sh(&format!("cd /sys/class/net/{NAME} && cat address mtu operstate"))?;
    ensure!(seen.starts_with(&format!("{mac}\n9000\n")), "{seen}");
    let (v4, v6) = HOST;
    let routes = vm.sh("ip route; ip -6 route; ip neigh")?;
    ensure!(routes.contains(&format!("default via {v4} dev {NAME}")), "{routes}");
    ensure!(routes.contains(&format!("default via {v6} dev {NAME}")), "{routes}");
    ensure!(routes.contains("PERMANENT"), "{routes}");
    // In one packet each, which fills the link.
    vm.sh(&format!("ping -c 3 -s 8972 {v4} && ping -6 -c 3 -s 8952 {v6}"))?;
    for guest in [GUEST.0.to_string(), GUEST.1.to_string()] {
        let output = Command::new("busybox").args(["ping", "-c", "3", "-s", "8900", &guest]).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let (packets, bytes) = (vm.counter(SLOT, "rx_packets")?, vm.counter(SLOT, "rx_bytes")?);
    ensure!(bytes > 12 * 8900 && packets < 60, "{packets} packets of {bytes} bytes");
    ensure!(vm.counter(SLOT, "tx_malformed")? == 0 && vm.counter(SLOT, "rx_dropped")? == 0);
    Ok(())
}

fn tcp_carries_data_intact_both_ways(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    let link = Link::new(1500, 1)?;
    link.attach(&vm, SLOT)?;
    let (to_guest, from_guest) = (bulk(), bulk());
    receive_in_guest(&vm, to_guest)?;
    send_from_guest(&vm, from_guest)?;
    // Segments are cut by whoever has a wire, which is nobody here.
    let (packets, bytes) = (vm.counter(SLOT, "tx_packets")?, vm.counter(SLOT, "tx_bytes")?);
    ensure!(bytes as usize > from_guest && bytes / packets > 1500, "{packets} packets of {bytes} bytes");
    ensure!(vm.counter(SLOT, "rx_bytes")? as usize > to_guest);
    ensure!(vm.counter(SLOT, "tx_malformed")? == 0 && vm.counter(SLOT, "tx_dropped")? == 0);
    Ok(())
}

fn tcp_carries_data_intact_over_vhost(t: &Test) -> Result<()> {
    let vm = machine(t, 2)?;
    let link = Link::with_vhost(1500, 2)?;
    link.attach(&vm, SLOT)?;
    // Less than else: two vCPUs and the host's kernel share what may be one emulated CPU.
    receive_in_guest(&vm, bulk() / 8)?;
    send_from_guest(&vm, bulk() / 8)?;
    ensure!(vm.counter(SLOT, "rx_packets")? == 0, "it is the host's kernel that carries them");
    ensure!(vm.counter(SLOT, "control_done")? > 0, "and the VMM that obeys the driver");
    // It lets go, and takes up again where it was.
    for _ in 0..2 {
        vm.pause()?;
        vm.resume()?;
        vm.sh(&format!("ping -c 2 {}", HOST.0))?;
    }
    vm.detach(SLOT)?;
    link.attach(&vm, SLOT)?;
    receive_in_guest(&vm, MIB)
}

fn several_queues_serve_several_vcpus(t: &Test) -> Result<()> {
    let vm = machine(t, 2)?;
    let link = Link::new(1500, 2)?;
    link.attach(&vm, SLOT)?;
    let queues = vm.sh(&format!("ls /sys/class/net/{NAME}/queues"))?;
    ensure!(queues == "rx-0\nrx-1\ntx-0\ntx-1\n", "{queues}");
    ensure!(vm.counter(SLOT, "control_done")? > 0);
    // Enough connections that both queues have some: the kernel spreads them by a hash.
    let hosts: Vec<_> = (0..8).map(|i| expect(PORT + i, 4 * MIB)).collect::<Result<_>>()?;
    let length = 4 * MIB;
    vm.write_pattern(length)?;
    let (v4, last) = (HOST.0, PORT + 7);
    vm.sh(&format!("for port in $(seq {PORT} {last}); do nc {v4} $port < /pattern & done; wait"))?;
    for host in hosts {
        finish(host)?;
    }
    Ok(())
}

fn link_is_taken_away_and_given_back(t: &Test) -> Result<()> {
    let vm = machine(t, 2)?;
    let link = Link::new(1500, 2)?;
    for _ in 0..3 {
        link.attach(&vm, SLOT)?;
        vm.sh(&format!("ping -c 1 {}", HOST.0))?;
        vm.detach(SLOT)?;
        ensure!(vm.run(&format!("ip link show {NAME}"))?.code != 0);
    }
    // By its driver only: the device starts anew under it.
    link.attach(&vm, SLOT)?;
    vm.block_on(vm.pod().agent().unbind_slot(SLOT))?;
    vm.block_on(vm.pod().agent().bind_slot(SLOT))?;
    link.set_up(&vm, SLOT)?;
    let sent = vm.counter(SLOT, "tx_packets")?;
    vm.sh(&format!("ping -c 1 {}", HOST.0))?;
    ensure!(vm.counter(SLOT, "tx_packets")? > sent);
    Ok(())
}

fn pausing_a_machine_breaks_no_connection(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    let link = Link::new(1500, 1)?;
    link.attach(&vm, SLOT)?;
    let length = bulk();
    let host = expect(PORT, length)?;
    vm.write_pattern(length)?;
    let script = vm.start(&format!("nc {} {PORT} < /pattern", HOST.0))?;
    let mut sent = 0;
    for _ in 0..5 {
        // Each time in the middle of it.
        while vm.counter(SLOT, "tx_bytes")? < sent + MIB as u64 {}
        vm.pause()?;
        sent = vm.counter(SLOT, "tx_bytes")?;
        for _ in 0..50 {
            ensure!(vm.counter(SLOT, "tx_bytes")? == sent, "a paused device sends nothing");
        }
        vm.resume()?;
    }
    script.wait()?;
    finish(host)
}

fn limit_of_a_link_can_be_changed_while_it_is_used(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    let link = Link::new(1500, 1)?;
    link.attach(&vm, SLOT)?;
    let rate = MIB as u64 / 2;
    let limit = RateLimit { bytes_per_second: rate, bytes_burst: 64 * 1024, ..RateLimit::default() };
    vm.block_on(vm.pod().vmm().set_rate_limit(SLOT, limit, Some(limit)))?;
    for send in [send_from_guest, receive_in_guest] {
        let start = Instant::now();
        send(&vm, MIB)?;
        let least = Duration::from_secs_f64((MIB as f64 - 65536.0 - 65536.0) / rate as f64);
        ensure!(start.elapsed() >= least, "1 MiB took {:?}", start.elapsed());
    }
    ensure!(vm.counter(SLOT, "tx_throttled")? > 0 && vm.counter(SLOT, "rx_throttled")? > 0);
    // A limit under which this would take hours is lifted while it holds packets back.
    let crawl = RateLimit { bytes_per_second: 100, bytes_burst: 1, ..RateLimit::default() };
    vm.block_on(vm.pod().vmm().set_rate_limit(SLOT, crawl, Some(crawl)))?;
    let host = expect(PORT, MIB)?;
    let script = vm.start(&format!("nc {} {PORT} < /pattern", HOST.0))?;
    let throttled = vm.counter(SLOT, "tx_throttled")?;
    while vm.counter(SLOT, "tx_throttled")? <= throttled {}
    vm.block_on(vm.pod().vmm().set_rate_limit(SLOT, RateLimit::default(), Some(RateLimit::default())))?;
    script.wait()?;
    finish(host)
}

fn link_that_cannot_be_is_refused(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    let link = Link::new(1500, 1)?;
    let null = File::open("/dev/null")?;
    let error = |result: Result<Option<String>>| {
        format!("{:#}", result.err().unwrap_or_else(|| anyhow::anyhow!("it works")))
    };
    let not_a_tap = error(vm.attach(SLOT, link.config.clone(), &[null.as_fd()]));
    ensure!(not_a_tap.contains("not a tap device"), "{not_a_tap}");
    let too_few = error(vm.attach(SLOT, link.config.clone(), &[]));
    ensure!(too_few.contains("takes 1 or twice as many descriptors, not 0"), "{too_few}");
    // The machine is as it was.
    link.attach(&vm, SLOT)
}

/// Bytes among which none is where another was.
fn pattern(length: usize) -> impl Read + Send {
    let mut block = Vec::with_capacity(MIB);
    let mut state = 1u32;
    while block.len() < MIB {
        // xorshift (Marsaglia, 2003).
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        block.extend(state.to_le_bytes());
    }
    io::Cursor::new(block.repeat(length.div_ceil(MIB))).take(length as u64)
}

trait Pattern {
    /// Puts the pattern where the guest finds it as `/pattern`.
    fn write_pattern(&self, length: usize) -> Result<()>;
}

impl Pattern for Machine {
    fn write_pattern(&self, length: usize) -> Result<()> {
        let mut file = File::create(self.rootfs().join("pattern"))?;
        io::copy(&mut pattern(length), &mut file)?;
        Ok(())
    }
}

/// Has the guest send the pattern to the host, which compares it.
fn send_from_guest(vm: &Machine, length: usize) -> Result<()> {
    let host = expect(PORT, length)?;
    vm.write_pattern(length)?;
    vm.sh(&format!("nc {} {PORT} < /pattern", HOST.0))?;
    finish(host)
}

/// Sends the pattern to the guest, which compares it.
fn receive_in_guest(vm: &Machine, length: usize) -> Result<()> {
    vm.write_pattern(length)?;
    let listener = vm.start(&format!(
        "nc -l -p {PORT} | cmp - /pattern & \
         until grep -q ':{PORT:04X} 0*:0000 0A' /proc/net/tcp /proc/net/tcp6; do :; done; \
         echo listening; wait $!"
    ))?;
    listener.until("listening")?;
    let mut stream = TcpStream::connect((GUEST.0, PORT)).context("cannot connect to the guest")?;
    io::copy(&mut pattern(length), &mut stream).context("cannot send to the guest")?;
    stream.shutdown(Shutdown::Write)?;
    let done = listener.wait()?;
    ensure!(done.code == 0, "{done}");
    Ok(())
}

/// Waits for somebody to send the pattern to this port of the host, and to end.
fn expect(port: u16, length: usize) -> Result<JoinHandle<Result<()>>> {
    let listener = TcpListener::bind((HOST.0, port)).context("cannot listen")?;
    Ok(thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let mut expected = pattern(length);
        let (mut got, mut want) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
        let mut at = 0;
        loop {
            let count = stream.read(&mut got)?;
            expected.read_exact(&mut want[..count]).with_context(|| format!("more than {length} bytes"))?;
            ensure!(got[..count] == want[..count], "bytes from {at} on are not what was sent");
            at += count;
            if count == 0 {
                break;
            }
        }
        ensure!(at == length, "{at} of {length} bytes arrived");
        stream.flush()?;
        Ok(())
    }))
}

fn finish(host: JoinHandle<Result<()>>) -> Result<()> {
    host.join().map_err(|_| anyhow::anyhow!("the host's end panicked"))?
}
