//! A kernel, initramfs or VMM that is missing or damaged is named, with the remedy.

use std::fs;
use std::path::Path;

use anyhow::Result;
use kvrun_e2e::{Case, Outcome, Running, Test, cases};

pub(crate) const CASES: &[Case] = cases![
    missing_kernel_is_named,
    empty_kernel_is_named,
    truncated_kernel_is_named,
    kernel_that_is_no_elf_is_named,
    kernel_that_is_a_directory_is_named,
    missing_initramfs_is_named,
    truncated_initramfs_is_reported_with_the_console,
    missing_vmm_is_named,
    program_without_its_files_names_the_first_one_missing,
];

/// Runs `/bin/true` with one of the three files replaced.
fn run_with(t: &Test, variable: &str, path: &Path) -> Result<Outcome> {
    let bundle = t.bundle(&["/bin/true"])?;
    let mut command = t.kvrun(t.run_args(&bundle));
    Running::start(command.env(variable, path))?.without_input().wait()
}

fn missing_kernel_is_named(t: &Test) -> Result<()> {
    run_with(t, "KVRUN_KERNEL", Path::new("/no/such/vmlinux"))?
        .failed()
        .stdout("")
        .error(&["/no/such/vmlinux"]);
    Ok(())
}

fn empty_kernel_is_named(t: &Test) -> Result<()> {
    let path = t.scratch().join("vmlinux");
    fs::write(&path, "")?;
    run_with(t, "KVRUN_KERNEL", &path)?.failed().stdout("").error(&["scratch/vmlinux", "empty"]);
    Ok(())
}

fn truncated_kernel_is_named(t: &Test) -> Result<()> {
    let whole = fs::read(t.prefix().join("share/kvrun/vmlinux"))?;
    // Half a kernel, and no more than its ELF header.
    for length in [whole.len() / 2, 64] {
        let path = t.scratch().join(format!("vmlinux-{length}"));
        fs::write(&path, &whole[..length])?;
        let name = format!("vmlinux-{length}");
        run_with(t, "KVRUN_KERNEL", &path)?.failed().stdout("").error(&["kernel", &name]);
    }
    Ok(())
}

fn kernel_that_is_no_elf_is_named(t: &Test) -> Result<()> {
    let path = t.scratch().join("vmlinux");
    fs::write(&path, "#!/bin/sh\nthis is no kernel\n".repeat(1000))?;
    run_with(t, "KVRUN_KERNEL", &path)?.failed().stdout("").error(&["kernel", "scratch/vmlinux", "ELF"]);
    Ok(())
}

fn kernel_that_is_a_directory_is_named(t: &Test) -> Result<()> {
    run_with(t, "KVRUN_KERNEL", &t.scratch())?.failed().stdout("").error(&["kernel", "/scratch"]);
    Ok(())
}

fn missing_initramfs_is_named(t: &Test) -> Result<()> {
    run_with(t, "KVRUN_INITRAMFS", Path::new("/no/such/cpio"))?.failed().stdout("").error(&["/no/such/cpio"]);
    Ok(())
}

fn truncated_initramfs_is_reported_with_the_console(t: &Test) -> Result<()> {
    let whole = fs::read(t.prefix().join("share/kvrun/initramfs.cpio"))?;
    let path = t.scratch().join("initramfs.cpio");
    fs::write(&path, &whole[..whole.len() / 2])?;
    let outcome = run_with(t, "KVRUN_INITRAMFS", &path)?.failed().stdout("").report(&["guest"]);
    assert!(outcome.stderr.contains("Kernel panic"), "no console: {outcome}");
    Ok(())
}

fn missing_vmm_is_named(t: &Test) -> Result<()> {
    run_with(t, "KVRUN_VMM", Path::new("/no/such/kvrun-vmm"))?
        .failed()
        .stdout("")
        .error(&["/no/such/kvrun-vmm"]);
    Ok(())
}

fn program_without_its_files_names_the_first_one_missing(t: &Test) -> Result<()> {
    let program = t.scratch().join("prefix/bin/kvrun");
    fs::create_dir_all(t.scratch().join("prefix/bin"))?;
    fs::copy(t.program(), &program)?;
    let bundle = t.bundle(&["/bin/true"])?;
    let mut command = std::process::Command::new(program);
    t.environment(&mut command);
    command.arg("--root").arg(t.state()).args(t.run_args(&bundle));
    Running::start(&mut command)?
        .without_input()
        .wait()?
        .failed()
        .stdout("")
        .error(&["/scratch/prefix/", "vmlinux"]);
    Ok(())
}
