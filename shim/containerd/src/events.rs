//! What containerd is told of: events, over its own ttrpc socket, in the order in which they happened.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim::event::Event;
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::protos::shim::event::Envelope;
use containerd_shim::protos::shim::events::ForwardRequest;
use containerd_shim::protos::shim_async::EventsClient;
use tokio::sync::{mpsc, watch};
use ttrpc::r#async::Client;
use ttrpc::context::Context;

/// How long containerd may take to take an event.
const ANSWER: Duration = Duration::from_secs(10);
/// How long we wait before we try again to reach a containerd that is down. It looks at the tasks itself when it comes back, but
/// other listeners do not.
const AGAIN: Duration = Duration::from_secs(1);
/// How many events are kept for it.
const KEPT: usize = 1024;

/// Now.
pub(crate) fn now() -> Timestamp {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: now.as_secs().try_into().unwrap_or(i64::MAX),
        nanos: now.subsec_nanos().try_into().unwrap_or(0),
        ..Default::default()
    }
}

/// Where events go. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    namespace: Arc<str>,
    queue: mpsc::UnboundedSender<Envelope>,
    /// How many have been sent or given up.
    done: watch::Receiver<u64>,
    published: Arc<std::sync::atomic::AtomicU64>,
}

impl Events {
    /// Starts to publish at containerd's address. Must be called in a tokio runtime.
    pub(crate) fn new(address: String, namespace: &str) -> Self {
        let (queue, waiting) = mpsc::unbounded_channel();
        let (done, done_receiver) = watch::channel(0);
        tokio::spawn(send_all(address, waiting, done));
        Self { namespace: namespace.into(), queue, done: done_receiver, published: Arc::default() }
    }

    /// Tells containerd, some time, of what has happened just now.
    pub(crate) fn publish(&self, event: impl Event) {
        let topic = event.topic();
        let event = match containerd_shim::util::convert_to_any(Box::new(event)) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(%error, topic, "write an event");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: MessageField::some(now()),
            namespace: self.namespace.to_string(),
            topic,
            event: MessageField::some(event),
            ..Default::default()
        };
        self.published.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // The other end lives as long as the runtime.
        let _ = self.queue.send(envelope);
    }

    /// Waits until all that was published has been taken, or nobody can be expected to take it any more.
    pub(crate) async fn flush(mut self) {
        let published = self.published.load(std::sync::atomic::Ordering::Relaxed);
        let _ = tokio::time::timeout(ANSWER, self.done.wait_for(|done| *done >= published)).await;
    }
}

async fn send_all(address: String, mut waiting: mpsc::UnboundedReceiver<Envelope>, done: watch::Sender<u64>) {
    let mut client = None;
    let mut kept = VecDeque::new();
    loop {
        if kept.is_empty() {
            match waiting.recv().await {
                Some(envelope) => kept.push_back(envelope),
                None => return,
            }
        }
        while let Ok(envelope) = waiting.try_recv() {
            kept.push_back(envelope);
        }
        while kept.len() > KEPT {
            kept.pop_front();
            done.send_modify(|done| *done += 1);
        }
        let Some(envelope) = kept.front().cloned() else { continue };
        match send(&mut client, &address, envelope).await {
            Ok(()) => {
                kept.pop_front();
                done.send_modify(|done| *done += 1);
            }
            Err(error) => {
                tracing::warn!(%error, "publish an event; it will be tried again");
                client = None;
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn send(
    client: &mut Option<EventsClient>,
    address: &str,
    envelope: Envelope,
) -> Result<(), ttrpc::Error> {
    let client = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(&format!("unix://{address}")).await?)),
    };
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
    match tokio::time::timeout(ANSWER, client.forward(Context::default(), &request)).await {
        Ok(result) => result.map(drop),
        Err(_) => Err(ttrpc::Error::Others("containerd does not answer".into())),
    }
}
