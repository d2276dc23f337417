//! `kvrun`: the OCI command line, a thin door to the pod engine ([`kvrun_pod`]).
//!
//! * [`cli`] - the options.
//! * [`run`] - `kvrun run`: a container in the foreground, with [`signals`] forwarded and the [`terminal`] handed over.
//! * [`check`] - `kvrun check`: whether this host can run virtual machines.
//! * [`env`] - `kvrun env`: what would be used, and where it is.
//! * [`log`] - where errors and traces go.
//!
//! Every failure is one line on standard error, and in the log file if there is one, and an exit code that is not 0.

mod check;
mod cli;
mod env;
mod log;
mod run;
mod signals;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command};

/// The exit code for a failure of kvrun itself.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let log = match log::Log::open(cli.global.log.as_deref(), cli.global.log_format, cli.global.debug) {
        Ok(log) => log,
        Err(error) => return log::Log::none().fail(&error.to_string(), FAILED),
    };
    match cli.command {
        Command::Run(args) => match run::run(&cli.global, &args, &log) {
            Ok(code) => code.into(),
            Err(error) => {
                let code = log.fail(&kvrun_pod::text::chain(&error), error.code());
                log.last_words(error.vm_end());
                code
            }
        },
        Command::Check => {
            finish(&log, check::check(&cli.global), "kvrun check: this host cannot run virtual machines")
        }
        Command::Env => finish(&log, env::env(&cli.global), "kvrun env: files are missing"),
    }
}

/// The end of a command that prints a report and says whether all is well.
fn finish(log: &log::Log, result: anyhow::Result<bool>, otherwise: &str) -> ExitCode {
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => log.fail(&format!("{otherwise}; see the table above"), FAILED),
        Err(error) => log.fail(&format!("{error:#}"), FAILED),
    }
}

/// Help and version are what was asked for; anything else is one line.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // Nothing is left to do if standard output is gone.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    // clap explains at length; its first paragraph says what is wrong, over several lines if arguments are missing.
    let first: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let line = first.join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    log::Log::none().fail(&format!("{line}; see `kvrun --help`"), FAILED)
}
