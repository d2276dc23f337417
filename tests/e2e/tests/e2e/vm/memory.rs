//! Memory that grows, shrinks, and goes back to the host.

use anyhow::{Context, Result, ensure};
use kvrun_e2e::vm::{FIRST_SLOT, Machine, Shape};
use kvrun_e2e::{Case, Test, cases, time};
use kvrun_vmm_api::DeviceConfig;

use super::host;

pub(crate) const CASES: &[Case] = cases![
    memory_grows_is_used_and_shrinks_again,
    balloon_takes_memory_and_gives_it_back,
    memory_that_becomes_free_goes_back_to_the_host,
    free_memory_goes_back_to_the_host_when_asked_for,
    devices_of_memory_are_refused_where_they_make_no_sense,
];

/// A field of the guest's /proc/meminfo, in MiB.
fn meminfo(vm: &Machine, field: &str) -> Result<u64> {
    let text = vm.sh("cat /proc/meminfo")?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    Ok(value.split_whitespace().nth(1).context("no number")?.parse::<u64>()? >> 10)
}

/// Has a program in the guest use so much memory, all of it at once, and end.
fn use_memory(vm: &Machine, mib: u64) -> Result<()> {
    vm.sh(&format!(
        "mkdir -p /tmp/used && mount -t tmpfs -o size=100% tmpfs /tmp/used && \
         dd if=/dev/zero of=/tmp/used/file bs=1M count={mib} 2>/dev/null && \
         test $(wc -c < /tmp/used/file) = $(({mib} << 20)) && umount /tmp/used"
    ))
    .map(drop)
}

fn memory_grows_is_used_and_shrinks_again(t: &Test) -> Result<()> {
    const MORE: u32 = 256;
    let vm = Machine::boot(t, Shape { memory_mib: 160, hotplug_mib: 512, ..Shape::default() })?;
    let resize = |mib: u32| -> Result<()> {
        vm.block_on(vm.pod().vmm().resize_memory(mib))?;
        time::until("the guest has done as asked", || Ok(vm.state()?.plugged_mib == mib))
    };
    let (booted, alone) = (meminfo(&vm, "MemTotal")?, host::anonymous_mib(t)?);
    vm.attach(FIRST_SLOT, DeviceConfig::Mem, &[])?;
    resize(MORE)?;
    let grown = meminfo(&vm, "MemTotal")?;
    ensure!(grown == booted + u64::from(MORE), "{booted} MiB, then {grown}");
    // More than it booted with.
    use_memory(&vm, 200)?;
    let used = host::anonymous_mib(t)?;
    ensure!(used >= alone + 150, "the host gave {alone} MiB, then {used}");
    // Without a word to the guest, whose driver would be unbound for good.
    ensure!(vm.block_on(vm.pod().vmm().detach(FIRST_SLOT)).is_err(), "memory is in use");
    resize(0)?;
    let (shrunk, back) = (meminfo(&vm, "MemTotal")?, host::anonymous_mib(t)?);
    eprintln!("guest: {booted} MiB, {grown}, {shrunk}; host: {alone} MiB, {used} used, {back} shrunk");
    ensure!(shrunk == booted, "{booted} MiB, then {shrunk}");
    ensure!(back + 150 <= used, "the host gave {used} MiB, then {back}");
    // Not all at once, and again.
    for mib in [130, 64] {
        resize(mib)?;
    }
    use_memory(&vm, 100)
}

