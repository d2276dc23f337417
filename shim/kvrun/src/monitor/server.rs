//! The monitor's end of a connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use kvrun_pod::accept;
use kvrun_pod::channel::{AsyncChannel, ChannelListener};
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::network::NetworkNamespace;
use kvrun_pod::process::Process;
use kvrun_pod::share::Trees;
use kvrun_pod::stdio::Streams;
use kvrun_vmm_api::Received;
use rustix::net::sockopt::socket_peercred;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::{Answer, Call, Request, payload, unpack};
use super::{Container, Handed, Monitor};
use crate::attach::{Attended, End};
use crate::daemon::channel_error;
use crate::error::{Error, host};

/// Takes connections until the runtime ends.
pub(super) async fn serve(monitor: Arc<Monitor>, listener: ChannelListener) {
    loop {
        let socket = accept::patiently(|| listener.accept()).await;
        tokio::spawn(converse(Arc::clone(&monitor), socket));
    }
}

async fn converse(monitor: Arc<Monitor>, socket: OwnedFd) {
    if let Err(error) = answer_all(&monitor, socket).await {
        tracing::debug!(error = %kvrun_pod::text::chain(&error), "a connection ended");
    }
}

async fn answer_all(monitor: &Arc<Monitor>, socket: OwnedFd) -> Result<(), Error> {
    let peer = socket_peercred(&socket).map_err(host("tell who asks"))?;
    if !accept::is_trusted(&peer) {
        return Ok(());
    }
    let peer = peer.pid.as_raw_nonzero().get();
    let channel = AsyncChannel::new(socket.into()).map_err(host("watch a connection"))?;
    let error = |e| channel_error("read a request", e);
    while let Some(Received { message: Call { id, request }, fds }) =
        channel.receive().await.map_err(error)?
    {
        let made = match request {
            Request::Exec { ignore_paused, wanted } => exec(monitor, &id, fds, ignore_paused, wanted).await,
            Request::Create { bundle, wanted } => create(monitor, &bundle, fds, wanted).await,
            request => {
                let (answer, data) = match answer(monitor, &id, request, fds).await {
                    Ok(None) => (Answer::Done, None),
                    Ok(data) => (Answer::Payload, data),
                    Err(error) => (Answer::Failed(error.to_failure()), None),
                };
                let fds: Vec<BorrowedFd<'_>> = data.iter().map(AsFd::as_fd).collect();
                channel.send(&answer, &fds).await.map_err(error)?;
                continue;
            }
        };
        match made {
            Ok((made, streams)) => return made.stand_for(monitor, &channel, peer, streams).await,
            Err(failed) => channel.send(&Answer::Failed(failed.to_failure()), &[]).await.map_err(error)?,
        }
    }
    Ok(())
}

/// Answers a request that makes no process.
async fn answer(
    monitor: &Monitor,
    id: &ContainerId,
    request: Request,
    fds: Vec<OwnedFd>,
) -> Result<Option<OwnedFd>, Error> {
    let container = monitor.get(id)?;
    match request {
        Request::Start => monitor.start(&container).await?,
        Request::Kill { signal, all } => monitor.kill(&container, signal, all).await?,
        Request::Delete => monitor.delete(&container).await,
        Request::Pause => monitor.pause(&container).await?,
        Request::Resume => monitor.resume(&container).await?,
        Request::Processes => return data(&monitor.processes(&container).await?),
        Request::HostProcesses => return data(&Monitor::host_processes(&container)?),
        Request::LookAtProc { path } => return data(&monitor.look_at_proc(&container, path).await?),
        Request::Stats => return data(&monitor.stats(&container).await?),
        Request::Update => Monitor::update(&container, &read(fds)?).await?,
        // Only where there is a process.
        Request::Signal { .. } | Request::Resize { .. } => {}
        Request::Exec { .. } | Request::Create { .. } => {}
    }
    Ok(None)
}

fn data(value: &impl Serialize) -> Result<Option<OwnedFd>, Error> {
    payload(value).map(Some).map_err(host("write an answer"))
}

