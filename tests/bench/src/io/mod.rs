//! Devices at work: kvrun's against those of QEMU's microvm, with the same kernel, the same program in the guest, and the same back ends.
//!
//! Both machines are up all the time and do each job in turn, so that whatever else the host does is shared fairly. Each has
//!
//! * a disk: a raw file of its own in tmpfs;
//! * a link that the host's kernel carries (vhost-net), if it can, and one that the VMM carries; each to a tap of its own;
//! * vsock: kvrun's is in the VMM, QEMU has vhost-vsock only;
//! * a directory of a tmpfs, by virtio-fs, with the same cache policy: in the VMM, or by virtiofsd beside QEMU.
//!
//! Modules: [`kvrun`] and [`qemu`] start the machines, [`machine`] is what both are from then on, [`peer`] is the host's side of streams,
//! [`host`] has taps and files.

mod host;
mod kvrun;
mod machine;
mod peer;
mod qemu;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result};
use kvrun_bench::{Job, Stream};

use self::machine::Machine;
use crate::report::Report;
use crate::{Stage, process};

/// Memory of the machines in MiB.
const MEMORY_MIB: u32 = 256;
/// Bytes of their disks.
const DISK: usize = 64 << 20;

/// What is measured: a job, the key its time is reported by, and the key of the ratio it counts for. Each works for long against what
/// disturbs it, and not for long altogether.
struct Case {
    name: &'static str,
    ratio: &'static str,
    job: Work,
}

/// A job for the guest, and what the host does meanwhile.
#[derive(Clone)]
enum Work {
    Guest(Job),
    /// Over vsock, or over the first or second link.
    Stream(Over, fn(Stream) -> Job, usize),
}

/// What a stream goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Vsock,
    /// The link that the host's kernel carries.
    Vhost,
    /// The link that the VMM carries.
    Link,
}

fn cases(vhost: bool) -> Vec<Case> {
    let disk = |write, block, count| Work::Guest(Job::DiskSequential { write, block, count });
    let random = |write, depth, count| Work::Guest(Job::DiskRandom { write, depth, count });
    let mib = |mib: usize| mib << 20;
    let case = |name, ratio, job| Case { name, ratio, job };
    let mut cases = vec![
        case("blk_read_128k", "blk_seq", disk(false, 128 << 10, 128)),
        case("blk_read_1m", "blk_seq", disk(false, 1 << 20, 32)),
        case("blk_write_128k", "blk_seq", disk(true, 128 << 10, 128)),
        case("blk_write_1m", "blk_seq", disk(true, 1 << 20, 32)),
        case("blk_rand_read_q16", "blk_rand", random(false, 16, 1024)),
        case("blk_rand_write_q16", "blk_rand", random(true, 16, 1024)),
        case("blk_rand_read_q1", "blk_rand", random(false, 1, 128)),
        case("blk_rand_write_q1", "blk_rand", random(true, 1, 128)),
        case("vsock_tx", "vsock", Work::Stream(Over::Vsock, Job::Send, mib(16))),
        case("vsock_rx", "vsock", Work::Stream(Over::Vsock, Job::Receive, mib(16))),
        case("vsock_ping", "vsock_ping", Work::Stream(Over::Vsock, Job::PingPong, 128)),
        case("fs_write", "fs_data", Work::Guest(Job::FileWrite { bytes: mib(16) })),
        case("fs_read", "fs_data", Work::Guest(Job::FileRead { bytes: mib(16) })),
        case("fs_meta", "fs_meta", Work::Guest(Job::Files { count: 100 })),
        case("net_user_tx", "net_user_tx", Work::Stream(Over::Link, Job::Send, mib(16))),
        case("net_user_rx", "net_user_rx", Work::Stream(Over::Link, Job::Receive, mib(16))),
        case("net_user_ping", "net_user_ping", Work::Stream(Over::Link, Job::PingPong, 128)),
    ];
    // The bar is with vhost-net where there is one.
    let over = if vhost { Over::Vhost } else { Over::Link };
    cases.push(case("net_tx", "net_tx", Work::Stream(over, Job::Send, mib(16))));
    cases.push(case("net_rx", "net_rx", Work::Stream(over, Job::Receive, mib(16))));
    cases.push(case("net_ping", "net_ping", Work::Stream(over, Job::PingPong, 128)));
    cases
}

/// What the machines are made of.
pub(crate) struct Setup<'s> {
    pub(crate) stage: &'s Stage,
    /// With the program of the guest as its init.
    pub(crate) initramfs: &'s Path,
    /// A directory in tmpfs for disks and shares.
    pub(crate) scratch: PathBuf,
    /// Whether the host has vhost-net.
    pub(crate) vhost: bool,
}

/// Measures each case `runs` times in each machine, those only whose name begins with `only`.
pub(crate) fn measure(
    stage: &Stage,
    initramfs: &Path,
    scratch: &Path,
    runs: usize,
    only: &str,
    report: &mut Report,
) -> Result<()> {
    host::own_network()?;
    let vhost = host::has_vhost_net();
    let setup = Setup { stage, initramfs, scratch: scratch.to_owned(), vhost };
    let runtime = Rc::new(tokio::runtime::Builder::new_current_thread().enable_all().build()?);
    let (kvrun, mut ours) = kvrun::start(&setup, &runtime).context("kvrun's machine")?;
    let (_qemu, mut theirs) = qemu::start(&setup).context("QEMU's machine")?;

    let mut ratios: Vec<(&str, f64, f64)> = Vec::new();
    for Case { name, ratio, job } in cases(vhost) {
        if !name.starts_with(only) {
            continue;
        }
        let mut times = [Vec::new(), Vec::new()];
        // Once without counting: caches fill, buffers are allocated.
        for run in 0..=runs {
            for (machine, times) in [&mut ours, &mut theirs].into_iter().zip(&mut times) {
                let ms = machine.perform(&job).with_context(|| format!("{name} on {}", machine.name()))?;
                if run > 0 {
                    times.push(ms);
                }
            }
        }
        let [ours_ms, theirs_ms] = times;
        let ours_ms = report.median(&format!("io.kvrun.{name}_ms"), ours_ms);
        let theirs_ms = report.median(&format!("io.qemu_microvm.{name}_ms"), theirs_ms);
        report.ratio(&format!("io.qemu_microvm.{name}_ms"), &format!("io.kvrun.{name}_ms"));
        match ratios.iter_mut().find(|(key, ..)| *key == ratio) {
            Some((_, ours, theirs)) => (*ours, *theirs) = (*ours + ours_ms, *theirs + theirs_ms),
            None => ratios.push((ratio, ours_ms, theirs_ms)),
        }
    }
    for (key, ours_ms, theirs_ms) in ratios {
        report.number(&format!("io.{key}_ratio"), theirs_ms / ours_ms);
    }
    report.number("io.vhost_net", f64::from(u8::from(vhost)));
    // After all that work, with disk, links, share and vsock attached.
    report.number("mem.vmm_private_kib", process::private_kib(kvrun.pid()?, MEMORY_MIB)?);
    report.number("mem.vmm_io_threads", process::threads(kvrun.pid()?)?);
    drop(ours);
    kvrun.stop(&runtime);
    Ok(())
}
