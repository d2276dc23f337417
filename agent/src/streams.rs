//! The broker between stdio streams that arrive over vsock and the containers that ask for them by token.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvrun_agent_api::{STREAM_TIMEOUT_SECS, TOKEN_LEN};
use tokio::io::AsyncReadExt;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout};

use crate::descriptor::{Descriptor, Listener};

/// How many connected streams may wait to be asked for, and how many may be in the middle of their token.
const MAX_UNCLAIMED: usize = 64;
/// How long a stream may wait to be asked for, and how long it may take to send its token.
const PATIENCE: Duration = Duration::from_secs(STREAM_TIMEOUT_SECS);

/// Why a stream could not be had.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No connection brought the token in time.
    #[error("no stream with token {0:#018x} was connected within {STREAM_TIMEOUT_SECS} s")]
    Timeout(u64),
    /// Another request waits for the same token.
    #[error("token {0:#018x} is asked for twice")]
    Taken(u64),
}

#[derive(Default)]
struct Table {
    unclaimed: VecDeque<Unclaimed>,
    waiting: HashMap<u64, oneshot::Sender<Descriptor>>,
}

struct Unclaimed {
    token: u64,
    stream: Descriptor,
    since: Instant,
}

/// Connected streams by token.
#[derive(Clone)]
pub struct StreamBroker {
    table: Arc<Mutex<Table>>,
    headers: Arc<Semaphore>,
}

impl Default for StreamBroker {
    fn default() -> Self {
        Self { table: Arc::default(), headers: Arc::new(Semaphore::new(MAX_UNCLAIMED)) }
    }
}

impl StreamBroker {
    /// Takes streams from `listener` for ever.
    pub async fn serve(self, listener: Listener) {
        loop {
            // Held until the token is read: later connections wait in the listener's backlog.
            let Ok(permit) = self.headers.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok(stream) => stream,
                Err(err) => {
                    log::warn!("accept of a stdio stream failed: {err}");
                    continue;
                }
            };
            let broker = self.clone();
            tokio::spawn(async move {
                match timeout(PATIENCE, read_token(stream)).await {
                    Ok(Some((token, stream))) => broker.offer(token, stream),
                    Ok(None) | Err(_) => log::warn!("a stdio stream was closed without a token"),
                }
                drop(permit);
            });
        }
    }

    /// Keeps a stream for the one who asks for its token, or hands it over if asked already.
    pub fn offer(&self, token: u64, stream: Descriptor) {
        if token == 0 {
            log::warn!("a stdio stream with token 0 was closed");
            return;
        }
        let mut table = self.table();
        let stream = match table.waiting.remove(&token) {
            Some(waiter) => match waiter.send(stream) {
                Ok(()) => return,
                // The waiter's time had run out.
                Err(stream) => stream,
            },
            None => stream,
        };
        let now = Instant::now();
        while table.unclaimed.front().is_some_and(|oldest| now - oldest.since > PATIENCE) {
            table.unclaimed.pop_front();
        }
        if table.unclaimed.len() >= MAX_UNCLAIMED || table.unclaimed.iter().any(|other| other.token == token)
        {
            log::warn!(
                "a stdio stream was closed: its token is in use, or {MAX_UNCLAIMED} wait to be asked for"
            );
            return;
        }
        table.unclaimed.push_back(Unclaimed { token, stream, since: now });
    }

    /// The stream with this token, as soon as it is connected.
    ///
    /// # Errors
    ///
    /// [`StreamError`].
    pub async fn claim(&self, token: u64) -> Result<Descriptor, StreamError> {
        let receiver = {
            let mut table = self.table();
            if let Some(index) = table.unclaimed.iter().position(|unclaimed| unclaimed.token == token)
                && let Some(unclaimed) = table.unclaimed.remove(index)
            {
                return Ok(unclaimed.stream);
            }
            if table.waiting.get(&token).is_some_and(|other| !other.is_closed()) {
                return Err(StreamError::Taken(token));
            }
            let (sender, receiver) = oneshot::channel();
            table.waiting.insert(token, sender);
            receiver
        };
        // Takes the entry out again whether time runs out or the caller is dropped.
        let _entry = Waiting { broker: self, token };
        match timeout(PATIENCE, receiver).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(_)) | Err(_) => Err(StreamError::Timeout(token)),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Waiting<'a> {
    broker: &'a StreamBroker,
    token: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // After a hand-over a second claim of the same token may have put its own entry here: tokens are never used
        // twice, so there is none of its own to lose.
        let mut table = self.broker.table();
        if table.waiting.get(&self.token).is_some_and(oneshot::Sender::is_closed) {
            table.waiting.remove(&self.token);
        }
    }
}

