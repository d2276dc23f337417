//! The agent of the guest, in the order a reader meets it:
//!
//! * [`init`] - what PID 1 does from its first instruction to the ready signal: boot marks ([`arch`]), the file systems of
//!   the guest ([`boot`]), the log ([`kmsg`]), then the listeners ([`descriptor`]) and the service.
//! * [`service`] - the RPCs of `agent.proto`: checks a request, calls one of the modules below, and gives errors their code.
//! * [`slots`], [`mounts`], [`overlay`], [`path`] - devices that the VMM attaches, and the file systems on them.
//! * [`volumes`] - volumes of the host of which the guest has a copy, because what watches them there could not hear of changes in a share.
//! * [`network`] - links, addresses and routes of the guest; [`forward`] - connections of the engine to its loopback.
//! * [`cpus`] - vCPUs brought online and taken offline.
//! * [`sandbox`] - the guest as a pod's own container.
//! * [`container`] - one container: its states, its process, its [`cgroup`].
//! * [`oci`] - the helper process that creates a container, and the agent's end of it.
//! * [`streams`], [`stdio`] - vsock streams by token, and the pumps between them and a process.
//! * [`reaper`] - the one place that waits for children.
//! * [`power`] - the way down.
//!
//! The agent trusts the pod engine, not the containers: nothing here follows a path that a container could have changed, and
//! no container can hold up another one, or the agent.

pub mod arch;
pub mod boot;
pub mod cgroup;
pub mod container;
pub mod cpus;
pub mod descriptor;
pub mod forward;
pub mod init;
pub mod kmsg;
pub mod mounts;
pub mod network;
pub mod oci;
pub mod overlay;
pub mod path;
pub mod power;
pub mod reaper;
pub mod sandbox;
pub mod service;
pub mod slots;
pub mod stdio;
pub mod streams;
pub mod volumes;
