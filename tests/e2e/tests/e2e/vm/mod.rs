//! What the virtual machine promises, one module per device or subject: machines without `kvrun` around them.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::vm::{Machine, Shape};
use kvrun_e2e::{Case, Test, cases};

mod blk;
mod clock;
pub(crate) mod fs;
mod host;
mod jail;
mod memory;
mod net;
mod pmem;
mod vcpus;
mod vsock;

pub(crate) const GROUPS: &[&[Case]] = &[
    CASES,
    blk::CASES,
    fs::CASES,
    net::CASES,
    vcpus::CASES,
    clock::CASES,
    vsock::CASES,
    memory::CASES,
    pmem::CASES,
    jail::CASES,
];

const CASES: &[Case] =
    cases![script_has_the_whole_guest_and_gives_its_result_back, unit_tests_that_need_kvm_pass];

/// The harness itself.
fn script_has_the_whole_guest_and_gives_its_result_back(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape::default())?;
    let done = vm.run("echo out; echo err >&2; exit 7")?;
    ensure!(done.code == 7 && done.stdout == "out\n" && done.stderr == "err\n", "{done}");
    // The guest's own devices, init, kernel settings and file system of PID 1's runtime directory.
    vm.sh("cat /proc/1/cmdline | grep -q init && test -c /dev/kmsg && ls -d /run/kvrun >/dev/null")?;
    vm.sh("echo 1 > /proc/sys/kernel/sysrq && grep -q '^CapEff:.*1ffffffffff$' /proc/self/status")?;
    let rootfs = vm.rootfs().to_owned();
    std::fs::write(rootfs.join("from-host"), "hello\n")?;
    ensure!(vm.sh("cat /from-host")? == "hello\n");
    let mut script = vm.start("echo ready; read line; echo \"got $line\"")?;
    script.until("ready\n")?;
    script.write("word\n")?;
    let done = script.wait()?;
    ensure!(done.code == 0 && done.stdout == "ready\ngot word\n", "{done}");
    Ok(())
}

/// They are built with the VMM, and skip themselves where there is no KVM.
fn unit_tests_that_need_kvm_pass(_: &Test) -> Result<()> {
    let program =
        std::env::var_os("KVRUN_VMM_TESTS").context("KVRUN_VMM_TESTS must name the VMM's unit tests")?;
    let output = Command::new(program)
        .args(["vcpu::", "check::", "--nocapture"])
        .env("KVRUN_E2E_REQUIRED", "1")
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success()
            && !said.contains("skipped")
            && said.contains("a_saved_vcpu_goes_on_in_another_machine")
            && said.contains("every_way_to_fail_is_told"),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
