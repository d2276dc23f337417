//! The log of the guest: that of its kernel, which the agent writes into too.
//!
//! The agent reads it out. One that does not answer is when the log is wanted most, so then it is the end of the serial console, which the VMM has: the kernel writes
//! warnings there and worse, and the agent its errors.

use std::fmt::Write;

use crate::pod::{Pod, PodError};
use crate::text;

/// The log in lines that do nothing to a terminal.
pub(super) async fn read(pod: &Pod) -> Result<String, PodError> {
    let mut log = String::new();
    let said = match pod.or_death(pod.agent.read_log()).await {
        Ok(said) => String::from_utf8_lossy(&said).into_owned(),
        Err(error @ PodError::Died(_)) => return Err(error),
        Err(error) => {
            // Writing to a string does not fail.
            let _ = writeln!(
                log,
                "kvrun: the log cannot be had ({}); what follows is the end of the guest's serial console",
                text::chain(&error)
            );
            pod.vmm.console().await?
        }
    };
    for line in text::lines(&said) {
        log.push_str(&line);
        log.push('\n');
    }
    Ok(log)
}
