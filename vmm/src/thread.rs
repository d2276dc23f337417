//! Where every thread of this program starts.
//!
//! A thread belongs to a [`Class`], which says what it may ask of the kernel. Devices start their workers with [`spawn`] and nothing
//! else, so that no thread can be without its class.

use std::io;
use std::thread::{Builder, JoinHandle};

/// What a thread is for, and so what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The main thread: the control socket, and everything that is asked for there.
    Main,
    /// A vCPU: runs the guest and answers its accesses to registers of devices.
    Vcpu,
    /// The event loop: vsock and the entropy device.
    EventLoop,
    /// A worker of a shared directory: whatever the guest asks of files.
    Fs,
    /// A worker of a block device.
    Blk,
    /// A worker of a network link.
    Net,
}

/// Starts a thread of `class` that does `body`. `name` is what `ps` shows of it, at most 15 bytes; `stack` is the size of its stack in
/// bytes, of which only what is touched costs memory.
///
/// A panic in `body` ends the process, except in tests, where whoever joins the thread gets it.
///
/// # Errors
/// When the host is out of threads or memory.
pub fn spawn<T: Send + 'static>(
    class: Class,
    name: &str,
    stack: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    log::trace!("starting thread {name}, {class:?}");
    Builder::new().name(name.to_owned()).stack_size(stack).spawn(body)
}
