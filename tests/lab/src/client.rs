//! One command in the lab, seen from its caller: the caller's standard streams and signals are the command's.

use crate::frame::{self, Frame, Kind, Request};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// The signals that are passed on to the command.
pub(crate) const PASSED: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// Blocks the signals that are passed on, in this thread and those it will start, so that one thread can wait for them.
pub(crate) fn block_signals() -> Result<SigSet> {
    let signals = SigSet::from_iter(PASSED);
    signals.thread_block().context("block signals")?;
    Ok(signals)
}

/// How often a lab is nudged.
const NUDGE: Duration = Duration::from_secs(1);

/// Runs a command over `stream` and returns its exit code.
///
/// With `nudged` the lab gets an interrupt every second. A lab has been seen whose CPU was idle and whose every wait was endless, and
/// which went on at once when its command was sent a signal: as if QEMU's emulation had lost the interrupt of its timer, and found it
/// pending with the next. Probably because the thread of the emulated CPU changes the word of pending interrupts, for nested SVM, while
/// another thread sets one there; that has not been proven.
///
/// Standard input is forwarded by a thread that may outlive the call: it may be waiting for a terminal. The caller is
/// expected to exit soon.
pub(crate) fn run(mut stream: UnixStream, request: &Request, signals: &Signals, nudged: bool) -> Result<u8> {
    let to_lab = Arc::new(Mutex::new(stream.try_clone().context("duplicate the stream")?));
    let send = |kind, payload: &[u8]| send(&to_lab, kind, payload);
    send(Kind::Run, &request.encode()).context("send the command")?;
    signals.deliver_to(Arc::clone(&to_lab));
    if nudged {
        let to_lab = Arc::clone(&to_lab);
        thread::spawn(move || {
            // Until the lab is gone, or this process.
            while self::send(&to_lab, Kind::Nudge, &[]).is_ok() {
                thread::sleep(NUDGE);
            }
        });
    }
    let window = Arc::new(Window::default());
    {
        let (window, to_lab) = (Arc::clone(&window), Arc::clone(&to_lab));
        thread::spawn(move || forward_stdin(&window, &to_lab));
    }
    loop {
        let Some(frame) = Frame::read(&mut stream).context("read from the lab")? else {
            bail!("the lab is gone while the command ran");
        };
        match frame.kind {
            Kind::Stdout | Kind::Stderr => {
                let written = match frame.kind {
                    Kind::Stdout => write_now(&mut io::stdout(), &frame.payload),
                    _ => write_now(&mut io::stderr(), &frame.payload),
                };
                match written {
                    // As if the command had written into the broken pipe itself; it is killed when the stream closes.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(128 + 13),
                    result => result.context("write the command's output")?,
                }
            }
            Kind::StdinTaken => {
                let count = frame.payload.first_chunk().context("a count has four bytes")?;
                window.give_back(u32::from_le_bytes(*count) as usize);
            }
            Kind::Exit => return frame.exit_code().context("an exit has a code"),
            other => bail!("the lab sent {other:?} while a command runs"),
        }
    }
}

/// Whether this signal asks a process to end.
pub(crate) fn asks_to_end(signal: Signal) -> bool {
    matches!(signal, Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM)
}

/// The thread that waits for this process's signals, and where it sends them once a command runs.
#[derive(Clone, Default)]
pub(crate) struct Signals(Arc<Mutex<Option<Arc<Mutex<UnixStream>>>>>);

impl Signals {
    /// Starts to wait. A signal while no command runs, and a second signal that asks to end, end this process: QEMU, if this
    /// process owns it, goes with it.
    pub(crate) fn handle(blocked: SigSet) -> Self {
        let signals = Self::default();
        let target = signals.clone();
        thread::spawn(move || {
            let mut asked = false;
            loop {
                let Ok(signal) = blocked.wait() else { continue };
                let stream = target.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let asks_to_end = asks_to_end(signal);
                let number = u8::try_from(signal as i32).expect("signal numbers are small");
                match stream {
                    Some(stream) if !(asks_to_end && asked) => {
                        // If the lab is gone the main thread says so.
                        let _ = send(&stream, Kind::Signal, &[number]);
                    }
                    None if !asks_to_end => {}
                    _ => std::process::exit(128 + i32::from(number)),
                }
                asked |= asks_to_end;
            }
        });
        signals
    }

    fn deliver_to(&self, stream: Arc<Mutex<UnixStream>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
    }
}

fn send(stream: &Mutex<UnixStream>, kind: Kind, payload: &[u8]) -> io::Result<()> {
    frame::write(&mut *stream.lock().unwrap_or_else(PoisonError::into_inner), kind, payload)
}

fn forward_stdin(window: &Window, to_lab: &Mutex<UnixStream>) {
    let mut stdin = io::stdin().lock();
    let mut chunk = [0; frame::CHUNK];
    loop {
        let sent = match stdin.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Unreadable, for example closed, is an end too.
            Ok(0) | Err(_) => {
                let _ = send(to_lab, Kind::StdinEnd, &[]);
                return;
            }
            Ok(count) => {
                window.take(count);
                send(to_lab, Kind::Stdin, &chunk[..count])
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

fn write_now(stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()
}

/// How much input is under way and not taken yet.
#[derive(Default)]
struct Window {
    under_way: Mutex<usize>,
    changed: Condvar,
}

impl Window {
    fn take(&self, count: usize) {
        let guard = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |under_way: &mut usize| *under_way + count > frame::STDIN_WINDOW;
        *self.changed.wait_while(guard, full).unwrap_or_else(PoisonError::into_inner) += count;
    }

    fn give_back(&self, count: usize) {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        *under_way = under_way.saturating_sub(count);
        self.changed.notify_all();
    }
}
