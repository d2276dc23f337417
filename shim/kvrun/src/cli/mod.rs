//! The options of the command line: those of runc, whose callers know no other, and a few of our own.
//!
//! * Here - the commands, and the options of all of them.
//! * [`process`] - options of what makes processes: `create`, `run`, `exec`.
//! * [`update`] - options of `update`.

pub(crate) mod process;
pub(crate) mod update;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvrun_pod::assets::{Named, Paths};
use kvrun_pod::cgroup::Driver;
use kvrun_pod::config::{Config, ConfigError, Source};
use kvrun_pod::log::Format;
use kvrun_pod::state_dir::DEFAULT_ROOT;

use process::{CreateArgs, ExecArgs, RunArgs};
use update::UpdateArgs;

/// Runs OCI containers, each in a micro-VM of its own.
#[derive(Debug, Parser)]
#[command(name = "kvrun", version, arg_required_else_help = true, subcommand_required = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Directory for the state of containers
    #[arg(long, value_name = "DIR", default_value = DEFAULT_ROOT, global = true)]
    pub(crate) root: PathBuf,
    /// Configuration, instead of /etc/kvrun/config.toml
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,
    /// File to which errors are appended too
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) log: Option<PathBuf>,
    /// Format of the log file
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    pub(crate) log_format: LogFormat,
    /// Trace what is done, to the log file or standard error
    #[arg(long, global = true)]
    pub(crate) debug: bool,
    /// linux.cgroupsPath is slice:prefix:name, for which the cgroup of a systemd scope is made
    #[arg(long, global = true)]
    pub(crate) systemd_cgroup: bool,
    /// As --systemd-cgroup if it is systemd
    #[arg(long, value_name = "DRIVER", conflicts_with = "systemd_cgroup", global = true)]
    pub(crate) cgroup_manager: Option<CgroupManager>,
    /// Must be false or auto: kvrun runs as root
    #[arg(long, value_name = "BOOL", default_value = "auto", global = true)]
    pub(crate) rootless: Rootless,
    /// Guest kernel, an uncompressed ELF vmlinux [env: KVRUN_KERNEL]
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) kernel: Option<PathBuf>,
    /// Initramfs with the agent, an uncompressed cpio archive [env: KVRUN_INITRAMFS]
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) initramfs: Option<PathBuf>,
    /// The kvrun-vmm program [env: KVRUN_VMM]
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) vmm: Option<PathBuf>,
}

impl Global {
    /// Where the configuration is.
    pub(crate) fn source(&self) -> Source {
        self.config.clone().map_or(Source::Default, Source::File)
    }

    /// Reads the configuration.
    pub(crate) fn load_config(&self) -> Result<Config, ConfigError> {
        Config::load(&self.source())
    }

    /// The paths given on the command line.
    pub(crate) fn given(&self) -> Paths {
        Paths { kernel: self.kernel.clone(), initramfs: self.initramfs.clone(), vmm: self.vmm.clone() }
    }

    /// What a machine is to be made of.
    pub(crate) fn assets(&self, config: &Config) -> Named {
        Named { given: self.given(), configured: config.assets.clone() }
    }

    /// How `linux.cgroupsPath` is to be read; `None`: not at all.
    pub(crate) fn cgroup_driver(&self) -> Option<Driver> {
        match self.cgroup_manager {
            Some(CgroupManager::Disabled) => None,
            Some(CgroupManager::Systemd) => Some(Driver::Systemd),
            _ if self.systemd_cgroup => Some(Driver::Systemd),
            _ => Some(Driver::Cgroupfs),
        }
    }
}

/// Format of the log file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// time="..." level=... msg="..."
    Text,
    /// One object per line with level, msg and time
    Json,
}

impl From<LogFormat> for Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

/// The cgroup driver, by crun's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CgroupManager {
    /// linux.cgroupsPath is a path
    Cgroupfs,
    /// It is slice:prefix:name
    Systemd,
    /// It has no meaning on the host
    Disabled,
}

