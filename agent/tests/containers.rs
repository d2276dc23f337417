//! The service with real containers: busybox, pipes and ptys; Unix sockets in the place of vsock.

#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

mod lab;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use kvrun_agent::cgroup::event_file::EventFile;
use kvrun_agent_api::agent::{Empty, GetInfoRequest, ResizeTerminalRequest};
use lab::{Ended, ROOTFS, Stream, config, lab, left_behind, refusal, stdio};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

#[test]
fn the_exit_code_reaches_every_waiter() {
    lab(|lab| async move {
        for code in [0, 1, 42, 255] {
            let id = format!("exit{code}");
            lab.create(&id, &config(&format!("exit {code}")), stdio(None, None, None)).await.unwrap();
            let early = lab.wait(&id);
            let (started, ended) = tokio::join!(lab.start(&id), early);
            started.unwrap();
            assert_eq!(ended, Ended::Exit(code));
            assert_eq!(lab.wait(&id).await, Ended::Exit(code), "asked again");
            lab.remove(&id).await.unwrap();
            assert_eq!(refusal(lab.wait_response(&id).await).0, Code::NOT_FOUND);
        }
        assert!(left_behind().is_empty(), "{:?}", left_behind());
    });
}

#[test]
fn death_by_a_signal_is_told_with_its_number() {
    lab(|lab| async move {
        // The highest is a real-time signal, which has no name in most lists.
        for signal in [9, 15, 64] {
            let id = format!("signal{signal}");
            // PID 1 of a namespace ignores signals it has no handler for, so the container has none.
            let mut config = config("echo up; exec sleep 1000");
            config["linux"]["namespaces"] = json!([{ "type": "mount" }]);
            config["hostname"].take();
            let mut stdout = Stream::open();
            lab.create(&id, &config, stdio(None, Some(&stdout), None)).await.unwrap();
            lab.start(&id).await.unwrap();
            stdout.socket.read_exact(&mut [0; 3]).await.unwrap();
            lab.signal(&id, signal, false).await.unwrap();
            assert_eq!(lab.wait(&id).await, Ended::Signal(signal));
            assert_eq!(refusal(lab.signal(&id, signal, false).await).0, Code::FAILED_PRECONDITION);
            lab.signal(&id, signal, true).await.unwrap();
            lab.remove(&id).await.unwrap();
        }
        assert_eq!(refusal(lab.signal("signal9", 9, false).await).0, Code::NOT_FOUND);
    });
}

#[test]
fn stdin_comes_back_bit_exact_and_its_end_is_seen() {
    lab(|lab| async move {
        let (stdin, mut stdout) = (Stream::open(), Stream::open());
        lab.create("cat", &config("exec cat"), stdio(Some(&stdin), Some(&stdout), None)).await.unwrap();
        lab.start("cat").await.unwrap();
        let data: Vec<u8> = (0..8 << 20_u32).map(|n| (n ^ (n >> 9)) as u8).collect();
        let sent = data.clone();
        let writer = tokio::spawn(async move {
            let mut stdin = stdin;
            stdin.write(&sent).await;
            stdin.socket.shutdown().await.unwrap();
            stdin
        });
        let mut received = Vec::new();
        stdout.socket.read_to_end(&mut received).await.unwrap();
        assert!(received == data, "{} bytes came back of {}", received.len(), data.len());
        writer.await.unwrap();
        assert_eq!(lab.wait("cat").await, Ended::Exit(0));
        lab.remove("cat").await.unwrap();
    });
}

#[test]
fn output_and_errors_are_kept_apart_and_complete_when_the_end_is_told() {
    lab(|lab| async move {
        let (stdout, stderr) = (Stream::open(), Stream::open());
        let script = "seq 1 20000; echo problem >&2; seq 20001 40000; exit 3";
        lab.create("both", &config(script), stdio(None, Some(&stdout), Some(&stderr))).await.unwrap();
        lab.start("both").await.unwrap();
        let (stdout, stderr, ended) = tokio::join!(stdout.read(), stderr.read(), lab.wait("both"));
        assert_eq!(ended, Ended::Exit(3));
        assert_eq!(stderr, "problem\n");
        assert!(stdout.lines().map(|line| line.parse::<u32>().unwrap()).eq(1..=40000));
        lab.remove("both").await.unwrap();
    });
}

