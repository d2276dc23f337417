//! The system calls of a VMM's threads, recorded by the kernel's tracer and compared with the table of its filters.
//!
//! The tracer (Linux Documentation/trace/ftrace.rst) follows this process and all it starts, and records in a buffer of its own: threads
//! that begin and change their names, and every system call with its arguments, as the filter has let it through. The VMM is not
//! stopped for it, as it is by ptrace(2).
//!
//! Calls of a thread count for its class from where its own filter is on; before that they are the spawner's, whose filter the thread was
//! born with. Those of the main thread before it has a filter, and of all other processes, do not count.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvrun_vmm::thread::Class;
use kvrun_vmm::thread::table::{RULES, Rule};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Kilobytes of a CPU's buffer: a moment's work of a machine, for it is read all the time.
const BUFFER_KIB: &str = "8192";
/// The last line of a recording.
const END: &str = "end of the recording";
/// A line to find out which thread this is, as the tracer numbers them.
const HERE: &str = "start of the recording";

/// A recording that goes on, in an instance of the tracer that is gone when this is dropped.
#[derive(Debug)]
pub struct Trace {
    mounted: PathBuf,
    instance: PathBuf,
    reader: Option<JoinHandle<Result<Usage>>>,
}

impl Trace {
    /// Records what the calling thread, and whatever it starts from now on, does. `dir` is an empty directory for the tracer, `name` one that
    /// no other recording has.
    ///
    /// # Errors
    /// When the host's kernel has no tracer for system calls, or has it locked.
    pub fn start(dir: &Path, name: &str) -> Result<Self> {
        mount("tracefs", dir, "tracefs", MountFlags::empty(), c"").context("cannot mount tracefs")?;
        let instance = dir.join("instances").join(name);
        let mut trace = Self { mounted: dir.to_owned(), instance, reader: None };
        fs::create_dir(&trace.instance).context("cannot make an instance of the tracer")?;
        trace.write("buffer_size_kb", BUFFER_KIB)?;
        trace.write("trace_marker", HERE)?;
        let recorded = fs::read_to_string(trace.instance.join("trace"))?;
        let here = recorded.lines().find(|line| line.contains(HERE)).context("no line of our own")?;
        let (pid, ..) = split(here).context("a line of the tracer")?;
        // Before children are followed: it would record what it does itself.
        let pipe = File::open(trace.instance.join("trace_pipe"))?;
        trace.reader = Some(std::thread::spawn(move || Usage::read(BufReader::new(pipe))));
        trace.write("set_event_pid", &pid.to_string())?;
        trace.write("options/event-fork", "1")?;
        // Only this one's answer is of interest.
        let landlock = format!("id == {}", libc::SYS_landlock_restrict_self);
        trace.write("events/raw_syscalls/sys_exit/filter", &landlock)?;
        for event in
            ["task/task_newtask", "task/task_rename", "raw_syscalls/sys_enter", "raw_syscalls/sys_exit"]
        {
            trace.write(&format!("events/{event}/enable"), "1")?;
        }
        Ok(trace)
    }

    /// Ends the recording; what it says of the filters.
    ///
    /// # Errors
    /// When it is not complete.
    pub fn finish(mut self) -> Result<Usage> {
        let usage = self.end().context("ended already")??;
        for cpu in fs::read_dir(self.instance.join("per_cpu"))? {
            let stats = fs::read_to_string(cpu?.path().join("stats"))?;
            let none_lost = |what: &str| stats.lines().any(|line| line == format!("{what}: 0"));
            ensure!(none_lost("overrun") && none_lost("dropped events"), "lines are lost: {stats}");
        }
        Ok(usage)
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        let what = || format!("cannot write {value:?} to the tracer's {name}");
        let mut file = OpenOptions::new().write(true).open(self.instance.join(name)).with_context(what)?;
        file.write_all(value.as_bytes()).with_context(what)
    }

    /// Lets the reader end; what it has read, the first time.
    fn end(&mut self) -> Option<Result<Usage>> {
        let reader = self.reader.take()?;
        let ended = self.write("events/enable", "0").and_then(|()| self.write("trace_marker", END));
        Some(ended.and_then(|()| reader.join().map_err(|_| anyhow!("the reader panicked"))?))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.end();
        let _ = fs::remove_dir(&self.instance);
        let _ = unmount(&self.mounted, UnmountFlags::DETACH);
    }
}

