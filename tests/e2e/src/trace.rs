//! The system calls of a VMM's threads, recorded by strace and compared with the table of its filters.
//!
//! strace sees a call before the filter does. Calls of a thread count for its class from where its own filter is on; before that they are the
//! spawner's, whose filter the thread was born with.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use kvrun_vmm::thread::Class;
use kvrun_vmm::thread::table::{RULES, Rule};
use rustix::process::{Pid, Signal, kill_process};

/// strace, attached to this process and all it starts.
#[derive(Debug)]
pub struct Trace {
    strace: Child,
    file: PathBuf,
}

impl Trace {
    /// Attaches strace; what it records goes to `file`.
    ///
    /// # Errors
    /// When strace does not.
    pub fn start(file: &Path) -> Result<Self> {
        let mut strace = Command::new("strace")
            .args(["-f", "-X", "raw", "-o"])
            .arg(file)
            .args(["-p", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run strace")?;
        let stderr = strace.stderr.take().context("no pipe")?;
        // It says so once it has attached, to each thread there is.
        let mut line = String::new();
        BufReader::new(stderr).read_line(&mut line)?;
        ensure!(line.contains("attached"), "strace says {line:?}");
        Ok(Self { strace, file: file.to_owned() })
    }

    /// Detaches strace; which lines of the table were needed.
    ///
    /// # Errors
    /// When what it recorded cannot be read.
    pub fn finish(mut self) -> Result<Usage> {
        let pid = i32::try_from(self.strace.id()).ok().and_then(Pid::from_raw).context("no process")?;
        kill_process(pid, Signal::INT)?;
        self.strace.wait()?;
        let mut usage = Usage::default();
        let recorded = fs::File::open(&self.file)?;
        for line in BufReader::new(recorded).split(b'\n') {
            usage.add(&String::from_utf8_lossy(&line?));
        }
        Ok(usage)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // Both fail if `finish` was called.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// What is known of a thread.
#[derive(Debug, Default)]
struct Thread {
    class: Option<Class>,
    /// Whether the filter of its class is on.
    filtered: bool,
    /// Its calls, while it is not known whether it is one of a VMM.
    early: Vec<Seen>,
}

/// A call, with those arguments that are numbers.
#[derive(Clone, Debug)]
struct Seen {
    name: String,
    args: [Option<u64>; 6],
}

/// Which lines of the table were needed, and by which classes.
#[derive(Debug, Default)]
pub struct Usage {
    threads: HashMap<u32, Thread>,
    needed: HashMap<(usize, &'static str), u64>,
}

impl Usage {
    fn add(&mut self, line: &str) {
        let Some((pid, rest)) = line.split_once(' ') else { return };
        let (Ok(pid), rest) = (pid.parse(), rest.trim_start()) else { return };
        // The rest of a call that was interrupted by one of another thread: its arguments came before.
        let Some(seen) = parse(rest) else { return };
        let thread = self.threads.entry(pid).or_default();
        match seen.name.as_str() {
            "execve" if rest.contains("/libexec/kvrun/kvrun-vmm\"") => {
                *thread = Thread { class: Some(Class::Main), ..Thread::default() };
                return;
            }
            "prctl" if thread.class.is_none() && seen.args[0] == Some(PR_SET_NAME) => {
                let name = rest.split('"').nth(1).unwrap_or_default();
                let workers = Class::ALL.iter().filter(|class| !matches!(class, Class::Main));
                thread.class = workers.copied().find(|class| name.starts_with(class.name()));
                thread.filtered = false;
                if thread.class.is_some_and(|class| class != Class::Spawner) {
                    for early in std::mem::take(&mut thread.early) {
                        count(&mut self.needed, Class::Spawner, &early);
                    }
                }
            }
            _ => {}
        }
        match thread.class {
            None => thread.early.push(seen),
            Some(class) if thread.filtered => count(&mut self.needed, class, &seen),
            Some(class) => {
                if class != Class::Main && class != Class::Spawner {
                    count(&mut self.needed, Class::Spawner, &seen);
                }
                thread.filtered = seen.name == "seccomp";
            }
        }
        // What a process that is none of ours did before it told its name is of no interest.
        if thread.early.len() > EARLY {
            thread.early.clear();
        }
    }

    /// The lines that nobody needed of those that `classes` should need, in words. A line of one class or two is needed by each; one that is
    /// for every thread is the C library's, and needed if anybody needs it.
    pub fn idle(&self, classes: &[Class]) -> Vec<String> {
        let mut idle = Vec::new();
        for (index, rule) in RULES.iter().enumerate().filter(|(_, rule)| rule.rarely.is_none()) {
            let needs = |class: &Class| self.needed.contains_key(&(index, class.name()));
            let everybody = rule.who.len() + 1 == Class::ALL.len();
            if everybody && rule.who.iter().any(needs) {
                continue;
            }
            for class in rule.who.iter().filter(|class| classes.contains(class) && !needs(class)) {
                idle.push(format!("{class:?} {} {:?}: {}", rule.call.name, rule.when, rule.why));
            }
        }
        idle
    }
}

/// `PR_SET_NAME`, Linux include/uapi/linux/prctl.h.
const PR_SET_NAME: u64 = 15;
/// More than a thread calls before it has a name.
const EARLY: usize = 64;

fn count(needed: &mut HashMap<(usize, &'static str), u64>, class: Class, seen: &Seen) {
    let fits = |rule: &Rule| {
        let conditions = |args: [u64; 6]| rule.when.iter().all(|condition| condition.holds(args));
        rule.who.contains(&class)
            && rule.call.name.strip_prefix("SYS_") == Some(&seen.name)
            // What strace shows as more than a number is none that a condition asks for.
            && conditions(seen.args.map(|arg| arg.unwrap_or_default()))
    };
    for (index, _) in RULES.iter().enumerate().filter(|(_, rule)| fits(rule)) {
        *needed.entry((index, class.name())).or_default() += 1;
    }
}

/// A line like `ioctl(5, 0xae80, 0) = 0`, finished or not.
fn parse(call: &str) -> Option<Seen> {
    let (name, rest) = call.split_once('(')?;
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return None;
    }
    let mut args = [None; 6];
    let (mut depth, mut quoted, mut index, mut text) = (0, false, 0, String::new());
    let mut previous = ' ';
    for c in rest.chars() {
        match c {
            '"' if previous != '\\' => quoted = !quoted,
            '[' | '{' | '(' if !quoted => depth += 1,
            ']' | '}' if !quoted => depth -= 1,
            ')' if !quoted && depth > 0 => depth -= 1,
            ',' | ')' | ' ' if !quoted && depth == 0 => {
                if index < args.len() && !text.is_empty() {
                    args[index] = number(&text);
                    index += 1;
                    text.clear();
                }
                if c == ')' {
                    break;
                }
                previous = c;
                continue;
            }
            _ => {}
        }
        text.push(c);
        previous = c;
    }
    Some(Seen { name: name.to_owned(), args })
}

/// `0x1f`, `-1`, `07`, `0x1|0x80800`.
fn number(text: &str) -> Option<u64> {
    text.split('|').try_fold(0, |all, part| {
        let value = match part.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok()?,
            None if part == "NULL" => 0,
            None => part.parse::<i64>().ok()?.cast_unsigned(),
        };
        Some(all | value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = r#"7 execve("/opt/kvrun/libexec/kvrun/kvrun-vmm", ["kvrun-vmm"], 0x1 /* 0 vars */) = 0
7 ioctl(9, 0x4040ae79, 0x7ffc) = 0
7 seccomp(0x1, 0, {len=9, filter=0x5}) = 0
9 set_robust_list(0x1, 24) = 0
9 prctl(0xf, "vcpu0") = 0
9 seccomp(0x1, 0, {len=9, filter=0x5}) = 0
9 ioctl(5, 0xae80 <unfinished ...>
7 socketpair(0x1, 0x1|0x80800, 0, [7, 8]) = 0
9 <... ioctl resumed>, 0) = 0
7 sendmsg(3, {msg_name=NULL, msg_iov=[{iov_base="a, \"b\"", iov_len=3}]}, 0x4000) = 3
"#;

    #[test]
    fn calls_count_for_the_class_of_their_thread() {
        let mut usage = Usage::default();
        RECORD.lines().for_each(|line| usage.add(line));
        let mut needed: Vec<_> =
            usage.needed.keys().map(|(index, class)| (RULES[*index].call.name, *class)).collect();
        needed.sort();
        let spawner =
            [("SYS_prctl", "spawner"), ("SYS_seccomp", "spawner"), ("SYS_set_robust_list", "spawner")];
        let mut expected = vec![("SYS_ioctl", "vcpu"), ("SYS_sendmsg", "kvrun-vmm")];
        expected.extend(spawner);
        expected.sort();
        assert_eq!(needed, expected);
        let idle = usage.idle(&[Class::Vcpu]);
        assert!(idle.iter().any(|line| line.starts_with("Vcpu SYS_rt_sigreturn")), "{idle:?}");
        assert!(!idle.iter().any(|line| line.contains("runs the guest")), "{idle:?}");
    }

    #[test]
    fn arguments_are_numbers_or_nothing() {
        let args = |call| parse(call).unwrap().args;
        assert_eq!(
            args("socketpair(0x1, 0x1|0x80800, 0, [7, 8]) = 0")[..4],
            [Some(1), Some(0x80801), Some(0), None]
        );
        assert_eq!(args(r#"openat(-1, "a, b)", 0x80000) = 3"#)[..3], [Some(u64::MAX), None, Some(0x80000)]);
        assert_eq!(args("ioctl(5, 0xae80 <unfinished ...>")[..2], [Some(5), Some(0xae80)]);
        assert!(parse("<... ioctl resumed>, 0) = 0").is_none());
        assert!(parse("+++ exited with 0 +++").is_none());
    }
}
