//! A call that the table does not allow is not made; the process ends, and says which thread wanted to make which call.
//!
//! The filter has the kernel raise `SIGSYS` in the thread instead (seccomp(2), `SECCOMP_RET_TRAP`), and [`on_violation`] is its handler, for
//! good: no filter lets anybody replace it. The kernel itself kills a process in which it cannot be called. Had the kernel killed in the
//! first place, nobody would know for what, for it tells the parent no more than the signal.
//!
//! The handler runs on memory that every thread can write. Whoever executes code of their own in the process can keep it from ending that,
//! though not have the call made; for what only they would ask for, the kernel ends the process and does not ask ([`super::table::NEVER`]).

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fmt::Write;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;

use kvrun_vmm_api::{VIOLATION_EXIT, VIOLATION_PREFIX};

use super::Class;
use crate::arch;

thread_local! {
    /// The class whose filter the thread has; without destructor and lazy start, so that a signal handler can read it.
    static CLASS: Cell<Option<Class>> = const { Cell::new(None) };
}

/// Says that from now on violations of the calling thread are those of `class`.
pub(super) fn blame(class: Class) {
    CLASS.set(Some(class));
}

/// Has violations reported. To be called before there are filters.
///
/// # Errors
/// None that is known.
pub(super) fn handle() -> io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a sigaction(2) of zeroes is a valid one, and sigfillset(3) is given memory for a set of signals.
    let mut action = unsafe {
        // Nothing comes between: neither another signal nor, if the handler itself should do what is not allowed, another violation,
        // of which the process then dies.
        libc::sigfillset(&raw mut (*action.as_mut_ptr()).sa_mask);
        action.assume_init()
    };
    action.sa_sigaction = on_violation as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler only does what a signal handler may (signal-safety(7)).
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What `siginfo_t` has for `SIGSYS` (Linux include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct Info {
    signo: c_int,
    errno: c_int,
    code: c_int,
    address: *const c_void,
    syscall: c_int,
    arch: u32,
}

/// `SYS_SECCOMP` of the same header.
const FROM_SECCOMP: c_int = 1;

/// Allocates nothing and takes no lock: the thread may have been anywhere.
extern "C" fn on_violation(_signal: c_int, info: *const Info, context: *const c_void) {
    // SAFETY: the kernel passes a siginfo_t, of which these are the first fields (sigaction(2), SA_SIGINFO).
    let (code, number) = unsafe { ((*info).code, (*info).syscall) };
    if code == FROM_SECCOMP {
        let class = CLASS.get().map_or("?", Class::name);
        let name = usize::try_from(number).ok().and_then(arch::syscall_name).unwrap_or("?");
        // SAFETY: it is the third argument.
        let [first, second, third] = unsafe { arch::syscall_arguments(context) };
        let mut line = Line::default();
        // A line that is too long is cut.
        let _ = writeln!(
            line,
            "{VIOLATION_PREFIX}thread of class {class}, system call {number} ({name}), arguments {first:#x} {second:#x} {third:#x}"
        );
        // SAFETY: the bytes are there.
        unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length) };
    }
    // SAFETY: ends the process.
    unsafe { libc::_exit(VIOLATION_EXIT) }
}

/// A line of text on the stack.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 256], length: 0 }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.bytes.get_mut(self.length..self.length + text.len()).ok_or(std::fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.length += text.len();
        Ok(())
    }
}
