//! The helper process: prepares what needs the guest's privileges, forks the container's process, and sees it off.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use oci_spec::runtime::{ExecCPUAffinity, LinuxNamespaceType, Process, Spec};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};
use serde::de::DeserializeOwned;

use super::error::{SetupError, system};
use super::init::{self, Container, Gate};
use super::namespaces::{self, Namespaces};
use super::rootfs::Sources;
use super::sys::{self, Cloned};
use super::{Report, Reporter, one_line, process, seccomp};
use crate::cgroup::{self, device_filter, limits};

/// The container's config in its bundle directory.
pub const CONFIG: &str = "config.json";

/// `oci create SOCKET-FD BUNDLE CGROUP ID HOST-BUNDLE`, `oci exec SOCKET-FD BUNDLE CGROUP PID PROCESS-FILE`; BUNDLE is a directory of the agent,
/// CGROUP relative to the root; descriptors 0, 1 and 2 are the process's.
pub fn main(args: &[OsString]) -> ExitCode {
    let [oci, verb, socket, bundle, cgroup, name, extra] = args else { return usage() };
    let (Some("oci"), Some(verb @ ("create" | "exec"))) = (oci.to_str(), verb.to_str()) else {
        return usage();
    };
    let Some(socket) = socket.to_str().and_then(|socket| socket.parse::<RawFd>().ok()) else {
        return usage();
    };
    // SAFETY: the agent has left this descriptor open for this process, under the number it gives.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    if fcntl_setfd(&socket, FdFlags::CLOEXEC).is_err() {
        return usage();
    }
    let reporter = Reporter::new(socket);
    let panics = reporter.clone();
    std::panic::set_hook(Box::new(move |info| panics.send(&Report::Failed(one_line(&info.to_string())))));

    let (bundle, cgroup) = (Path::new(bundle), Path::new(cgroup));
    let created = match verb {
        "create" => create(bundle, cgroup, &name.to_string_lossy(), Path::new(extra), &reporter),
        _ => match name.to_str().and_then(|pid| pid.parse().ok()) {
            Some(pid) => exec(bundle, cgroup, pid, Path::new(extra), &reporter),
            None => return usage(),
        },
    };
    match created {
        Ok(child) => {
            reporter.send(&Report::Created { pid: child.pid });
            reporter.wait_for_answer();
            ExitCode::SUCCESS
        }
        Err(err) => {
            reporter.fail(&err);
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("kvrun-agent is the init process of a kvrun guest and is not started by hand");
    ExitCode::from(2)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, SetupError> {
    let what = || format!("read {}", path.display());
    let bytes = std::fs::read(path).map_err(system(what()))?;
    serde_json::from_slice(&bytes).map_err(system(what()))
}

fn create(
    bundle: &Path,
    cgroup: &Path,
    id: &str,
    host_bundle: &Path,
    reporter: &Reporter,
) -> Result<Child, SetupError> {
    let spec: Spec = read_json(&bundle.join(CONFIG))?;
    let (Some(linux), Some(process)) = (spec.linux().as_ref(), spec.process().as_ref()) else {
        return Err(SetupError::field("config.json", "has no process or no linux"));
    };
    let seccomp = linux.seccomp().as_ref().map(seccomp::build).transpose()?;
    let dir = make_cgroup(cgroup, &spec)?;
    let cgroup = open_directory(&dir)?;
    let namespaces = Namespaces::open(linux)?;
    let sources = Sources::open(&spec, &namespaces, &dir)?;
    process::set_oom_score(process)?;
    namespaces.enter(linux)?;
    let (ours, theirs) = pair()?;
    // SAFETY: this process has one thread.
    match unsafe { sys::clone(namespaces.to_clone(), cgroup.as_fd()) }
        .map_err(system("start the container's process"))?
    {
        Cloned::Child => {
            drop(ours);
            let gate = Gate { helper: theirs, reporter: reporter.clone() };
            let container = Container {
                spec: &spec,
                process,
                namespaces: &namespaces,
                sources,
                seccomp,
                id,
                bundle: host_bundle,
            };
            end(init::run_container(container, &gate), reporter)
        }
        Cloned::Parent(pid) => {
            drop(theirs);
            let child = Child { pid, gate: ours };
            if namespaces.is_new(LinuxNamespaceType::User) {
                namespaces::map_ids(pid, linux)?;
            }
            child.let_go()?;
            child.wait_until_ready()?;
            process::schedule(pid, process)?;
            Ok(child)
        }
    }
}

fn make_cgroup(path: &Path, spec: &Spec) -> Result<PathBuf, SetupError> {
    let root = Path::new(cgroup::ROOT);
    let dir = limits::make(root, path)
        .map_err(system(format!("linux.cgroupsPath: make the cgroup {}", path.display())))?;
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    if let Some(resources) = resources {
        limits::apply(&dir, resources)?;
    }
    let devices = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    device_filter::enforce(open_directory(&dir)?.as_fd(), devices)?;
    Ok(dir)
}

fn open_directory(dir: &Path) -> Result<OwnedFd, SetupError> {
    openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(system(format!("open the cgroup {}", dir.display())))
}

fn exec(
    bundle: &Path,
    cgroup: &Path,
    container: i32,
    process_file: &Path,
    reporter: &Reporter,
) -> Result<Child, SetupError> {
    let spec: Spec = read_json(&bundle.join(CONFIG))?;
    let process: Process = read_json(process_file)?;
    let linux = spec.linux().as_ref();
    let seccomp = linux.and_then(|linux| linux.seccomp().as_ref()).map(seccomp::build).transpose()?;
    let affinity = process.exec_cpu_affinity().as_ref();
    if let Some(list) = affinity.and_then(|affinity| affinity.initial().as_deref()) {
        process::set_affinity(None, "process.execCPUAffinity.initial", list)?;
    }
    process::set_oom_score(&process)?;

    let container_pid =
        Pid::from_raw(container).ok_or_else(|| SetupError::field("process", "has no number"))?;
    let pidfd =
        pidfd_open(container_pid, PidfdFlags::empty()).map_err(system("find the container's process"))?;
    let namespaces = namespaces::of_process(container)?;
    // Not joined before the clone: from inside, the kernel would see no way from our cgroup to the container's (Linux 6.12 kernel/cgroup/cgroup.c,
    // cgroup_procs_write_permission, with "nsdelegate").
    let cgroup_namespace = (namespaces & libc::CLONE_NEWCGROUP != 0)
        .then(|| File::open(format!("/proc/{container}/ns/cgroup")).map(OwnedFd::from))
        .transpose()
        .map_err(system("open the cgroup namespace of the container"))?;
    let mut cgroup = open_directory(&Path::new(cgroup::ROOT).join(cgroup))?;
    let mut of_init = Some(cgroup_of(container)?);
    let (ours, theirs) = pair()?;
    // Nobody in the container may look into this process once it is partly there.
    process::hide()?;
    sys::setns(&pidfd, namespaces & !libc::CLONE_NEWCGROUP).map_err(system("enter the container"))?;
    let in_user_namespace = namespaces & libc::CLONE_NEWUSER != 0;
    loop {
        // SAFETY: this process has one thread.
        match unsafe { sys::clone(0, cgroup.as_fd()) } {
            Ok(Cloned::Child) => {
                drop(ours);
                let gate = Gate { helper: theirs, reporter: reporter.clone() };
                let entered = init::Entered { cgroup: cgroup_namespace, user: in_user_namespace };
                end(init::run_process(&spec, &process, seccomp, entered, &gate), reporter)
            }
            Ok(Cloned::Parent(pid)) => {
                drop(theirs);
                let child = Child { pid, gate: ours };
                child.let_go()?;
                child.wait_until_ready()?;
                process::schedule(pid, &process)?;
                set_final_affinity(pid, affinity)?;
                return Ok(child);
            }
            // The container has cgroups of its own, and its processes in those (cgroup-v2.rst, "No Internal Process Constraint"):
            // then beside its first one.
            Err(err) => match of_init.take() {
                Some(other) if err.raw_os_error() == Some(libc::EBUSY) => cgroup = other,
                _ => return Err(system("start the process")(err)),
            },
        }
    }
}

/// The cgroup that a process is in now.
fn cgroup_of(pid: i32) -> Result<OwnedFd, SetupError> {
    let what = || system("find the cgroup of the container's process");
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(what())?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    open_directory(&Path::new(cgroup::ROOT).join(path))
}

fn set_final_affinity(pid: i32, affinity: Option<&ExecCPUAffinity>) -> Result<(), SetupError> {
    match affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref()) {
        Some(list) => process::set_affinity(Some(pid), "process.execCPUAffinity.final", list),
        None => Ok(()),
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd), SetupError> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(system("make a socket pair"))
}

/// In the child: reports what went wrong, and ends.
fn end(failed: Result<std::convert::Infallible, SetupError>, reporter: &Reporter) -> ! {
    let Err(err) = failed;
    reporter.fail(&err);
    // SAFETY: ends this process without running what was meant for the one it was forked from.
    unsafe { libc::_exit(1) }
}

/// The process that was forked. It ends by itself when this end of its gate closes before it is ready, or the agent's does.
#[derive(Debug)]
struct Child {
    pid: i32,
    gate: OwnedFd,
}

impl Child {
    fn let_go(&self) -> Result<(), SetupError> {
        match rustix::net::send(&self.gate, b"g", rustix::net::SendFlags::NOSIGNAL) {
            // It has ended: the next step tells.
            Ok(_) | Err(Errno::PIPE) => Ok(()),
            Err(errno) => Err(system("tell the container's process")(errno)),
        }
    }

    fn wait_until_ready(&self) -> Result<(), SetupError> {
        let mut byte = [0];
        loop {
            match rustix::io::read(&self.gate, &mut byte) {
                Ok(1..) => return Ok(()),
                Err(Errno::INTR) => {}
                // Its own report, which came before this, says why.
                Ok(0) | Err(_) => return Err(self.early_end()),
            }
        }
    }

    fn early_end(&self) -> SetupError {
        let status =
            Pid::from_raw(self.pid).and_then(|pid| waitpid(Some(pid), WaitOptions::empty()).ok().flatten());
        let how = match status.map(|(_, status)| (status.exit_status(), status.terminating_signal())) {
            Some((Some(code), _)) => format!("with code {code}"),
            Some((_, Some(signal))) => format!("by signal {signal}"),
            _ => "unexpectedly".to_owned(),
        };
        SetupError::field("the container's process", format!("ended {how} before its program ran"))
    }
}