fn read<T: DeserializeOwned>(fds: Vec<OwnedFd>) -> Result<T, Error> {
    unpack(fds).map_err(host("read a request"))
}

/// A process that a connection stands for.
enum Made {
    Container(Arc<Container>),
    Exec(Arc<Container>, Process),
}

async fn exec(
    monitor: &Monitor,
    id: &ContainerId,
    fds: Vec<OwnedFd>,
    ignore_paused: bool,
    wanted: kvrun_pod::stdio::Wanted,
) -> Result<(Made, Streams), Error> {
    let container = monitor.get(id)?;
    let (process, streams) = monitor.exec(&container, read(fds)?, ignore_paused, wanted).await?;
    Ok((Made::Exec(container, process), streams))
}

async fn create(
    monitor: &Monitor,
    bundle: &std::path::Path,
    fds: Vec<OwnedFd>,
    wanted: kvrun_pod::stdio::Wanted,
) -> Result<(Made, Streams), Error> {
    let missing = || host("read a request")(std::io::Error::from(std::io::ErrorKind::InvalidData));
    let mut fds = fds.into_iter();
    let (Some(dir), Some(config), Some(network)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(missing());
    };
    let network = NetworkNamespace::try_from(network).map_err(host("read a request"))?;
    let handed = Handed { dir, config: config.into(), network, trees: Trees::from(fds.collect::<Vec<_>>()) };
    let (container, streams) = monitor.create(bundle, handed, wanted).await?;
    Ok((Made::Container(container), streams))
}

impl Made {
    /// Hands over the streams, and is there for the process until it has ended or nobody asks any more.
    async fn stand_for(
        self,
        monitor: &Monitor,
        channel: &AsyncChannel,
        peer: i32,
        streams: Streams,
    ) -> Result<(), Error> {
        let fds: Vec<BorrowedFd<'_>> = streams.0.iter().flatten().map(AsFd::as_fd).collect();
        let sent = channel.send(&Answer::Attached, &fds).await;
        drop(fds);
        drop(streams);
        let result = match (&self, sent) {
            (_, Err(error)) => Err(channel_error("hand over a process", error)),
            (Self::Exec(container, process), Ok(())) => {
                with_execs(container, |execs| execs.push(peer));
                let result = attend(channel, process, Attended::wait(process)).await;
                with_execs(container, |execs| {
                    if let Some(at) = execs.iter().position(|pid| *pid == peer) {
                        execs.swap_remove(at);
                    }
                });
                result
            }
            (Self::Container(container), Ok(())) => {
                attend(channel, container.process(), monitor.until_removed(container)).await
            }
        };
        if let Self::Container(container) = &self {
            monitor.remove(container).await;
        }
        result
    }
}

fn with_execs(container: &Container, change: impl FnOnce(&mut Vec<i32>)) {
    change(&mut container.execs.lock().unwrap_or_else(PoisonError::into_inner));
}

async fn attend(
    channel: &AsyncChannel,
    process: &Process,
    end: impl Future<Output = End>,
) -> Result<(), Error> {
    let mut end = std::pin::pin!(end);
    let mut asked = true;
    loop {
        tokio::select! {
            biased;
            end = &mut end => {
                let sent = channel.send(&Answer::Ended(end), &[]).await;
                if sent.is_ok() {
                    // Whoever stands for it has output to hand over, and then ends.
                    while let Ok(Some(_)) = channel.receive::<Call>().await {}
                }
                return sent.map_err(|e| channel_error("report the end of a process", e));
            }
            request = channel.receive::<Call>(), if asked => match request {
                Ok(Some(Received { message: Call { request: Request::Signal { signal }, .. }, .. })) => {
                    Attended::signal(process, signal).await;
                }
                Ok(Some(Received { message: Call { request: Request::Resize { rows, columns }, .. }, .. })) => {
                    Attended::resize(process, rows, columns).await;
                }
                Ok(Some(_)) => {}
                // A container ends with who stands for it. A further process goes on, as one that was started by a shell does.
                Ok(None) | Err(_) if process.is_containers_own() => return Ok(()),
                Ok(None) | Err(_) => asked = false,
            },
        }
    }
}