async fn read_token(mut stream: Descriptor) -> Option<(u64, Descriptor)> {
    let mut header = [0; TOKEN_LEN];
    stream.read_exact(&mut header).await.ok()?;
    Some((u64::from_le_bytes(header), stream))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Descriptor, Descriptor) {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        (Descriptor::new(a).unwrap(), Descriptor::new(b).unwrap())
    }

    async fn is_closed(stream: &Descriptor) -> bool {
        stream.read(&mut Vec::with_capacity(1)).await.is_ok_and(|n| n == 0)
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_reaches_its_claim_in_either_order() {
        let broker = StreamBroker::default();
        let (ours, theirs) = pair();
        broker.offer(7, theirs);
        let claimed = broker.claim(7).await.unwrap();
        claimed.write_all(b"x").await.unwrap();
        assert_eq!(ours.read(&mut Vec::with_capacity(9)).await.unwrap(), 1);

        let (ours, theirs) = pair();
        let (claimed, ()) = tokio::join!(broker.claim(8), async { broker.offer(8, theirs) });
        drop(claimed.unwrap());
        assert!(is_closed(&ours).await);
        assert!(broker.table().waiting.is_empty() && broker.table().unclaimed.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_gives_up_and_leaves_nothing() {
        let broker = StreamBroker::default();
        let (first, second) = tokio::join!(broker.claim(9), broker.claim(9));
        assert!(matches!(first, Err(StreamError::Timeout(9))));
        assert!(matches!(second, Err(StreamError::Taken(9))));
        assert!(broker.table().waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn unclaimed_streams_are_bounded_and_grow_old() {
        let broker = StreamBroker::default();
        let mut ends = Vec::new();
        for token in 1..=MAX_UNCLAIMED as u64 + 1 {
            let (ours, theirs) = pair();
            broker.offer(token, theirs);
            ends.push(ours);
        }
        assert!(is_closed(ends.last().unwrap()).await, "one too many");
        assert_eq!(broker.table().unclaimed.len(), MAX_UNCLAIMED);

        let (ours, theirs) = pair();
        broker.offer(0, theirs);
        assert!(is_closed(&ours).await, "token 0");

        tokio::time::advance(PATIENCE + Duration::from_secs(1)).await;
        let (_ours, theirs) = pair();
        broker.offer(1000, theirs);
        assert_eq!(broker.table().unclaimed.len(), 1);
        assert!(is_closed(&ends[0]).await);
        broker.claim(1000).await.unwrap();
    }

    #[tokio::test]
    async fn a_token_is_read_from_the_connection_and_no_byte_more() {
        let path = std::env::temp_dir().join(format!("kvrun-streams-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let broker = StreamBroker::default();
        tokio::spawn(broker.clone().serve(Listener::new(listener.into()).unwrap()));
        // A connection that never finishes its token does not stand in the way of the next.
        let mut stuck = UnixStream::connect(&path).unwrap();
        std::io::Write::write_all(&mut stuck, &[1, 2, 3]).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        std::io::Write::write_all(&mut stream, b"\x01\x02\x03\x04\x05\x06\x07\x08data").unwrap();
        let claimed = broker.claim(0x0807_0605_0403_0201).await.unwrap();
        let mut buf = Vec::with_capacity(64);
        claimed.read(&mut buf).await.unwrap();
        assert_eq!(buf, b"data");
        std::fs::remove_file(path).unwrap();
    }
}
