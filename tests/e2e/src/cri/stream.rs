//! What a kubelet leads on to containerd's streaming server: attach, exec with its streams, port-forward; over a WebSocket, of which each message
//! begins with the number of its channel (subprotocol `v4.channel.k8s.io`).

use std::net::TcpStream;

use anyhow::{Context, Result, bail, ensure};
use k8s_cri::v1 as api;
use tungstenite::protocol::WebSocket;
use tungstenite::{ClientRequestBuilder, Message};

use super::Pod;
use crate::time;

const PROTOCOL: &str = "v4.channel.k8s.io";

/// The channels of attach and exec.
pub const STDIN: u8 = 0;
/// As above.
pub const STDOUT: u8 = 1;
/// What became of it, as a `Status` of Kubernetes.
pub const STATUS: u8 = 3;

/// An open stream.
#[derive(Debug)]
pub struct Stream(WebSocket<TcpStream>);

impl Stream {
    fn open(url: &str) -> Result<Self> {
        let address = url.strip_prefix("http://").and_then(|rest| rest.split('/').next());
        let socket = TcpStream::connect(address.with_context(|| format!("no address in {url}"))?)?;
        socket.set_read_timeout(Some(time::scaled(time::RUN)))?;
        let request =
            ClientRequestBuilder::new(url.replacen("http", "ws", 1).parse()?).with_sub_protocol(PROTOCOL);
        let (socket, _) = tungstenite::client(request, socket).map_err(|e| anyhow::anyhow!("{url}: {e}"))?;
        Ok(Self(socket))
    }

    /// Sends bytes to a channel.
    ///
    /// # Errors
    /// When the stream is closed.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message: Vec<u8> = [channel].iter().chain(bytes).copied().collect();
        Ok(self.0.send(Message::binary(message))?)
    }

    /// What comes next, and on which channel; `None` at the end.
    ///
    /// # Errors
    /// When nothing comes in time.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            match self.0.read() {
                Ok(Message::Binary(bytes)) => {
                    let (channel, rest) = bytes.split_first().context("a message without a channel")?;
                    // An empty one only says that the streams are there.
                    if !rest.is_empty() {
                        return Ok(Some((*channel, rest.to_vec())));
                    }
                }
                Ok(Message::Ping(_) | Message::Pong(_)) => {}
                Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => return Ok(None),
                Ok(other) => bail!("not of the protocol: {other:?}"),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// All that still comes on a channel, up to the end of the stream.
    ///
    /// # Errors
    /// As [`Stream::receive`].
    pub fn rest(&mut self, wanted: u8) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some((channel, bytes)) = self.receive()? {
            if channel == wanted {
                all.extend(bytes);
            }
        }
        Ok(all)
    }
}

impl Pod<'_> {
    /// The streams of a container that runs; it must have been made with `stdin`.
    ///
    /// # Errors
    /// What containerd says.
    pub fn attach(&self, container: &str) -> Result<Stream> {
        let request = api::AttachRequest {
            container_id: container.to_owned(),
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
        };
        Stream::open(&self.cri.call(async |mut client| client.attach(request).await)?.url)
    }

    /// A command in a container, with its streams.
    ///
    /// # Errors
    /// What containerd says.
    pub fn exec_stream(&self, container: &str, command: &[&str]) -> Result<Stream> {
        let request = api::ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty: false,
            stdin: true,
            stdout: true,
            stderr: true,
        };
        Stream::open(&self.cri.call(async |mut client| client.exec(request).await)?.url)
    }

    /// What a port answers to some bytes, by way of port-forward.
    ///
    /// # Errors
    /// What containerd says; [`Err`] too if nothing listens.
    pub fn ask_port(&self, port: u16, question: &[u8]) -> Result<Vec<u8>> {
        let request = api::PortForwardRequest { pod_sandbox_id: self.id.clone(), port: vec![port.into()] };
        let url = self.cri.call(async |mut client| client.port_forward(request).await)?.url;
        let mut stream = Stream::open(&url)?;
        // Of each port there are two channels, for its bytes and for an error; each begins with the port.
        for _ in 0..2 {
            let (_, bytes) = stream.receive()?.context("no channels")?;
            ensure!(bytes == port.to_le_bytes(), "{bytes:?}");
        }
        stream.send(0, question)?;
        stream.rest(0)
    }
}
