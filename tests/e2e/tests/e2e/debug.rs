//! Programs that are run in a guest to look at it from inside.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::containerd::{Containerd, IMAGE, RUNTIME};
use kvrun_e2e::process::Running;
use kvrun_e2e::terminal::on_terminal;
use kvrun_e2e::{Case, Outcome, Terminal, Test, cases, time};

pub(crate) const CASES: &[Case] = cases![
    program_sees_all_of_the_guest,
    program_ends_with_who_asked_for_it,
    nothing_is_run_where_the_configuration_does_not_say_so,
    pod_of_containerd_is_looked_into,
];

/// A configuration with a directory of programs, which is another bundle's root file system.
fn configuration(t: &Test) -> Result<PathBuf> {
    let root = t.bundle(&["/bin/true"])?.rootfs();
    let path = t.scratch().join("config.toml");
    fs::write(&path, format!("[debug]\nroot = {:?}\n", root.display().to_string()))?;
    Ok(path)
}

/// A container whose machine may be looked into.
fn start(t: &Test, script: &str) -> Result<Running> {
    let (config, bundle) = (configuration(t)?, t.script(script)?);
    let option: [&OsStr; 2] = ["--config".as_ref(), config.as_os_str()];
    let container = Running::start(&mut t.kvrun(option.into_iter().chain(t.run_args(&bundle))))?;
    let container = container.without_input();
    container.until("ready\n")?;
    Ok(container)
}

fn debug(t: &Test, command: &[&str]) -> Result<Outcome> {
    t.invoke(&[&["debug", t.id()], command].concat())
}

fn program_sees_all_of_the_guest(t: &Test) -> Result<()> {
    let container = start(t, "echo ready; sleep 1000")?;
    let id = t.id();
    let look = "cat /proc/1/comm; grep CapEff /proc/self/status; ps -o args | grep -c '[s]leep 1000'; \
        ls /proc/1/root/run/kvrun/share; dmesg | head -n 1 | cut -d ']' -f 2; echo problem >&2; touch /file || exit 7";
    let seen = debug(t, &["sh", "-c", look])?.exited(7);
    ensure!(
        seen.text().starts_with("init\nCapEff:\t000001ffffffffff\n1\n0\n1\nvolumes\n Linux version "),
        "{seen}"
    );
    ensure!(seen.stderr.starts_with("problem\n") && seen.stderr.contains("Read-only file system"), "{seen}");
    debug(t, &["sh", "-c", "kill -9 $$"])?.exited(137).stdout("").stderr("");
    debug(t, &["no-such"])?.exited(1).stdout("").error(&[id, "no-such", "not found"]);

    let mut piped = Running::start(&mut t.kvrun(["debug", id, "cat"]))?;
    piped.stdin.take().context("no stdin")?.write_all(b"from outside\n")?;
    piped.wait()?.exited(0).stdout("from outside\n").stderr("");

    let terminal = Terminal::open(31, 97)?;
    let mut command = on_terminal(t.program());
    command.arg("--root").arg(t.state()).args(["debug", id]);
    t.environment(&mut command);
    let shell = terminal.attach(command)?;
    terminal.keys(b"stty size; trap 'stty size; exit 5' WINCH; echo re''ady\n")?;
    shell.until("31 97\r\n")?;
    shell.until("ready\r\n")?;
    terminal.resize(40, 132)?;
    // The shell reads its traps between two lines.
    terminal.keys(b"\n")?;
    shell.until("40 132\r\n")?;
    shell.wait()?.exited(5).stderr("");

    // Nothing is left of them.
    debug(t, &["ls", "/proc/1/root/run/kvrun/share"])?.exited(0).stdout("0\n6\nvolumes\n").stderr("");
    t.invoke(&["kill", id, "KILL"])?.exited(0);
    container.wait()?.exited(137);
    Ok(())
}

fn program_ends_with_who_asked_for_it(t: &Test) -> Result<()> {
    let container = start(t, "echo ready; sleep 1000")?;
    let mut looking = Running::start(&mut t.kvrun(["debug", t.id(), "sh", "-c", "echo up; sleep 999"]))?;
    looking.until("up\n")?;
    looking.kill()?;
    time::until("the program is killed", || {
        let seen = debug(t, &["sh", "-c", "ps -o args | grep -c '[s]leep 999'"])?;
        Ok(seen.text() == "0\n")
    })?;
    // And with the machine.
    let looking = Running::start(&mut t.kvrun(["debug", t.id(), "sh", "-c", "echo up; sleep 999"]))?;
    looking.until("up\n")?;
    t.invoke(&["kill", t.id(), "KILL"])?.exited(0);
    container.wait()?.exited(137);
    looking.wait()?.exited(137);
    Ok(())
}

fn nothing_is_run_where_the_configuration_does_not_say_so(t: &Test) -> Result<()> {
    let container = t.start(&t.script("echo ready; sleep 1000")?)?.without_input();
    container.until("ready\n")?;
    debug(t, &["true"])?.exited(1).stdout("").error(&[t.id(), "debug.root"]);
    ensure!(!t.state().join(t.id()).join("debug.sock").exists());
    t.invoke(&["kill", t.id(), "KILL"])?.exited(0);
    container.wait()?.exited(137);
    debug(t, &["true"])?.exited(1).stdout("").error(&[t.id()]);
    Ok(())
}

fn pod_of_containerd_is_looked_into(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let config = configuration(t)?.display().to_string();
    let run = ["run", "--rm", "--runtime", RUNTIME, "--runtime-config-path", &config, IMAGE, t.id()];
    let mut container = containerd.start(&[&run[..], &["sh", "-c", "echo ready; cat"]].concat())?;
    let stdin = container.stdin.take().context("no stdin")?;
    container.until("ready\n")?;
    debug(t, &["cat", "/proc/1/comm"])?.exited(0).stdout("init\n").stderr("");
    debug(t, &["sh", "-c", "exit 3"])?.exited(3);
    drop(stdin);
    container.wait()?.exited(0);
    containerd.end()
}
