//! The command line: what is refused, and what `check` and `env` tell.

use std::fs;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::{Case, Running, Test, cases};
use rustix::mount::{UnmountFlags, mount_bind, unmount};

pub(crate) const CASES: &[Case] = cases![
    bundle_that_does_not_exist_is_named,
    bundle_without_config_is_named,
    bundle_that_is_a_file_is_named,
    relative_bundle_and_default_bundle_work,
    invalid_container_id_is_named,
    container_id_in_use_is_named_and_its_owner_undisturbed,
    unknown_command_and_option_are_refused,
    version_is_printed,
    check_prints_a_table_and_succeeds,
    host_whose_kvm_is_no_kvm_is_told,
    env_prints_versions_and_paths,
];

fn bundle_that_does_not_exist_is_named(t: &Test) -> Result<()> {
    t.invoke(&["run", "--bundle", "/no/such/bundle", t.id()])?
        .failed()
        .stdout("")
        .error(&["/no/such/bundle"]);
    Ok(())
}

fn bundle_without_config_is_named(t: &Test) -> Result<()> {
    let dir = t.scratch().display().to_string();
    t.invoke(&["run", "--bundle", &dir, t.id()])?.failed().stdout("").error(&[&dir, "config.json"]);
    Ok(())
}

fn bundle_that_is_a_file_is_named(t: &Test) -> Result<()> {
    let file = t.scratch().join("file");
    fs::write(&file, "")?;
    let file = file.display().to_string();
    t.invoke(&["run", "--bundle", &file, t.id()])?.failed().stdout("").error(&[&file]);
    Ok(())
}

fn relative_bundle_and_default_bundle_work(t: &Test) -> Result<()> {
    let bundle = t.script("echo here")?;
    let parent = bundle.path().parent().context("no parent")?;
    let name = bundle.path().file_name().and_then(|name| name.to_str()).context("no name")?;
    let mut relative = t.kvrun(["run", "--bundle", name, t.id()]);
    Running::start(relative.current_dir(parent))?
        .without_input()
        .wait()?
        .exited(0)
        .stdout("here\n")
        .stderr("");
    // As with runc, the bundle is the working directory when none is named.
    let mut default = t.kvrun(["run", t.id()]);
    Running::start(default.current_dir(bundle.path()))?
        .without_input()
        .wait()?
        .exited(0)
        .stdout("here\n")
        .stderr("");
    Ok(())
}

fn invalid_container_id_is_named(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?;
    let dir = bundle.path().display().to_string();
    for id in ["../escape", "a/b", "a b", ".", "", &"x".repeat(300)] {
        let shown = &id[..id.len().min(20)];
        t.invoke(&["run", "--bundle", &dir, id])?.failed().stdout("").error(&["container ID", shown]);
    }
    Ok(())
}

fn container_id_in_use_is_named_and_its_owner_undisturbed(t: &Test) -> Result<()> {
    let run = t.start(&t.script("echo ready; cat; echo undisturbed")?)?;
    run.until("ready\n")?;
    t.run(&t.bundle(&["/bin/true"])?)?.failed().stdout("").error(&[t.id(), "in use"]);
    run.without_input().wait()?.exited(0).stdout("ready\nundisturbed\n").stderr("");
    Ok(())
}

fn unknown_command_and_option_are_refused(t: &Test) -> Result<()> {
    for words in [&["no-such-command"][..], &["run", "--no-such-option", "id"], &["run"]] {
        t.invoke(words)?.failed().stdout("").error(&["kvrun --help"]);
    }
    Ok(())
}

fn version_is_printed(t: &Test) -> Result<()> {
    let text = t.invoke(&["--version"])?.exited(0).stderr("").text();
    ensure!(text.starts_with("kvrun ") && text.contains(env!("CARGO_PKG_VERSION")), "unexpected: {text}");
    Ok(())
}

fn check_prints_a_table_and_succeeds(t: &Test) -> Result<()> {
    let text = t.invoke(&["check"])?.exited(0).stderr("").text();
    for word in ["/dev/kvm", "CMPXCHG16B", "INT3", "XSAVE", "XRSTOR", "POPCNT"] {
        ensure!(text.to_uppercase().contains(&word.to_uppercase()), "nothing about {word}: {text}");
    }
    Ok(())
}

fn host_whose_kvm_is_no_kvm_is_told(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?;
    mount_bind("/dev/null", "/dev/kvm").context("cannot cover /dev/kvm")?;
    let check = t.invoke(&["check"]);
    let run = t.run(&bundle);
    unmount("/dev/kvm", UnmountFlags::empty()).context("cannot uncover /dev/kvm")?;
    let check = check?.failed().error(&["kvrun check"]);
    ensure!(check.text().lines().any(|line| line.starts_with("FAIL")), "no finding failed: {check}");
    run?.failed().stdout("").error(&["kvm"]);
    Ok(())
}

fn env_prints_versions_and_paths(t: &Test) -> Result<()> {
    let text = t.invoke(&["env"])?.exited(0).stderr("").text();
    for file in ["share/kvrun/vmlinux", "share/kvrun/initramfs.cpio", "libexec/kvrun/kvrun-vmm"] {
        let path = t.prefix().join(file).display().to_string();
        ensure!(text.contains(&path), "nothing about {path}: {text}");
    }
    ensure!(text.contains(env!("CARGO_PKG_VERSION")), "no version: {text}");
    Ok(())
}