#[test]
fn what_is_in_the_pipe_when_the_process_ends_is_not_lost() {
    lab(|lab| async move {
        let stdout = Stream::open();
        lab.create("last", &config("head -c 60000 /proc/self/exe"), stdio(None, Some(&stdout), None))
            .await
            .unwrap();
        lab.start("last").await.unwrap();
        assert_eq!(lab.wait("last").await, Ended::Exit(0));
        lab.remove("last").await.unwrap();
        let mut bytes = Vec::new();
        { stdout }.socket.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes, fs::read("/bin/busybox").unwrap()[..60000]);
    });
}

#[test]
fn a_child_that_keeps_the_output_open_does_not_hold_up_the_end() {
    lab(|lab| async move {
        let mut config = config("sleep 1000 & while :; do echo noise; done & echo done");
        // Without a PID namespace the children live on.
        config["linux"]["namespaces"] = json!([{ "type": "mount" }]);
        config["hostname"].take();
        let stdout = Stream::open();
        lab.create("orphans", &config, stdio(None, Some(&stdout), None)).await.unwrap();
        let before = Instant::now();
        lab.start("orphans").await.unwrap();
        let (output, ended) = tokio::join!(stdout.read(), lab.wait("orphans"));
        assert_eq!(ended, Ended::Exit(0));
        assert!(output.contains("done\n"));
        assert!(before.elapsed() < Duration::from_secs(5), "{:?}", before.elapsed());
        lab.remove("orphans").await.unwrap();
    });
}

#[test]
fn a_terminal_has_the_asked_size_and_can_be_resized() {
    lab(|lab| async move {
        let mut config = config("stty size; read line; stty size; id -u >/dev/tty; echo got $line; exit 5");
        config["process"]["terminal"] = true.into();
        config["process"]["consoleSize"] = json!({ "height": 33, "width": 111 });
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        let (mut stdin, mut stdout) = (Stream::open(), Stream::open());
        lab.create("tty", &config, stdio(Some(&stdin), Some(&stdout), None)).await.unwrap();
        lab.start("tty").await.unwrap();
        let mut first = [0; 8];
        stdout.socket.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"33 111\r\n");
        let mut resize = ResizeTerminalRequest::new();
        resize.container_id = "tty".to_owned();
        (resize.rows, resize.columns) = (40, 120);
        lab.agent.resize_terminal(lab.context(), &resize).await.unwrap();
        stdin.write(b"hello\n").await;
        let (rest, ended) = tokio::join!(stdout.read(), lab.wait("tty"));
        assert_eq!(rest, "hello\r\n40 120\r\n1000\r\ngot hello\r\n");
        assert_eq!(ended, Ended::Exit(5));
        resize.rows = 70000;
        let refused = refusal(lab.agent.resize_terminal(lab.context(), &resize).await);
        assert_eq!(refused.0, Code::INVALID_ARGUMENT);
        lab.remove("tty").await.unwrap();
    });
}

