//! The command server: one thread per virtio-serial port, one command at a time on each.

use super::init;
use crate::frame::{self, Frame, Kind, Request};
use anyhow::{Context, Result, bail};
use nix::sys::reboot::{RebootMode, reboot};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;

/// First argument that makes this program the command server.
pub(crate) const ROLE: &str = "lab-server";
/// Bytes for the host that may wait in memory; past that the command's output is left in its pipes.
const OUTPUT_BACKLOG: usize = 256 << 10;

/// Serves `ports` ports until the lab is powered off or a port fails.
pub(crate) fn main(ports: usize) -> Result<()> {
    thread::scope(|scope| {
        for index in 0..ports {
            scope.spawn(move || {
                // Without this port a caller would wait for ever: the whole lab fails, visibly.
                let Err(error) = serve(index);
                eprintln!("lab server: port {index}: {error:#}");
                std::process::exit(1);
            });
        }
    });
    bail!("no port to serve")
}

fn serve(index: usize) -> Result<std::convert::Infallible> {
    // QEMU numbers the ports of the first virtio-serial device from 1 here: 0 is kept for a console.
    let path = format!("/dev/vport0p{}", index + 1);
    init::wait_for(&path)?;
    let file = File::options().read(true).write(true).open(&path).with_context(|| format!("open {path}"))?;
    // A blocking write waits until the host end is connected, which comes later than the node (Linux
    // drivers/char/virtio_console.c: will_write_block); a read would report the end of the stream instead.
    frame::write(&mut &file, Kind::Hello, &[]).context("greet the host")?;
    rustix::fs::fcntl_setfl(&file, OFlags::NONBLOCK).context("make the port non-blocking")?;
    let mut port = Port { file, input: Vec::new(), output: Vec::new() };
    let mut running: Option<Running> = None;
    loop {
        running = port.turn(running)?;
    }
}

struct Port {
    file: File,
    input: Vec<u8>,
    output: Vec<u8>,
}

/// A command under way.
struct Running {
    child: Child,
    /// Process group of the command.
    group: Pid,
    /// Readable once the command is over.
    over: OwnedFd,
    stdin: Option<ChildStdin>,
    /// Input that the command has not taken yet; bounded by [`frame::STDIN_WINDOW`].
    pending: Vec<u8>,
    stdin_ended: bool,
    streams: [Option<OwnedFd>; 2],
}

const STREAMS: [Kind; 2] = [Kind::Stdout, Kind::Stderr];

impl Port {
    /// Waits for one thing to happen and deals with it.
    fn turn(&mut self, mut running: Option<Running>) -> Result<Option<Running>> {
        let ready = self.wait(running.as_ref())?;
        if ready.port_in {
            self.fill()?;
            while let Some(frame) = Frame::cut(&mut self.input).context("read from the host")? {
                match (frame.kind, &mut running) {
                    (Kind::Run, None) => running = self.start(&frame.payload),
                    (Kind::PowerOff, _) => power_off()?,
                    (_, Some(command)) => command.handle(&frame),
                    // The rest of a command that is over.
                    (_, None) => {}
                }
            }
        }
        if let Some(mut command) = running.take() {
            command.feed(&mut self.output);
            // Look whether it is over before the last read of its output, so that nothing is left behind.
            let status =
                if ready.over { command.child.try_wait().context("wait for the command")? } else { None };
            command.collect(&mut self.output, status.is_some())?;
            match status {
                Some(status) => {
                    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(255);
                    frame::put(&mut self.output, Kind::Exit, &[u8::try_from(code).unwrap_or(255)]);
                }
                None => running = Some(command),
            }
        }
        self.flush()?;
        Ok(running)
    }

