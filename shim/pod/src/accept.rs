//! What all who serve a socket of ours do with those who come.

use std::io;
use std::time::Duration;

use rustix::net::UCred;
use tokio::time::sleep;

/// How long we rest when a connection cannot be taken, for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(10);

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
