//! Connections that the engine has to a port on which something in the guest listens: port-forwarding, as Kubernetes has it.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::descriptor::Descriptor;

/// How long whoever listens may leave a connection in its backlog.
const CONNECT: Duration = Duration::from_secs(10);
/// One read's size.
const BUFFER: usize = 32 * 1024;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Nothing listens.
    #[error("nothing in the guest listens on TCP port {port} of its loopback")]
    Refused {
        /// The port.
        port: u16,
        /// What the kernel says, of IPv6.
        #[source]
        source: io::Error,
    },
    /// It listens, and takes nothing.
    #[error("TCP port {port} of the guest's loopback took no connection within {} s", CONNECT.as_secs())]
    Timeout {
        /// The port.
        port: u16,
    },
}

/// Connects to a port of 127.0.0.1, or of ::1 if nothing listens there.
///
/// # Errors
/// [`ForwardError`].
pub async fn connect(port: u16) -> Result<TcpStream, ForwardError> {
    let connected = timeout(CONNECT, async {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await,
            connected => connected,
        }
    });
    match connected.await {
        Ok(connected) => connected.map_err(|source| ForwardError::Refused { port, source }),
        Err(_) => Err(ForwardError::Timeout { port }),
    }
}

/// Copies in both directions until both have ended, or one has failed.
pub async fn copy(mut stream: Descriptor, mut connection: TcpStream) {
    // Whoever is left learns of a failure by the end of its connection.
    let _ = copy_bidirectional_with_sizes(&mut stream, &mut connection, BUFFER, BUFFER).await;
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn either_loopback_is_reached_and_each_direction_has_its_own_end() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = tokio::spawn(async move {
                let (mut accepted, _) = listener.accept().await.unwrap();
                let mut question = String::new();
                // The end of the question comes before the answer begins.
                accepted.read_to_string(&mut question).await.unwrap();
                accepted.write_all(format!("{question}!").as_bytes()).await.unwrap();
            });
            let (engine, agent) =
                socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
            let connection = connect(port).await.unwrap();
            tokio::spawn(copy(Descriptor::new(agent).unwrap(), connection));
            let mut engine = Descriptor::new(engine).unwrap();
            engine.write_all(b"who").await.unwrap();
            engine.shutdown(rustix::net::Shutdown::Write);
            let mut answer = String::new();
            engine.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "who!");
            server.await.unwrap();
            assert!(matches!(connect(port).await, Err(ForwardError::Refused { .. })));
        }
    }
}
