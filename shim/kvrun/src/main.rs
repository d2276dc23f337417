//! `kvrun`: the OCI command line, a thin door to the pod engine ([`kvrun_pod`]).
//!
//! * [`cli`] - the options.
//! * [`run`] - `kvrun run`: a container in the foreground. [`create`] - in a process that stays; [`daemon`] makes it.
//!   [`exec`] - a further process.
//! * [`engine`] - what each machine is made of; [`monitor`] - the process that has one, and how others ask it for something.
//! * [`attach`] - standing for a process in a guest: [`signals`] forwarded, the [`terminal`] handed over, the same end.
//! * [`commands`] - the commands that only look or ask.
//! * [`check`] - `kvrun check`: whether this host can run virtual machines; [`env`] - `kvrun env`: what would be used, and where it is.
//! * [`error`] - what can go wrong; [`log`] - where errors and traces go.
//!
//! Every failure is one line on standard error, and in the log file if there is one, and an exit code that is not 0.

mod attach;
mod check;
mod cli;
mod commands;
mod create;
mod daemon;
mod debug;
mod engine;
mod env;
mod error;
mod exec;
mod first_thread;
mod guest_proc;
mod log;
mod monitor;
mod run;
mod signals;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command};
use commands::{config, delete, events, kill, list, observe, ps, spec, start, state, update};
use error::{Error, FAILED};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let log = match log::Log::open(cli.global.log.as_deref(), cli.global.log_format.into(), cli.global.debug)
    {
        Ok(log) => log,
        Err(error) => return log::Log::none().fail(&error.to_string(), FAILED),
    };
    let global = &cli.global;
    let done = match &cli.command {
        Command::Check => {
            return finish(&log, check::check(global), "kvrun check: this host cannot run virtual machines");
        }
        Command::Env => return finish(&log, env::env(global), "kvrun env: files are missing"),
        Command::Config(args) => config::config(global, &args.what, &log),
        Command::Run(args) if args.detach => create::run_detached(global, &args.create, &log).map(|()| 0),
        Command::Run(args) => run::run(global, &args.create, args.keep, &log),
        Command::Create(args) => create::create(global, args, &log).map(|()| 0),
        Command::Exec(args) => exec::exec(global, args, &log),
        Command::Debug(args) => debug::debug(global, args, &log),
        command => simple(global, command, &log).map(|()| 0),
    };
    match done {
        Ok(code) => code.into(),
        Err(error) => {
            let code = log.fail(&kvrun_pod::text::chain(&error), error.code());
            log.last_words(&error.last_words());
            code
        }
    }
}

/// The commands whose exit code only says whether they have failed.
fn simple(global: &cli::Global, command: &Command, log: &log::Log) -> Result<(), Error> {
    match command {
        Command::Start(args) => start::start(global, &args.id),
        Command::State(args) => state::state(global, &args.id),
        Command::Kill(args) => kill::kill(global, args),
        Command::Delete(args) => delete::delete(global, &args.id, args.force, log),
        Command::List(args) => list::list(global, args),
        Command::Ps(args) => ps::ps(global, args),
        Command::Pause(args) => start::pause(global, &args.id),
        Command::Resume(args) => start::resume(global, &args.id),
        Command::Update(args) => update::update(global, args),
        Command::Events(args) => events::events(global, args),
        Command::Metrics(args) => observe::metrics(global, args.id.as_deref()),
        Command::Logs(args) => observe::guest_log(global, &args.id),
        Command::Spec(args) => spec::spec(args),
        Command::Features => commands::print_json(&kvrun_pod::features::features()),
        Command::Run(_) | Command::Create(_) | Command::Exec(_) | Command::Debug(_) => Ok(()),
        Command::Check | Command::Env | Command::Config(_) => Ok(()),
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
