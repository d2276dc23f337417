//! The front door's command line.

use crate::client::{self, Signals};
use crate::frame::Request;
use crate::guest::server;
use crate::machine::{Machine, Shape};
use crate::supervisor;
use anyhow::{Context, Result, anyhow, ensure};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Exit code of the front door when the lab itself failed, as opposed to the command in it.
pub(crate) const LAB_FAILED: u8 = 125;

/// A real KVM on a machine without one: QEMU emulates AMD SVM, Debian's kernel in it offers /dev/kvm.
#[derive(Parser)]
#[command(name = "lab")]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build the lab's image if it is not there, and print its directory
    Build,
    /// Boot a lab, run a command in it, and throw the lab away; exits with the command's code
    Run {
        #[command(flatten)]
        shape: Shape,
        #[command(flatten)]
        what: What,
    },
    /// Boot a lab that stays up
    Up {
        /// Name of the lab; several may be up
        #[arg(long, default_value = "default")]
        name: supervisor::Name,
        /// Commands that may run at the same time
        #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=30))]
        commands: u8,
        #[command(flatten)]
        shape: Shape,
    },
    /// Run a command in a lab that is up; exits with the command's code
    Exec {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: supervisor::Name,
        #[command(flatten)]
        what: What,
    },
    /// Power a lab off
    Down {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: supervisor::Name,
    },
    /// Own a lab that stays up (started by `up`)
    #[command(hide = true)]
    Supervise {
        #[arg(long)]
        name: supervisor::Name,
        #[arg(long)]
        commands: u8,
        #[arg(long)]
        image: PathBuf,
        #[command(flatten)]
        shape: Shape,
    },
    /// Serve commands inside the lab (started by its init)
    #[command(name = server::ROLE, hide = true)]
    Server { ports: usize },
}

#[derive(clap::Args)]
struct What {
    /// Add to the command's environment (repeatable)
    #[arg(long, value_name = "K=V", value_parser = parse_pair)]
    env: Vec<(OsString, OsString)>,
    /// Directory in the lab to start in
    #[arg(long, default_value = "/")]
    cwd: OsString,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    argv: Vec<OsString>,
}

impl From<What> for Request {
    fn from(what: What) -> Self {
        Self { cwd: what.cwd, env: what.env, argv: what.argv }
    }
}

fn parse_pair(text: &str) -> Result<(OsString, OsString), String> {
    let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("expected K=V")?;
    Ok((key.into(), value.into()))
}

/// Does what the command line says; returns the exit code.
pub(crate) fn main() -> Result<u8> {
    match Cli::parse().command {
        Action::Build => {
            println_path(&build_image()?)?;
            Ok(0)
        }
        Action::Run { shape, what } => {
            let image = build_image()?;
            // Before the first thread starts: QEMU's readers inherit it.
            let signals = Signals::handle(client::block_signals()?);
            run(&image, &shape, &what.into(), &signals)
        }
        Action::Up { name, commands, shape } => {
            supervisor::start(&name, commands, &build_image()?, &shape).map(|()| 0)
        }
        Action::Exec { name, what } => {
            let signals = Signals::handle(client::block_signals()?);
            client::run(supervisor::connect(&name)?, &what.into(), &signals, false)
        }
        Action::Down { name } => supervisor::stop(&name).map(|()| 0),
        Action::Supervise { name, commands, image, shape } => {
            supervisor::main(&name, commands, &image, &shape).map(|()| 0)
        }
        Action::Server { ports } => server::main(ports).map(|()| 0),
    }
}

fn run(image: &Path, shape: &Shape, request: &Request, signals: &Signals) -> Result<u8> {
    let mut machine = Machine::boot(image, shape, 1, None)?;
    let port = machine.ports[0].try_clone().context("duplicate the port")?;
    // In deterministic time nothing may come from outside.
    match client::run(port, request, signals, !shape.icount) {
        Ok(code) => machine.shut_down().map(|()| code),
        Err(error) => Err(anyhow!("{error:#}\n{}", machine.last_words())),
    }
}

/// The directory of the image; it is built if it is not there.
fn build_image() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("image/build");
    let output = Command::new(&script).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("start {}", script.display()))?;
    ensure!(output.status.success(), "the lab image cannot be built: {}", output.status);
    let path = String::from_utf8(output.stdout).context("the image's path is not UTF-8")?;
    Ok(path.trim_end().into())
}

fn println_path(path: &Path) -> Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{}", path.display()).context("print the path")
}
