//! `exec`: a further process in a container.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::{Case, Left, Running, Test, cases};
use serde_json::json;

pub(crate) const CASES: &[Case] = cases![
    process_is_in_the_container_and_its_exit_code_is_the_commands,
    streams_are_passed_both_ways,
    options_change_user_environment_and_directory,
    no_new_privileges_can_be_asked_for,
    process_file_says_it_all,
    program_that_cannot_run_is_told_as_by_a_shell,
    signal_to_the_command_reaches_the_process,
    fifty_at_the_same_time_while_the_container_is_busy,
    detached_process_is_stood_for,
    terminal_is_the_containers_own_kind,
    paused_container_takes_none,
    refused_options_are_named,
];

/// A container that does nothing until it is killed.
fn idle(t: &Test) -> Result<Left> {
    let left = t.create(&t.script("trap 'exit 0' TERM; echo up; while :; do sleep 1000 & wait; done")?)?;
    t.command("start")?;
    left.until("up\n")?;
    Ok(left)
}

fn gone(t: &Test, left: &Left) -> Result<()> {
    t.invoke(&["delete", "--force", t.id()])?.exited(0).stdout("").stderr("");
    left.end()?;
    Ok(())
}

fn process_is_in_the_container_and_its_exit_code_is_the_commands(t: &Test) -> Result<()> {
    let left = idle(t)?;
    t.invoke(&["exec", t.id(), "true"])?.exited(0).stdout("").stderr("");
    t.invoke(&["exec", t.id(), "sh", "-c", "exit 42"])?.exited(42).stdout("").stderr("");
    t.invoke(&["exec", t.id(), "sh", "-c", "kill -KILL $$"])?.exited(137).stdout("").stderr("");
    // The same namespaces, cgroup, capabilities, and not the same process.
    let script = "for n in cgroup ipc mnt net pid uts user; do
            test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) || echo another $n; done
        cat /proc/self/cgroup; grep -E 'Cap(Eff|Prm|Bnd)|NoNewPrivs' /proc/self/status > /tmp/own
        grep -E 'Cap(Eff|Prm|Bnd)|NoNewPrivs' /proc/1/status | cmp - /tmp/own && test $$ != 1 && hostname; ulimit -n";
    t.invoke(&["exec", t.id(), "sh", "-c", script])?.exited(0).stdout("0::/\nkvrun\n1024\n").stderr("");
    ensure!(t.status()? == "running", "the container has changed its state");
    gone(t, &left)
}

fn streams_are_passed_both_ways(t: &Test) -> Result<()> {
    let left = idle(t)?;
    let mut command = t.kvrun(["exec", t.id(), "sh", "-c", "cat; echo err >&2"]);
    let mut run = Running::start(&mut command)?;
    let mut stdin = run.stdin.take().context("no stdin")?;
    let sent = "0123456789".repeat(30_000);
    let writer = {
        let sent = sent.clone();
        std::thread::spawn(move || std::io::Write::write_all(&mut stdin, sent.as_bytes()))
    };
    let outcome = run.wait()?.exited(0).stderr("err\n");
    ensure!(outcome.text() == sent, "{} bytes came back", outcome.stdout.len());
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    gone(t, &left)
}

fn options_change_user_environment_and_directory(t: &Test) -> Result<()> {
    let left = idle(t)?;
    let script = "id -u; id -g; id -G; echo $FOO; pwd; echo $HOME; grep CapEff /proc/self/status | cut -f2";
    let args = [
        "exec",
        "--user",
        "1000:1001",
        "-e",
        "FOO=a b",
        "--cwd",
        "/tmp",
        "--additional-gids",
        "7",
        "-g",
        "8",
        t.id(),
        "sh",
        "-c",
        script,
    ];
    // By execve(2) a user other than root has no capabilities.
    let seen = "1000\n1001\n1001 7 8\na b\n/tmp\n/\n0000000000000000\n";
    t.invoke(&args)?.exited(0).stdout(seen).stderr("");
    let args = [
        "exec",
        "--cap",
        "CAP_SYS_ADMIN",
        t.id(),
        "sh",
        "-c",
        "grep CapEff /proc/self/status | cut -f2; echo $HOME",
    ];
    // CAP_AUDIT_WRITE, CAP_KILL, CAP_NET_BIND_SERVICE, and CAP_SYS_ADMIN.
    t.invoke(&args)?.exited(0).stdout("0000000020200420\n/root\n").stderr("");
    gone(t, &left)
}

