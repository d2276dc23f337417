//! Against a VMM that is a thread on the other end of the control socket, and a process that ends when it does.

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::thread;

use kvrun_vmm_api::config::VcpuConfig;
use kvrun_vmm_api::{Received, VIOLATION_EXIT, VIOLATION_PREFIX};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::*;

/// What a fake VMM has: its end of the control socket. The process that stands for it ends with this.
pub(crate) struct FakeVmm {
    pub(crate) channel: Channel,
    /// `cat` reads it, and ends at end-of-file.
    process: Option<std::process::ChildStdin>,
}

impl FakeVmm {
    pub(crate) fn next(&self) -> Option<Received<ToVmm>> {
        self.channel.receive().unwrap()
    }

    pub(crate) fn send(&self, message: &FromVmm) {
        // The engine may be gone.
        let _ = self.channel.send(message, &[]);
    }

    pub(crate) fn done(&self, id: u64) {
        self.send(&FromVmm::Reply { id, result: Ok(Reply::Done) });
    }

    pub(crate) fn event(&self, event: Event, fds: &[BorrowedFd<'_>]) {
        let _ = self.channel.send(&FromVmm::Event(event), fds);
    }
}

/// A [`Vmm`] that reaps its process, and whose other side is `behaviour` on a thread. Must be called in a runtime.
#[allow(clippy::zombie_processes, reason = "the Vmm reaps it, by its pidfd")]
pub(crate) fn fake(behaviour: impl FnOnce(FakeVmm) + Send + 'static) -> Vmm {
    let (ours, theirs) = Channel::pair().unwrap();
    let (stderr, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    rustix::io::ioctl_fionbio(&stderr, true).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "echo complaint >&2; exec cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::from(writer)).spawn().unwrap();
    drop(command);
    let process = child.stdin.take();
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    let pidfd: OwnedFd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    thread::spawn(move || behaviour(FakeVmm { channel: theirs, process }));
    Vmm::over(ours, process::Child { pidfd, stderr }).unwrap()
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bounded = async { timeout(Duration::from_secs(60), test).await.expect("the test ends") };
    runtime.block_on(bounded);
}

fn config() -> VmConfig {
    let vcpus = VcpuConfig { boot: 1, max: 1 };
    VmConfig {
        memory_mib: 128,
        hotplug_mib: 0,
        vcpus,
        cmdline: String::new(),
        slots: 8,
        vsock_listen: vec![1024],
    }
}

#[test]
fn boot_sends_three_descriptors_and_waits_for_the_answer() {
    run(async {
        let vmm = fake(|fake| {
            let boot = fake.next().unwrap();
            assert_eq!(boot.message.request, Request::Boot(config()));
            assert_eq!(boot.fds.len(), 3);
            fake.done(boot.message.id);
            fake.next();
        });
        let null = std::fs::File::open("/dev/null").unwrap();
        vmm.boot(config(), null.as_fd(), null.as_fd(), null.as_fd()).unwrap().running().await.unwrap();
    });
}

#[test]
fn vmm_that_ended_before_it_was_sent_the_machine_is_an_end() {
    run(async {
        let vmm = fake(drop);
        vmm.ended().await;
        let file = std::fs::File::open("/dev/null").unwrap();
        let booting = vmm.boot(config(), file.as_fd(), file.as_fd(), file.as_fd()).unwrap();
        assert!(matches!(booting.running().await, Err(VmmError::Ended(_))));
    });
}

#[test]
fn answers_may_come_in_any_order() {
    run(async {
        let vmm = fake(|fake| {
            let mut ids = [fake.next().unwrap().message, fake.next().unwrap().message];
            ids.sort_by_key(|message| message.request == Request::State);
            let [pause, state] = ids.map(|message| message.id);
            let reply = VmState {
                paused: true,
                slots: Vec::new(),
                first_entry_ns: 1,
                boot_marks: Vec::new(),
                exits: Vec::new(),
                plugged_mib: 0,
                balloon_mib: 0,
            };
            fake.send(&FromVmm::Reply { id: state, result: Ok(Reply::State(reply)) });
            fake.done(pause);
            fake.next();
        });
        let (paused, state) = tokio::join!(vmm.pause(), vmm.state());
        paused.unwrap();
        assert!(state.unwrap().paused);
    });
}

#[test]
fn refusal_is_an_error_and_the_machine_goes_on() {
    run(async {
        let vmm = fake(|fake| {
            let id = fake.next().unwrap().message.id;
            let error = RequestError::ConnectionRefused { port: 7 };
            fake.send(&FromVmm::Reply { id, result: Err(error) });
            fake.done(fake.next().unwrap().message.id);
            fake.next();
        });
        let error = vmm.connect(7).await.unwrap_err();
        assert!(matches!(
            error,
            VmmError::Refused { source: RequestError::ConnectionRefused { port: 7 }, .. }
        ));
        vmm.resume().await.unwrap();
    });
}

#[test]
fn guest_connection_is_handed_over() {
    run(async {
        let vmm = fake(|fake| {
            let (stream, _) = StdUnixStream::pair().unwrap();
            fake.next();
            fake.event(Event::VsockAccepted { port: 1024 }, &[stream.as_fd()]);
            fake.next();
        });
        let connection = vmm.expect(1024);
        let pause = vmm.pause();
        let (accepted, _) = tokio::join!(connection.accepted(), timeout(Duration::from_millis(1), pause));
        accepted.unwrap();
    });
}

#[test]
fn end_has_its_reason_the_console_and_the_complaints() {
    run(async {
        let vmm = fake(|fake| {
            fake.next();
            let event = Event::Exited { reason: ExitReason::TripleFault, console_tail: "Oops".into() };
            fake.event(event, &[]);
        });
        let error = vmm.pause().await.unwrap_err();
        let VmmError::Ended(end) = error else { panic!("{error}") };
        assert_eq!(end.death, Death::Reported(ExitReason::TripleFault));
        assert_eq!((end.console_tail.as_str(), end.stderr_tail.as_str()), ("Oops", "complaint\n"));
        // Everything after it fails the same way, at once.
        assert!(matches!(vmm.pause().await, Err(VmmError::Ended(_))));
        assert!(matches!(vmm.expect(1).accepted().await, Err(VmmError::Ended(_))));
        assert!(vmm.try_ended().is_some());
    });
}

#[test]
fn silent_end_is_an_end() {
    run(async {
        let vmm = fake(drop);
        assert_eq!(vmm.ended().await.death, Death::Exited(0));
    });
}

#[test]
fn killed_vmm_says_by_which_signal() {
    run(async {
        let vmm = fake(|fake| while fake.next().is_some() {});
        vmm.process.kill();
        assert_eq!(vmm.ended().await.death, Death::Signaled(9));
    });
}

#[test]
fn vmm_killed_by_its_filter_says_so() {
    run(async {
        let vmm = fake(|fake| while fake.next().is_some() {});
        rustix::process::pidfd_send_signal(vmm.process.pidfd(), rustix::process::Signal::SYS).unwrap();
        assert_eq!(vmm.ended().await.death, Death::Filtered(None));

        let dir = tempfile::tempdir().unwrap();
        let (text, program) = (dir.path().join("script"), dir.path().join("vmm"));
        let script =
            format!("#!/bin/sh\necho '{VIOLATION_PREFIX}thread of class vcpu' >&2\nexit {VIOLATION_EXIT}\n");
        std::fs::write(&text, script).unwrap();
        // What a test beside this one starts inherits a descriptor that is open here, and what is open for writing cannot be run.
        assert!(Command::new("install").args([&text, &program]).status().unwrap().success());
        let end = Vmm::spawn(&program, None).unwrap().ended().await;
        let expected = "its VMM, kvrun-vmm, was killed by its seccomp filter: thread of class vcpu";
        assert_eq!((end.to_string().as_str(), end.stderr_tail.as_str()), (expected, ""));
    });
}

#[test]
fn vmm_that_closes_its_socket_but_lives_on_is_killed() {
    run(async {
        let vmm = fake(|fake| {
            let FakeVmm { channel, process } = fake;
            drop(channel);
            // Never ends by itself.
            std::mem::forget(process);
        });
        assert_eq!(vmm.ended().await.death, Death::Signaled(9));
    });
}

#[test]
fn vmm_that_does_not_stop_is_killed() {
    run(async {
        let vmm = fake(|fake| while fake.next().is_some() {});
        assert_eq!(vmm.stop().await.death, Death::Killed("it did not stop when asked"));
    });
}

#[test]
fn vmm_that_breaks_the_protocol_is_killed() {
    type Breach = fn(&FakeVmm);
    let breaches: [(Breach, &str); 4] = [
        (|fake| fake.done(99), "answered"),
        (|fake| fake.event(Event::VsockAccepted { port: 5 }, &[]), "connection"),
        (|fake| fake.event(Event::VsockAccepted { port: 1024 }, &[]), "connection"),
        (
            |fake| {
                let _ = rustix::net::send(&fake.channel, b"{}", rustix::net::SendFlags::empty());
            },
            "malformed",
        ),
    ];
    for (breach, word) in breaches {
        run(async move {
            let vmm = fake(move |fake| {
                breach(&fake);
                while fake.next().is_some() {}
            });
            let _expected = vmm.expect(1024);
            let Death::Killed(why) = vmm.ended().await.death else { panic!("not killed") };
            assert!(why.contains(word), "{why}");
        });
    }
}

#[test]
fn dropping_the_last_handle_kills_and_reaps() {
    run(async {
        let vmm = fake(|fake| while fake.next().is_some() {});
        let pidfd = vmm.process.pidfd();
        drop(vmm);
        // Reaped: there is nothing to signal any more.
        let gone = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::TERM);
        assert_eq!(gone, Err(Errno::SRCH));
    });
}

#[test]
fn program_that_cannot_be_started_is_named() {
    run(async {
        let error = Vmm::spawn(Path::new("/no/such/vmm"), None).unwrap_err();
        assert!(error.to_string().contains("/no/such/vmm"));
        assert!(matches!(error, VmmError::Spawn { .. }));
    });
}

#[test]
fn real_child_is_process_one_and_has_two_descriptors_and_nothing_else() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        // Neither close-on-exec nor known to us: as if inherited from a careless parent.
        let stray = rustix::io::dup(std::fs::File::open("/dev/zero").unwrap()).unwrap();
        rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).unwrap();
        std::fs::write(
            &program,
            "#!/bin/sh\ncd /proc/self/fd && for fd in *; do echo \"$fd $(readlink $fd)\" >&2; done; echo \"process $$\" >&2; env >&2\n",
        )
        .unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let share = std::fs::File::open("/usr").unwrap();
        let vmm = Vmm::spawn(&program, Some(share.as_fd())).unwrap();
        let end = vmm.ended().await;
        let text = &end.stderr_tail;
        assert!(
            text.contains("0 /dev/null") && text.contains("1 /dev/null") && text.contains("3 socket:"),
            "{text}"
        );
        assert!(text.contains("4 /usr\n") && text.contains("process 1\n"), "{text}");
        assert!(!text.contains("/dev/zero") && !text.contains("HOME="), "{text}");
    });
}
