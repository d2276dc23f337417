//! What `kvrun` promises, one module per subject.

use std::process::ExitCode;

use kvrun_e2e::vsock_peer;

mod bad_config;
mod command_line;
mod config;
mod containerd;
mod cri;
mod debug;
mod deploy;
mod engines;
mod exec;
mod exit;
mod faults;
mod files;
mod hooks;
mod inspect;
mod installation;
mod lifecycle;
mod network;
mod observe;
mod parallel;
mod pod_faults;
mod pods;
mod process;
mod resources;
mod signals;
mod soak;
mod spec;
mod stdio;
mod terminal;
mod vm;

fn main() -> ExitCode {
    if std::env::args().next().is_some_and(|name| name.ends_with(vsock_peer::NAME)) {
        return match vsock_peer::main() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error:#}", vsock_peer::NAME);
                ExitCode::FAILURE
            }
        };
    }
    let mut groups = vec![
        exit::CASES,
        stdio::CASES,
        terminal::CASES,
        signals::CASES,
        process::CASES,
        resources::CASES,
        files::CASES,
        faults::CASES,
        installation::CASES,
        command_line::CASES,
        config::CASES,
        bad_config::CASES,
        parallel::CASES,
        spec::process::CASES,
        spec::mounts::CASES,
        spec::linux::CASES,
        spec::resources::CASES,
        spec::disks::CASES,
        spec::hooks::CASES,
        spec::refused::CASES,
        lifecycle::CASES,
        exec::CASES,
        inspect::CASES,
        hooks::CASES,
        network::CASES,
        observe::CASES,
        debug::CASES,
        engines::podman::CASES,
        engines::docker::CASES,
        pods::CASES,
        containerd::CASES,
        cri::CASES,
        cri::limits::CASES,
        cri::OLDER_CASES,
        deploy::CASES,
        pod_faults::CASES,
        soak::CASES,
    ];
    groups.extend(vm::GROUPS);
    kvrun_e2e::main(&groups)
}
