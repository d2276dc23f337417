//! vCPUs: how many, held and let go, and what they are counted for.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kvrun_e2e::vm::{FIRST_SLOT, Machine, Shape, assets, kernel};
use kvrun_e2e::{Case, Test, cases, time};
use kvrun_pod::pod;
use kvrun_pod::size::VmSize;
use kvrun_pod::vmm::Vmm;
use kvrun_vmm_api::config::{MAX_VCPUS, RNG_SLOT, VSOCK_SLOT};
use kvrun_vmm_api::{DeviceConfig, RateLimit, VcpuConfig};

pub(crate) const CASES: &[Case] = cases![
    cpus_come_online_and_go_offline_while_the_guest_works,
    as_many_cpus_as_a_machine_can_have,
    output_is_whole_across_pauses,
    paused_vcpus_do_not_run,
    guest_that_spins_with_interrupts_off_stops_no_request,
    exits_and_devices_are_counted,
];

fn cpus_come_online_and_go_offline_while_the_guest_works(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { vcpus: 2, max_vcpus: 4, ..Shape::default() })?;
    let online = || vm.sh("cat /sys/devices/system/cpu/online");
    let set = |cpus| vm.block_on(vm.pod().agent().set_cpus(cpus));
    ensure!(vm.sh("cat /sys/devices/system/cpu/possible")? == "0-3\n");
    ensure!(online()? == "0-1\n");
    let mut work =
        vm.start("echo ready; yes | head -c 3000000 | md5sum; read line; yes | head -c 1000 | wc -c")?;
    work.until("ready\n")?;
    set(4)?;
    ensure!(online()? == "0-3\n");
    // Each of them runs programs: field 39 of /proc/PID/stat is the CPU.
    let ran = vm.sh(
        "for cpu in 0 1 2 3; do taskset $(printf %x $((1 << cpu))) awk '{ print $39 }' /proc/self/stat; done",
    )?;
    ensure!(ran == "0\n1\n2\n3\n", "{ran}");
    set(1)?;
    ensure!(vm.sh("nproc")? == "1\n");
    for impossible in [0, 5] {
        ensure!(set(impossible).is_err());
    }
    ensure!(online()? == "0\n");
    set(3)?;
    ensure!(online()? == "0-2\n");
    work.write("go on\n")?;
    let done = work.wait()?;
    ensure!(done.code == 0 && done.stdout.ends_with("1000\n"), "{done}");
    Ok(())
}

fn as_many_cpus_as_a_machine_can_have(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { max_vcpus: MAX_VCPUS, ..Shape::default() })?;
    ensure!(vm.sh("cat /sys/devices/system/cpu/possible; nproc")? == "0-31\n1\n");
    // A few at a time, for a slow host's sake: each takes a while.
    for cpus in (4..=MAX_VCPUS).step_by(4) {
        vm.block_on(vm.pod().agent().set_cpus(cpus))?;
    }
    ensure!(vm.sh("nproc")? == "32\n");
    vm.pause()?;
    let state = vm.state()?;
    ensure!(state.paused && state.exits.len() == usize::from(MAX_VCPUS), "{state:?}");
    vm.resume()?;
    ensure!(vm.sh("grep -c ^processor /proc/cpuinfo")? == "32\n");
    Ok(())
}

/// Data goes through vsock and the shared root file system, and through the guest's rng, while it is paused over and over.
fn output_is_whole_across_pauses(t: &Test) -> Result<()> {
    const BYTES: usize = 4_000_000;
    let vm = Machine::boot(t, Shape { vcpus: 2, ..Shape::default() })?;
    vm.sh("head -c 4000000 /dev/urandom > /data")?;
    let expected = std::fs::read(vm.rootfs().join("data"))?;
    ensure!(expected.len() == BYTES);
    let script = vm.start("echo begin; head -c 100000 /dev/hwrng | wc -c; cat /data; echo end")?;
    script.until("begin\n")?;
    for _ in 0..20 {
        vm.pause()?;
        vm.resume()?;
    }
    let output = script.stdout.clone();
    ensure!(script.wait()?.code == 0);
    let output = output.bytes();
    let data = output.strip_prefix(b"begin\n100000\n").and_then(|rest| rest.strip_suffix(b"end\n"));
    ensure!(data == Some(&expected), "{} bytes", output.len());
    Ok(())
}