fn no_new_privileges_can_be_asked_for(t: &Test) -> Result<()> {
    let bundle = t.script("sleep 1000")?;
    let left = t.create(&bundle.with(|spec| spec["process"]["noNewPrivileges"] = json!(false))?)?;
    t.command("start")?;
    let look = ["grep", "NoNewPrivs", "/proc/self/status"];
    t.invoke(&[&["exec", t.id()], &look[..]].concat())?.exited(0).stdout("NoNewPrivs:\t0\n");
    t.invoke(&[&["exec", "--no-new-privs", t.id()], &look[..]].concat())?
        .exited(0)
        .stdout("NoNewPrivs:\t1\n");
    gone(t, &left)
}

fn process_file_says_it_all(t: &Test) -> Result<()> {
    let left = idle(t)?;
    let file = t.scratch().join("process.json");
    let process = json!({
        "user": {"uid": 5, "gid": 6, "umask": 0o027, "additionalGids": [9]},
        "args": ["/bin/sh", "-c", "id -u; id -G; umask; pwd; echo $A; ulimit -n; grep NoNewPrivs /proc/self/status | cut -f2; cat /proc/self/oom_score_adj"],
        "env": ["A=1", "PATH=/bin"], "cwd": "/etc", "noNewPrivileges": true, "oomScoreAdj": 77,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}],
    });
    fs::write(&file, process.to_string())?;
    let path = file.display().to_string();
    let seen = "5\n6 9\n0027\n/etc\n1\n99\n1\n77\n";
    t.invoke(&["exec", "--process", &path, t.id()])?.exited(0).stdout(seen).stderr("");
    fs::write(&file, json!({"args": ["true"], "cwd": "tmp", "user": {"uid": 0, "gid": 0}}).to_string())?;
    t.invoke(&["exec", "--process", &path, t.id()])?.exited(1).error(&["process.cwd"]);
    fs::write(&file, "{")?;
    t.invoke(&["exec", "--process", &path, t.id()])?.exited(1).error(&[&path]);
    gone(t, &left)
}

fn program_that_cannot_run_is_told_as_by_a_shell(t: &Test) -> Result<()> {
    let left = idle(t)?;
    t.invoke(&["exec", t.id(), "no-such"])?
        .exited(127)
        .stdout("")
        .error(&["no-such", "executable file not found in $PATH"]);
    t.invoke(&["exec", t.id(), "/no/such"])?
        .exited(127)
        .stdout("")
        .error(&["/no/such", "no such file or directory"]);
    t.invoke(&["exec", t.id(), "/etc/passwd"])?
        .exited(126)
        .stdout("")
        .error(&["/etc/passwd", "permission denied"]);
    t.invoke(&["exec", "--cwd", "/no/such", t.id(), "true"])?.failed().stdout("").error(&["/no/such"]);
    ensure!(t.status()? == "running", "the container has changed its state");
    gone(t, &left)
}

