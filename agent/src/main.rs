//! `kvrun-agent`: PID 1 of the guest. The same binary is the helper process that applies one OCI config
//! (`kvrun-agent oci create ...`), because that forks, waits and joins namespaces, which PID 1 must not.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        kvrun_agent::init::run();
    }
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    kvrun_agent::oci::helper::main(&args)
}
