//! The emulated machine: QEMU's command line, its process, and its last words.

use crate::frame::{Frame, Kind};
use crate::initramfs;
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Pid;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, parent_id};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes of the console, and of QEMU's own messages, that are kept for an error report.
const TAIL_BYTES: usize = 16 << 10;
/// How long a lab may take to power off when asked to, before it is killed.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(20);

/// What the machine looks like.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Shape {
    /// Deterministic time: one guest instruction is one nanosecond, one CPU
    #[arg(long)]
    pub(crate) icount: bool,
    /// Number of CPUs
    #[arg(long, default_value_t = 2, conflicts_with = "icount")]
    pub(crate) smp: u32,
    /// Memory in MiB
    #[arg(long, default_value_t = 6144)]
    pub(crate) mem: u32,
    /// Make a host directory visible in the lab, HOSTDIR:GUESTDIR, read-only unless :rw is added (repeatable)
    #[arg(long, value_name = "HOSTDIR:GUESTDIR[:rw]")]
    pub(crate) share: Vec<Share>,
    /// Seconds the lab may take to come up
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub(crate) boot_limit: u64,
    /// Add to the kernel command line
    #[arg(long, default_value = "", value_name = "WORDS", hide_default_value = true)]
    pub(crate) append: String,
    /// Boot this kernel instead of the image's (for tests of the lab)
    #[arg(long, hide = true)]
    pub(crate) kernel: Option<PathBuf>,
}

/// A directory of the host in the lab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) host: PathBuf,
    pub(crate) guest: String,
    pub(crate) writable: bool,
}

impl std::str::FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (paths, writable) = match text.strip_suffix(":rw") {
            Some(paths) => (paths, true),
            None => (text.strip_suffix(":ro").unwrap_or(text), false),
        };
        let (host, guest) = paths.split_once(':').ok_or("expected HOSTDIR:GUESTDIR[:rw]")?;
        if !guest.starts_with('/') || guest.contains(['\t', '\n', ':']) {
            return Err(format!("the directory in the lab must be absolute: {guest}"));
        }
        let host = Path::new(host).canonicalize().map_err(|error| format!("{host}: {error}"))?;
        if !host.is_dir() {
            return Err(format!("{} is not a directory", host.display()));
        }
        Ok(Self { host, guest: guest.to_owned(), writable })
    }
}

/// A running lab. It is killed when this is dropped, or when the thread that booted it ends, however it ends.
pub(crate) struct Machine {
    qemu: Child,
    /// The host's ends of the command ports.
    pub(crate) ports: Vec<UnixStream>,
    console: Tail,
    messages: Tail,
    readers: Vec<JoinHandle<()>>,
    has_writable_share: bool,
}

impl Machine {
    /// Boots a lab with that many command ports and waits until it takes commands.
    ///
    /// If it does not come up, the error holds the tail of the console and of QEMU's messages. Call this from a thread that
    /// lives as long as the lab is needed: the kernel kills QEMU when that thread ends.
    pub(crate) fn boot(image: &Path, shape: &Shape, ports: usize, console_log: Option<File>) -> Result<Self> {
        let mut machine = Self::spawn(image, shape, ports, console_log)?;
        match machine.wait_for_hello(Duration::from_secs(shape.boot_limit)) {
            Ok(()) => Ok(machine),
            Err(error) => {
                let report = machine.last_words();
                Err(anyhow!("{error:#}\n{report}"))
            }
        }
    }

