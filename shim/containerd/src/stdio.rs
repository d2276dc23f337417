//! What a process reads from and writes to, as containerd names it: FIFOs, files, or a program that takes logs (containerd's
//! `core/runtime/v2/README.md`, "Logging").

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as Standard};

use kvrun_pod::stdio::Stdio;
use rustix::fs::OFlags;

use crate::error::{Error, host};

/// Where the streams of a process are, as in the request; empty for those that are not wanted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// A program that takes a process's output.
#[derive(Debug)]
pub(crate) struct Logger(Option<Child>);

impl Drop for Logger {
    fn drop(&mut self) {
        // It ends by itself at the end of the output, after it has written down what it has, and nobody waits for that but the kernel.
        if let Some(mut child) = self.0.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}

/// The open streams.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    pub(crate) stdio: Stdio,
    /// Another writing end of the input: it ends when containerd says so ([`CloseIO`]), not when a client goes away that may come back.
    ///
    /// [`CloseIO`]: https://pkg.go.dev/github.com/containerd/containerd/api/runtime/task/v3#CloseIORequest
    pub(crate) input: Option<OwnedFd>,
    pub(crate) logger: Option<Logger>,
}

/// Whose output it is, for a logger.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) id: &'a str,
}

impl Names {
    /// Opens them. A logger has started when this returns.
    pub(crate) fn open(&self, owner: Owner<'_>) -> Result<Opened, Error> {
        let failed = |name: &str| host(format!("open {name} for the container"));
        let mut opened = Opened::default();
        if !self.stdin.is_empty() {
            let (reader, keeper) = open_input(path_of(&self.stdin)).map_err(failed(&self.stdin))?;
            opened.stdio.stdin = Some(reader);
            opened.input = Some(keeper);
        }
        if let Some(program) = self.stdout.strip_prefix("binary://") {
            let (logger, stdout, stderr) = start_logger(program, owner).map_err(failed(&self.stdout))?;
            opened.logger = Some(logger);
            opened.stdio.stdout = Some(stdout);
            opened.stdio.stderr = Some(stderr).filter(|_| !self.terminal);
            return Ok(opened);
        }
        if !self.stdout.is_empty() {
            opened.stdio.stdout = Some(open_output(&self.stdout).map_err(failed(&self.stdout))?);
        }
        if !self.stderr.is_empty() && !self.terminal {
            opened.stdio.stderr = Some(open_output(&self.stderr).map_err(failed(&self.stderr))?);
        }
        Ok(opened)
    }
}

fn path_of(name: &str) -> &Path {
    Path::new(name.strip_prefix("fifo://").unwrap_or(name))
}

fn open_input(path: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
    // Not to wait for each other, nor for a client.
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    let reader = OpenOptions::new().read(true).custom_flags(nonblock).open(path)?;
    if !reader.metadata()?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a FIFO"));
    }
    let keeper = OpenOptions::new().write(true).custom_flags(nonblock).open(path)?;
    blocking(&reader)?;
    Ok((reader.into(), keeper.into()))
}

fn open_output(name: &str) -> io::Result<OwnedFd> {
    if let Some(path) = name.strip_prefix("file://") {
        let path = PathBuf::from(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        return Ok(OpenOptions::new().append(true).create(true).mode(0o600).open(path)?.into());
    }
    let path = path_of(name);
    if !std::fs::metadata(path)?.file_type().is_fifo() {
        return Ok(OpenOptions::new().append(true).open(path)?.into());
    }
    // Also for reading: so the output waits for a containerd that is being restarted, instead of failing.
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    let fifo = OpenOptions::new().read(true).write(true).custom_flags(nonblock).open(path)?;
    blocking(&fifo)?;
    Ok(fifo.into())
}

fn blocking(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)? - OFlags::NONBLOCK;
    Ok(rustix::fs::fcntl_setfl(file, flags)?)
}

/// Starts a logging program: it reads standard output from descriptor 3 and standard error from 4, and closes 5 once it is ready.
fn start_logger(uri: &str, owner: Owner<'_>) -> io::Result<(Logger, OwnedFd, OwnedFd)> {
    let (program, query) = uri.split_once('?').unwrap_or((uri, ""));
    let (stdout_reader, stdout) = io::pipe()?;
    let (stderr_reader, stderr) = io::pipe()?;
    let (mut ready, ready_writer) = io::pipe()?;
    let mut command = Command::new(program);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        command.arg(decoded(key)).arg(decoded(value));
    }
    command.env("CONTAINER_ID", owner.id).env("CONTAINER_NAMESPACE", owner.namespace);
    command.stdin(Standard::null()).stdout(Standard::null()).stderr(Standard::null());
    let inherited = [(stdout_reader.as_fd(), 3), (stderr_reader.as_fd(), 4), (ready_writer.as_fd(), 5)];
    let child = kvrun_pod::spawn::in_new_session(&mut command, &inherited)?;
    drop(ready_writer);
    // Its end-of-file, or a byte.
    let _ = ready.read(&mut [0])?;
    Ok((Logger(Some(child)), stdout.into(), stderr.into()))
}

