//! The exit code of the container is that of `kvrun run`.

use anyhow::Result;
use kvrun_e2e::{Case, Test, cases};

pub(crate) const CASES: &[Case] = cases![
    success_is_0,
    failure_is_1,
    any_code_is_passed_on,
    missing_command_is_127,
    command_that_is_not_executable_is_126,
    death_by_fault_is_128_and_the_signal,
    death_by_sent_signal_is_128_and_the_signal,
    background_child_that_holds_stdout_does_not_stall_the_end,
    background_child_in_the_guests_pid_namespace_does_not_stall_the_end,
    container_can_be_run_again_under_the_same_id,
];

fn success_is_0(t: &Test) -> Result<()> {
    t.run(&t.bundle(&["/bin/true"])?)?.exited(0).stdout("").stderr("");
    Ok(())
}

fn failure_is_1(t: &Test) -> Result<()> {
    t.run(&t.bundle(&["/bin/false"])?)?.exited(1).stdout("").stderr("");
    Ok(())
}

fn any_code_is_passed_on(t: &Test) -> Result<()> {
    t.run(&t.script("exit 42")?)?.exited(42).stdout("").stderr("");
    Ok(())
}

fn missing_command_is_127(t: &Test) -> Result<()> {
    t.run(&t.bundle(&["/bin/no-such-command"])?)?.exited(127).stdout("").error(&["/bin/no-such-command"]);
    Ok(())
}

fn command_that_is_not_executable_is_126(t: &Test) -> Result<()> {
    t.run(&t.bundle(&["/etc/passwd"])?)?.exited(126).stdout("").error(&["/etc/passwd"]);
    Ok(())
}

fn death_by_fault_is_128_and_the_signal(t: &Test) -> Result<()> {
    // A stack overflow: SIGSEGV, which no PID 1 is spared.
    t.run(&t.script("ulimit -s 100; exec /bin/sh -c 'f() { f; }; f'")?)?.exited(128 + 11);
    Ok(())
}

fn death_by_sent_signal_is_128_and_the_signal(t: &Test) -> Result<()> {
    // pid_namespaces(7): PID 1 of a namespace ignores a signal it has no handler for, so it must not be PID 1.
    let bundle = t.script("kill -TERM $$; sleep 1000")?.without_namespace("pid")?;
    t.run(&bundle)?.exited(128 + 15).stdout("").stderr("");
    Ok(())
}

fn background_child_that_holds_stdout_does_not_stall_the_end(t: &Test) -> Result<()> {
    t.run(&t.script("sleep 1000 & echo started; exit 5")?)?.exited(5).stdout("started\n").stderr("");
    Ok(())
}

fn background_child_in_the_guests_pid_namespace_does_not_stall_the_end(t: &Test) -> Result<()> {
    let bundle = t.script("setsid sleep 1000 & echo started; exit 6")?.without_namespace("pid")?;
    t.run(&bundle)?.exited(6).stdout("started\n").stderr("");
    Ok(())
}

fn container_can_be_run_again_under_the_same_id(t: &Test) -> Result<()> {
    let bundle = t.script("echo run >> /log; wc -l < /log")?;
    t.run(&bundle)?.exited(0).stdout("1\n").stderr("");
    t.run(&bundle)?.exited(0).stdout("2\n").stderr("");
    Ok(())
}
