//! The first process of a container, from its birth in new namespaces to exec; and a further process of one, which finds all of that
//! there. Both are forked from the helper ([`super::helper`]), which waits for them over [`Gate`].

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use libseccomp::ScmpFilterContext;
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::error::{SetupError, system};
use super::hooks::{self, State};
use super::namespaces::{self, Namespaces};
use super::rootfs::{Root, Sources};
use super::{Report, Reporter, devices, executor, in_root, process, seccomp, sys};

/// The process's end of its talk with the helper, and with the agent after that. Each message is one byte.
#[derive(Debug)]
pub struct Gate {
    /// To the helper.
    pub helper: OwnedFd,
    /// To the agent.
    pub reporter: Reporter,
}

impl Gate {
    /// Waits until the helper has done what must be done from outside.
    fn wait_for_helper(&self) -> Result<(), SetupError> {
        match read_byte(&self.helper).map_err(system("hear from the helper"))? {
            Some(_) => Ok(()),
            None => Err(gone("the process that creates the container")),
        }
    }

    /// Tells the helper that all is ready, waits until it has gone, and then for the start.
    fn wait_for_start(&self) -> Result<(), SetupError> {
        rustix::io::write(&self.helper, b"r").map_err(system("tell the helper"))?;
        // Its last word is its end.
        while read_byte(&self.helper).map_err(system("hear from the helper"))?.is_some() {}
        match read_byte(self.reporter.socket()).map_err(system("wait for the start"))? {
            Some(_) => Ok(()),
            None => Err(gone("the agent")),
        }
    }
}

fn gone(who: &str) -> SetupError {
    system(format!("wait for {who}"))(std::io::Error::from(std::io::ErrorKind::UnexpectedEof))
}

fn read_byte(fd: &OwnedFd) -> Result<Option<u8>, Errno> {
    let mut byte = [0];
    loop {
        match rustix::io::read(fd, &mut byte) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(byte[0])),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// What a container's first process is born with.
#[derive(Debug)]
pub struct Container<'a> {
    /// The config.
    pub spec: &'a Spec,
    /// Its `process`.
    pub process: &'a Process,
    /// Its namespaces.
    pub namespaces: &'a Namespaces,
    /// Trees of the guest.
    pub sources: Sources,
    /// The filter.
    pub seccomp: Option<ScmpFilterContext>,
    /// The ID, for hooks.
    pub id: &'a str,
    /// The bundle directory on the host, for hooks.
    pub bundle: &'a Path,
}

/// Sets the container up and becomes its program.
///
/// # Errors
///
/// [`SetupError`]: the process must end then.
pub fn run_container(container: Container<'_>, gate: &Gate) -> Result<Infallible, SetupError> {
    let Container { spec, process, namespaces, sources, seccomp, id, bundle } = container;
    gate.wait_for_helper()?;
    process::hide()?;
    rustix::process::setsid().map_err(system("begin a session"))?;
    if namespaces.is_private(LinuxNamespaceType::User) {
        become_root()?;
    }
    if namespaces.is_new(LinuxNamespaceType::Cgroup) {
        sys::unshare(libc::CLONE_NEWCGROUP).map_err(system("make a cgroup namespace"))?;
    }
    new_keyring()?;
    if namespaces.is_private(LinuxNamespaceType::Uts) {
        namespaces::set_names(spec.hostname().as_deref(), spec.domainname().as_deref())?;
    }
    if namespaces.is_new(LinuxNamespaceType::Network) {
        crate::boot::loopback_up();
    }
    // Modes are as they are given.
    rustix::process::umask(Mode::empty());
    let mut root = Root::build(spec, sources)?;
    if let Some(linux) = spec.linux() {
        namespaces::set_sysctls(linux.sysctl().iter().flatten())?;
    }
    let state = |status| State {
        oci_version: spec.version(),
        id,
        status,
        pid: std::process::id(),
        bundle,
        annotations: spec.annotations().as_ref(),
    };
    let hooks = spec.hooks().as_ref();
    if let Some(list) = hooks.and_then(|hooks| hooks.create_container().as_deref()) {
        hooks::run("createContainer", list, &state("creating"), Some(root.directory()), &[])?;
    }
    root.enter()?;
    let env = process::environment(process);
    if process.terminal() == Some(true) {
        let slave = open_terminal(&gate.reporter)?;
        root.bind_console(&slave)?;
        use_terminal(&slave)?;
    }
    make_working_directory(process.cwd())?;
    root.restrict(spec)?;
    drop(root);
    process::set_personality(spec.linux().as_ref().and_then(|linux| linux.personality().as_ref()))?;

    let last = prepare(process, seccomp, &env)?;
    gate.wait_for_start()?;
    if let Some(list) = hooks.and_then(|hooks| hooks.start_container().as_deref()) {
        hooks::run("startContainer", list, &state("created"), None, &env)?;
    }
    last.exec(process, &env)
}

