//! The lab: a genuine KVM on a machine that has none. QEMU without acceleration emulates an x86 machine with AMD SVM; the
//! Debian kernel in it loads `kvm-amd`. README.md beside this crate says how to use it.
//!
//! One program, three roles:
//!
//! * the front door (`lab run`, `up`, `exec`, `down`, `build`) on the host: [`cli`], with [`machine`] (QEMU), [`initramfs`]
//!   and [`client`] (one command's streams);
//! * the [`supervisor`] of a lab that stays up: owns QEMU and shares the lab among the callers of `lab exec`;
//! * `/init` of the lab ([`guest`]): the kernel starts this same binary, which sets the machine up and serves commands.
//!
//! Host and lab talk in frames ([`frame`]) over virtio-serial ports. One port carries one command at a time, so each
//! command has a byte stream of its own, with its own flow control, and no network is involved.

mod cli;
mod client;
mod frame;
mod guest;
mod initramfs;
mod machine;
mod supervisor;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::init::main();
    }
    match cli::main() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // A supervisor outlives whoever read its errors.
            let _ = writeln!(std::io::stderr(), "lab: {error:#}");
            ExitCode::from(cli::LAB_FAILED)
        }
    }
}
