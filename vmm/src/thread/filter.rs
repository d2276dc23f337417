//! The filters: the table as BPF programs, made by the build script.

use seccompiler::{apply_filter, sock_filter};

use super::{Class, violation};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// The program of a class; a call that it does not allow is not made, and its thread gets SIGSYS: see [`violation`]. Those of the main thread and
/// the spawner have the kernel end the process for what is in [`super::table::NEVER`], and all other threads inherit from the spawner: of
/// several filters the strictest answer counts.
pub const fn of(class: Class) -> &'static [sock_filter] {
    match class {
        Class::Main => MAIN,
        Class::Vcpu => VCPU,
        Class::EventLoop => EVENT_LOOP,
        Class::Fs => FS,
        Class::Blk => BLK,
        Class::Net => NET,
        Class::Spawner => SPAWNER,
    }
}

/// Puts the filter of `class` on the calling thread, for as long as it lives.
///
/// # Errors
/// When the kernel has no filters, or no memory.
pub fn install(class: Class) -> Result<(), seccompiler::Error> {
    violation::blame(class);
    apply_filter(of(class))
}

/// As [`install`]; without the filter there is no thread.
pub(super) fn install_or_die(class: Class) {
    if let Err(error) = install(class) {
        log::error!("cannot filter the system calls of a thread of class {}: {error}", class.name());
        std::process::abort();
    }
}