fn paused_vcpus_do_not_run(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { vcpus: 2, ..Shape::default() })?;
    let script = vm.start("echo ready; read line; while true; do :; done")?;
    script.until("ready\n")?;
    vm.pause()?;
    vm.pause()?;
    let before = vm.state()?;
    ensure!(before.paused);
    let metrics = vm.metrics()?;
    // Long enough for a hundred timer ticks of a guest that runs.
    std::thread::sleep(time::scaled(Duration::from_millis(100)));
    ensure!(vm.state()? == before && vm.metrics()? == metrics);
    vm.resume()?;
    vm.resume()?;
    ensure!(!vm.state()?.paused);
    vm.sh("true")?;
    drop(script);
    Ok(())
}

fn guest_that_spins_with_interrupts_off_stops_no_request(t: &Test) -> Result<()> {
    let image = t.scratch().join("kernel");
    // cli; jmp $
    kernel::write(&image, &[0xfa, 0xeb, 0xfe])?;
    let disk = File::options().read(true).write(true).create_new(true).open(t.scratch().join("disk"))?;
    disk.set_len(1 << 20)?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let assets = assets(t)?;
    let vcpus = VcpuConfig { boot: 2, max: 2 };
    let config = pod::machine(VmSize { vcpus, memory_mib: 128, max_memory_mib: 128 });
    let blk =
        DeviceConfig::Blk { read_only: false, serial: String::new(), queues: 1, limit: RateLimit::default() };

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let vmm = Vmm::spawn(&assets.vmm.path, None)?;
        let kernel = File::open(&image)?;
        vmm.boot(config, kvm.as_fd(), kernel.as_fd(), assets.initramfs.file.as_fd())?.running().await?;
        let began = Instant::now();
        for _ in 0..10 {
            vmm.pause().await?;
            ensure!(vmm.state().await?.paused);
            vmm.resume().await?;
            ensure!(!vmm.state().await?.paused);
            vmm.attach(FIRST_SLOT, blk.clone(), &[disk.as_fd()]).await?;
            ensure!(vmm.metrics().await?.slots[usize::from(FIRST_SLOT)].is_some());
            vmm.detach(FIRST_SLOT).await?;
        }
        vmm.stop().await;
        let (took, bound) = (began.elapsed(), time::scaled(Duration::from_secs(1)));
        ensure!(took < bound, "70 requests and the end took {took:?}");
        Ok(())
    })
}

fn exits_and_devices_are_counted(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape::default())?;
    let before = vm.metrics()?;
    let exits = |kind: &str| vm.metrics().map(|metrics| metrics.exits[kind]);
    // The boot mark and the console.
    ensure!(exits("io_out")? > 0);
    // The driver that was bound to the share's slot. What it reads is memory.
    ensure!(exits("mmio_read")? == 0 && exits("mmio_write")? > 0);
    ensure!(exits("ended")? == 0);
    vm.sh("echo hello > /dev/ttyS0")?;
    ensure!(exits("io_out")? > before.exits["io_out"]);
    let interrupted = exits("interrupted")?;
    vm.pause()?;
    ensure!(exits("interrupted")? > interrupted);
    vm.resume()?;

    let total: u64 = vm.state()?.exits.iter().sum();
    let by_kind: u64 = vm.metrics()?.exits.values().sum();
    ensure!(by_kind >= total, "{by_kind} {total}");

    let bytes = vm.counter(RNG_SLOT, "bytes")?;
    ensure!(vm.sh("head -c 10000 /dev/hwrng | wc -c")? == "10000\n");
    ensure!(vm.counter(RNG_SLOT, "bytes")? >= bytes + 10_000 - 64, "the driver may have had some in hand");
    ensure!(vm.counter(RNG_SLOT, "requests")? > 0);

    let (connections, sent) =
        (vm.counter(VSOCK_SLOT, "connections_to_guest")?, vm.counter(VSOCK_SLOT, "bytes_from_guest")?);
    vm.sh("head -c 50000 /dev/zero")?;
    ensure!(vm.counter(VSOCK_SLOT, "connections_to_guest")? == connections + 3, "one for each stream");
    ensure!(vm.counter(VSOCK_SLOT, "bytes_from_guest")? >= sent + 50_000);
    ensure!(vm.counter(VSOCK_SLOT, "connections_from_guest")? == 1, "the ready signal");
    Ok(())
}