fn signal_to_the_command_reaches_the_process(t: &Test) -> Result<()> {
    let left = idle(t)?;
    let script = "trap 'echo got it; exit 9' USR1; echo ready; sleep 1000 & wait";
    let run = Running::start(&mut t.kvrun(["exec", t.id(), "sh", "-c", script]))?.without_input();
    run.until("ready\n")?;
    run.signal(rustix::process::Signal::USR1)?;
    run.wait()?.exited(9).stdout("ready\ngot it\n").stderr("");
    // A container that ends takes them along.
    let run =
        Running::start(&mut t.kvrun(["exec", t.id(), "sh", "-c", "echo ready; sleep 1000"]))?.without_input();
    run.until("ready\n")?;
    t.invoke(&["kill", t.id(), "KILL"])?.exited(0);
    run.wait()?.exited(137).stdout("ready\n");
    left.end()?;
    t.command("delete")?;
    Ok(())
}

fn fifty_at_the_same_time_while_the_container_is_busy(t: &Test) -> Result<()> {
    let left = t.create(&t.script("echo up; while :; do :; done")?)?;
    t.command("start")?;
    left.until("up\n")?;
    let mut running = Vec::new();
    for number in 0..50 {
        let script = format!("echo {number}; cat; exit {number}");
        let child = t
            .kvrun(["exec", t.id(), "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        running.push(child);
    }
    // Each waits for the end of its input: they are all there at once.
    for (number, child) in running.iter_mut().enumerate() {
        let expected = format!("{number}\n");
        let mut line = vec![0; expected.len()];
        if let Err(error) = child.stdout.as_mut().context("no stdout")?.read_exact(&mut line) {
            let mut said = String::new();
            child.stderr.as_mut().context("no stderr")?.read_to_string(&mut said)?;
            anyhow::bail!("{number}: {error}: {said}");
        }
        ensure!(line == expected.as_bytes(), "{number} says {line:?}");
    }
    for (number, child) in running.into_iter().enumerate() {
        let output = child.wait_with_output()?;
        ensure!(output.status.code() == Some(number as i32), "{number}: {output:?}");
        ensure!(output.stderr.is_empty() && output.stdout.is_empty(), "{number}: {output:?}");
    }
    gone(t, &left)
}

fn detached_process_is_stood_for(t: &Test) -> Result<()> {
    let left = idle(t)?;
    let exec = t.leave_with(&["exec", "--detach"], t.id(), &["sh", "-c", "echo started; exit 6"])?;
    ensure!(exec.end()? == 6, "another exit code");
    ensure!(exec.text()? == "started\n", "{:?}", exec.text()?);
    let exec = t.leave_with(&["exec", "--detach"], t.id(), &["sh", "-c", "echo up; sleep 1000"])?;
    exec.until("up\n")?;
    let pids: Vec<i32> = serde_json::from_slice(&t.invoke(&["ps", "--format", "json", t.id()])?.stdout)?;
    ensure!(pids == [left.pid(), exec.pid()], "{pids:?}");
    gone(t, &left)?;
    // Killed, as the guest tells it, or because its machine is gone before it can.
    ensure!(matches!(exec.end()?, 137 | 1009), "another end");
    Ok(())
}

/// Takes the terminal that is sent to a console socket.
fn receive_terminal(listener: &UnixListener) -> Result<fs::File> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (stream, _) = listener.accept()?;
    let mut name = [0; 100];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got =
        recvmsg(&stream, &mut [std::io::IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::empty())?;
    let name = String::from_utf8_lossy(&name[..got.bytes]).into_owned();
    ensure!(name.starts_with("/dev/pts/"), "the terminal is called {name:?}");
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fd.context("no terminal was sent")?.into())
}

fn terminal_is_the_containers_own_kind(t: &Test) -> Result<()> {
    use rustix::termios::{Winsize, tcsetwinsize};
    let size = |rows, columns| Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let socket = t.scratch().join("console");
    let path = socket.display().to_string();
    let listener = UnixListener::bind(&socket)?;
    let bundle = t
        .script("trap 'stty size; exit 5' WINCH; tty; stty size; echo up; sleep 1000 & wait; wait")?
        .with(|spec| {
            spec["process"]["terminal"] = json!(true);
            spec["process"]["consoleSize"] = json!({"height": 11, "width": 22});
        })?;
    let left = t.leave(
        &["create", "--console-socket", &path, "-b", bundle.path().to_str().context("ASCII")?],
        t.id(),
    )?;
    let terminal = receive_terminal(&listener)?;
    let shown = kvrun_e2e::process::Captured::new(terminal.try_clone()?);
    t.command("start")?;
    let until = |shown: &kvrun_e2e::process::Captured, text: &str| {
        shown.until(text).with_context(|| format!("the terminal shows {shown:?}"))
    };
    until(&shown, "11 22\r\nup\r\n")?;

    // And a further process with another one.
    let exec = t.leave_with(
        &["exec", "-d", "-t", "--console-socket", &path],
        t.id(),
        &["sh", "-c", "tty; read line; echo \"<$line>\"; exit 8"],
    )?;
    let second = receive_terminal(&listener)?;
    let second_shown = kvrun_e2e::process::Captured::new(second.try_clone()?);
    until(&second_shown, "/dev/pts/")?;
    std::io::Write::write_all(&mut &second, b"hello\r")?;
    until(&second_shown, "<hello>\r\n")?;
    ensure!(exec.end()? == 8, "another exit code");

    tcsetwinsize(&terminal, size(33, 44))?;
    until(&shown, "33 44\r\n")?;
    ensure!(left.end()? == 5, "another exit code");
    t.command("delete")?;
    drop((terminal, second));
    fs::remove_file(&socket)?;
    Ok(())
}

fn paused_container_takes_none(t: &Test) -> Result<()> {
    let left = t.create(&t.script("i=0; while :; do i=$((i + 1)); echo $i > /tmp/count; done")?)?;
    t.command("start")?;
    let count = || -> Result<String> {
        Ok(t.invoke(&["exec", "--ignore-paused", t.id(), "cat", "/tmp/count"])?.exited(0).text())
    };
    count()?;
    t.command("pause")?;
    ensure!(t.status()? == "paused", "not paused");
    t.invoke(&["pause", t.id()])?.exited(1).error(&["pause", "paused"]);
    t.invoke(&["exec", t.id(), "true"])?.exited(1).error(&["paused"]);
    // The root file system is the host's.
    let bundle = t.bundles().join("0/rootfs/tmp/count");
    let held = fs::read_to_string(&bundle)?;
    t.invoke(&["ps", t.id()])?.exited(0);
    ensure!(fs::read_to_string(&bundle)? == held, "the container runs on");
    t.command("resume")?;
    ensure!(t.status()? == "running", "not running");
    let after = count()?;
    while count()? == after {}
    t.command("pause")?;
    // SIGKILL does not wait for the end of a pause.
    t.invoke(&["kill", t.id(), "KILL"])?.exited(0);
    ensure!(left.end()? == 1009, "another end");
    t.command("delete")?;
    Ok(())
}

fn refused_options_are_named(t: &Test) -> Result<()> {
    let left = t.create(&t.bundle(&["/bin/true"])?)?;
    for (options, word) in [
        (&["--preserve-fds", "3"][..], "--preserve-fds 3"),
        (&["--apparmor", "mine"], "AppArmor"),
        (&["--process-label", "l"], "SELinux"),
        (&["--user", "name"], "--user"),
        (&["-d", "-t"], "--console-socket"),
        (&["-d", "--console-socket", "/s"], "--console-socket"),
        (&["--cap", "CAP_NO_SUCH"], "CAP_NO_SUCH"),
    ] {
        let args = [&["exec"], options, &[t.id(), "true"]].concat();
        t.invoke(&args)?.exited(1).stdout("").error(&[word]);
    }
    t.invoke(&["exec", t.id()])?.exited(1).error(&["command"]);
    t.invoke(&["exec", "--apparmor", "docker-default", "--process-label", "", t.id(), "true"])?
        .exited(0)
        .stderr("");
    gone(t, &left)
}
