//! Where every thread of this program starts, and what it may ask of the kernel.
//!
//! A thread belongs to a [`Class`], and each class has a list of system calls: [`table`] has them all, [`filter`] puts them on, [`violation`]
//! is what becomes of any other call. Devices start their workers with [`spawn`] and nothing else, so that no thread can be without its
//! filter.
//!
//! A thread inherits the filters of the one that starts it. So that a worker is not held to what a vCPU may do, nor a vCPU allowed what a
//! worker needs, one thread starts all others and does nothing else: the spawner, whose filter allows what any class is allowed.

mod class;
pub mod filter;
mod spawner;
pub mod table;
#[cfg(test)]
mod tests;
mod violation;

use std::io;
use std::thread::{Builder, JoinHandle};

pub use class::Class;
pub use spawner::confine_spawned;

/// Puts the filter of `class` on the calling thread, if threads are to have filters.
///
/// # Errors
/// When the kernel has no filters, or no memory.
pub fn confine(class: Class) -> Result<(), seccompiler::Error> {
    if spawner::get().is_some() { filter::install(class) } else { Ok(()) }
}

/// Starts a thread of `class` that does `body`. `name` is what `ps` shows of it, at most 15 bytes; `stack` is the size of its stack in
/// bytes, of which only what is touched costs memory.
///
/// Its filter is on before `body` runs, if threads are to have filters ([`confine_spawned`]).
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
    let builder = Builder::new().name(name.to_owned()).stack_size(stack);
    let Some(spawner) = spawner::get() else { return builder.spawn(body) };
    spawner.spawn(move || {
        builder.spawn(move || {
            filter::install_or_die(class);
            body()
        })
    })
}
