//! Fixtures of the end-to-end tests, which run `kvrun` for real; the tests are in `tests/`.
//!
//! * [`harness`] - finds `kvrun`, asks `kvrun check` whether this host can run VMs, and runs every test in a process of its own.
//! * [`isolation`] - what that process has of its own, so that tests run side by side and nothing a test leaves behind escapes it.
//! * [`leaks`] - what must be as before when a test is over: processes, mounts, sockets, cgroups, files.
//! * [`fixture`] - [`Test`]: the directories of one test, and how it starts `kvrun`.
//! * [`bundle`] - OCI bundles with a busybox userland.
//! * [`engine`] - podman and docker, with `kvrun` as their runtime.
//! * [`guest`] - what a container sees of the machine that it is in.
//! * [`process`] - a running `kvrun`, its captured streams and its [`Outcome`], every wait bounded.
//! * [`vm`] - a virtual machine without `kvrun` around it, for tests of devices.
//! * [`lifecycle`] - containers created and started by commands of their own.
//! * [`containerd`] - a containerd whose containers are run by our shim.
//! * [`loop_device`] - block devices of this host.
//! * [`cri`] - pods, as a kubelet has containerd run them.
//! * [`netns`] - network namespaces as engines make them.
//! * [`vsock_peer`] - a program for guests, to speak with over vsock.
//! * [`terminal`] - a `kvrun` that runs on a pseudo-terminal.
//! * [`time`] - the one factor by which all bounds scale.
//!
//! The same binary runs on a host with hardware KVM and in the lab; it needs root, busybox and util-linux. Environment:
//! `KVRUN` (the program under test), `KVRUN_VMM_TESTS` (the unit tests of the VMM), `KVRUN_IMAGE` (what `shim/deploy/image` made),
//! `KVRUN_TIMEOUT_FACTOR`, `KVRUN_E2E_REQUIRED=1` (a host that cannot run VMs is a failure).

#![forbid(unsafe_code)]

pub mod bundle;
pub mod containerd;
pub mod cri;
pub mod engine;
pub mod fixture;
pub mod guest;
pub mod harness;
pub mod isolation;
pub mod leaks;
pub mod lifecycle;
pub mod loop_device;
pub mod netns;
pub mod process;
pub mod terminal;
pub mod time;
pub mod trace;
pub mod vm;
pub mod vsock_peer;

pub use bundle::Bundle;
pub use fixture::Test;
pub use harness::{Case, main};
pub use lifecycle::Left;
pub use process::{Outcome, Running};
pub use terminal::Terminal;

/// The tests of a module, named by their functions; a test that is not listed is dead code, which the compiler reports.
#[macro_export]
macro_rules! cases {
    (needs $program:literal: $($test:ident),* $(,)?) => {
        &[$($crate::Case { name: concat!(module_path!(), "::", stringify!($test)), test: $test, needs: Some($program) }),*]
    };
    ($($test:ident),* $(,)?) => {
        &[$($crate::Case { name: concat!(module_path!(), "::", stringify!($test)), test: $test, needs: None }),*]
    };
}
