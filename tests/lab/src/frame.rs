//! The protocol between host and lab: frames of one type byte, a little-endian `u32` payload length, and the payload.
//!
//! Host to lab: `Run`, then any number of `Stdin`, `StdinEnd`, `Signal`, `Nudge`; `Kill` when the caller is gone; `PowerOff`.
//! Lab to host: `Hello` once per port, then per command `Stdout`, `Stderr`, `StdinTaken` and last `Exit`.
//! The host sends at most [`STDIN_WINDOW`] bytes of input that the command has not taken, so the lab reads its port at all
//! times and a signal never waits behind input that nobody reads. Frames that arrive after `Exit` belong to a command that
//! is over, and are dropped.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Most bytes of a frame's payload.
pub(crate) const MAX_PAYLOAD: usize = 4 << 20;
/// Bytes of standard input that may be under way to a command.
pub(crate) const STDIN_WINDOW: usize = 256 << 10;
/// Bytes of a stream that go into one frame.
pub(crate) const CHUNK: usize = 32 << 10;
/// Bytes before the payload.
pub(crate) const HEADER: usize = 5;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// The lab serves this port. Empty.
    Hello = 1,
    /// Run a command: a [`Request`].
    Run = 2,
    /// Bytes of standard input.
    Stdin = 3,
    /// Standard input is at its end. Empty.
    StdinEnd = 4,
    /// The command took this many bytes of standard input (`u32`).
    StdinTaken = 5,
    /// Bytes of standard output.
    Stdout = 6,
    /// Bytes of standard error.
    Stderr = 7,
    /// Send this signal (`u8`) to the command's process group.
    Signal = 8,
    /// The caller is gone: kill the command's process group. Empty.
    Kill = 9,
    /// The command is over, with this exit code (`u8`; 128 + n for signal n).
    Exit = 10,
    /// Write everything out and power the lab off. Empty.
    PowerOff = 11,
    /// Says nothing: that it arrives is an interrupt. Empty.
    Nudge = 12,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [Hello, Run, Stdin, StdinEnd, StdinTaken, Stdout, Stderr, Signal, Kill, Exit, PowerOff, Nudge]
            .into_iter()
            .find(|&kind| kind as u8 == byte)
    }
}

/// One frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// Cuts the first frame off `buffer`; `None` while it is not complete.
    pub(crate) fn cut(buffer: &mut Vec<u8>) -> io::Result<Option<Self>> {
        let Some(&[kind, a, b, c, d]) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let (kind, len) = parse_header([kind, a, b, c, d])?;
        if buffer.len() < HEADER + len {
            return Ok(None);
        }
        let payload = buffer[HEADER..HEADER + len].to_vec();
        buffer.drain(..HEADER + len);
        Ok(Some(Self { kind, payload }))
    }

    /// Reads one frame; `None` at the end of the stream.
    pub(crate) fn read(stream: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        match stream.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        let (kind, len) = parse_header(header)?;
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload)?;
        Ok(Some(Self { kind, payload }))
    }

    /// The exit code of an `Exit` frame, if it is one.
    pub(crate) fn exit_code(&self) -> Option<u8> {
        (self.kind == Kind::Exit).then(|| self.payload.first().copied().unwrap_or(255))
    }
}

fn parse_header([kind, a, b, c, d]: [u8; HEADER]) -> io::Result<(Kind, usize)> {
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    match Kind::from_byte(kind) {
        Some(kind) if len <= MAX_PAYLOAD => Ok((kind, len)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("no frame: type {kind}, {len} bytes"))),
    }
}

/// Appends a frame to `out`.
pub(crate) fn put(out: &mut Vec<u8>, kind: Kind, payload: &[u8]) {
    let len = u32::try_from(payload.len()).expect("payloads are at most MAX_PAYLOAD");
    out.push(kind as u8);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(payload);
}

/// Writes one frame.
pub(crate) fn write(stream: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    put(&mut bytes, kind, payload);
    stream.write_all(&bytes)
}

/// A command to run in the lab.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Directory to start in.
    pub(crate) cwd: OsString,
    /// Additions to the environment.
    pub(crate) env: Vec<(OsString, OsString)>,
    /// Program and arguments.
    pub(crate) argv: Vec<OsString>,
}

impl Request {
    /// As a payload: NUL-terminated strings `cwd`, each `K=V`, an empty one, each argument.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut string = |parts: &[&OsStr]| {
            for part in parts {
                out.extend_from_slice(part.as_bytes());
            }
            out.push(0);
        };
        string(&[&self.cwd]);
        for (key, value) in &self.env {
            string(&[key, OsStr::new("="), value]);
        }
        string(&[]);
        for arg in &self.argv {
            string(&[arg]);
        }
        out
    }

    /// The reverse of [`Self::encode`].
    pub(crate) fn decode(payload: &[u8]) -> Option<Self> {
        let mut strings = payload.strip_suffix(&[0])?.split(|&byte| byte == 0);
        let owned = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        let cwd = owned(strings.next()?);
        let mut env = Vec::new();
        loop {
            let pair = strings.next()?;
            if pair.is_empty() {
                break;
            }
            let equals = pair.iter().position(|&byte| byte == b'=')?;
            env.push((owned(&pair[..equals]), owned(&pair[equals + 1..])));
        }
        let argv: Vec<_> = strings.map(owned).collect();
        (!argv.is_empty()).then_some(Self { cwd, env, argv })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_cut_only_when_complete() {
        let mut whole = Vec::new();
        put(&mut whole, Kind::Stdout, b"hello");
        put(&mut whole, Kind::Exit, &[7]);
        for cut in 0..HEADER + 5 {
            assert_eq!(Frame::cut(&mut whole[..cut].to_vec()).unwrap(), None);
        }
        let first = Frame::cut(&mut whole).unwrap().unwrap();
        assert_eq!((first.kind, first.payload.as_slice()), (Kind::Stdout, b"hello".as_slice()));
        assert_eq!(Frame::cut(&mut whole).unwrap().unwrap().exit_code(), Some(7));
        assert!(whole.is_empty());
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        assert!(Frame::cut(&mut vec![0, 0, 0, 0, 0]).is_err());
        assert!(Frame::cut(&mut vec![Kind::Stdin as u8, 0xff, 0xff, 0xff, 0xff]).is_err());
    }

    #[test]
    fn a_request_survives_the_wire() {
        let request = Request {
            cwd: "/tmp".into(),
            env: vec![("A".into(), "b=c".into()), ("E".into(), "".into())],
            argv: vec!["sh".into(), "-c".into(), "".into()],
        };
        assert_eq!(Request::decode(&request.encode()), Some(request));
        assert_eq!(Request::decode(b"/\0\0"), None);
    }
}