/// A thread of a VMM.
#[derive(Clone, Copy, Debug)]
struct Thread {
    class: Option<Class>,
    /// By which filter it is held.
    filter: Option<Class>,
}

/// Which lines of the table were needed, and by which classes.
#[derive(Debug, Default)]
pub struct Usage {
    threads: HashMap<u32, Thread>,
    needed: HashMap<(usize, Class), u64>,
    calls: u64,
    /// What Landlock answered each VMM that asked to be confined.
    pub landlock: Vec<i64>,
}

impl Usage {
    /// Reads a recording to its end.
    fn read(recording: impl BufRead) -> Result<Self> {
        let mut usage = Self::default();
        for line in recording.split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            if line.contains(END) {
                return Ok(usage);
            }
            usage.add(&line);
        }
        bail!("the recording has no end")
    }

    fn add(&mut self, line: &str) {
        let Some((pid, event, rest)) = split(line) else { return };
        let field = |name: &str| {
            rest.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
        };
        match event {
            "task_newtask" => {
                let Some(parent) = self.threads.get(&pid) else { return };
                // The filter is inherited, the class is told later.
                let thread = Thread { class: None, filter: parent.filter };
                self.threads.extend(field("pid").parse().map(|child: u32| (child, thread)));
            }
            "task_rename" => match (self.threads.get_mut(&pid), field("newcomm")) {
                (None, name) if name == Class::Main.name() => {
                    self.threads.insert(pid, Thread { class: Some(Class::Main), filter: None });
                }
                (Some(thread), name) => {
                    thread.class = Class::ALL.into_iter().find(|class| name.starts_with(class.name()));
                }
                (None, _) => {}
            },
            "sys_enter" => {
                let Some(thread) = self.threads.get_mut(&pid) else { return };
                let Some((number, args)) = call(rest) else { return };
                if let Some(class) = thread.filter {
                    self.calls += 1;
                    count(&mut self.needed, class, number, args);
                }
                if number == libc::SYS_seccomp {
                    thread.filter = thread.class;
                }
            }
            "sys_exit" if self.threads.contains_key(&pid) => {
                self.landlock
                    .extend(rest.rsplit_once(" = ").and_then(|(_, value)| value.parse::<i64>().ok()));
            }
            _ => {}
        }
    }

    /// How many calls were made under a filter.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// The lines that a class did not need of those that are not for rare occasions, in words.
    pub fn idle(&self) -> Vec<String> {
        let mut idle = Vec::new();
        for (index, rule) in RULES.iter().enumerate().filter(|(_, rule)| rule.rarely.is_none()) {
            let needs = |class: &Class| self.needed.contains_key(&(index, *class));
            for class in rule.who.iter().filter(|class| !needs(class)) {
                idle.push(format!("{class:?} {} {:?}: {}", rule.call.name, rule.when, rule.why));
            }
        }
        idle
    }
}

fn count(needed: &mut HashMap<(usize, Class), u64>, class: Class, number: i64, args: [u64; 6]) {
    let fits = |rule: &Rule| {
        rule.call.number == number
            && rule.who.contains(&class)
            && rule.when.iter().all(|condition| condition.holds(args))
    };
    for (index, _) in RULES.iter().enumerate().filter(|(_, rule)| fits(rule)) {
        *needed.entry((index, class)).or_default() += 1;
    }
}

/// A line like `   vcpu0-77    [000] .....  12.345678: sys_enter: NR 16 (5, ae80, 0, 0, 0, 0)`: the thread, the event, the rest.
fn split(line: &str) -> Option<(u32, &str, &str)> {
    let (task, rest) = line.split_once(" [")?;
    let pid = task.trim_end().rsplit_once('-')?.1.parse().ok()?;
    let mut parts = rest.splitn(3, ": ").skip(1);
    Some((pid, parts.next()?, parts.next().unwrap_or_default()))
}

