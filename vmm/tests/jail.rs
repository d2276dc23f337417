//! The jail of the real program, looked at from outside while it waits for its first request. These need root, as the program does.

#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use kvrun_vmm_api::{CONTROL_FD, Channel, SHARE_FD};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, set_capabilities, unshare_unsafe};

/// How long the program may take to be where it waits: it takes milliseconds.
const LIMIT: Duration = Duration::from_secs(30);

/// Runs a test on a thread with a mount namespace of its own, and with mounts that propagate, as the engine has them.
fn in_mount_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        // SAFETY: parts mounts and working directory from the other threads, and nothing that memory safety hangs on.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
            .expect("tests of the jail run as root");
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A directory to share: a shared mount, as the engine's is.
struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        let directory = Self(tempfile::tempdir().unwrap());
        tmpfs(directory.path());
        mount_change(directory.path(), MountPropagationFlags::SHARED).unwrap();
        fs::create_dir(directory.path().join("below")).unwrap();
        directory
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn open(&self) -> OwnedFd {
        open_directory(self.path())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

fn tmpfs(path: &Path) {
    mount("tmpfs", path, "tmpfs", MountFlags::empty(), c"").unwrap();
}

fn open_directory(path: &Path) -> OwnedFd {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// The program, started as the engine does.
struct Vmm {
    child: Child,
    control: Option<Channel>,
}

impl Vmm {
    fn spawn(share: Option<BorrowedFd<'_>>, own_pid_namespace: bool) -> Self {
        let (control, theirs) = Channel::pair().unwrap();
        let high = |fd: BorrowedFd<'_>| fcntl_dupfd_cloexec(fd, 100).unwrap();
        let theirs = high(theirs.as_fd());
        let share = share.map(high);
        let numbers = (theirs.as_raw_fd(), share.as_ref().map(AsRawFd::as_raw_fd));
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvrun-vmm"));
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // SAFETY: only system calls, on numbers that nothing else uses in the child; 5 is one that a careless engine left open.
        unsafe {
            command.pre_exec(move || {
                libc::dup2(numbers.0, CONTROL_FD);
                libc::close(SHARE_FD);
                if let Some(share) = numbers.1 {
                    libc::dup2(share, SHARE_FD);
                }
                libc::dup2(2, 5);
                Ok(())
            });
        }
        let spawn = move || {
            if own_pid_namespace {
                // SAFETY: changes where children of this thread start, and nothing else.
                unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.unwrap();
            }
            command.spawn().unwrap()
        };
        let child = thread::scope(|scope| scope.spawn(spawn).join().unwrap());
        Self { child, control: Some(control) }
    }

    /// Waits until it is jailed and waits for its first request.
    fn jailed(share: Option<BorrowedFd<'_>>) -> Self {
        let mut vmm = Self::spawn(share, true);
        let began = Instant::now();
        let receiving = format!("{} ", libc::SYS_recvmsg);
        // Nothing tells that a process has come to rest but the table of processes.
        while !fs::read_to_string(vmm.proc("syscall")).is_ok_and(|call| call.starts_with(&receiving)) {
            if vmm.child.try_wait().unwrap().is_some() || began.elapsed() > LIMIT {
                let (status, said) = vmm.end();
                panic!("it did not get to its first request: {status}, {said}");
            }
            thread::yield_now();
        }
        vmm
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string()).join(name)
    }

    fn status(&self, key: &str) -> String {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {key} in {status}")).trim().to_owned()
    }

    /// Closes its control socket and waits; what it said.
    fn end(&mut self) -> (ExitStatus, String) {
        drop(self.control.take());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_namespace_is_its_own() {
    in_mount_namespace(|| {
        let directory = Directory::new();
        let vmm = Vmm::jailed(Some(directory.open().as_fd()));
        for name in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
            let theirs = fs::read_link(vmm.proc("ns").join(name)).unwrap();
            let ours = fs::read_link(Path::new("/proc/thread-self/ns").join(name)).unwrap();
            assert_ne!(theirs, ours);
        }
        assert!(vmm.status("NSpid").ends_with("\t1"));
        for map in ["uid_map", "gid_map"] {
            let words = |path: PathBuf| -> Vec<String> {
                fs::read_to_string(path).unwrap().split_whitespace().map(str::to_owned).collect()
            };
            let (ours, theirs) = (words(Path::new("/proc/self").join(map)), words(vmm.proc(map)));
            // "inside outside count": as many as here, and the same.
            assert_eq!((&theirs[0], &theirs[1], &theirs[2]), (&ours[0], &ours[0], &ours[2]));
        }
    });
}

#[test]
fn root_is_empty_and_read_only_but_for_the_share() {
    in_mount_namespace(|| {
        let directory = Directory::new();
        fs::write(directory.path().join("file"), "shared").unwrap();
        let vmm = Vmm::jailed(Some(directory.open().as_fd()));
        let root = vmm.proc("root");
        let names: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["share"]);
        assert_eq!(fs::read_to_string(root.join("share/file")).unwrap(), "shared");
        assert_eq!(fs::create_dir(root.join("x")).unwrap_err().raw_os_error(), Some(libc::EROFS));
        // No other mount, and not even a hidden one.
        let mounts = fs::read_to_string(vmm.proc("mountinfo")).unwrap();
        let points: Vec<_> = mounts.lines().map(|line| line.split(' ').nth(4).unwrap()).collect();
        assert_eq!(points, ["/", "/share"], "{mounts}");
        assert_eq!(fs::read_link(vmm.proc("cwd")).unwrap(), Path::new("/"));
    });
}

#[test]
fn root_is_empty_without_a_share() {
    in_mount_namespace(|| {
        let vmm = Vmm::jailed(None);
        assert_eq!(fs::read_dir(vmm.proc("root")).unwrap().count(), 0);
        let mounts = fs::read_to_string(vmm.proc("mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
    });
}

#[test]
fn what_is_mounted_in_the_share_appears_and_what_the_vmm_mounts_does_not() {
    in_mount_namespace(|| {
        let directory = Directory::new();
        // One that is there before the jail, one that comes later.
        tmpfs(&directory.path().join("below"));
        fs::create_dir_all(directory.path().join("below/later")).unwrap();
        let vmm = Vmm::jailed(Some(directory.open().as_fd()));
        tmpfs(&directory.path().join("below/later"));
        mount_change(directory.path().join("below"), MountPropagationFlags::SHARED).unwrap();
        fs::create_dir(directory.path().join("later")).unwrap();
        tmpfs(&directory.path().join("later"));
        fs::write(directory.path().join("later/file"), "mounted").unwrap();
        assert_eq!(fs::read_to_string(vmm.proc("root/share/later/file")).unwrap(), "mounted");
        let mounts = fs::read_to_string(vmm.proc("mountinfo")).unwrap();
        // `master:` without `shared:` is a slave that passes nothing back (proc_pid_mountinfo(5)).
        let share = mounts.lines().find(|line| line.contains(" /share ")).unwrap();
        assert!(share.contains("master:") && !share.contains("shared:"), "{share}");
        rustix::mount::unmount(directory.path().join("later"), rustix::mount::UnmountFlags::empty()).unwrap();
        assert!(!vmm.proc("root/share/later/file").exists());
    });
}

#[test]
fn any_directory_can_be_the_share() {
    in_mount_namespace(|| {
        let directory = Directory::new();
        fs::write(directory.path().join("secret"), "").unwrap();
        fs::write(directory.path().join("below/file"), "").unwrap();
        let vmm = Vmm::jailed(Some(open_directory(&directory.path().join("below")).as_fd()));
        let share = vmm.proc("root/share");
        let names: Vec<_> = fs::read_dir(&share).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["file"]);
    });
}

#[test]
fn privileges_are_those_of_a_file_server() {
    in_mount_namespace(|| {
        let directory = Directory::new();
        let with = Vmm::jailed(Some(directory.open().as_fd()));
        // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID (Linux include/uapi/linux/capability.h), SETFCAP.
        let files = format!("{:016x}", 1u64 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31);
        let without = Vmm::jailed(None);
        for (vmm, caps) in [(&with, files.as_str()), (&without, "0000000000000000")] {
            for (key, value) in [
                ("CapPrm", caps),
                ("CapEff", caps),
                ("CapInh", "0000000000000000"),
                ("CapBnd", "0000000000000000"),
                ("CapAmb", "0000000000000000"),
                ("NoNewPrivs", "1"),
                ("Groups", ""),
                ("Threads", "2"),
            ] {
                assert_eq!(vmm.status(key), value, "{key}");
            }
            let limits = fs::read_to_string(vmm.proc("limits")).unwrap();
            for (limit, most) in [("Max core file size", "1"), ("Max msgqueue size", "0")] {
                let line = limits.lines().find_map(|line| line.strip_prefix(limit)).unwrap();
                let words: Vec<_> = line.split_whitespace().collect();
                assert_eq!(words[..2], [most, most], "{limits}");
            }
        }
    });
}

/// A process that is dumpable and in a user namespace of its own; it ends with the test.
struct Dumpable(Child);

impl Dumpable {
    fn new() -> Self {
        let mut command = Command::new("sleep");
        command.arg("1000").stdin(Stdio::null());
        // SAFETY: one system call, of which the parent notices nothing.
        unsafe { command.pre_exec(|| Ok(unshare_unsafe(UnshareFlags::NEWUSER)?)) };
        Self(command.spawn().unwrap())
    }
}

impl Drop for Dumpable {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn its_memory_is_closed_to_processes_of_its_user() {
    in_mount_namespace(|| {
        let vmm = Vmm::jailed(None);
        let dumpable = Dumpable::new();
        // As a process of the host's user 0 without privileges over others; it made both user namespaces, and so owns them.
        let mut capabilities = capabilities(None).unwrap();
        capabilities.effective.remove(CapabilitySet::SYS_PTRACE);
        set_capabilities(None, capabilities).unwrap();
        let look_into = |pid: u32| fs::File::open(format!("/proc/{pid}/mem")).map(drop);
        look_into(dumpable.0.id()).unwrap();
        let error = look_into(vmm.child.id()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    });
}

#[test]
fn descriptors_are_those_that_were_meant_and_lead_nowhere_else() {
    in_mount_namespace(|| {
        let directory = Directory::new();
        let vmm = Vmm::jailed(Some(directory.open().as_fd()));
        let mut found = Vec::new();
        for entry in fs::read_dir(vmm.proc("fd")).unwrap() {
            let entry = entry.unwrap();
            let number: i32 = entry.file_name().to_str().unwrap().parse().unwrap();
            let target = fs::read_link(entry.path()).unwrap().to_string_lossy().into_owned();
            let kind = target.split(':').next().unwrap().to_owned();
            found.push((number, kind));
        }
        found.sort();
        let kinds: Vec<&str> = found.iter().map(|(_, kind)| kind.as_str()).collect();
        assert_eq!(kinds[..4], ["/dev/null", "/dev/null", "pipe", "socket"], "{found:?}");
        let mut rest = kinds[4..].to_vec();
        rest.sort();
        // The share, and of its own procfs its descriptors.
        assert_eq!(rest, ["/1/fd", "/share"], "{found:?}");

        let number = found.iter().find(|(_, kind)| kind == "/1/fd").unwrap().0;
        let proc = vmm.proc(&format!("fd/{number}/../.."));
        let names: Vec<_> = fs::read_dir(&proc).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        // No /proc/sys, and no process but this one.
        assert!(
            names.iter().all(|name| ["1", "self", "thread-self"].iter().any(|known| name == known)),
            "{names:?}"
        );
        assert_eq!(fs::metadata(proc.join("..")).unwrap().ino(), fs::metadata(&proc).unwrap().ino());
    });
}

#[test]
fn it_refuses_to_run_where_it_is_not_process_one() {
    let (status, said) = Vmm::spawn(None, false).end();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("process 1 of a PID namespace"), "{said}");
}

#[test]
fn it_ends_with_its_control_socket() {
    in_mount_namespace(|| {
        let (status, said) = Vmm::jailed(None).end();
        assert!(status.success() && status.signal().is_none() && said.is_empty(), "{status} {said}");
    });
}
