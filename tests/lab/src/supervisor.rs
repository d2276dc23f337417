//! A lab that stays up: a process that owns QEMU and gives each caller of `lab exec` a free port.
//!
//! What is known about a lab is in a directory of its own, `run/NAME` in the lab's cache: `lock`, held for as long as the
//! supervisor lives (so what a killed one left behind is recognised); `socket`, where callers connect; `console.log`;
//! `failure.log` once the lab has died by itself.

use crate::cli::LAB_FAILED;
use crate::client;
use crate::frame::{self, Frame, Kind};
use crate::machine::{Machine, Shape};
use anyhow::{Context, Result, bail};
use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;

/// What the supervisor prints when its lab takes commands.
const READY: &str = "ready";
/// Where a supervisor leaves the last words of a lab that died, for the next caller of `lab exec`.
const FAILURE: &str = "failure.log";

/// Name of a lab: letters, digits, `-` and `_`.
#[derive(Clone, Debug)]
pub(crate) struct Name(String);

impl FromStr for Name {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if text.is_empty() || text.len() > 32 || !text.chars().all(plain) {
            return Err("a lab's name is 1 to 32 letters, digits, - or _");
        }
        Ok(Self(text.to_owned()))
    }
}

impl Name {
    fn directory(&self) -> Result<PathBuf> {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        Ok(cache.context("neither XDG_CACHE_HOME nor HOME is set")?.join("kvrun/lab/run").join(&self.0))
    }
}

/// Starts a supervisor in the background and waits until its lab takes commands.
pub(crate) fn start(name: &Name, commands: u8, image: &Path, shape: &Shape) -> Result<()> {
    let mut supervisor = Command::new(std::env::current_exe().context("find this program")?);
    supervisor.args(["supervise", "--name", &name.0, "--commands", &commands.to_string()]);
    supervisor.arg("--image").arg(image);
    if shape.icount {
        supervisor.arg("--icount");
    } else {
        supervisor.args(["--smp", &shape.smp.to_string()]);
    }
    supervisor.args(["--mem", &shape.mem.to_string(), "--boot-limit", &shape.boot_limit.to_string()]);
    for share in &shape.share {
        let mode = if share.writable { "rw" } else { "ro" };
        let host = share.host.to_str().context("a shared directory must have a name in UTF-8")?;
        supervisor.arg("--share").arg(format!("{host}:{}:{mode}", share.guest));
    }
    supervisor.arg("--append").arg(&shape.append);
    if let Some(kernel) = &shape.kernel {
        supervisor.arg("--kernel").arg(kernel);
    }
    // It reports on its standard output, and gives up if nobody listens any more. Its errors go to a pipe as well: it
    // must not hold on to the caller's streams.
    let mut supervisor = supervisor
        .process_group(0)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start the supervisor")?;
    let mut line = String::new();
    let stdout = supervisor.stdout.take().context("the supervisor's output is piped")?;
    BufReader::new(stdout).read_line(&mut line).context("wait for the supervisor")?;
    if line.trim_end() == READY {
        return Ok(());
    }
    let mut message = String::new();
    let mut stderr = supervisor.stderr.take().context("the supervisor's errors are piped")?;
    stderr.read_to_string(&mut message).context("read the supervisor's errors")?;
    supervisor.wait().context("wait for the supervisor")?;
    bail!("{}", message.trim_end().trim_start_matches("lab: "))
}

/// Connects to a lab that is up.
pub(crate) fn connect(name: &Name) -> Result<UnixStream> {
    let directory = name.directory()?;
    UnixStream::connect(directory.join("socket")).or_else(|error| {
        match fs::read_to_string(directory.join(FAILURE)) {
            Ok(report) => bail!("lab {} died\n{report}", name.0),
            Err(_) => {
                Err(error).with_context(|| format!("no lab {} is up: tests/lab/lab up starts one", name.0))
            }
        }
    })
}

/// Powers a lab off and waits until it is gone; no lab is fine too.
pub(crate) fn stop(name: &Name) -> Result<()> {
    let directory = name.directory()?;
    let Ok(lock) = File::open(directory.join("lock")) else { return Ok(()) };
    if let Ok(mut stream) = UnixStream::connect(directory.join("socket")) {
        // If this fails the supervisor is ending already.
        let _ = frame::write(&mut stream, Kind::PowerOff, &[]);
    }
    // The supervisor bounds how long its lab takes to power off.
    flock(&lock, FlockOperation::LockExclusive).context("wait for the lab to end")?;
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("remove the lab's state"),
        _ => Ok(()),
    }
}