/// A part of a query (RFC 3986, 2.1), as bytes that are text.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let hex = |digit: Option<u8>| digit.and_then(|digit| char::from(digit).to_digit(16));
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => match (hex(rest.next()), hex(rest.next())) {
                (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
                _ => bytes.push(b'%'),
            },
            byte => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    const OWNER: Owner<'_> = Owner { namespace: "tests", id: "c1" };

    #[test]
    fn query_is_decoded() {
        assert_eq!(decoded("a%20b+c%2Fd"), "a b c/d");
        assert_eq!(decoded("100%"), "100%");
        assert_eq!(decoded("%zz"), "%");
    }

    #[test]
    fn nothing_is_opened_that_is_not_named() {
        let opened = Names::default().open(OWNER).unwrap();
        assert!(
            opened.stdio.stdin.is_none() && opened.stdio.stdout.is_none() && opened.stdio.stderr.is_none()
        );
        assert!(opened.input.is_none() && opened.logger.is_none());
    }

    #[test]
    fn fifo_is_opened_without_anybody_at_its_other_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for name in ["in", "out"] {
            mknodat(CWD, path(name), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        }
        let names = Names { stdin: path("in"), stdout: path("out"), ..Default::default() };
        let opened = names.open(OWNER).unwrap();
        // Without a reader there is room for it, and no signal.
        File::from(opened.stdio.stdout.unwrap()).write_all(b"kept").unwrap();
        let mut input = File::from(opened.stdio.stdin.unwrap());
        std::fs::write(path("in"), "typed").unwrap();
        let mut text = [0; 5];
        input.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"typed");
        // That client is gone, and the input has not ended; now it does.
        drop(opened.input);
        assert_eq!(input.read(&mut text).unwrap(), 0);
    }

    #[test]
    fn input_that_is_no_fifo_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let names = Names { stdin: path.to_str().unwrap().to_owned(), ..Default::default() };
        let error = kvrun_pod::text::chain(&names.open(OWNER).unwrap_err());
        assert!(error.contains("/file for the container") && error.contains("not a FIFO"), "{error}");
    }

    #[test]
    fn file_takes_both_streams_and_keeps_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/file");
        let name = format!("file://{}", path.display());
        let names = Names { stdout: name.clone(), stderr: name, ..Default::default() };
        for _ in 0..2 {
            let opened = names.open(OWNER).unwrap();
            File::from(opened.stdio.stdout.unwrap()).write_all(b"out,").unwrap();
            File::from(opened.stdio.stderr.unwrap()).write_all(b"err.").unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "out,err.out,err.");
    }

    #[test]
    fn logger_gets_the_streams_and_whose_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let (program, log) = (dir.path().join("logger"), dir.path().join("log"));
        let script = "#!/bin/sh\nexec >\"$2\"\nexec 5>&-\necho $1 $CONTAINER_NAMESPACE $CONTAINER_ID\ncat <&3; cat <&4\n";
        let text = dir.path().join("script");
        std::fs::write(&text, script).unwrap();
        // What a test beside this one starts inherits a descriptor that is open here, and what is open for writing cannot be run.
        assert!(Command::new("install").args([&text, &program]).status().unwrap().success());
        let names = Names {
            stdout: format!("binary://{}?to={}", program.display(), log.display()),
            ..Default::default()
        };
        let mut opened = names.open(OWNER).unwrap();
        File::from(opened.stdio.stdout.take().unwrap()).write_all(b"out\n").unwrap();
        File::from(opened.stdio.stderr.take().unwrap()).write_all(b"err\n").unwrap();
        let mut child = opened.logger.take().unwrap().0.take().unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read_to_string(log).unwrap(), "to tests c1\nout\nerr\n");
    }

    #[test]
    fn logger_that_is_not_there_is_named() {
        let names = Names { stdout: "binary:///no/such/logger".into(), ..Default::default() };
        let error = kvrun_pod::text::chain(&names.open(OWNER).unwrap_err());
        assert!(error.contains("binary:///no/such/logger"), "{error}");
    }
}
