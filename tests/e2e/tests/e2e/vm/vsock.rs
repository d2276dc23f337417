//! Streams between host and guest.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use kvrun_e2e::vm::{Machine, Shape};
use kvrun_e2e::{Case, Test, cases, time, vsock_peer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::task::JoinSet;

pub(crate) const CASES: &[Case] = cases![
    thousands_of_connections_live_side_by_side,
    small_stream_is_served_beside_a_big_one,
    each_side_may_end_first_and_hear_the_other_out,
];

const PORT: u32 = 5000;

fn boot(t: &Test) -> Result<Machine> {
    let vm = Machine::boot(t, Shape { vcpus: 2, ..Shape::default() })?;
    fs::copy(std::env::current_exe()?, vm.rootfs().join("bin").join(vsock_peer::NAME))?;
    Ok(vm)
}

fn connect(vm: &Machine) -> Result<UnixStream> {
    let stream = vm.block_on(vm.pod().vmm().connect(PORT))?;
    stream.set_read_timeout(Some(time::scaled(time::RUN)))?;
    Ok(stream)
}

fn thousands_of_connections_live_side_by_side(t: &Test) -> Result<()> {
    const COUNT: usize = 2000;
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })?;
    let vm = boot(t)?;
    let peer = vm.start(&format!("vsock-peer echo {PORT} {COUNT}"))?;
    peer.until("ready\n")?;
    let mut streams = Vec::new();
    while streams.len() < COUNT {
        // Some at a time, as an engine would that is in a hurry.
        let batch = (COUNT - streams.len()).min(50);
        let connected: Vec<_> = vm.block_on(async {
            let mut requests = JoinSet::new();
            for _ in 0..batch {
                let vmm = vm.pod().vmm().clone();
                requests.spawn(async move { vmm.connect(PORT).await });
            }
            requests.join_all().await
        });
        streams.extend(connected.into_iter().collect::<Result<Vec<_>, _>>()?);
    }
    // All of them speak before any is listened to.
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.set_read_timeout(Some(time::scaled(time::RUN)))?;
        stream.write_all(&number.to_le_bytes())?;
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut bytes = [0; size_of::<usize>()];
        stream.read_exact(&mut bytes).with_context(|| format!("stream {number}"))?;
        ensure!(usize::from_le_bytes(bytes) == number, "stream {number} hears another");
    }
    drop(streams);
    let done = peer.wait()?;
    ensure!(done.stdout == format!("ready\nserved {COUNT}\n"), "{done}");
    // And they are gone: there is room again.
    ensure!(vm.sh("echo still here")? == "still here\n");
    Ok(())
}

fn small_stream_is_served_beside_a_big_one(t: &Test) -> Result<()> {
    const BIG: usize = 48 << 20;
    const WORDS: usize = 20;
    let vm = boot(t)?;
    let peer = vm.start(&format!("vsock-peer echo {PORT} 2"))?;
    peer.until("ready\n")?;
    let (mut big, mut small) = (connect(&vm)?, connect(&vm)?);
    let come_back = Arc::new(AtomicUsize::new(0));
    let writer = thread::spawn({
        let mut big = big.try_clone()?;
        move || -> std::io::Result<()> {
            let bytes = vec![7; 1 << 20];
            (0..BIG / bytes.len()).try_for_each(|_| big.write_all(&bytes))?;
            big.shutdown(Shutdown::Write)
        }
    });
    let reader = thread::spawn({
        let come_back = come_back.clone();
        move || -> std::io::Result<()> {
            let mut bytes = vec![0; 1 << 20];
            loop {
                match big.read(&mut bytes)? {
                    0 => return Ok(()),
                    count => come_back.fetch_add(count, Ordering::Relaxed),
                };
            }
        }
    });
    while come_back.load(Ordering::Relaxed) == 0 {
        thread::yield_now();
    }
    for _ in 0..WORDS {
        small.write_all(b"word")?;
        small.read_exact(&mut [0; 4])?;
    }
    let meanwhile = come_back.load(Ordering::Relaxed);
    ensure!(meanwhile < BIG, "{WORDS} words took as long as {BIG} bytes");
    drop(small);
    writer.join().map_err(|_| anyhow!("panic"))??;
    reader.join().map_err(|_| anyhow!("panic"))??;
    ensure!(come_back.load(Ordering::Relaxed) == BIG);
    ensure!(peer.wait()?.code == 0);
    Ok(())
}

fn each_side_may_end_first_and_hear_the_other_out(t: &Test) -> Result<()> {
    const LENGTH: usize = 1_000_000;
    let vm = boot(t)?;
    // The host ends first: all that is on its way comes back.
    let peer = vm.start(&format!("vsock-peer echo {PORT} 1"))?;
    peer.until("ready\n")?;
    let mut stream = connect(&vm)?;
    let writer = thread::spawn({
        let mut stream = stream.try_clone()?;
        move || stream.write_all(&vec![1; LENGTH]).and_then(|()| stream.shutdown(Shutdown::Write))
    });
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    writer.join().map_err(|_| anyhow!("panic"))??;
    ensure!(heard == vec![1; LENGTH], "{} bytes", heard.len());
    ensure!(peer.wait()?.code == 0);
    // The guest ends first: what is said afterwards still arrives.
    let peer = vm.start(&format!("vsock-peer farewell {PORT}"))?;
    peer.until("ready\n")?;
    let mut stream = connect(&vm)?;
    let mut heard = String::new();
    stream.read_to_string(&mut heard)?;
    ensure!(heard == "goodbye", "{heard:?}");
    stream.write_all(&vec![2; LENGTH])?;
    drop(stream);
    let done = peer.wait()?;
    ensure!(done.stdout == format!("ready\nheard {LENGTH}\n"), "{done}");
    Ok(())
}
