//! Options of what makes processes.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Directory of the bundle, which has the config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// Unix socket to which the host's end of the container's terminal is sent
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// File to which the ID of a process is written that lives as long as the container and ends as it does
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Without effect: a guest's root can always be pivoted
    #[arg(long)]
    pub(crate) no_pivot: bool,
    /// Without effect: a guest has no keyring of the caller's
    #[arg(long)]
    pub(crate) no_new_keyring: bool,
    /// Must be 0: no descriptor reaches into a guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) preserve_fds: u32,
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) create: CreateArgs,
    /// Do not wait for its end
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Leave the container to `delete` when it has ended, as with --detach
    #[arg(long)]
    pub(crate) keep: bool,
    /// Without effect: kvrun is no reaper of others
    #[arg(long)]
    pub(crate) no_subreaper: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// File with an OCI process to run, instead of the options below and of a command
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["command", "cwd", "env", "user", "additional_gids", "cap", "no_new_privs"])]
    pub(crate) process: Option<PathBuf>,
    /// Give it a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Do not wait for its end
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Unix socket to which the host's end of its terminal is sent
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// File to which the ID of a process is written that lives as long as it and ends as it does
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Its working directory
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// Set a variable of its environment
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Its user
    #[arg(short, long, value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,
    /// Add a group
    #[arg(short = 'g', long, value_name = "GID")]
    pub(crate) additional_gids: Vec<u32>,
    /// Add a capability
    #[arg(short, long, value_name = "CAP")]
    pub(crate) cap: Vec<String>,
    /// It cannot gain privileges by exec
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// Refused, unless it is one that engines ask for by default: the guest has no AppArmor
    #[arg(long, value_name = "PROFILE")]
    pub(crate) apparmor: Option<String>,
    /// Refused, unless empty: the guest has no SELinux
    #[arg(long, value_name = "LABEL")]
    pub(crate) process_label: Option<String>,
    /// Also in a paused container, where it waits
    #[arg(long)]
    pub(crate) ignore_paused: bool,
    /// Must be 0: no descriptor reaches into a guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) preserve_fds: u32,
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// The command to run
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}
