//! What runs inside the lab: [`init`] is PID 1, which sets the machine up, starts the command server ([`server`]) and reaps
//! orphans. The server is a process of its own so that waiting for a command never races with the reaping of orphans.

pub(crate) mod init;
pub(crate) mod server;
