//! The engine's end of a pod's socket.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Page, guest_log, metrics};
use crate::accept::{self, Serving};
use crate::pod::{Pod, PodError};
use crate::state_dir::{POD_SOCKET, socket_path};
use crate::text;

/// How many are answered at a time; others wait.
const MOST_CONNECTIONS: usize = 8;
/// The longest request in bytes: what clients of HTTP say of themselves, several times over.
const MAX_REQUEST: usize = 8 * 1024;
/// How long whoever asks may take over it, and over taking the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// By what a pod is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// The namespace of containerd; empty where there is none.
    pub namespace: String,
    /// The ID of the first container.
    pub pod: String,
}

/// Answers on a socket in the pod's state directory. Must be called in a tokio runtime.
///
/// # Errors
/// The socket cannot be made.
pub fn start(pod: &Pod, dir: impl AsFd, labels: Labels) -> io::Result<Serving> {
    let listener = StdUnixListener::bind(socket_path(dir.as_fd(), POD_SOCKET))?;
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    Ok(Serving::start(serve(listener, pod.clone(), labels)))
}

async fn serve(listener: UnixListener, pod: Pod, labels: Labels) {
    // They end with this task.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            (stream, _) = accept::patiently(|| listener.accept()), if connections.len() < MOST_CONNECTIONS => {
                let (pod, labels) = (pod.clone(), labels.clone());
                connections.spawn(async move {
                    if let Err(error) = answer(stream, &pod, &labels).await {
                        tracing::debug!(%error, "answer on the pod's socket");
                    }
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(mut stream: UnixStream, pod: &Pod, labels: &Labels) -> io::Result<()> {
    if !accept::is_trusted(&socket_peercred(&stream)?) {
        return Ok(());
    }
    let answer = match timeout(PATIENCE, request(&mut stream)).await?? {
        Ok(page) => match content(page, pod, labels).await {
            Ok(text) => response("200 OK", page.content_type(), &text),
            Err(error) => refusal("503 Service Unavailable", &text::chain(&error)),
        },
        Err(status) => refusal(status, "GET /metrics and /guest-log are answered"),
    };
    timeout(PATIENCE, stream.write_all(answer.as_bytes())).await?
}

async fn content(page: Page, pod: &Pod, labels: &Labels) -> Result<String, PodError> {
    match page {
        Page::Metrics => {
            let labels = [("namespace", labels.namespace.as_str()), ("pod", &labels.pod)];
            metrics::gather(pod, &labels).await
        }
        Page::GuestLog => guest_log::read(pod).await,
    }
}

/// Reads a request to the end of its header, and tells what it asks for, or the status with which it is refused.
async fn request(stream: &mut UnixStream) -> io::Result<Result<Page, &'static str>> {
    let mut bytes = Vec::new();
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        if bytes.len() >= MAX_REQUEST {
            return Ok(Err("431 Request Header Fields Too Large"));
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    Ok(match (words.next(), words.next()) {
        (Some(b"GET"), Some(path)) => {
            let found = Page::ALL.into_iter().find(|page| page.path().as_bytes() == path);
            found.ok_or("404 Not Found")
        }
        _ => Err("405 Method Not Allowed"),
    })
}

fn refusal(status: &str, why: &str) -> String {
    response(status, "text/plain; charset=utf-8", &format!("{why}\n"))
}

fn response(status: &str, content_type: &str, text: &str) -> String {
    let length = text.len();
    format!(
        "HTTP/1.0 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}"
    )
}
