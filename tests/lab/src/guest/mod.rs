//! What runs inside the lab: [`init`] is PID 1, which sets the machine up, starts the command server ([`server`]) and reaps
//! orphans. The server is a process of its own so that waiting for a command never races with the reaping of orphans.
//! [`static_keys`] works around a race of QEMU's.

pub(crate) mod init;
pub(crate) mod server;
mod static_keys;