/// The namespaces of a container that a further process of it is not simply born in.
#[derive(Debug)]
pub struct Entered {
    /// That of cgroups, yet to be joined, if it is not the guest's.
    pub cgroup: Option<OwnedFd>,
    /// Whether the user namespace is not the guest's.
    pub user: bool,
}

/// Becomes a further process of a container, in whose namespaces this one is.
///
/// # Errors
///
/// [`SetupError`]: the process must end then.
pub fn run_process(
    spec: &Spec,
    process: &Process,
    seccomp: Option<ScmpFilterContext>,
    entered: &Entered,
    gate: &Gate,
) -> Result<Infallible, SetupError> {
    gate.wait_for_helper()?;
    process::hide()?;
    rustix::process::setsid().map_err(system("begin a session"))?;
    if let Some(namespace) = &entered.cgroup {
        sys::setns(namespace, libc::CLONE_NEWCGROUP)
            .map_err(system("enter the container's cgroup namespace"))?;
    }
    if entered.user {
        become_root()?;
    }
    new_keyring()?;
    if process.terminal() == Some(true) {
        use_terminal(&open_terminal(&gate.reporter)?)?;
    }
    process::set_personality(spec.linux().as_ref().and_then(|linux| linux.personality().as_ref()))?;
    let env = process::environment(process);
    let last = prepare(process, seccomp, &env)?;
    gate.wait_for_start()?;
    last.exec(process, &env)
}

/// What is left to do when the start comes.
struct Last {
    seccomp: Option<ScmpFilterContext>,
}

/// Becomes the user, and looks for the program: that it is missing is an error of "create".
fn prepare(
    process: &Process,
    seccomp: Option<ScmpFilterContext>,
    env: &[String],
) -> Result<Last, SetupError> {
    let mut seccomp = seccomp;
    process::become_user(process, || {
        // Without no_new_privs it takes CAP_SYS_ADMIN (seccomp(2)), which is about to go.
        match seccomp.take() {
            Some(filter) if process.no_new_privileges() != Some(true) => seccomp::load(&filter),
            other => {
                seccomp = other;
                Ok(())
            }
        }
    })?;
    executor::check(process, env)?;
    Ok(Last { seccomp })
}

impl Last {
    fn exec(self, process: &Process, env: &[String]) -> Result<Infallible, SetupError> {
        sys::close_others_at_exec().map_err(system("close what the program is not to have"))?;
        let program = executor::Program::find(process, env)?;
        // As late as can be, so that a strict filter need not allow what we do.
        if let Some(filter) = &self.seccomp {
            seccomp::load(filter)?;
        }
        program.exec()
    }
}

/// In a user namespace, "nobody" until here.
fn become_root() -> Result<(), SetupError> {
    use rustix::fs::{Gid, Uid};
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    rustix::thread::set_thread_groups(&[])
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .map_err(system(
            "become root in the user namespace, which linux.uidMappings and linux.gidMappings must map",
        ))
}

fn new_keyring() -> Result<(), SetupError> {
    match sys::join_new_session_keyring() {
        Err(err) if err.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other.map_err(system("make a session keyring")),
    }
}

/// A pty of the container's own devpts; the agent gets the master.
fn open_terminal(reporter: &Reporter) -> Result<OwnedFd, SetupError> {
    let what = || system("process.terminal: open /dev/pts/ptmx, which a mount of type devpts has");
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(what())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let master =
        in_root::open_with(&root, Path::new("dev/pts/ptmx"), flags, ResolveFlags::empty()).map_err(what())?;
    if !devices::is_ptmx(&master) {
        return Err(SetupError::field(
            "process.terminal",
            "is true, but /dev/pts/ptmx is not that of a devpts",
        ));
    }
    let slave = sys::open_slave(&master).map_err(system("process.terminal: open the terminal"))?;
    reporter
        .send_with(&Report::Terminal, master.as_fd())
        .map_err(system("process.terminal: hand the terminal to the agent"))?;
    Ok(slave)
}

fn use_terminal(slave: &OwnedFd) -> Result<(), SetupError> {
    sys::set_controlling_terminal(slave).map_err(system("process.terminal: make it the controlling one"))?;
    dup2_stdin(slave)
        .and_then(|()| dup2_stdout(slave))
        .and_then(|()| dup2_stderr(slave))
        .map_err(system("process.terminal: make it the standard streams"))
}

/// As runc does. The pod engine has made it where the root file system is the host's; here it may be in a mount.
fn make_working_directory(cwd: &Path) -> Result<(), SetupError> {
    let what = || system(format!("process.cwd: make {}", cwd.display()));
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(what())?;
    match in_root::open(&root, cwd) {
        Err(Errno::NOENT) => in_root::make(&root, cwd, false).map(drop).map_err(what()),
        // What it is, and whether it can be entered, the change to it will tell.
        _ => Ok(()),
    }
}