/// A call like `NR 16 (5, ae80, 0, 0, 0, 0)`: its number and arguments.
fn call(text: &str) -> Option<(i64, [u64; 6])> {
    let (number, args) = text.strip_prefix("NR ")?.split_once(" (")?;
    let mut values = [0; 6];
    for (value, arg) in values.iter_mut().zip(args.trim_end_matches(')').split(", ")) {
        *value = u64::from_str_radix(arg, 16).ok()?;
    }
    Some((number.parse().ok()?, values))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDING: &str = "
           e2e-7       [000] .....     1.000001: sys_enter: NR 1 (1, 2, 3, 0, 0, 0)
           <...>-9     [001] .....     1.000002: task_rename: pid=9 oldcomm=e2e newcomm=kvrun-vmm oom_score_adj=0
           kvrun-vmm-9       [001] .....     1.000003: sys_enter: NR 257 (ffffff9c, 2, 3, 0, 0, 0)
           kvrun-vmm-9       [001] .....     1.000003: sys_exit: NR 446 = 0
           kvrun-vmm-9       [001] .....     1.000004: task_newtask: pid=10 comm=kvrun-vmm clone_flags=3d0f00 oom_score_adj=0
           kvrun-vmm-10      [001] .....     1.000005: task_rename: pid=10 oldcomm=kvrun-vmm newcomm=spawner oom_score_adj=0
             spawner-10      [001] .....     1.000006: sys_enter: NR 317 (1, 0, 7f, 0, 0, 0)
             spawner-10      [001] .....     1.000007: task_newtask: pid=11 comm=spawner clone_flags=3d0f00 oom_score_adj=0
             spawner-11      [001] .....     1.000008: sys_enter: NR 273 (7f, 18, 0, 0, 0, 0)
             spawner-11      [001] .....     1.000009: task_rename: pid=11 oldcomm=spawner newcomm=vcpu0 oom_score_adj=0
               vcpu0-11      [001] .....     1.000010: sys_enter: NR 317 (1, 0, 7f, 0, 0, 0)
               vcpu0-11      [001] .....     1.000011: sys_enter: NR 16 (5, ae80, 0, 0, 0, 0)
               vcpu0-11      [001] .....     1.000011: sys_enter: NR 202 (7f, 80, 0, 0, 0, 0)
           kvrun-vmm-9       [001] .....     1.000012: sys_enter: NR 317 (1, 0, 7f, 0, 0, 0)
           kvrun-vmm-9       [001] .....     1.000013: sys_enter: NR 46 (3, 7f, 4000, 0, 0, 0)
               e2e-7       [000] .....     1.000014: tracing_mark_write: end of the recording
";

    #[test]
    fn calls_count_for_the_class_of_their_thread() {
        let usage = Usage::read(RECORDING.as_bytes()).unwrap();
        let mut needed: Vec<_> =
            usage.needed.keys().map(|(index, class)| (RULES[*index].call.name, class.name())).collect();
        needed.sort();
        let expected = [
            ("SYS_futex", "vcpu"),
            ("SYS_ioctl", "vcpu"),
            ("SYS_seccomp", "spawner"),
            ("SYS_sendmsg", "kvrun-vmm"),
            ("SYS_set_robust_list", "spawner"),
        ];
        assert_eq!(needed, expected);
        assert_eq!((usage.calls(), usage.landlock.as_slice()), (5, [0].as_slice()));
        let idle = usage.idle();
        assert!(idle.iter().any(|line| line.starts_with("Vcpu SYS_rt_sigreturn")), "{idle:?}");
        assert!(!idle.iter().any(|line| line.contains("runs the guest")), "{idle:?}");
        // That one needs it does not make it needed by all.
        let futex: Vec<_> = idle.iter().filter_map(|line| line.split_once(" SYS_futex")).collect();
        let classes: Vec<_> = futex.iter().map(|(class, _)| *class).collect();
        assert_eq!(classes, ["Main", "EventLoop", "Fs", "Blk", "Net"]);
    }

    #[test]
    fn recording_without_an_end_is_none() {
        assert!(Usage::read("a-1 [000] x: y: z\n".as_bytes()).is_err());
    }
}