fn balloon_takes_memory_and_gives_it_back(t: &Test) -> Result<()> {
    const TAKEN: u64 = 96;
    let vm = Machine::boot(t, Shape::default())?;
    vm.attach(FIRST_SLOT, DeviceConfig::Balloon { free_page_reporting: false }, &[])?;
    let resize = |mib: u64| -> Result<()> {
        vm.block_on(vm.pod().vmm().set_balloon(mib as u32))?;
        time::until("the guest has done as asked", || Ok(u64::from(vm.state()?.balloon_mib) == mib))
    };
    use_memory(&vm, 128)?;
    let (free, used) = (meminfo(&vm, "MemFree")?, host::anonymous_mib(t)?);
    resize(TAKEN)?;
    let (left, back) = (meminfo(&vm, "MemFree")?, host::anonymous_mib(t)?);
    eprintln!("guest: {free} MiB free, {left} with {TAKEN} in the balloon; host: {used} MiB, then {back}");
    ensure!(left + TAKEN - 16 <= free, "{free} MiB free, then {left}");
    ensure!(back + 64 <= used, "the host gave {used} MiB, then {back}");
    ensure!(vm.counter(FIRST_SLOT, "guest_total_bytes")? > 100 << 20);
    resize(0)?;
    // Linux keeps up to an eighth of the memory on lists of its CPUs, where it is not counted, and takes it from there in time
    // (Linux 6.12 mm/page_alloc.c, decay_pcp_high).
    time::until("the guest has its memory", || Ok(meminfo(&vm, "MemFree")? + 16 >= free))?;
    // What was taken in small pages comes back in small pages, which takes an emulated machine long.
    use_memory(&vm, 32)
}

fn memory_that_becomes_free_goes_back_to_the_host(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { memory_mib: 256, ..Shape::default() })?;
    let before = host::anonymous_mib(t)?;
    vm.attach(FIRST_SLOT, DeviceConfig::Balloon { free_page_reporting: true }, &[])?;
    let mut script = vm.start(
        "mkdir /tmp/used && mount -t tmpfs -o size=100% tmpfs /tmp/used && \
         dd if=/dev/zero of=/tmp/used/file bs=1M count=128 2>/dev/null && echo filled && read line && umount /tmp/used",
    )?;
    script.until("filled")?;
    let used = host::anonymous_mib(t)?;
    script.write("go on\n")?;
    ensure!(script.wait()?.code == 0);
    time::until("memory is back", || Ok(host::anonymous_mib(t)? + 80 <= used))?;
    let back = host::anonymous_mib(t)?;
    eprintln!("host: {before} MiB, {used} when 128 had been used, {back} reported free");
    Ok(())
}

fn free_memory_goes_back_to_the_host_when_asked_for(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { memory_mib: 256, ..Shape::default() })?;
    vm.attach(FIRST_SLOT, DeviceConfig::Balloon { free_page_reporting: false }, &[])?;
    use_memory(&vm, 128)?;
    let (free, used) = (meminfo(&vm, "MemFree")?, host::anonymous_mib(t)?);
    for round in 1..=2 {
        vm.block_on(vm.pod().vmm().hint_free_pages())?;
        time::until("the guest has told", || Ok(vm.counter(FIRST_SLOT, "hint_rounds")? == round))?;
    }
    let back = host::anonymous_mib(t)?;
    time::until("the guest has its memory", || Ok(meminfo(&vm, "MemFree")? + 16 >= free))?;
    eprintln!("host: {used} MiB when 128 had been used, {back} after hints");
    ensure!(back + 80 <= used, "the host gave {used} MiB, then {back}");
    use_memory(&vm, 32)
}

fn devices_of_memory_are_refused_where_they_make_no_sense(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape::default())?;
    let refused = |slot: u8, device: DeviceConfig, why: &str| -> Result<()> {
        let error = vm.attach(slot, device, &[]).err().context("not refused")?;
        ensure!(format!("{error:#}").contains(why), "{error:#}");
        Ok(())
    };
    refused(FIRST_SLOT, DeviceConfig::Mem, "memory that cannot grow")?;
    let error = vm.block_on(vm.pod().vmm().resize_memory(2)).err().context("not refused")?;
    ensure!(format!("{:#}", anyhow::Error::from(error)).contains("no mem"), "no device");
    let balloon = DeviceConfig::Balloon { free_page_reporting: true };
    vm.attach(FIRST_SLOT, balloon.clone(), &[])?;
    refused(FIRST_SLOT + 1, balloon, "has a device of kind balloon already")?;
    let error = vm.block_on(vm.pod().vmm().set_balloon(257)).err().context("not refused")?;
    ensure!(format!("{:#}", anyhow::Error::from(error)).contains("at most"), "more than there is");
    vm.detach(FIRST_SLOT)?;
    vm.attach(FIRST_SLOT, DeviceConfig::Balloon { free_page_reporting: false }, &[])?;
    Ok(())
}