    fn wait(&self, running: Option<&Running>) -> Result<Ready> {
        let mut port_events = PollFlags::IN;
        port_events.set(PollFlags::OUT, !self.output.is_empty());
        let mut fds = vec![PollFd::new(&self.file, port_events)];
        if let Some(command) = running {
            fds.push(PollFd::new(&command.over, PollFlags::IN));
            if let (Some(stdin), false) = (&command.stdin, command.pending.is_empty()) {
                fds.push(PollFd::new(stdin, PollFlags::OUT));
            }
            if self.output.len() < OUTPUT_BACKLOG {
                for stream in command.streams.iter().flatten() {
                    fds.push(PollFd::new(stream, PollFlags::IN));
                }
            }
        }
        while let Err(error) = poll(&mut fds, None) {
            if error != Errno::INTR {
                return Err(error).context("wait for something to do");
            }
        }
        let happened = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready { port_in: happened(fds.first()), over: running.is_some() && happened(fds.get(1)) })
    }

    fn fill(&mut self) -> Result<()> {
        let mut chunk = [0; frame::CHUNK];
        loop {
            match rustix::io::read(&self.file, &mut chunk) {
                Ok(0) => bail!("the host closed the port"),
                Ok(count) => self.input.extend_from_slice(&chunk[..count]),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("read from the host"),
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        let mut done = 0;
        while done < self.output.len() {
            let end = self.output.len().min(done + frame::CHUNK);
            match rustix::io::write(&self.file, &self.output[done..end]) {
                Ok(count) => done += count,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("write to the host"),
            }
        }
        self.output.drain(..done);
        Ok(())
    }

    /// Starts a command. If it cannot be started the caller is told on its standard error, with the code a shell uses.
    fn start(&mut self, payload: &[u8]) -> Option<Running> {
        let started = match Request::decode(payload) {
            Some(request) => Running::start(&request),
            None => Err((126, "the request is malformed".to_owned())),
        };
        match started {
            Ok(running) => Some(running),
            Err((code, message)) => {
                frame::put(&mut self.output, Kind::Stderr, format!("lab: {message}\n").as_bytes());
                frame::put(&mut self.output, Kind::Exit, &[code]);
                None
            }
        }
    }
}

struct Ready {
    port_in: bool,
    over: bool,
}

impl Running {
    fn start(request: &Request) -> Result<Self, (u8, String)> {
        let program = request.argv[0].display();
        let mut child = Command::new(&request.argv[0])
            .args(&request.argv[1..])
            .envs(request.env.iter().map(|(key, value)| (key, value)))
            .current_dir(&request.cwd)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| {
                let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
                (code, format!("run {program} in {}: {error}", request.cwd.display()))
            })?;
        let group = Pid::from_child(&child);
        let mut prepare = || -> io::Result<_> {
            let over = pidfd_open(group, PidfdFlags::empty())?;
            let stdin = child.stdin.take();
            let streams = [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)];
            for fd in stdin.iter().map(AsFd::as_fd).chain(streams.iter().flatten().map(AsFd::as_fd)) {
                rustix::fs::fcntl_setfl(fd, OFlags::NONBLOCK)?;
            }
            Ok((over, stdin, streams))
        };
        let (over, stdin, streams) = prepare().map_err(|error| (126, format!("watch {program}: {error}")))?;
        Ok(Self { child, group, over, stdin, pending: Vec::new(), stdin_ended: false, streams })
    }

    fn handle(&mut self, frame: &Frame) {
        match frame.kind {
            Kind::Stdin => self.pending.extend_from_slice(&frame.payload),
            Kind::StdinEnd => self.stdin_ended = true,
            Kind::Signal => {
                if let Some(signal) = frame.payload.first().and_then(|&n| Signal::from_named_raw(n.into())) {
                    self.signal(signal);
                }
            }
            Kind::Kill => self.signal(Signal::KILL),
            _ => {}
        }
    }

    fn signal(&self, signal: Signal) {
        // It fails only if the whole group is gone, which is what was wanted or will be seen anyway.
        let _ = kill_process_group(self.group, signal);
    }

    /// Gives the command its input, and tells the host how much it took.
    fn feed(&mut self, output: &mut Vec<u8>) {
        let mut taken = 0;
        while let Some(stdin) = self.stdin.as_mut().filter(|_| taken < self.pending.len()) {
            match stdin.write(&self.pending[taken..]) {
                Ok(count) => taken += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Nobody reads it any more: the rest is dropped, as a broken pipe does.
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin.is_none() {
            taken = self.pending.len();
        }
        self.pending.drain(..taken);
        if taken > 0 {
            let taken = u32::try_from(taken).expect("at most the window of standard input");
            frame::put(output, Kind::StdinTaken, &taken.to_le_bytes());
        }
        if self.stdin_ended && self.pending.is_empty() {
            self.stdin = None;
        }
    }

    /// Takes what the command has written; all of it when it is over.
    fn collect(&mut self, output: &mut Vec<u8>, over: bool) -> Result<()> {
        for (stream, kind) in self.streams.iter_mut().zip(STREAMS) {
            let mut chunk = [0; frame::CHUNK];
            // When the command is over, what it wrote is in the pipe now; a background child may go on for ever.
            let mut rest = match stream {
                Some(fd) if over => rustix::io::ioctl_fionread(fd).context("look into a pipe")?,
                _ => u64::MAX,
            };
            while let Some(fd) =
                stream.as_ref().filter(|_| rest > 0 && (over || output.len() < OUTPUT_BACKLOG))
            {
                match rustix::io::read(fd, &mut chunk) {
                    Ok(0) => *stream = None,
                    Ok(count) => {
                        frame::put(output, kind, &chunk[..count]);
                        rest = rest.saturating_sub(count as u64);
                    }
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error).context("read the command's output"),
                }
            }
        }
        Ok(())
    }
}

fn power_off() -> Result<()> {
    rustix::fs::sync();
    reboot(RebootMode::RB_POWER_OFF).context("power off")?;
    Ok(())
}
