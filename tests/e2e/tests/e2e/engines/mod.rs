//! Containers that podman and docker run with `kvrun`.

pub(crate) mod docker;
pub(crate) mod podman;

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result};

/// What a web server says about a path.
fn http_get(address: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