/// Whether we are not root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rootless {
    /// Yes: not supported
    True,
    /// No
    False,
    /// Whatever we are
    Auto,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a container; its process waits for start
    Create(CreateArgs),
    /// Run the process of a created container
    Start(IdArgs),
    /// Create and start a container; in the foreground, kvrun exits with its exit code
    Run(RunArgs),
    /// Run a further process in a container; in the foreground, kvrun exits with its exit code
    Exec(ExecArgs),
    /// Print the state of a container as JSON
    State(IdArgs),
    /// Send a signal to the process of a container
    Kill(KillArgs),
    /// Delete a container that has stopped
    Delete(DeleteArgs),
    /// List the containers below --root
    List(ListArgs),
    /// List the processes of a container
    Ps(PsArgs),
    /// Hold all processes of a container
    Pause(IdArgs),
    /// Let the processes of a paused container run
    Resume(IdArgs),
    /// Change the limits of a container
    Update(UpdateArgs),
    /// Print figures of a container, and its OOM kills, as lines of JSON
    Events(EventsArgs),
    /// Write a config.json to begin with
    Spec(SpecArgs),
    /// Print what of the OCI runtime-spec is implemented, as JSON
    Features,
    /// Tell whether this host can run virtual machines
    Check,
    /// Print versions, and the kernel, initramfs and VMM in use
    Env,
    /// Print the metrics of a machine, or of all, as Prometheus reads them
    Metrics(MetricsArgs),
    /// Print the log of a guest's kernel and agent
    Logs(LogsArgs),
    /// Run a program of the directory debug.root of the configuration in a guest, with all that the guest has
    Debug(DebugArgs),
    /// Write a configuration to begin with, look for mistakes in one, or print what is in effect
    Config(ConfigArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    pub(crate) what: ConfigCommand,
}

/// What to do with the configuration.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print a file with every setting, its meaning and its default
    Default,
    /// Print every mistake in a file, or in the one in use
    Check {
        /// The file
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Print every setting in effect, and where it comes from
    Show,
}

#[derive(Debug, Args)]
pub(crate) struct IdArgs {
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {
    /// Name of a container, or of a pod of containerd, alone or behind its namespace and a slash
    #[arg(value_name = "ID")]
    pub(crate) id: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Required: what containers print goes to whoever has created them
    #[arg(long, required = true)]
    pub(crate) guest: bool,
    /// Name of a container, or of a pod of containerd, alone or behind its namespace and a slash
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct DebugArgs {
    /// Name of a container, or of a pod of containerd, alone or behind its namespace and a slash
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// The program and its arguments [default: sh]
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Send it to all processes of the container
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// Number or name of the signal
    #[arg(value_name = "SIGNAL", default_value = "TERM")]
    pub(crate) signal: String,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Kill it first if need be; a container that does not exist is no error
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Format of the list
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) format: ListFormat,
    /// Print the names only
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Format of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ListFormat {
    /// For people
    Table,
    /// For programs
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// table: the processes in the guest; json: the IDs of the processes on the host that stand for them
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) format: ListFormat,
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// Options of ps(1): -e, -f, aux, or -o with columns
    #[arg(value_name = "PS-OPTION", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Print the figures once
    #[arg(long)]
    pub(crate) stats: bool,
    /// Time between two lines, such as 5s or 100ms
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub(crate) interval: Duration,
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    /// Directory to write it to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
}

/// A duration as Go writes it, of one number and unit.
fn duration(text: &str) -> Result<Duration, String> {
    let error = || format!("{text:?} is no duration; write one such as 5s, 100ms or 1m");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ns" => 1e-9,
        "us" | "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(error()),
    };
    let number: f64 = number.parse().map_err(|_| error())?;
    Duration::try_from_secs_f64(number * seconds).ok().filter(|d| !d.is_zero()).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_go_before_and_after_the_command() {
        let cli =
            Cli::try_parse_from(["kvrun", "--root", "/r", "run", "-b", "/b", "--log-format=json", "c1"])
                .unwrap();
        assert_eq!(cli.global.root, PathBuf::from("/r"));
        assert_eq!(cli.global.log_format, LogFormat::Json);
        let Command::Run(args) = cli.command else { panic!("not run") };
        assert_eq!((args.create.bundle, args.create.id.as_str()), (PathBuf::from("/b"), "c1"));
    }

    #[test]
    fn commands_are_understood_as_engines_write_them() {
        for line in [
            "--log /l --log-format=json create --bundle /b --pid-file /p --no-pivot --preserve-fds 0 c",
            "--systemd-cgroup create --bundle /b --console-socket /s --no-new-keyring c",
            "--cgroup-manager=cgroupfs --rootless=false start c",
            "exec --process /f --pid-file /p --tty --console-socket /s -d c",
            "exec -u 1000:1000 -e A=b --cwd / --cap CAP_KILL --preserve-fds=0 --additional-gids 5 c ls -l --all",
            "kill --all c 9",
            "kill c TERM",
            "delete --force c",
            "--root /r ps --format json c",
            "ps c -o pid,comm",
            "events --stats c",
            "events --interval=100ms c",
            "update --resources - c",
            "update --memory 100000000 --pids-limit 5 --cpu-quota -1 c",
            "list -f json",
        ] {
            let words = std::iter::once("kvrun").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("100ms"), Ok(Duration::from_millis(100)));
        for text in ["", "5", "s", "-1s", "0s", "1d", "1e400s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
