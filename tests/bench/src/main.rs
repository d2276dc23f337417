//! Measures kvrun, and its peers in the same run.
//!
//! * [`boot`] - a virtual machine started cold, and its phases.
//! * [`qemu`] - QEMU's microvm machine with the same kernel and initramfs.
//! * [`io`] - devices at work, against those of QEMU's microvm.
//! * [`run`] - whole runs of a container: kvrun against crun; and what kvrun's processes hold while one runs.
//! * [`pod`] - pods and their output through containerd: kvrun against runc.
//! * [`process`] - private memory and threads of a process.
//! * [`report`] - medians, the table, the JSON.
//!
//! Times come from `CLOCK_MONOTONIC` of the machine this runs on, those of [`io`] from that of its guests. Unless the host has hardware
//! KVM, `tests/bench/bench` starts it in the lab: boots and starts in the deterministic mode, where one instruction takes one nanosecond.

mod boot;
mod io;
mod pod;
mod process;
mod qemu;
mod report;
mod run;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;

use report::Report;

/// Measures kvrun and its peers.
#[derive(Parser)]
struct Args {
    /// The installed tree to measure: PREFIX of `make install`.
    #[arg(long)]
    prefix: PathBuf,
    #[command(flatten)]
    part: Part,
    /// How often each thing is measured; the median counts.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// Of what is measured of devices, only that whose name begins like this.
    #[arg(long, default_value = "")]
    only: String,
    /// Where to write the numbers: one flat JSON object, to which they are added if it is there.
    #[arg(long)]
    json: PathBuf,
}

/// What is measured.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Part {
    /// All but devices, with an OCI bundle whose process is /bin/true.
    #[arg(long)]
    bundle: Option<PathBuf>,
    /// Devices at work, with the initramfs that has kvrun-bench-guest as its init.
    #[arg(long)]
    io: Option<PathBuf>,
    /// Pods, started by containerd.
    #[arg(long)]
    pod: bool,
    /// So many MiB of a container's output through containerd.
    #[arg(long)]
    output: Option<u32>,
}

/// The tree that is measured.
struct Stage {
    kvrun: PathBuf,
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// Memory of the machines whose boot is measured, in MiB, ours and the peers'.
const MEMORY_MIB: u32 = 128;

fn main() -> Result<()> {
    let args = Args::parse();
    let stage = Stage {
        kvrun: args.prefix.join("bin/kvrun"),
        vmm: args.prefix.join("libexec/kvrun/kvrun-vmm"),
        kernel: args.prefix.join("share/kvrun/vmlinux"),
        initramfs: args.prefix.join("share/kvrun/initramfs.cpio"),
    };
    let mut report = Report::default();
    let Part { bundle, io: initramfs, pod, output } = &args.part;
    if let Some(bundle) = bundle {
        measure(&stage, bundle, args.runs, &mut report)?;
    }
    if let Some(initramfs) = initramfs {
        let scratch = std::path::absolute(&args.json)?.with_file_name("");
        io::measure(&stage, initramfs, &scratch, args.runs, &args.only, &mut report)?;
    }
    if *pod {
        pod::measure(&stage, args.runs, &mut report)?;
    }
    if let Some(mib) = output {
        pod::measure_output(&stage, *mib, args.runs, &mut report)?;
    }
    report.print();
    report.write(&args.json).with_context(|| format!("cannot write {}", args.json.display()))
}

/// Measures all but devices.
fn measure(stage: &Stage, bundle: &Path, runs: usize, report: &mut Report) -> Result<()> {
    // Once without counting: the first run of each program reads it from disk.
    for (runs, report) in [(1, &mut Report::default()), (runs, &mut *report)] {
        boot::measure(stage, runs, report)?;
        qemu::measure(stage, runs, report)?;
        run::measure(stage, bundle, runs, report)?;
    }
    report.number("size.agent_bytes", agent_size(&stage.initramfs)?);
    report.number("size.vmlinux_bytes", file_size(&stage.kernel)?);
    report.number("size.vmm_bytes", file_size(&stage.vmm)?);
    report.ratio("boot.cold.init_ms", "boot.qemu_microvm.init_ms");
    report.ratio("boot.cold.ready_ms", "boot.qemu_microvm.init_ms");
    report.ratio("run.true_ms", "run.crun_true_ms");
    report.ratio("exec.true_ms", "exec.crun_true_ms");
    Ok(())
}

fn file_size(path: &Path) -> Result<f64> {
    Ok(fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len() as f64)
}

/// Size of `/init` in an uncompressed `newc` archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
fn agent_size(initramfs: &Path) -> Result<f64> {
    let archive = fs::read(initramfs).with_context(|| format!("cannot read {}", initramfs.display()))?;
    let mut rest = archive.as_slice();
    while let Some(header) = rest.get(..110) {
        let field = |index: usize| -> Result<usize> {
            let hex = std::str::from_utf8(&header[6 + 8 * index..14 + 8 * index])?;
            Ok(usize::from_str_radix(hex, 16)?)
        };
        let (file_size, name_size) = (field(6)?, field(11)?);
        let name = rest.get(110..110 + name_size).context("cpio name past the end")?;
        if matches!(name, b"init\0" | b"./init\0" | b"/init\0") {
            return Ok(file_size as f64);
        }
        let next = (110 + name_size).next_multiple_of(4) + file_size.next_multiple_of(4);
        rest = rest.get(next..).context("cpio entry past the end")?;
    }
    anyhow::bail!("{} holds no /init", initramfs.display())
}