    fn spawn(image: &Path, shape: &Shape, ports: usize, console_log: Option<File>) -> Result<Self> {
        let mut command = Command::new("qemu-system-x86_64");
        // What QEMU inherits; closed here once it runs.
        let mut inherited = Vec::new();
        let mut config = format!("ports\t{ports}\n");
        let (console, console_end) = channel()?;
        add(
            &mut command,
            &format!("-chardev socket,id=console,fd={} -serial chardev:console", console_end.as_raw_fd()),
        );
        inherited.push(console_end);
        let mut port_ends = Vec::new();
        // The first virtio device: the lab knows its ports as /dev/vport0pN.
        add(&mut command, &format!("-device virtio-serial-pci,addr=1,max_ports={}", ports + 1));
        for index in 0..ports {
            let (ours, theirs) = channel()?;
            let (fd, number) = (theirs.as_raw_fd(), index + 1);
            add(&mut command, &format!("-chardev socket,id=port{index},fd={fd}"));
            add(&mut command, &format!("-device virtserialport,nr={number},chardev=port{index}"));
            inherited.push(theirs);
            port_ends.push(UnixStream::from(ours));
        }

        add_machine(&mut command, image, shape)?;
        for (index, share) in shape.share.iter().enumerate() {
            let access = if share.writable { "rw" } else { "ro" };
            config.push_str(&format!("share\tshare{index}\t{}\t{access}\n", share.guest));
            let host = share.host.to_str().context("a shared directory must have a name in UTF-8")?;
            let read_only = if share.writable { "" } else { ",readonly=on" };
            // multidevs=remap: inode numbers stay unique when the directory holds several file systems.
            command.arg("-fsdev").arg(format!(
                "local,id=share{index},path={},security_model=passthrough,multidevs=remap{read_only}",
                host.replace(',', ",,")
            ));
            command.arg("-device").arg(format!("virtio-9p-pci,fsdev=share{index},mount_tag=share{index}"));
        }
        let initramfs = initramfs::build(image, &config)?;
        command.arg("-initrd").arg(format!("/proc/self/fd/{}", initramfs.as_raw_fd()));
        inherited.push(initramfs);

        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let parent = std::process::id();
        // SAFETY: between fork and exec only async-signal-safe system calls are made (setpgid, prctl, getppid).
        unsafe {
            command.pre_exec(move || {
                // Out of the terminal's foreground group: Ctrl-C is ours to handle.
                nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0))?;
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                // If the parent died before prctl nobody would ever send the signal.
                if parent_id() != parent { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(()) }
            });
        }
        let mut qemu =
            command.spawn().context("start qemu-system-x86_64 (Debian package qemu-system-x86)")?;
        drop(inherited);
        let (console, console_reader) = Tail::follow(File::from(console), console_log);
        let (messages, stdout_reader) =
            Tail::follow(qemu.stdout.take().context("QEMU's output is piped")?, None);
        let stderr_reader = messages.also_follow(qemu.stderr.take().context("QEMU's errors are piped")?);
        Ok(Self {
            qemu,
            ports: port_ends,
            console,
            messages,
            readers: vec![console_reader, stdout_reader, stderr_reader],
            has_writable_share: shape.share.iter().any(|share| share.writable),
        })
    }

    fn wait_for_hello(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        for port in &mut self.ports {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            port.set_read_timeout(Some(left)).context("set a time limit")?;
            match Frame::read(port) {
                Ok(Some(frame)) if frame.kind == Kind::Hello => {}
                Ok(Some(frame)) => bail!("the lab greets with {:?}", frame.kind),
                Ok(None) => bail!("the lab switched itself off while it booted"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    bail!("the lab does not answer after {} s", limit.as_secs())
                }
                Err(error) => return Err(error).context("wait for the lab"),
            }
            port.set_read_timeout(None).context("lift the time limit")?;
        }
        Ok(())
    }

    /// Kills the machine and says what it said last.
    pub(crate) fn last_words(&mut self) -> String {
        self.kill();
        format!(
            "--- console ---\n{}\n--- qemu ---\n{}\n---",
            self.console.text().trim_end(),
            self.messages.text().trim_end()
        )
    }

    /// Ends the lab. With a writable share it is powered off in order, so that the host has all that was written.
    pub(crate) fn shut_down(mut self) -> Result<()> {
        if self.has_writable_share {
            self.power_off()?;
        }
        Ok(())
    }

    /// Powers the lab off in order, or kills it if it does not.
    pub(crate) fn power_off(&mut self) -> Result<()> {
        let port = self.ports.first_mut().context("a lab has at least one port")?;
        port.set_read_timeout(Some(POWER_OFF_LIMIT)).context("set a time limit")?;
        crate::frame::write(port, Kind::PowerOff, &[]).context("ask the lab to power off")?;
        // What is left in the port does not matter; its end says that QEMU has ended.
        match io::copy(port, &mut io::sink()) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) => {
                let report = self.last_words();
                Err(anyhow!("the lab does not power off: {error}\n{report}"))
            }
        }
    }

    /// The process ID of QEMU.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.qemu)
    }

    fn kill(&mut self) {
        // Neither fails but for a process that is already waited for.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A stream between us (first) and QEMU (second, inherited by it).
fn channel() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)
        .context("make a socket pair")?;
    rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).context("keep a socket to ourselves")?;
    Ok((ours, theirs))
}

