//! The classes of threads. Also part of the build script.

/// What a thread is for, and so what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The main thread: the control socket, and everything that is asked for there.
    Main,
    /// A vCPU: runs the guest and answers its accesses to registers of devices.
    Vcpu,
    /// The event loop: vsock, the entropy device, and what else devices wait for.
    EventLoop,
    /// A worker of a shared directory: whatever the guest asks of files.
    Fs,
    /// A worker of a block device.
    Blk,
    /// A worker of a network link.
    Net,
    /// The thread that starts all others, see [`spawn`](super::spawn).
    Spawner,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Main, Self::Vcpu, Self::EventLoop, Self::Fs, Self::Blk, Self::Net, Self::Spawner];

    /// What the names of its threads begin with.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "kvrun-vmm",
            Self::Vcpu => "vcpu",
            Self::EventLoop => "events",
            Self::Fs => "fs",
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Spawner => "spawner",
        }
    }
}
