//! What PID 1 does, in order. Everything up to the ready signal is boot time: no thread is started, nothing is printed.

use std::convert::Infallible;
use std::path::PathBuf;

use kvrun_agent_api::{READY_PORT, RPC_PORT, STREAM_PORT};
use nix::sys::reboot::{RebootMode, reboot};

use crate::arch::BootMarks;
use crate::boot::{self, BootError};
use crate::descriptor::{Listener, connect_to_host};
use crate::kmsg;
use crate::oci::error_chain;
use crate::reaper::Reaper;
use crate::service::AgentService;

/// Why PID 1 cannot go on.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    #[error("cannot listen on vsock port {0}")]
    Listen(u32, #[source] std::io::Error),
    #[error("cannot serve ttrpc")]
    Serve(#[from] ttrpc::Error),
    #[error("cannot reset the machine")]
    Reboot(#[from] nix::errno::Errno),
}

/// Runs the guest. Never returns: should it fail, the kernel panics, which is how the VMM learns of it.
pub fn run() -> ! {
    let marks = BootMarks::open();
    marks.write(BootMarks::INIT);
    let Err(err) = start(marks);
    eprintln!("kvrun-agent: {}", error_chain(&err));
    std::process::exit(1)
}

fn start(marks: BootMarks) -> Result<Infallible, InitError> {
    boot::set_up()?;
    kmsg::install();
    // One thread. The blocking pool starts threads when it is used, and lets them go when it is not.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build()
        .map_err(InitError::Runtime)?;
    runtime.block_on(serve(marks))
}

async fn serve(marks: BootMarks) -> Result<Infallible, InitError> {
    let listen = |port| Listener::vsock(port).map_err(|err| InitError::Listen(port, err));
    let reaper = Reaper::start().map_err(InitError::Runtime)?;
    let service = AgentService::new(PathBuf::from("/proc/self/exe"), reaper);
    let server = service.serve(listen(RPC_PORT)?, listen(STREAM_PORT)?).await?;
    marks.write(BootMarks::READY);
    drop(marks);
    // Kept open: that it closes tells the host that the agent is gone.
    let ready = connect_to_host(READY_PORT).await;
    if let Err(err) = &ready {
        log::error!("cannot tell the host that the agent is ready (vsock port {READY_PORT}): {err}");
    }
    service.power_off().await;
    drop((server, ready));
    // kernel command line: reboot=k, a reset through the keyboard controller, which the VMM takes for the power switch.
    Ok(reboot(RebootMode::RB_AUTOBOOT)?)
}
