//! A process of ours that stands for one in a guest: it passes signals and window sizes on, waits for the end, and ends the same way.

use std::future::Future;

use kvrun_pod::container::{Exit, ExitState};
use kvrun_pod::process::Process;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, raise, signal};
use serde::{Deserialize, Serialize};

use crate::error::{Error, LastWords, host};
use crate::signals::{self, Signals};
use crate::terminal::Terminal;

/// How a process in a guest ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct End {
    /// In which way.
    pub(crate) how: How,
    /// The guest's kernel killed a process of its container at the memory limit.
    pub(crate) oom_killed: bool,
}

/// In which way a process in a guest ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum How {
    /// Exited with this code.
    Exited(u8),
    /// Killed by this signal.
    Signaled(u8),
    /// Its machine died.
    VmDied {
        /// Why.
        reason: String,
        /// What the machine said last.
        last_words: Vec<LastWords>,
    },
}

impl End {
    /// That of a process whose monitor is gone.
    pub(crate) fn lost() -> Self {
        let reason = "the process that served it is gone".to_owned();
        Self { how: How::VmDied { reason, last_words: Vec::new() }, oom_killed: false }
    }

    /// The exit code by the shell's rule; 137, that of SIGKILL, when the machine died.
    pub(crate) fn code(&self) -> u8 {
        match &self.how {
            How::Exited(code) => *code,
            How::Signaled(signal) => 128_u8.saturating_add(*signal),
            How::VmDied { .. } => 128 + 9,
        }
    }

    /// Ends this process in the same way, so that whoever waits for it learns what it would of the process itself.
    pub(crate) fn take_on(&self) -> ! {
        if let How::Signaled(number) = self.how
            && let Ok(signal_to_die_of) = Signal::try_from(i32::from(number))
        {
            // The memory of this process says nothing about that of the container.
            let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
            // SAFETY: SIG_DFL installs no handler. It fails for SIGKILL and SIGSTOP, which have no other.
            let _ = unsafe { signal(signal_to_die_of, SigHandler::SigDfl) };
            let _ = SigSet::empty().thread_set_mask();
            let _ = raise(signal_to_die_of);
        }
        // Also for a real-time signal, and one that kills nobody by default.
        std::process::exit(self.code().into())
    }
}

impl From<Exit> for End {
    fn from(exit: Exit) -> Self {
        let how = match exit.state {
            ExitState::Exited(code) => How::Exited(code),
            ExitState::Signaled(signal) => How::Signaled(signal),
            ExitState::VmDied(death) => {
                How::VmDied { reason: death.to_string(), last_words: LastWords::of(death.vm_end()) }
            }
        };
        Self { how, oom_killed: exit.oom_killed }
    }
}

/// A process in a guest, wherever its machine is served.
pub(crate) trait Attended {
    /// Waits for its end. Cancel-safe.
    fn wait(&self) -> impl Future<Output = End>;
    /// Sends it a signal. It may have ended.
    fn signal(&self, signal: i32) -> impl Future<Output = ()>;
    /// Sets the size of its terminal.
    fn resize(&self, rows: u16, columns: u16) -> impl Future<Output = ()>;
}

impl Attended for Process {
    async fn wait(&self) -> End {
        Self::wait(self).await.into()
    }

    async fn signal(&self, signal: i32) {
        if let Err(error) = self.kill(signal, false).await {
            // Most likely it has just ended, which its exit tells better.
            tracing::debug!(signal, %error, "forward a signal");
        }
    }

    async fn resize(&self, rows: u16, columns: u16) {
        if let Err(error) = Self::resize(self, rows, columns).await {
            tracing::debug!(%error, "resize the terminal");
        }
    }
}

/// Passes on the signals this process gets, `early` first, until the other has ended.
pub(crate) async fn attend(
    process: &impl Attended,
    signals: &Signals,
    early: Vec<Signal>,
    terminal: Option<&Terminal>,
) -> Result<End, Error> {
    for signal in early {
        forward(process, signal, terminal).await;
    }
    let mut ended = std::pin::pin!(process.wait());
    loop {
        tokio::select! {
            biased;
            end = &mut ended => return Ok(end),
            signal = signals.next() => forward(process, signal.map_err(host("read signals"))?, terminal).await,
        }
    }
}

async fn forward(process: &impl Attended, signal: Signal, terminal: Option<&Terminal>) {
    match signal {
        Signal::SIGWINCH => {
            if let Some((rows, columns)) = terminal.and_then(Terminal::size) {
                process.resize(rows, columns).await;
            }
        }
        signal => process.signal(signal as i32).await,
    }
}

/// Waits for a signal that ends us before there is a process to forward it to; the others are kept for it.
pub(crate) async fn aborted(signals: &Signals, early: &mut Vec<Signal>) -> Result<Signal, Error> {
    loop {
        let signal = signals.next().await.map_err(host("read signals"))?;
        if signals::asks_to_end(signal) {
            return Ok(signal);
        }
        // The first of each, as the kernel keeps pending signals.
        if !early.contains(&signal) {
            early.push(signal);
        }
    }
}
