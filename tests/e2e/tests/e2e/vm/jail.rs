//! The jail and the filters of a machine that runs.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::trace::Trace;
use kvrun_e2e::vm::link::{HOST, Link};
use kvrun_e2e::vm::{FIRST_SLOT, Machine, Shape};
use kvrun_e2e::{Case, Test, cases};
use kvrun_vmm::thread::Class;
use kvrun_vmm_api::{DeviceConfig, RateLimit};

use super::fs::install_program;

pub(crate) const CASES: &[Case] = cases![
    every_thread_is_filtered,
    descriptors_are_of_the_kinds_that_are_listed,
    killed_by_its_filter_is_137_with_reason,
    no_line_of_the_filters_is_there_for_nothing,
];

/// The one VMM of a test, by its directory in /proc.
fn vmm(t: &Test) -> Result<std::path::PathBuf> {
    let vmms = t.vmms()?;
    let [(pid, _)] = vmms.as_slice() else { anyhow::bail!("{} VMMs", vmms.len()) };
    Ok(Path::new("/proc").join(pid.to_string()))
}

fn every_thread_is_filtered(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { vcpus: 2, ..Shape::default() })?;
    vm.sh("ls -R / >/dev/null")?;
    let mut names = Vec::new();
    for thread in fs::read_dir(vmm(t)?.join("task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let field = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(":\t"));
        let name = field("Name").context("no name")?.to_owned();
        // The mode of filters, and how many: the spawner has its own and one that hides clone3(2); all but the main thread inherit them.
        let filters = match name.as_str() {
            "kvrun-vmm" => "1",
            "spawner" => "2",
            _ => "3",
        };
        ensure!(field("Seccomp") == Some("2") && field("Seccomp_filters") == Some(filters), "{status}");
        ensure!(field("NoNewPrivs") == Some("1") && field("CapBnd") == Some("0000000000000000"), "{status}");
        names.push(name);
    }
    for class in [Class::Main, Class::Vcpu, Class::EventLoop, Class::Fs, Class::Spawner] {
        ensure!(names.iter().any(|name| name.starts_with(class.name())), "no {class:?} in {names:?}");
    }
    Ok(())
}

fn descriptors_are_of_the_kinds_that_are_listed(t: &Test) -> Result<()> {
    let _vm = Machine::boot(t, Shape::default())?;
    // Streams, KVM, events, and of the file system the share and this process's own descriptors.
    let kinds = ["/dev/null", "pipe:", "socket:", "anon_inode:", "/dev/kvm", "/share", "/1/fd", "/"];
    for entry in fs::read_dir(vmm(t)?.join("fd"))? {
        let target = fs::read_link(entry?.path())?.to_string_lossy().into_owned();
        let known = kinds.iter().any(|kind| target == *kind || kind.len() > 1 && target.starts_with(kind));
        ensure!(known, "{target}");
    }
    Ok(())
}

fn killed_by_its_filter_is_137_with_reason(t: &Test) -> Result<()> {
    let run = t.start(&t.script("echo ready; sleep 1000")?)?.without_input();
    run.until("ready\n")?;
    let pid = vmm(t)?.file_name().context("no name")?.to_string_lossy().into_owned();
    // strace makes another call of the next write(2) of any thread; the guest's clock sees to it that there is one.
    let mut strace = Command::new("strace")
        .args([
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=write",
            "-e",
            "inject=write:error=EIO:syscall=getppid",
            "-p",
            &pid,
        ])
        .spawn()
        .context("cannot run strace")?;
    let outcome = run.wait()?;
    strace.wait()?;
    outcome.exited(137).stdout("ready\n").error(&["kvrun-vmm", "killed by its seccomp filter"]);
    Ok(())
}

fn no_line_of_the_filters_is_there_for_nothing(t: &Test) -> Result<()> {
    let trace = Trace::start(&t.scratch().join("trace"))?;
    work(t)?;
    let idle = trace.finish()?.idle(&Class::ALL);
    ensure!(idle.is_empty(), "nobody needs\n  {}", idle.join("\n  "));
    Ok(())
}

/// Whatever a machine can do, once.
fn work(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { vcpus: 2, ..Shape::default() })?;
    install_program(&vm)?;
    // What differs from a file system of the host's own is said elsewhere; here it is enough to have asked.
    let tried = vm.run("mkdir /tried && fs-semantics main /tried")?;
    ensure!(tried.stdout.contains("ok "), "{tried}");

    let link = Link::new(1500, 1)?;
    link.attach(&vm, FIRST_SLOT)?;
    vm.sh(&format!("ping -c 3 {}", HOST.0))?;
    vm.detach(FIRST_SLOT)?;

    // A disk that is not in memory: with an io_uring.
    let image = tempfile_on_disk()?;
    image.set_len(16 << 20)?;
    let config =
        DeviceConfig::Blk { read_only: false, serial: "x".into(), queues: 1, limit: RateLimit::default() };
    vm.attach(FIRST_SLOT, config, &[image.as_fd()])?;
    vm.sh("dd if=/dev/zero of=/dev/vda bs=64k count=32 conv=fsync && dd if=/dev/vda of=/dev/null bs=64k count=32")?;
    vm.attach(FIRST_SLOT + 1, DeviceConfig::Pmem, &[image.as_fd()])?;
    vm.pause()?;
    vm.resume()?;
    vm.detach(FIRST_SLOT)?;
    vm.shutdown();
    Ok(())
}

/// A file without a name on the disk of the machine the tests run on.
fn tempfile_on_disk() -> Result<File> {
    use rustix::fs::{CWD, Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, "/var/tmp", flags, Mode::RUSR | Mode::WUSR)?.into())
}
