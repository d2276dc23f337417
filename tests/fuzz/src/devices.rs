//! The devices.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;

use arbitrary::{Result, Unstructured};
use kvrun_vmm::devices::virtio::blk::{Blk, BlkOptions};
use kvrun_vmm::devices::virtio::fs::{Fs, FsOptions};
use kvrun_vmm::devices::virtio::net::{Net, NetConfig};
use kvrun_vmm::devices::virtio::rng::Rng;
use kvrun_vmm::devices::virtio::vsock::Vsock;
use kvrun_vmm::devices::virtio::{GuestRam, VirtioDevice};
use kvrun_vmm::event_loop::{EventLoop, LoopHandle};
use kvrun_vmm::jail::Share;
use kvrun_vmm_api::{FsCache, RateLimit};
use libfuzzer_sys::Corpus;
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, memfd_create, openat};

use crate::driver::{self, Driver};
use crate::tap::Tap;

/// The event loop that devices without a thread of their own run in.
pub(crate) static EVENTS: LazyLock<LoopHandle> = LazyLock::new(|| {
    let (event_loop, handle) = EventLoop::new().expect("event loop");
    thread::spawn(move || event_loop.run().expect("event loop"));
    handle
});

/// Takes a device through its life. `busy`: the queues whose chains it uses up by itself.
pub(crate) fn live(data: &[u8], device: Box<dyn VirtioDevice>, busy: &[usize]) -> Corpus {
    drive(data, device, driver::memory(), busy, |_| Ok(()))
}

/// As [`live`], over this memory; `meanwhile` does the host's part after each round of submissions.
pub(crate) fn drive(
    data: &[u8],
    device: Box<dyn VirtioDevice>,
    mem: GuestRam,
    busy: &[usize],
    mut meanwhile: impl FnMut(&mut Unstructured<'_>) -> Result<()>,
) -> Corpus {
    let mut driver = Driver::new(device, mem);
    let mut input = Unstructured::new(data);
    let mut rounds = || -> Result<()> {
        let buffers = input.arbitrary::<u16>()?;
        driver.fill_buffers(input.bytes(usize::from(buffers).min(input.len() / 2))?);
        driver.start(&mut input)?;
        driver.configure(&mut input)?;
        for _ in 0..input.int_in_range(1..=4)? {
            let queue = usize::from(input.int_in_range(0..=7_u8)?);
            driver.submit(queue, &mut input)?;
            meanwhile(&mut input)?;
            if input.ratio(1, 8)? {
                driver.pause_and_resume();
            }
            if busy.contains(&queue) {
                driver.wait(queue);
            }
        }
        Ok(())
    };
    // An input that ends early has said what it had to say.
    let outcome = rounds();
    driver.finish();
    if outcome.is_ok() || data.len() > 64 { Corpus::Keep } else { Corpus::Reject }
}

/// virtio-blk over an image in memory, or one on a disk, which is served by a ring where there is one; with limits that it keeps running
/// into, and that let it go on at once.
pub(crate) fn blk(data: &[u8]) -> Corpus {
    let choice = data.first().copied().unwrap_or(0);
    let image = if choice & 2 == 0 {
        File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("memfd"))
    } else {
        // From where `tests/fuzz/run` runs it.
        tempfile::tempfile_in("target/fuzz").expect("a file without a name")
    };
    image.set_len(64 * 1024).expect("room");
    let mut limit = RateLimit::default();
    if choice & 4 != 0 {
        (limit.bytes_per_second, limit.bytes_burst) = (1 << 26, 512);
    }
    if choice & 8 != 0 {
        (limit.ops_per_second, limit.ops_burst) = (10_000, 1);
    }
    let options = BlkOptions { read_only: choice & 1 == 1, serial: "serial", queues: 2, limit };
    live(data, Box::new(Blk::open(image.into(), options).expect("a disk")), &[0, 1])
}

/// virtio-fs over a directory that `tests/fuzz/run` makes: a small file system of its own.
pub(crate) fn fs(data: &[u8]) -> Corpus {
    static SHARE: LazyLock<Share> = LazyLock::new(|| {
        let path = std::env::var("KVRUN_FUZZ_SHARE").expect("KVRUN_FUZZ_SHARE: a directory to share");
        Share::unjailed(openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("it"))
    });
    let read_only = data.first().is_some_and(|byte| byte & 1 == 1);
    let options = FsOptions { read_only, cache: FsCache::Auto, writeback: false };
    let device = Fs::new(&SHARE, ".", "share", options).expect("a share");
    live(data, Box::new(device), &[0, 1])
}

/// virtio-net with two pairs of queues, and a host that sends.
pub(crate) fn net(data: &[u8]) -> Corpus {
    static TAP: LazyLock<Tap> = LazyLock::new(Tap::new);
    let config = NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        queue_pairs: 2,
        rx_limit: RateLimit::default(),
        tx_limit: RateLimit::default(),
    };
    let device = Net::open(TAP.queues(), &config).expect("a link");
    drive(data, Box::new(device), driver::memory(), &[1, 3, 4], |input| {
        let length = usize::from(input.arbitrary::<u8>()?).min(input.len());
        TAP.send(input.bytes(length)?);
        Ok(())
    })
}

/// virtio-rng.
pub(crate) fn rng(data: &[u8]) -> Corpus {
    live(data, Box::new(Rng::new(EVENTS.clone())), &[0])
}

/// virtio-vsock, with a host that connects to the guest and writes to whatever is connected.
pub(crate) fn vsock(data: &[u8]) -> Corpus {
    let streams = Arc::new(Mutex::new(Vec::new()));
    let accepted = {
        let streams = streams.clone();
        Box::new(move |_port, stream: OwnedFd| {
            streams.lock().expect("no panic").push(UnixStream::from(stream));
        })
    };
    let (device, handle) = Vsock::new(EVENTS.clone(), 3, vec![1024, 1], accepted).expect("a device");
    drive(data, Box::new(device), driver::memory(), &[1], |input| {
        if input.ratio(1, 4)? {
            let (near, far) = UnixStream::pair().expect("socket pair");
            far.set_nonblocking(true).expect("a socket");
            near.set_nonblocking(true).expect("a socket");
            handle.connect(input.int_in_range(0..=3)?, far.into(), Box::new(|_| {}));
            streams.lock().expect("no panic").push(near);
        }
        for stream in streams.lock().expect("no panic").iter_mut() {
            let length = usize::from(input.arbitrary::<u8>()?).min(input.len());
            // A full socket is as good.
            let _ = stream.write(input.bytes(length)?);
        }
        Ok(())
    })
}

/// The MMIO transport: any access in any order, then a device that is used as it should be.
pub(crate) fn mmio(data: &[u8]) -> Corpus {
    let mut driver = Driver::new(Box::new(Rng::new(EVENTS.clone())), driver::memory());
    let mut input = Unstructured::new(data);
    let mut steps = || -> Result<()> {
        if input.arbitrary()? {
            driver.start(&mut input)?;
        }
        while !input.is_empty() {
            driver.poke(&mut input)?;
        }
        Ok(())
    };
    let outcome = steps();
    driver.finish();
    if outcome.is_ok() { Corpus::Keep } else { Corpus::Reject }
}
