//! Images as memory of the guest.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::vm::{FIRST_SLOT, Machine, Shape};
use kvrun_e2e::{Case, Test, cases};
use kvrun_vmm_api::DeviceConfig;

use super::host;

pub(crate) const CASES: &[Case] = cases![
    image_on_pmem_is_mounted_with_dax_and_cannot_be_changed,
    several_images_come_and_go_while_the_machine_runs,
    machines_share_the_pages_of_an_image,
];

const MOUNT_POINT: &str = "/run/kvrun/image";

/// An EROFS image with a text, a program, and `mib` MiB of `data`.
fn image(t: &Test, name: &str, mib: usize) -> Result<PathBuf> {
    let content = t.scratch().join(format!("{name}.d"));
    fs::create_dir_all(&content)?;
    fs::write(content.join("text"), format!("this is {name}\n"))?;
    fs::copy("/bin/busybox", content.join("busybox"))?;
    // Bytes that differ from page to page, and are no zeroes.
    let data: Vec<u8> = (0..mib << 20).map(|i| (i >> 12) as u8 ^ i as u8 | 1).collect();
    fs::write(content.join("data"), data)?;
    let path = t.scratch().join(format!("{name}.erofs"));
    let output = Command::new("mkfs.erofs").arg(&path).arg(&content).output().context("mkfs.erofs")?;
    ensure!(output.status.success(), "mkfs.erofs: {output:?}");
    Ok(path)
}

/// Attaches an image and mounts it; the name of its block device.
fn mount(vm: &Machine, slot: u8, image: &Path, mount_point: &str) -> Result<String> {
    let file = File::open(image)?;
    let device = vm.attach(slot, DeviceConfig::Pmem, &[file.as_fd()])?.context("no block device")?;
    vm.block_on(vm.pod().agent().mount_erofs(&device, mount_point))?;
    Ok(device)
}

fn image_on_pmem_is_mounted_with_dax_and_cannot_be_changed(t: &Test) -> Result<()> {
    let image = image(t, "one", 6)?;
    let before = fs::read(&image)?;
    let vm = Machine::boot(t, Shape::default())?;
    let device = mount(&vm, FIRST_SLOT, &image, MOUNT_POINT)?;
    let mounted = vm.sh(&format!("grep ' {MOUNT_POINT} ' /proc/mounts"))?;
    ensure!(mounted.starts_with(&format!("/dev/{device} {MOUNT_POINT} erofs ro,")), "{mounted}");
    ensure!(mounted.contains("dax=always"), "{mounted}");

    ensure!(vm.sh(&format!("cat {MOUNT_POINT}/text"))? == "this is one\n");
    let sum = |text: &str| text.split(' ').next().map(str::to_owned);
    let on_host = Command::new("md5sum").arg(t.scratch().join("one.d/data")).output()?;
    let in_guest = vm.sh(&format!("md5sum {MOUNT_POINT}/data"))?;
    ensure!(sum(&in_guest) == sum(std::str::from_utf8(&on_host.stdout)?), "{in_guest}");
    ensure!(vm.sh(&format!("{MOUNT_POINT}/busybox echo from the page cache"))? == "from the page cache\n");

    let refused = vm.run(&format!("echo x > {MOUNT_POINT}/text"))?;
    ensure!(refused.code != 0 && refused.stderr.contains("Read-only"), "{refused}");
    // Past the file system: what is written to the memory itself goes nowhere.
    vm.run(&format!("dd if=/dev/zero of=/dev/{device} bs=4096 count=16 conv=fsync"))?;
    let magic = vm.sh(&format!("dd if=/dev/{device} bs=1 skip=1024 count=4 2>/dev/null | od -An -tx1"))?;
    ensure!(magic.trim() == "e2 e1 f5 e0", "{magic}");
    ensure!(vm.sh(&format!("cat {MOUNT_POINT}/text"))? == "this is one\n");
    ensure!(fs::read(&image)? == before, "the file has changed");
    Ok(())
}

fn several_images_come_and_go_while_the_machine_runs(t: &Test) -> Result<()> {
    let images = [image(t, "one", 1)?, image(t, "two", 3)?, image(t, "three", 5)?];
    let vm = Machine::boot(t, Shape::default())?;
    vm.sh("dmesg -c >/dev/null")?;
    let slots = [FIRST_SLOT, FIRST_SLOT + 1, FIRST_SLOT + 2];
    for round in 0..2 {
        for (slot, image) in slots.iter().zip(&images) {
            mount(&vm, *slot, image, &format!("{MOUNT_POINT}{slot}"))?;
        }
        let texts = vm.sh(&format!("cat {MOUNT_POINT}*/text"))?;
        ensure!(texts == "this is one\nthis is two\nthis is three\n", "round {round}: {texts}");
        vm.pause()?;
        vm.resume()?;
        for slot in slots {
            vm.block_on(vm.pod().agent().unmount(&format!("{MOUNT_POINT}{slot}")))?;
            vm.detach(slot)?;
        }
    }
    let complaints = vm.run("dmesg | grep -iE 'warning|bug:|oops|misaligned'")?;
    ensure!(complaints.stdout.is_empty(), "{complaints}");
    Ok(())
}

fn machines_share_the_pages_of_an_image(t: &Test) -> Result<()> {
    const MIB: usize = 24;
    let image = image(t, "shared", MIB)?;
    let free = "sed -n 's/^MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    let vms = [Machine::boot(t, Shape::default())?, Machine::boot(t, Shape::default())?];
    for vm in &vms {
        mount(vm, FIRST_SLOT, &image, MOUNT_POINT)?;
        let before: u64 = vm.sh(free)?.trim().parse()?;
        vm.sh(&format!("md5sum {MOUNT_POINT}/data"))?;
        let after: u64 = vm.sh(free)?.trim().parse()?;
        // Without DAX it would be in the guest's page cache.
        ensure!(before.saturating_sub(after) < (MIB as u64) << 9, "{before} KiB free, then {after}");
    }
    let mut mappings = 0;
    for vmm in host::vmms(t)? {
        let Some(mapping) = host::mapping(vmm, &image)? else { continue };
        eprintln!("VMM {vmm}: {mapping:?}");
        ensure!(mapping.rss_kib >= (MIB as u64) << 10 && mapping.private_dirty_kib == 0, "{mapping:?}");
        // As many processes have it as have its pages: half of it is each one's.
        ensure!(mapping.pss_kib <= mapping.rss_kib / 2 + 64, "{mapping:?}");
        mappings += 1;
    }
    ensure!(mappings == 2, "{mappings} processes have the image mapped");
    Ok(())
}
