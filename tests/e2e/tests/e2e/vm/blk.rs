//! Disks.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvrun_e2e::loop_device::Loop;
use kvrun_e2e::vm::{FIRST_SLOT, Machine, Shape};
use kvrun_e2e::{Case, Test, cases};
use kvrun_vmm_api::{DeviceConfig, RateLimit};

pub(crate) const CASES: &[Case] = cases![
    file_system_on_a_disk_outlives_detach_and_attach,
    trim_gives_space_of_a_file_back_to_the_host,
    block_device_of_the_host_is_a_disk,
    read_only_disk_cannot_be_written,
    every_cpu_has_its_queue,
    limit_of_a_disk_holds_and_can_be_lifted,
    paused_disk_loses_nothing,
];

const MIB: u64 = 1 << 20;
/// How long a test waits for what the guest does by itself.
const PATIENCE: Duration = Duration::from_secs(300);
const NO_LIMIT: RateLimit =
    RateLimit { bytes_per_second: 0, bytes_burst: 0, ops_per_second: 0, ops_burst: 0 };

fn disk() -> DeviceConfig {
    DeviceConfig::Blk { read_only: false, serial: "e2e disk".to_owned(), queues: 1, limit: NO_LIMIT }
}

/// An image that takes no space yet, in memory.
fn image(t: &Test, mib: u64) -> Result<File> {
    let path = t.scratch().join("disk");
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    file.set_len(mib * MIB)?;
    Ok(file)
}

/// An image on the disk of this host, gone when closed.
fn image_on_disk(t: &Test, mib: u64) -> Result<File> {
    let path = Path::new("/var/tmp").join(t.id());
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(path)?;
    file.set_len(mib * MIB)?;
    Ok(file)
}

/// Bytes the image takes on the host.
fn space(image: &File) -> Result<u64> {
    Ok(image.metadata()?.blocks() * 512)
}

/// Attaches a disk to the first slot; its device node in the guest.
fn attach(vm: &Machine, device: DeviceConfig, image: &impl AsFd) -> Result<String> {
    let name = vm.attach(FIRST_SLOT, device, &[image.as_fd()])?;
    Ok(format!("/dev/{}", name.context("the guest found no disk")?))
}

/// A machine whose scripts have the programs of ext4.
fn machine(t: &Test, vcpus: u8) -> Result<Machine> {
    let vm = Machine::boot(t, Shape { vcpus, ..Shape::default() })?;
    for program in ["/usr/sbin/mkfs.ext4", "/usr/sbin/e2fsck"] {
        vm.install(program)?;
    }
    Ok(vm)
}

fn file_system_on_a_disk_outlives_detach_and_attach(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    for (number, image) in [image(t, 64)?, image_on_disk(t, 64)?].into_iter().enumerate() {
        let dev = attach(&vm, disk(), &image)?;
        ensure!(vm.sh(&format!("cat /sys/block/{}/serial", &dev[5..]))?.trim_end() == "e2e disk");
        let written = vm.sh(&format!(
            "mkfs.ext4 -q {dev} && mount -t ext4 {dev} /mnt && cd /mnt
             for i in 1 2 3 4 5 6 7 8; do head -c 1000003 /dev/urandom > file$i; done
             sync; sha256sum file*; cd /; umount /mnt"
        ))?;
        ensure!(written.lines().count() == 8, "{written}");
        // An image in memory does better without.
        ensure!(has_ring(t)? == (number == 1), "image {number}");
        vm.detach(FIRST_SLOT)?;
        let dev = attach(&vm, disk(), &image)?;
        vm.sh(&format!("e2fsck -f -n {dev}"))?;
        let read =
            vm.sh(&format!("mount -t ext4 {dev} /mnt && cd /mnt && sha256sum file*; cd /; umount /mnt"))?;
        ensure!(read == written, "{read} is not {written}");
        ensure!(vm.counter(FIRST_SLOT, "bytes_read")? >= 8_000_000);
        ensure!(vm.counter(FIRST_SLOT, "errors")? == 0);
        vm.detach(FIRST_SLOT)?;
    }
    Ok(())
}

/// The directories of the VMM's processes in /proc.
fn vmm(t: &Test) -> Result<Vec<PathBuf>> {
    Ok(t.vmms()?.into_iter().map(|(pid, _)| format!("/proc/{pid}").into()).collect())
}

