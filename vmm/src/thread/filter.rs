//! The filters: the table as BPF programs, made by the build script.

use seccompiler::{apply_filter, sock_filter};

use super::{Class, violation};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// The program of a class; a call that it does not allow is not made, and its thread gets SIGSYS: see [`violation`]. [`NEVER`] is
/// under all of them.
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
    // All others inherit from the spawner. Of several filters the strictest answer counts.
    if matches!(class, Class::Main | Class::Spawner) {
        apply_filter(NEVER)?;
    }
    // Threads that have nothing to do with files: the C library asks /proc about overcommitting before it gives memory back, and takes
    // what it would be told in the jail anyway for an answer.
    if !matches!(class, Class::Fs | Class::Spawner) {
        apply_filter(NO_FILES)?;
    }
    if class == Class::Spawner {
        // The flags of clone3(2) are in memory, where a filter cannot look. Told that there is no such call, the C library takes clone(2).
        apply_filter(NO_CLONE3)?;
    }
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
