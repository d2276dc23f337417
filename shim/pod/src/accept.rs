//! What all who serve a socket of ours do with those who come.

use std::io;
use std::time::Duration;

use rustix::net::UCred;
use tokio::task::AbortHandle;
use tokio::time::sleep;

/// How long we rest when a connection cannot be taken, for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(10);

/// A task that serves a socket until this is dropped.
#[derive(Debug)]
pub struct Serving(AbortHandle);

impl Serving {
    /// Starts it. Must be called in a tokio runtime.
    pub(crate) fn start(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task).abort_handle())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The next connection, as `accept` gives it. That one cannot be taken is no reason to stop: others end meanwhile. Cancel-safe if `accept` is.
pub async fn patiently<T, F: Future<Output = io::Result<T>>>(accept: impl Fn() -> F) -> T {
    loop {
        match accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::debug!(%error, "accept a connection");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Whether whoever connected is root, or who runs us. The directories of our sockets are root's already; but descriptors of a socket may be handed on.
pub fn is_trusted(peer: &UCred) -> bool {
    peer.uid.is_root() || peer.uid == rustix::process::geteuid()
}
