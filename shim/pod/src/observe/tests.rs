//! The pod's socket, against a fake VMM and a fake agent.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use tokio::task::spawn_blocking;

use super::*;
use crate::pod::tests::{Program, boot, guest, run};
use crate::state_dir::POD_SOCKET;

fn open(dir: &Path) -> std::fs::File {
    std::fs::File::open(dir).unwrap()
}

fn labels() -> Labels {
    Labels { namespace: "n".to_owned(), pod: "p".to_owned() }
}

/// What is answered to these bytes.
async fn say(dir: &Path, bytes: &'static [u8]) -> String {
    let dir = open(dir);
    let asked = spawn_blocking(move || {
        let path = format!("/proc/self/fd/{}/{POD_SOCKET}", dir.as_fd().as_raw_fd());
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    asked.await.unwrap()
}

#[test]
fn metrics_are_told_as_long_as_the_machine_runs() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let pod = boot(guest(Program::Sleep)).await.unwrap();
        let server = start(&pod, open(dir.path()), labels()).unwrap();
        let see = |page| {
            let dir = open(dir.path());
            async move { spawn_blocking(move || fetch(dir, page)).await.unwrap() }
        };
        let text = see(Page::Metrics).await.unwrap();
        for line in [
            "kvrun_agent_up{namespace=\"n\",pod=\"p\"} 1",
            "kvrun_guest_vcpus_online{namespace=\"n\",pod=\"p\"} 3",
            "kvrun_vm_exits_total{namespace=\"n\",pod=\"p\",kind=\"io\\\"out\"} 7",
            "kvrun_vm_memory_bytes{namespace=\"n\",pod=\"p\",kind=\"boot\"} 134217728",
            "kvrun_virtio_total{namespace=\"n\",pod=\"p\",slot=\"1\",device=\"rng\",counter=\"bytes\"} 5",
            "kvrun_virtio_guest{namespace=\"n\",pod=\"p\",slot=\"1\",device=\"rng\",counter=\"guest_free\"} 6",
            "kvrun_agent_request_seconds_count{namespace=\"n\",pod=\"p\",request=\"bind a device\"} 1",
            "kvrun_agent_requests_failed_total{namespace=\"n\",pod=\"p\",request=\"bind a device\"} 0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}: {text}");
        }
        // What the VMM has seen of the boot makes no sense, and the guest's marks are missing.
        let phases: Vec<_> = text.lines().filter(|line| line.starts_with("kvrun_boot_seconds{")).collect();
        assert!(phases.len() == 1 && phases[0].contains("phase=\"all\""), "{text}");
        // Every sample is of the family above it.
        let mut family = "";
        for line in text.lines() {
            match line.strip_prefix("# ") {
                Some(comment) => family = comment.split(' ').nth(1).unwrap(),
                None => assert!(line.starts_with(family), "{family}: {line}"),
            }
        }

        assert_eq!(see(Page::GuestLog).await.unwrap(), "[    0.000001] one[2J\n[    0.000002] two\n");

        pod.vmm.stop().await;
        assert!(matches!(see(Page::Metrics).await, Err(FetchError::Refused(why)) if why.contains("died")));
        drop(server);
        // It ends when the runtime comes to it.
        loop {
            match see(Page::Metrics).await {
                Err(FetchError::NotRunning) => break,
                Err(_) => tokio::task::yield_now().await,
                Ok(text) => panic!("{text}"),
            }
        }
    });
}

#[test]
fn log_of_a_guest_whose_agent_does_not_answer_is_its_console() {
    run(async {
        let pod = boot(guest(Program::Hang)).await.unwrap();
        let log = guest_log::read(&pod).await.unwrap();
        let (first, rest) = log.split_once('\n').unwrap();
        assert!(
            first.starts_with("kvrun: the log cannot be had (") && first.ends_with("serial console"),
            "{log}"
        );
        assert_eq!(rest, "a [31mwarning\n");
    });
}

#[test]
fn only_the_two_pages_are_answered() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let pod = boot(guest(Program::Sleep)).await.unwrap();
        let _server = start(&pod, open(dir.path()), labels()).unwrap();
        let long: &'static [u8] = vec![b'a'; 8 * 1024].leak();
        for (request, status) in [
            (&b"GET /metrics HTTP/1.1\r\nHost: pod\r\n\r\n"[..], "200"),
            (b"GET /guest-log HTTP/1.0\r\n\r\n", "200"),
            (b"GET / HTTP/1.0\r\n\r\n", "404"),
            (b"GET /metrics?x HTTP/1.0\r\n\r\n", "404"),
            (b"POST /metrics HTTP/1.0\r\n\r\n", "405"),
            (b"\r\n\r\n", "405"),
            (long, "431"),
        ] {
            let answer = say(dir.path(), request).await;
            assert!(answer.starts_with(&format!("HTTP/1.0 {status} ")), "{status}: {answer}");
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{answer}");
        }
    });
}
