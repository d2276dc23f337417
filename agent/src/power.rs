//! The way down: the answer to `Shutdown` leaves before the power goes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::descriptor::Descriptor;

/// How long an engine that does not read may hold the power up.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether the machine is to be switched off.
#[derive(Debug)]
pub struct Power {
    wanted: watch::Sender<bool>,
    answered: Notify,
}

impl Default for Power {
    fn default() -> Self {
        Self { wanted: watch::Sender::new(false), answered: Notify::new() }
    }
}

impl Power {
    /// To be called by the handler of `Shutdown`, last before it returns its answer.
    pub fn request_off(&self) {
        self.wanted.send_replace(true);
    }

    /// Completes when the power may go: it was asked for, and the answer is in the socket.
    pub async fn off(&self) {
        // The sender is ours, so there is no error.
        let _ = self.wanted.subscribe().wait_for(|wanted| *wanted).await;
        let _ = timeout(ANSWER_TIMEOUT, self.answered.notified()).await;
        // That write may have been another answer's. Shutdown's is on its way from the handler to the connection's writer,
        // a few turns of the scheduler, and each of these lets every ready task have its turn.
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
    }
}

/// A ttrpc connection that tells when it has written.
#[derive(Debug)]
pub struct Connection {
    stream: Descriptor,
    power: Arc<Power>,
}

impl Connection {
    /// Wraps a connection.
    #[must_use]
    pub fn new(stream: Descriptor, power: Arc<Power>) -> Self {
        Self { stream, power }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        if *self.power.wanted.borrow() {
            self.power.answered.notify_one();
        }
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