/// The supervisor.
pub(crate) fn main(name: &Name, commands: u8, image: &Path, shape: &Shape) -> Result<()> {
    let signals = client::block_signals()?;
    let directory = name.directory()?;
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    let lock = File::create(directory.join("lock")).context("make the lock file")?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => bail!("lab {} is up already: tests/lab/lab down ends it", name.0),
        result => result.context("lock the lab's state")?,
    }
    // What a killed supervisor left.
    let socket = directory.join("socket");
    for file in [&socket, &directory.join(FAILURE)] {
        match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", file.display()));
            }
            _ => {}
        }
    }
    let log = File::create(directory.join("console.log")).context("make the console log")?;
    let mut machine = Machine::boot(image, shape, commands.into(), Some(log))?;
    let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    writeln!(io::stdout(), "{READY}").context("report to lab up")?;

    // This thread only waits for a reason to end: QEMU dies with the thread that started it.
    let (end, ended) = mpsc::channel();
    let (free, ports) = mpsc::channel();
    for port in &machine.ports {
        free.send(port.try_clone().context("duplicate a port")?).context("fill the pool of ports")?;
    }
    watch_for_signals(signals, end.clone());
    watch_for_death(&machine, end.clone())?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (port, free, end) = (ports.try_recv().ok(), free.clone(), end.clone());
            // A session that fails has told its caller; the death of the lab is noticed elsewhere.
            thread::spawn(move || serve(stream, port, &free, &end));
        }
    });
    match ended.recv().context("every thread of the supervisor is gone")? {
        End::Asked => machine.power_off()?,
        End::LabDied => {
            let report = machine.last_words();
            // Nobody reads our standard error any more.
            fs::write(directory.join(FAILURE), &report).context("write the failure log")?;
            bail!("the lab died\n{report}");
        }
    }
    fs::remove_dir_all(&directory).context("remove the lab's state")
}

/// Why a supervisor ends.
enum End {
    Asked,
    LabDied,
}

fn watch_for_signals(signals: SigSet, end: mpsc::Sender<End>) {
    thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if client::asks_to_end(signal) && end.send(End::Asked).is_err() {
                return;
            }
        }
    });
}

fn watch_for_death(machine: &Machine, end: mpsc::Sender<End>) -> Result<()> {
    let qemu = pidfd_open(machine.pid(), PidfdFlags::empty()).context("watch QEMU")?;
    thread::spawn(move || {
        let mut fds = [PollFd::new(&qemu, PollFlags::IN)];
        while poll(&mut fds, None) == Err(Errno::INTR) {}
        // Too late if the supervisor is ending anyway.
        let _ = end.send(End::LabDied);
    });
    Ok(())
}

/// Serves one caller: relays frames between it and a port. The port is free again once the command is over, whether or not
/// the caller is still there.
fn serve(
    caller: UnixStream,
    port: Option<UnixStream>,
    free: &mpsc::Sender<UnixStream>,
    end: &mpsc::Sender<End>,
) -> io::Result<()> {
    let mut from_caller = caller.try_clone()?;
    let Some(first) = Frame::read(&mut from_caller)? else {
        return free_port(port, free);
    };
    if first.kind == Kind::PowerOff {
        let _ = end.send(End::Asked);
        return free_port(port, free);
    }
    let Some(port) = port else {
        let mut caller = caller;
        frame::write(
            &mut caller,
            Kind::Stderr,
            b"lab: too many commands at the same time (lab up --commands)\n",
        )?;
        return frame::write(&mut caller, Kind::Exit, &[LAB_FAILED]);
    };
    let mut to_lab = port.try_clone()?;
    frame::write(&mut to_lab, first.kind, &first.payload)?;
    let input = thread::spawn(move || {
        // Until the caller is gone, or the other direction shuts the stream down. A kill after the end is dropped there.
        while let Ok(Some(frame)) = Frame::read(&mut from_caller) {
            frame::write(&mut to_lab, frame.kind, &frame.payload)?;
        }
        frame::write(&mut to_lab, Kind::Kill, &[])
    });
    relay_output(&port, &caller)?;
    // The last frame for this command must be on its way before the next command's first.
    let _ = caller.shutdown(std::net::Shutdown::Read);
    let _ = input.join();
    free_port(Some(port), free)
}

/// Relays what the lab says until the command is over. A caller that is gone does not stop it.
fn relay_output(mut port: &UnixStream, mut caller: &UnixStream) -> io::Result<()> {
    let mut caller_is_there = true;
    while let Some(frame) = Frame::read(&mut port)? {
        if caller_is_there && frame::write(&mut caller, frame.kind, &frame.payload).is_err() {
            caller_is_there = false;
            // Wakes the thread that reads from the caller, which has the command killed.
            let _ = caller.shutdown(std::net::Shutdown::Both);
        }
        if frame.exit_code().is_some() {
            return Ok(());
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

fn free_port(port: Option<UnixStream>, free: &mpsc::Sender<UnixStream>) -> io::Result<()> {
    if let Some(port) = port {
        free.send(port).map_err(io::Error::other)?;
    }
    Ok(())
}
