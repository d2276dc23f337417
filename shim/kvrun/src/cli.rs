//! The options of the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvrun_pod::assets::Explicit;
use kvrun_pod::state_dir::DEFAULT_ROOT;

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
    /// File to which errors are appended too
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) log: Option<PathBuf>,
    /// Format of the log file
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    pub(crate) log_format: LogFormat,
    /// Trace what is done, to the log file or standard error
    #[arg(long, global = true)]
    pub(crate) debug: bool,
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
    /// The paths given on the command line.
    pub(crate) fn explicit(&self) -> Explicit {
        Explicit { kernel: self.kernel.clone(), initramfs: self.initramfs.clone(), vmm: self.vmm.clone() }
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

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a container in the foreground; exits with its exit code
    Run(RunArgs),
    /// Tell whether this host can run virtual machines
    Check,
    /// Print versions, and the kernel, initramfs and VMM in use
    Env,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Directory of the bundle, which has the config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// File to which the process ID of this program, which lives as long as the container, is written
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
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
        assert_eq!((args.bundle, args.id.as_str()), (PathBuf::from("/b"), "c1"));
    }
}
