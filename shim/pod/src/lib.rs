//! The pod engine: one micro-VM and the containers in it.
//!
//! Its doors (the OCI command line, later the containerd shim) call it in this order:
//!
//! 1. [`share::enter_mount_namespace`], while the process has one thread.
//! 2. [`Config`](config::Config) is what whoever runs the host says of all machines. [`Bundle::load`](bundle::Bundle::load) reads and checks a bundle; [`VmSize`](size::VmSize) says how large a machine it asks for;
//!    [`assets`] finds the kernel, the initramfs and the VMM.
//! 3. [`ContainerDir::claim`](state_dir::ContainerDir::claim) makes the container ID ours; [`HostCgroup::join`](cgroup::HostCgroup::join)
//!    puts this process, and so everything it starts, into the container's cgroup on the host.
//! 4. [`Starting::spawn`](pod::Starting::spawn) starts the VMM; while the guest boots, [`Share`](share::Share) makes what
//!    the guest may see; [`Starting::ready`](pod::Starting::ready) is a running [`Pod`](pod::Pod).
//! 5. [`Pod::create`](pod::Pod::create) makes a [`Container`](container::Container), which is started, waited for and signalled;
//!    [`Pod::shutdown`](pod::Pod::shutdown) ends the machine.
//!
//! [`network`] makes the host's ends of links, [`disks`] has the guest use block devices of the host, [`growth`] makes the machine as large as its
//! containers ask. Root file systems that the guest mounts itself are on a disk ([`root_disk`]) or in [`layers`]. Volumes of
//! which programs want to hear when they change are copied to the guest ([`watched`]). The machine may stand for a pod's own container ([`sandbox`]). [`observe`] shows the pod's metrics and its guest's
//! log to whoever asks, and [`debug`] runs programs in the guest.
//!
//! Everything set up undoes itself when dropped, in reverse order: the machine, the share, the cgroup, the state directory.
//!
//! Who talks to whom: [`vmm`] owns the VMM process and its control socket, [`agent`] the ttrpc connection to the agent, [`stdio`]
//! the streams of a container. Nothing here parses bytes the guest chose, except size-bounded protobuf from the agent and the
//! replies of the VMM. One current-thread tokio runtime; threads only where a descriptor of the caller may block ([`stdio`]).

pub mod accept;
pub mod agent;
pub mod annotations;
pub mod assets;
pub mod bundle;
pub mod cgroup;
pub mod channel;
pub mod config;
pub mod container;
pub mod container_id;
pub mod debug;
pub mod disks;
pub mod features;
pub mod growth;
pub mod hooks;
pub mod host_process;
pub mod layers;
pub mod log;
pub mod network;
pub mod observe;
pub mod pod;
pub mod process;
pub mod record;
pub mod root_disk;
pub mod sandbox;
pub mod share;
pub mod size;
pub mod spawn;
pub mod state_dir;
pub mod stdio;
mod sys;
pub mod text;
pub mod vmm;
pub mod watched;