/// Whether the VMM has a ring open.
fn has_ring(t: &Test) -> Result<bool> {
    for process in vmm(t)? {
        for entry in fs::read_dir(process.join("fd"))? {
            // One that is closed meanwhile has no link.
            let link = fs::read_link(entry?.path()).unwrap_or_default();
            if link.as_os_str() == "anon_inode:[io_uring]" {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Fills a file system, empties it, and trims it; `space` tells how much of the image the host keeps.
fn fill_and_trim(vm: &Machine, dev: &str, space: impl Fn() -> Result<u64>) -> Result<()> {
    // One script, because each has mounts of its own. The kernel would write tables that are left to it while space is counted.
    let mut script = vm.start(&format!(
        "mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {dev} && mount -t ext4 {dev} /mnt && head -c 33554432 /dev/urandom > /mnt/file && sync
         echo full; read next
         rm /mnt/file && sync && fstrim /mnt && echo trimmed || exit 1; read next
         head -c 1000000 /dev/zero > /mnt/zeroes && umount /mnt && e2fsck -f -n {dev}"
    ))?;
    script.until("full\n")?;
    let full = space()?;
    ensure!(full >= 32 * MIB, "{full}");
    script.write("next\n")?;
    script.until("trimmed\n")?;
    let trimmed = space()?;
    ensure!(trimmed + 32 * MIB <= full + MIB, "{trimmed} of {full}");
    ensure!(vm.counter(FIRST_SLOT, "discards")? > 0);
    script.write("next\n")?;
    let finished = script.wait()?;
    ensure!(finished.code == 0, "{finished}");
    Ok(())
}

fn trim_gives_space_of_a_file_back_to_the_host(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    for image in [image(t, 64)?, image_on_disk(t, 64)?] {
        let dev = attach(&vm, disk(), &image)?;
        fill_and_trim(&vm, &dev, || {
            image.sync_all()?;
            space(&image)
        })?;
        vm.detach(FIRST_SLOT)?;
    }
    Ok(())
}

fn block_device_of_the_host_is_a_disk(t: &Test) -> Result<()> {
    let backing = image(t, 64)?;
    let device = Loop::over(&t.scratch().join("disk"))?;
    let vm = machine(t, 1)?;
    let open = File::options().read(true).write(true).open(device.path())?;
    let dev = attach(&vm, disk(), &open)?;
    fill_and_trim(&vm, &dev, || {
        open.sync_all()?;
        space(&backing)
    })?;
    ensure!(vm.counter(FIRST_SLOT, "errors")? == 0);
    // So that nobody has the loop device open when it is to go.
    vm.detach(FIRST_SLOT)?;
    Ok(())
}

fn read_only_disk_cannot_be_written(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    let image = image(t, 16)?;
    let dev = attach(&vm, disk(), &image)?;
    vm.sh(&format!("mkfs.ext4 -q {dev} && mount -t ext4 {dev} /mnt && echo kept > /mnt/file; umount /mnt"))?;
    vm.detach(FIRST_SLOT)?;
    let before = fs::read(t.scratch().join("disk"))?;
    // Though the descriptor would allow it.
    let read_only = DeviceConfig::Blk { read_only: true, serial: String::new(), queues: 1, limit: NO_LIMIT };
    let dev = attach(&vm, read_only, &image)?;
    ensure!(vm.sh(&format!("mount -t ext4 -o ro {dev} /mnt && cat /mnt/file; umount /mnt"))? == "kept\n");
    for refused in [
        format!("mount -t ext4 -o rw {dev} /mnt && echo more > /mnt/file && sync"),
        format!("dd if=/dev/urandom of={dev} bs=4k count=1 conv=fsync"),
        format!("blkdiscard {dev}"),
        // What the driver believes does not matter.
        format!("blockdev --setrw {dev} && dd if=/dev/urandom of={dev} bs=4k count=1 conv=fsync"),
    ] {
        ensure!(vm.run(&refused)?.code != 0, "{refused}");
    }
    ensure!(fs::read(t.scratch().join("disk"))? == before, "the image has changed");
    Ok(())
}

fn every_cpu_has_its_queue(t: &Test) -> Result<()> {
    let vm = machine(t, 2)?;
    let image = image_on_disk(t, 64)?;
    let device = DeviceConfig::Blk { read_only: false, serial: String::new(), queues: 4, limit: NO_LIMIT };
    let dev = attach(&vm, device, &image)?;
    // The guest takes as many as it has CPUs.
    ensure!(vm.sh(&format!("ls /sys/block/{}/mq", &dev[5..]))? == "0\n1\n");
    let work = "head -c 8000009 /dev/urandom > $0; sync; sha256sum $0 > $0.sum
                echo 3 > /proc/sys/vm/drop_caches; sha256sum -c $0.sum";
    let sums = vm.sh(&format!(
        "mkfs.ext4 -q {dev} && mount -t ext4 {dev} /mnt && cd /mnt
         taskset 1 sh -c '{work}' one & first=$!; taskset 2 sh -c '{work}' two & second=$!
         wait $first && wait $second; cd /; umount /mnt"
    ))?;
    ensure!(sums.matches(": OK").count() == 2, "{sums}");
    // One thread for all queues.
    let mut threads = 0;
    for process in vmm(t)? {
        for task in fs::read_dir(process.join("task"))? {
            let name = fs::read_to_string(task?.path().join("comm")).unwrap_or_default();
            threads += usize::from(name.trim_end() == "blk");
        }
    }
    ensure!(threads == 1, "{threads} threads");
    vm.sh(&format!("e2fsck -f -n {dev}"))?;
    Ok(())
}

fn limit_of_a_disk_holds_and_can_be_lifted(t: &Test) -> Result<()> {
    let vm = machine(t, 1)?;
    let image = image(t, 16)?;
    let limit = RateLimit { bytes_per_second: 2 * MIB, bytes_burst: MIB, ..NO_LIMIT };
    let device = DeviceConfig::Blk { read_only: false, serial: String::new(), queues: 1, limit };
    let dev = attach(&vm, device, &image)?;
    // Of 5 MiB, one goes at once and the rest takes two seconds.
    let read = format!("dd if={dev} of=/dev/null bs=64k count=80 2>/dev/null");
    let begin = Instant::now();
    vm.sh(&read)?;
    ensure!(begin.elapsed() >= Duration::from_secs(2), "{:?}", begin.elapsed());
    ensure!(vm.counter(FIRST_SLOT, "throttled")? > 0);
    // One that would take until next week, lifted while a request waits for it.
    let almost_nothing = RateLimit { bytes_per_second: 1, bytes_burst: 1, ..NO_LIMIT };
    let limit = |limit| vm.block_on(vm.pod().vmm().set_rate_limit(FIRST_SLOT, limit, None));
    limit(almost_nothing)?;
    let before = vm.counter(FIRST_SLOT, "throttled")?;
    vm.sh("echo 3 > /proc/sys/vm/drop_caches")?;
    let script = vm.start(&read)?;
    let begin = Instant::now();
    while vm.counter(FIRST_SLOT, "throttled")? == before {
        ensure!(begin.elapsed() < PATIENCE, "nothing was held back");
    }
    limit(NO_LIMIT)?;
    let finished = script.wait()?;
    ensure!(finished.code == 0, "{finished}");
    ensure!(vm.block_on(vm.pod().vmm().set_rate_limit(FIRST_SLOT, NO_LIMIT, Some(NO_LIMIT))).is_err());
    Ok(())
}

fn paused_disk_loses_nothing(t: &Test) -> Result<()> {
    let vm = machine(t, 2)?;
    let image = image_on_disk(t, 64)?;
    let device = DeviceConfig::Blk { read_only: false, serial: String::new(), queues: 2, limit: NO_LIMIT };
    let dev = attach(&vm, device, &image)?;
    let script = vm.start(&format!(
        "mkfs.ext4 -q {dev} && mount -t ext4 {dev} /mnt && cd /mnt && echo begun
         for i in 1 2 3 4 5 6; do
             head -c 1000003 /dev/urandom > file$i; sync; sha256sum file$i > sum$i
             echo 3 > /proc/sys/vm/drop_caches; sha256sum -c sum$i || exit 1
         done; cd / && umount /mnt && e2fsck -f -n {dev}"
    ))?;
    script.until("begun\n")?;
    let mut pauses = 0;
    let mut last = vm.counter(FIRST_SLOT, "bytes_written")?;
    let end = last + 5_000_000;
    let begin = Instant::now();
    while last < end {
        ensure!(begin.elapsed() < PATIENCE, "the disk does not go on");
        vm.pause()?;
        let at_rest = vm.metrics()?;
        let again = vm.metrics()?;
        let slot = usize::from(FIRST_SLOT);
        ensure!(at_rest.slots[slot] == again.slots[slot], "a paused disk works: {at_rest:?} {again:?}");
        vm.resume()?;
        let written = vm.counter(FIRST_SLOT, "bytes_written")?;
        pauses += u32::from(written > last);
        last = written;
    }
    ensure!(pauses >= 3, "{pauses} pauses while the disk worked");
    let finished = script.wait()?;
    ensure!(finished.code == 0, "{finished}");
    ensure!(vm.counter(FIRST_SLOT, "errors")? == 0);
    Ok(())
}
