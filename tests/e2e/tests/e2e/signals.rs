//! Signals sent to `kvrun run` go to the container's process, unchanged and once.

use anyhow::{Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use rustix::process::Signal;

pub(crate) const CASES: &[Case] = cases![
    sigterm_reaches_the_container_exactly_once,
    signals_keep_their_number,
    sigterm_while_starting_ends_the_run
];

fn sigterm_reaches_the_container_exactly_once(t: &Test) -> Result<()> {
    let script = "n=0; trap 'n=$((n+1)); echo terminated' TERM; trap 'echo $n; exit 7' USR1
        echo ready; while :; do sleep 1000 & wait; done";
    let run = t.start(&t.script(script)?)?.without_input();
    run.until("ready\n")?;
    run.signal(Signal::TERM)?;
    run.until("terminated\n")?;
    // Whatever kvrun still had to say about SIGTERM comes before this one.
    run.signal(Signal::USR1)?;
    run.wait()?.exited(7).stdout("ready\nterminated\n1\n").stderr("");
    Ok(())
}

fn signals_keep_their_number(t: &Test) -> Result<()> {
    let script = "for s in HUP INT QUIT USR1 USR2; do trap \"echo SIG$s\" $s; done; trap 'exit 0' TERM
        echo ready; while :; do sleep 1000 & wait; done";
    let run = t.start(&t.script(script)?)?.without_input();
    run.until("ready\n")?;
    let signals = [
        (Signal::HUP, "SIGHUP\n"),
        (Signal::INT, "SIGINT\n"),
        (Signal::QUIT, "SIGQUIT\n"),
        (Signal::USR1, "SIGUSR1\n"),
        (Signal::USR2, "SIGUSR2\n"),
    ];
    for (signal, shown) in signals {
        run.signal(signal)?;
        run.until(shown)?;
    }
    run.signal(Signal::TERM)?;
    run.wait()?.exited(0).stdout("ready\nSIGHUP\nSIGINT\nSIGQUIT\nSIGUSR1\nSIGUSR2\n").stderr("");
    Ok(())
}

fn sigterm_while_starting_ends_the_run(t: &Test) -> Result<()> {
    // No process of the container is there to get it yet, so it is for kvrun. PID 1 would ignore it.
    let run = t.start(&t.script("sleep 1000")?)?.without_input();
    t.until_vmm(&run)?;
    run.signal(Signal::TERM)?;
    let outcome = run.wait()?.stdout("");
    ensure!(outcome.status.code() == Some(128 + 15), "143 expected: {outcome}");
    Ok(())
}
