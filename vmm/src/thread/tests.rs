//! The filters, in two ways: interpreted here against the table, for every call there is; and put on by the kernel, in a process per case, for
//! the proof that a violation ends it.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use kvrun_vmm_api::{VIOLATION_EXIT, VIOLATION_PREFIX};
use seccompiler::sock_filter;

use super::table::{Condition, NEVER, RULES, Rule};
use super::{Class, confine_spawned, filter, spawn};

/// More than any call has for a number (Linux 6.18: 470).
const NUMBERS: i64 = 1024;
/// `AUDIT_ARCH_X86_64`, Linux include/uapi/linux/audit.h.
const THIS_ARCH: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386`.
const OTHER_ARCH: u32 = 0x4000_0003;

/// What a filter says of a call: a classic BPF program (Linux Documentation/networking/filter.rst), of the instructions that the build script makes.
fn verdict(program: &[sock_filter], arch: u32, number: i64, args: [u64; 6]) -> u32 {
    run(program, arch, number, args).0
}

/// The same, and how many instructions that took.
fn run(program: &[sock_filter], arch: u32, number: i64, args: [u64; 6]) -> (u32, usize) {
    // struct seccomp_data, Linux include/uapi/linux/seccomp.h.
    let mut data = Vec::new();
    data.extend((number as u32).to_le_bytes());
    data.extend(arch.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    data.extend(args.into_iter().flat_map(u64::to_le_bytes));
    let (mut at, mut accumulator, mut steps) = (0, 0, 0);
    loop {
        let step = &program[at];
        at += 1;
        steps += 1;
        let k = step.k;
        let jump = |yes: bool| usize::from(if yes { step.jt } else { step.jf });
        match u32::from(step.code) {
            c if c == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                let bytes = &data[k as usize..k as usize + 4];
                accumulator = u32::from_le_bytes(bytes.try_into().unwrap());
            }
            c if c == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => accumulator &= k,
            c if c == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => at += jump(accumulator == k),
            c if c == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => at += jump(accumulator >= k),
            c if c == libc::BPF_JMP | libc::BPF_JA => at += k as usize,
            c if c == libc::BPF_RET | libc::BPF_K => return (k, steps),
            other => panic!("unknown instruction {other:#x}"),
        }
    }
}

fn lines(class: Class) -> impl Iterator<Item = &'static Rule> {
    RULES.iter().filter(move |rule| class == Class::Spawner || rule.who.contains(&class))
}

/// What the table says.
fn expected(class: Class, number: i64, args: [u64; 6]) -> u32 {
    let fits = |rule: &&Rule| rule.call.number == number && rule.when.iter().all(|c| c.holds(args));
    let answer = |rule: &Rule| match rule.refused {
        None => libc::SECCOMP_RET_ALLOW,
        Some(error) => libc::SECCOMP_RET_ERRNO | u32::from(error),
    };
    if is_never(number) && matches!(class, Class::Main | Class::Spawner) {
        return libc::SECCOMP_RET_KILL_PROCESS;
    }
    // The spawner has all lines, and allows what one of them does.
    lines(class).filter(fits).map(answer).max().unwrap_or(libc::SECCOMP_RET_TRAP)
}

/// Arguments that satisfy a line, and as many that miss one condition each.
fn arguments(rule: &Rule) -> Vec<[u64; 6]> {
    let hit = |args: &mut [u64; 6], condition: &Condition| {
        if let Condition::Is(index, value) = condition {
            args[usize::from(*index)] = u64::from(*value);
        }
    };
    let mut right = [0; 6];
    rule.when.iter().for_each(|condition| hit(&mut right, condition));
    let mut all = vec![right];
    for condition in rule.when {
        let mut wrong = right;
        match condition {
            Condition::Is(index, value) => wrong[usize::from(*index)] = u64::from(value ^ 1 << 30),
            Condition::Without(index, bits) => wrong[usize::from(*index)] = u64::from(*bits),
            Condition::Null(index) => wrong[usize::from(*index)] = 1 << 32,
        }
        all.push(wrong);
    }
    // What the kernel does not look at is not looked at: int arguments may have anything above.
    all.push(right.map(|arg| arg | 0xdead_beef << 32));
    all
}

#[test]
fn filters_say_what_the_table_says() {
    for class in Class::ALL {
        let program = filter::of(class);
        let calls = (0..NUMBERS).map(|number| (number, [0; 6]));
        let given =
            RULES.iter().flat_map(|rule| arguments(rule).into_iter().map(|args| (rule.call.number, args)));
        for (number, args) in calls.chain(given) {
            let expected = expected(class, number, args);
            assert_eq!(verdict(program, THIS_ARCH, number, args), expected, "{class:?} {number} {args:x?}");
            // The numbers of 32-bit calls are others.
            assert_eq!(verdict(program, OTHER_ARCH, number, args), libc::SECCOMP_RET_KILL_PROCESS);
        }
    }
}

#[test]
fn every_line_says_who_and_why_and_is_there_once() {
    for (index, rule) in RULES.iter().enumerate() {
        assert!(!rule.who.is_empty() && !rule.why.is_empty(), "{rule:?}");
        assert!(rule.rarely.is_none_or(|when| !when.is_empty()), "{rule:?}");
        for other in &RULES[..index] {
            let overlaps = other.who.iter().any(|class| rule.who.contains(class));
            let same = other.call == rule.call
                && (other.when == rule.when || other.when.is_empty() || rule.when.is_empty());
            assert!(!(overlaps && same), "{rule:?} and {other:?}");
        }
    }
}

#[test]
fn what_nobody_may_ever_do_is_in_no_line() {
    for (index, call) in NEVER.iter().enumerate() {
        assert!(RULES.iter().all(|rule| rule.call.number != call.number), "{call:?}");
        assert!(!NEVER[..index].contains(call), "{call:?}");
    }
}

#[test]
fn what_the_c_library_only_tries_is_refused() {
    let says = |class, call| verdict(filter::of(class), THIS_ARCH, call, [0; 6]);
    let error = |number: i32| libc::SECCOMP_RET_ERRNO | number as u32;
    assert_eq!(says(Class::Spawner, libc::SYS_clone3), error(libc::ENOSYS));
    for class in [Class::Main, Class::Vcpu, Class::EventLoop, Class::Blk, Class::Net] {
        assert_eq!(says(class, libc::SYS_openat), error(libc::ENOENT), "{class:?}");
    }
}

/// The kernel goes through a filter for every number when it is put on, so that costs each start of a machine.
#[test]
fn numbers_are_found_in_few_steps() {
    let depends = |number| RULES.iter().any(|rule| rule.call.number == number && !rule.when.is_empty());
    for class in Class::ALL {
        for number in (0..NUMBERS).filter(|number| !depends(*number)) {
            let steps = run(filter::of(class), THIS_ARCH, number, [0; 6]).1;
            assert!(steps <= 20, "{class:?} {number}: {steps}");
        }
    }
}

fn is_never(number: i64) -> bool {
    NEVER.iter().any(|call| call.number == number)
}

/// What the victim's process is told to do: the index of a class, and of a deed.
const ORDER: &str = "KVRUN_TEST_VICTIM";

/// A system call, made for its number and arguments; it would fail or do no harm.
#[derive(Clone, Copy)]
struct Deed {
    what: &'static str,
    number: i64,
    args: [u64; 4],
}

impl Deed {
    fn commit(self) {
        let [a, b, c, d] = self.args;
        // SAFETY: all there are pass null pointers, invalid descriptors or values that change nothing.
        unsafe { libc::syscall(self.number, a, b, c, d, 0, 0) };
    }
}

const fn deed(what: &'static str, number: i64, args: [u64; 4]) -> Deed {
    Deed { what, number, args }
}

const NONE: u64 = u64::MAX;

/// What no class may do.
const CRIMES: &[Deed] = &[
    deed("another program", libc::SYS_execve, [0; 4]),
    deed("another process", libc::SYS_clone, [u32::MAX as u64, 0, 0, 0]),
    deed("a socket", libc::SYS_socket, [NONE; 4]),
    deed("a trace", libc::SYS_ptrace, [NONE; 4]),
    deed("a mount", libc::SYS_mount, [0; 4]),
    deed("a namespace", libc::SYS_unshare, [0x7e02_0000 | libc::CLONE_FS as u64, 0, 0, 0]),
    deed("a signal to all", libc::SYS_kill, [NONE, 0, 0, 0]),
    deed("a file handle", libc::SYS_open_by_handle_at, [NONE, 0, 0, 0]),
    deed("code", libc::SYS_mmap, [0, 0, libc::PROT_EXEC as u64 | libc::PROT_READ as u64, 0]),
    deed("memory turned to code", libc::SYS_mprotect, [0, 0, libc::PROT_EXEC as u64, 0]),
    deed("another device's request", libc::SYS_ioctl, [NONE, libc::TIOCSTI, 0, 0]),
    deed("core dumps again", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0]),
    deed("another kick", libc::SYS_tgkill, [NONE, NONE, libc::SIGKILL as u64, 0]),
    deed("another handler of this", libc::SYS_rt_sigaction, [libc::SIGSYS as u64, 0, 0, 8]),
    deed("a call of tomorrow", NUMBERS - 1, [0; 4]),
];

#[test]
fn a_call_outside_the_table_ends_the_process_which_says_so() {
    for class in Class::ALL {
        for (index, crime) in CRIMES.iter().enumerate() {
            let (status, said) = victim(class, index);
            let Deed { what, number, args } = crime;
            if is_never(*number) {
                assert_eq!(status.signal(), Some(libc::SIGSYS), "{class:?}: {what}: {status} {said}");
                continue;
            }
            assert_eq!(status.code(), Some(VIOLATION_EXIT), "{class:?}: {what}: {status} {said}");
            let expected =
                format!("{VIOLATION_PREFIX}thread of class {}, system call {number} (", class.name());
            let line =
                said.lines().find(|line| line.starts_with(&expected)).unwrap_or_else(|| panic!("{said}"));
            assert!(line.ends_with(&format!(" {:#x} {:#x} {:#x}", args[0], args[1], args[2])), "{line}");
        }
    }
}

/// Whose own calls another class may not make.
const PRIVATE: &[(Class, Deed)] = &[
    (Class::Vcpu, deed("KVM_RUN", libc::SYS_ioctl, [NONE, 0xae80, 0, 0])),
    (Class::Main, deed("KVM_IOEVENTFD", libc::SYS_ioctl, [NONE, 0x4040_ae79, 0, 0])),
    (Class::EventLoop, deed("socketpair", libc::SYS_socketpair, [1, 0x80801, 0, 0])),
    (Class::Fs, deed("mkdirat", libc::SYS_mkdirat, [NONE, 0, 0, 0])),
    (Class::Blk, deed("io_uring_enter", libc::SYS_io_uring_enter, [NONE, 0, 0, 0])),
    (Class::Net, deed("writev", libc::SYS_writev, [NONE, 0, 0, 0])),
];

#[test]
fn a_class_may_make_its_own_calls_and_not_those_of_another() {
    for class in Class::ALL {
        for (index, (owner, deed)) in PRIVATE.iter().enumerate() {
            let (status, said) = victim(class, CRIMES.len() + index);
            // The spawner's filter is under all others.
            let expected = if class == *owner || class == Class::Spawner { 0 } else { VIOLATION_EXIT };
            assert_eq!(status.code(), Some(expected), "{class:?}: {}: {said}", deed.what);
        }
    }
}

/// How a thread may end the process otherwise.
const ENDS: &[(&str, fn(), i32)] = &[
    ("abort", || std::process::abort(), libc::SIGABRT),
    // SAFETY: it is meant to crash.
    ("crash", || unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) }, libc::SIGSEGV),
    ("a stack overflow", || assert_eq!(overflow(1), 0), libc::SIGABRT),
    ("a call that is not allowed, unheard", || unheard(CRIMES[1]), libc::SIGSYS),
];

/// Does the deed with `SIGSYS` blocked.
fn unheard(deed: Deed) {
    // SAFETY: a set of signals may be zeroes before it is emptied; the mask is the calling thread's own.
    unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
    }
    deed.commit();
}

#[allow(unconditional_recursion, reason = "meant")]
fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 512]);
    overflow(depth + 1) + frame[0]
}

#[test]
fn a_crash_is_reported_as_the_crash_it_is() {
    for class in Class::ALL {
        for (index, (what, _, signal)) in ENDS.iter().enumerate() {
            let (status, said) = victim(class, CRIMES.len() + PRIVATE.len() + index);
            assert_eq!(status.signal(), Some(*signal), "{class:?}: {what}: {status} {said}");
        }
    }
}

/// What the C library does with memory now and then.
const RARE: &[(&str, fn())] = &[
    ("a heap that grows beyond its first part, and shrinks again", || {
        let blocks: Vec<Box<[u64; 64]>> = (0..2048).map(|i| Box::new([i; 64])).collect();
        drop(std::hint::black_box(blocks));
    }),
    ("a large block that grows", || {
        let mut block = vec![1u8; 1 << 20];
        block.reserve_exact(4 << 20);
        drop(std::hint::black_box(block));
    }),
    ("a turn given away", std::thread::yield_now),
];

#[test]
fn what_is_rarely_needed_is_allowed_where_it_is() {
    for class in Class::ALL {
        for (index, (what, _)) in RARE.iter().enumerate() {
            let (status, said) = victim(class, CRIMES.len() + PRIVATE.len() + ENDS.len() + index);
            assert!(status.success(), "{class:?}: {what}: {status} {said}");
        }
    }
}

/// Has a process do the deed on a thread of `class`; how it ended, and what it said.
fn victim(class: Class, deed: usize) -> (ExitStatus, String) {
    let class = Class::ALL.iter().position(|c| *c == class).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "thread::tests::victim_process",
        "--ignored",
        "--nocapture",
        "--test-threads=1",
    ]);
    command.env(ORDER, format!("{class} {deed}")).stdin(Stdio::null());
    let output = command.output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
#[ignore = "not a test: the process of the others' victims"]
fn victim_process() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let (class, number) = order.split_once(' ').unwrap();
    let class = Class::ALL[class.parse::<usize>().unwrap()];
    let number: usize = number.parse().unwrap();
    let deeds: Vec<Deed> = CRIMES.iter().copied().chain(PRIVATE.iter().map(|(_, deed)| *deed)).collect();
    let ends = ENDS.iter().map(|(_, end, _)| *end);
    let others: Vec<fn()> = ends.chain(RARE.iter().map(|(_, deed)| *deed)).collect();
    // As in the jail: without /proc, of which malloc would read in a class that may open files.
    rustix::process::chroot("/sys").unwrap();
    confine_spawned().unwrap();
    let (done, told) = std::sync::mpsc::channel();
    // Started from a vCPU's thread, as workers may be: what that may not do is no matter.
    let nested = spawn(Class::Vcpu, "vcpu0", 128 * 1024, move || {
        spawn(class, class.name(), 128 * 1024, move || {
            match deeds.get(number) {
                Some(deed) => deed.commit(),
                None => others[number - deeds.len()](),
            }
            done.send(()).unwrap();
            if class == Class::Main {
                // The main thread ends with the process.
                std::process::exit(0);
            }
        })
        .unwrap()
        .join()
    });
    nested.unwrap().join().unwrap().unwrap();
    told.recv().unwrap();
}