#[test]
fn the_program_to_run_can_be_missing_or_not_executable_or_broken() {
    lab(|lab| async move {
        let with_args = |args: &[&str]| {
            let mut config = config("");
            config["process"]["args"] = json!(args);
            config
        };
        fs::write(format!("{ROOTFS}/bin/data"), "data").unwrap();
        fs::write(format!("{ROOTFS}/bin/script"), "#!/no/interpreter\n").unwrap();
        fs::write(format!("{ROOTFS}/bin/garbage"), "garbage").unwrap();
        for name in ["script", "garbage"] {
            fs::set_permissions(format!("{ROOTFS}/bin/{name}"), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let none = || stdio(None, None, None);

        let (code, text) = refusal(lab.create("x", &with_args(&["no-such"]), none()).await);
        assert_eq!(
            (code, text.as_str()),
            (Code::NOT_FOUND, r#"exec "no-such": executable file not found in $PATH (/bin)"#)
        );
        let (code, text) = refusal(lab.create("x", &with_args(&["/bin/no-such"]), none()).await);
        assert_eq!(
            (code, text.as_str()),
            (
                Code::NOT_FOUND,
                r#"executable "/bin/no-such" does not exist in the container: no such file or directory"#
            )
        );
        for name in ["data", "/bin/data", "/bin"] {
            let (code, text) = refusal(lab.create("x", &with_args(&[name]), none()).await);
            assert_eq!(code, Code::PERMISSION_DENIED, "{text}");
            assert!(text.starts_with("cannot execute \"/bin"), "{text}");
        }
        assert!(left_behind().is_empty(), "{:?}", left_behind());

        // Only exec itself can tell.
        lab.create("y", &with_args(&["/bin/script"]), none()).await.unwrap();
        let (code, text) = refusal(lab.start("y").await);
        assert_eq!(code, Code::NOT_FOUND, "{text}");
        assert!(text.contains("/bin/script"), "{text}");
        lab.remove("y").await.unwrap();
        lab.create("z", &with_args(&["/bin/garbage"]), none()).await.unwrap();
        let (code, text) = refusal(lab.start("z").await);
        assert_eq!(
            (code, text.as_str()),
            (Code::PERMISSION_DENIED, r#"cannot execute "/bin/garbage": Exec format error"#)
        );
        lab.remove("z").await.unwrap();
        assert!(left_behind().is_empty(), "{:?}", left_behind());
    });
}

#[test]
fn a_container_that_cannot_be_created_says_why_and_leaves_nothing() {
    lab(|lab| async move {
        let mut config = config("true");
        config["mounts"].as_array_mut().unwrap().push(
            json!({ "destination": "/mnt", "type": "bind", "source": "/no/such/source", "options": ["bind"] }),
        );
        let (code, text) = refusal(lab.create("bad", &config, stdio(None, None, None)).await);
        assert_eq!(code, Code::INTERNAL);
        assert!(text.contains("/no/such/source") && !text.contains('\n'), "{text}");
        assert!(left_behind().is_empty(), "{:?}", left_behind());

        for broken in ["", "{", "[]", r#"{"ociVersion":"1.0.2"}"#] {
            let mut request = kvrun_agent_api::agent::CreateContainerRequest::new();
            request.container_id = "bad".to_owned();
            request.spec_json = broken.as_bytes().to_vec();
            let (code, text) = refusal(lab.agent.create_container(lab.context(), &request).await);
            assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        }
    });
}

#[test]
fn every_state_refuses_what_does_not_fit_it() {
    lab(|lab| async move {
        let none = || stdio(None, None, None);
        let sleep = config("sleep 1000");
        assert_eq!(refusal(lab.start("s").await).0, Code::NOT_FOUND);
        assert_eq!(refusal(lab.create("../s", &sleep, none()).await).0, Code::INVALID_ARGUMENT);
        lab.remove("s").await.unwrap();

        lab.create("s", &sleep, none()).await.unwrap();
        assert_eq!(refusal(lab.create("s", &sleep, none()).await).0, Code::ALREADY_EXISTS);
        lab.start("s").await.unwrap();
        assert_eq!(refusal(lab.start("s").await).0, Code::FAILED_PRECONDITION);
        assert_eq!(refusal(lab.signal("s", 65, false).await).0, Code::INVALID_ARGUMENT);

        let mut nested = sleep.clone();
        nested["linux"]["cgroupsPath"] = "/kvrun/s/below".into();
        assert_eq!(refusal(lab.create("t", &nested, none()).await).0, Code::FAILED_PRECONDITION);

        // A waiter of a container that is removed while it runs gets its end.
        let (ended, removed) = tokio::join!(lab.wait("s"), lab.remove("s"));
        assert_eq!(ended, Ended::Signal(9));
        removed.unwrap();
        lab.remove("s").await.unwrap();

        // Killed before it was started.
        lab.create("c", &sleep, none()).await.unwrap();
        lab.signal("c", 9, false).await.unwrap();
        assert_eq!(lab.wait("c").await, Ended::Signal(9));
        assert_eq!(refusal(lab.start("c").await).0, Code::FAILED_PRECONDITION);
        lab.remove("c").await.unwrap();
        assert!(left_behind().is_empty(), "{:?}", left_behind());
    });
}

#[test]
fn a_change_of_a_file_of_a_cgroup_is_heard() {
    lab(|_| async move {
        let dir = Path::new("/sys/fs/cgroup/kvrun/heard");
        fs::create_dir(dir).unwrap();
        let mut events = EventFile::open(&dir.join("cgroup.events")).unwrap();
        let says = |line: &'static str| move |text: &str| text.lines().any(|have| have == line).then_some(());
        events.until(says("frozen 0")).await.unwrap();
        // More than once: the first wake-up may be that of the registration.
        for (value, line) in [("1", "frozen 1"), ("0", "frozen 0"), ("1", "frozen 1")] {
            let change = async { fs::write(dir.join("cgroup.freeze"), value).unwrap() };
            let (heard, ()) = tokio::join!(events.until(says(line)), change);
            heard.unwrap();
        }
        fs::remove_dir(dir).unwrap();
        let gone = events.until(says("frozen 0")).await.unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ENODEV));
    });
}

#[test]
fn who_waits_for_an_oom_kill_hears_of_the_end() {
    lab(|lab| async move {
        assert_eq!(refusal(lab.wait_oom_kill("c", 0).await).0, Code::NOT_FOUND);
        lab.create("c", &config("sleep 1000"), stdio(None, None, None)).await.unwrap();
        lab.start("c").await.unwrap();
        let mut wait = std::pin::pin!(lab.wait_oom_kill("c", 7));
        tokio::select! {
            biased;
            kills = &mut wait => panic!("{kills:?}"),
            // The answer to what was asked later.
            refused = lab.wait_oom_kill("none", 0) => assert_eq!(refusal(refused).0, Code::NOT_FOUND),
        }
        let (kills, removed) = tokio::join!(wait, lab.remove("c"));
        assert_eq!(kills.unwrap(), 7);
        removed.unwrap();
        assert_eq!(refusal(lab.wait_oom_kill("c", 0).await).0, Code::NOT_FOUND);

        lab.create("d", &config("exit 0"), stdio(None, None, None)).await.unwrap();
        lab.start("d").await.unwrap();
        assert_eq!(lab.wait("d").await, Ended::Exit(0));
        assert_eq!(lab.wait_oom_kill("d", 0).await.unwrap(), 0);
        lab.remove("d").await.unwrap();
    });
}

#[test]
fn a_container_is_created_as_its_config_says() {
    lab(|lab| async move {
        let mut config = config(
            "echo $$ $(cat /proc/sys/kernel/hostname) $(id -u):$(id -g) $PWD $COLOUR $(cat /proc/self/oom_score_adj); \
             grep SigIgn /proc/self/status; grep SigBlk /proc/self/status; \
             cat /proc/self/cgroup | grep ^0:; echo again >/dev/stdout; ls /proc/self/fd | wc -l",
        );
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1001 });
        config["process"]["cwd"] = "/tmp".into();
        config["process"]["env"] = json!(["PATH=/bin", "COLOUR=green"]);
        let script = config["process"]["args"][2].as_str().unwrap().replace("ls ", "/bin/busybox ls ");
        config["process"]["args"][2] = script.into();
        // What this test's own parents ignore is inherited; SIGPIPE, which Rust ignores, is not.
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
        let (output, ended) = lab.run("as-told", &config).await;
        assert_eq!(
            output,
            "1 box 1000:1001 /tmp green 0\n\
             SigIgn:\tIGNORED\nSigBlk:\t0000000000000000\n\
             0::/\nagain\n4\n"
                .replace("IGNORED", &format!("{:016x}", ignored & !(1 << (libc::SIGPIPE - 1)))),
            "descriptors: 0, 1, 2 and the directory itself"
        );
        assert_eq!(ended, Ended::Exit(0));
    });
}

#[test]
fn the_agent_tells_about_its_machine() {
    lab(|lab| async move {
        let info = lab.agent.get_info(lab.context(), &GetInfoRequest::new()).await.unwrap();
        assert_eq!(info.kernel_release, fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim());
        assert!(info.memory_available_kib > 0 && info.memory_available_kib < info.memory_total_kib);
        assert!(info.cpus > 0);
    });
}

#[test]
fn shutdown_kills_the_containers_and_answers_first() {
    lab(|lab| async move {
        lab.create("left", &config("sleep 1000"), stdio(None, None, None)).await.unwrap();
        lab.start("left").await.unwrap();
        let off = async {
            lab.service.power_off().await;
            Instant::now()
        };
        let answer = async {
            lab.agent.shutdown(lab.context(), &Empty::new()).await.unwrap();
            Instant::now()
        };
        let (off, answer, ended) = tokio::join!(off, answer, lab.wait("left"));
        assert_eq!(ended, Ended::Signal(9));
        // The client reads the answer in the same thread, in a turn after it was written.
        assert!(answer.saturating_duration_since(off) < Duration::from_millis(100));
        assert!(left_behind().is_empty(), "{:?}", left_behind());
    });
}
