//! What can be seen of a pod from outside: its metrics, and the log of its guest.
//!
//! Each pod has a socket beside its record ([`SOCKET`](crate::state_dir::POD_SOCKET)), on which whoever runs the engine answers as long as the machine runs. It speaks
//! HTTP/1.0, so that what scrapes metrics can read it: `GET` of the path of a [`Page`], and nothing else. The directory is root's, and whoever asks must be root.
//!
//! * [`server`] - the engine's end, for both doors; [`client`] - that of the command line.
//! * [`metrics`] - what is measured, gathered when it is asked for; [`exposition`] - how it is written; [`latency`] - what is counted meanwhile.
//! * [`guest_log`] - what the guest has said about itself.

mod client;
mod exposition;
mod guest_log;
pub(crate) mod latency;
mod metrics;
mod server;
#[cfg(test)]
mod tests;

pub use client::{FetchError, fetch};
pub use exposition::merge;
pub use server::{Labels, start};

/// Something to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// The metrics, as Prometheus reads them.
    Metrics,
    /// The log of the guest's kernel and of the agent.
    GuestLog,
}

impl Page {
    /// All there are.
    const ALL: [Self; 2] = [Self::Metrics, Self::GuestLog];

    /// Its path.
    const fn path(self) -> &'static str {
        match self {
            Self::Metrics => "/metrics",
            Self::GuestLog => "/guest-log",
        }
    }

    /// What its text is, as HTTP has it.
    const fn content_type(self) -> &'static str {
        match self {
            Self::Metrics => "text/plain; version=0.0.4; charset=utf-8",
            Self::GuestLog => "text/plain; charset=utf-8",
        }
    }
}
