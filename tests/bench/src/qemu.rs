//! QEMU's microvm machine with the same kernel, initramfs, vCPU and memory.

use std::io::Read;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use kvrun_vmm_api::control::{BOOT_MARK_INIT, BOOT_MARK_PORT};

use crate::boot::now_ns;
use crate::report::Report;
use crate::{MEMORY_MIB, Stage};

/// Measures `runs` boots from spawn to the guest's init, which writes a boot mark to a port that QEMU passes on.
pub(crate) fn measure(stage: &Stage, runs: usize, report: &mut Report) -> Result<()> {
    let boots = (0..runs).map(|_| boot(stage)).collect::<Result<Vec<_>>>()?;
    report.median("boot.qemu_microvm.init_ms", boots);
    Ok(())
}

fn boot(stage: &Stage) -> Result<f64> {
    let mut command = Command::new("qemu-system-x86_64");
    // All optional devices of the machine off, as its documentation recommends for boot time (docs/system/i386/microvm.rst).
    command
        .args(["-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,x-option-roms=off,auto-kernel-cmdline=off"])
        .args(["-enable-kvm", "-cpu", "host", "-smp", "1", "-m", &format!("{MEMORY_MIB}M")])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "null"])
        .arg("-kernel")
        .arg(&stage.kernel)
        .arg("-initrd")
        .arg(&stage.initramfs)
        .args(["-append", kvrun_pod::pod::KERNEL_CMDLINE])
        .args(["-chardev", "stdio,id=mark,signal=off"])
        .args(["-device", &format!("isa-debugcon,iobase={BOOT_MARK_PORT:#x},chardev=mark")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let spawned = now_ns();
    let mut qemu = command.spawn().context("cannot start qemu-system-x86_64")?;
    let mut mark = [0];
    let outcome = qemu.stdout.take().context("no pipe")?.read_exact(&mut mark);
    let marked = now_ns();
    let _ = qemu.kill();
    qemu.wait()?;
    outcome.context("qemu ended before its guest reached init")?;
    ensure!(mark[0] == BOOT_MARK_INIT, "unexpected boot mark {mark:?}");
    Ok((marked - spawned) as f64 / 1e6)
}