/// Adds arguments that have no spaces in them.
fn add(command: &mut Command, words: &str) {
    command.args(words.split(' '));
}

fn add_machine(command: &mut Command, image: &Path, shape: &Shape) -> Result<()> {
    add(command, "-nodefaults -no-user-config -display none -no-reboot -M q35");
    // SVM with nested paging, and no feature that only costs emulation time (five-level page tables; ERMS, whose string
    // instructions count as one instruction a byte). No XSAVE: QEMU's SVM does not intercept XSETBV, so a guest's XCR0
    // is lost at its next exit (seen with QEMU 7.2), and tasks in it would see each other's vector registers.
    add(command, "-cpu EPYC,+svm,-xsave");
    let tsc_khz = if shape.icount {
        // Instructions run in one thread; a nanosecond passes with each, and none passes while the host waits.
        add(command, "-accel tcg,thread=single -icount shift=0,sleep=off -smp 1");
        // The TSC counts the nanoseconds of QEMU's virtual clock: 1 GHz.
        1_000_000
    } else {
        add(command, &format!("-accel tcg,thread=multi -smp {}", shape.smp));
        // The emulated TSC is the host's.
        host_tsc_khz()
    };
    add(command, &format!("-m {}", shape.mem));
    let root = image.join("root.ext4");
    let root = root.to_str().context("the cache directory must have a name in UTF-8")?.replace(',', ",,");
    command.arg("-drive").arg(format!("if=none,id=root,file={root},format=raw,snapshot=on,cache=unsafe"));
    add(command, "-device virtio-blk-pci,drive=root -device virtio-rng-pci");
    command.arg("-kernel").arg(shape.kernel.clone().unwrap_or_else(|| image.join("vmlinux")));
    // Who removes a namespace, a cgroup or a mount waits for RCU's grace periods, in which a machine with one CPU does nothing. What is measured is as
    // a kernel is by itself.
    let expedited = if shape.icount { "" } else { "rcupdate.rcu_expedited=1 " };
    // No clock calibration, no mitigations, no watchdogs: they cost time under emulation or misfire on a busy host.
    command.arg("-append").arg(format!(
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr nowatchdog rcupdate.rcu_cpu_stall_suppress=1 {expedited}\
         tsc_early_khz={tsc_khz} tsc=reliable {}",
        shape.append
    ));
    Ok(())
}

/// The host's TSC frequency.
fn host_tsc_khz() -> u64 {
    let read = || {
        // SAFETY: RDTSC has no effect beside its result and every x86-64 CPU has it.
        let ticks = unsafe { std::arch::x86_64::_rdtsc() };
        (ticks, Instant::now())
    };
    let (first, start) = read();
    thread::sleep(Duration::from_millis(20));
    let (second, end) = read();
    second.wrapping_sub(first) * 1000 / u64::try_from((end - start).as_micros()).unwrap_or(u64::MAX)
}

/// The last bytes of a stream, as text.
#[derive(Clone)]
struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// Reads `stream` to its end in a thread of its own; everything also goes to `log`.
    fn follow(stream: impl Read + Send + 'static, log: Option<File>) -> (Self, JoinHandle<()>) {
        let tail = Self(Arc::default());
        let reader = tail.read_in_thread(stream, log);
        (tail, reader)
    }

    fn also_follow(&self, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        self.read_in_thread(stream, None)
    }

    fn read_in_thread(
        &self,
        mut stream: impl Read + Send + 'static,
        mut log: Option<File>,
    ) -> JoinHandle<()> {
        let tail = self.clone();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            // A stream that fails has ended as well.
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                let mut bytes = tail.0.lock().unwrap_or_else(PoisonError::into_inner);
                bytes.extend(&chunk[..count]);
                let excess = bytes.len().saturating_sub(TAIL_BYTES);
                bytes.drain(..excess);
                if let Some(log) = &mut log {
                    // The log is a convenience; a full disk must not stop the lab.
                    let _ = io::Write::write_all(log, &chunk[..count]);
                }
            }
        })
    }

    fn text(&self) -> String {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(bytes.make_contiguous()).into_owned();
        // The named CPU has features that emulation lacks; QEMU says so each time, twice.
        let telling = |line: &&str| !line.contains("TCG doesn't support requested feature");
        text.lines().filter(telling).collect::<Vec<_>>().join("\n")
    }
}
