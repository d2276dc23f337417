//! The filters, in two ways: interpreted here against the table, for every call there is; and put on by the kernel, in a process per case, for
//! the proof that a violation kills.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use seccompiler::sock_filter;

use super::table::{Condition, RULES, Rule};
use super::{Class, confine_spawned, filter, spawn};

/// More than any call has for a number (Linux 6.18: 470).
const NUMBERS: i64 = 1024;
/// `AUDIT_ARCH_X86_64`, Linux include/uapi/linux/audit.h.
const THIS_ARCH: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386`.
const OTHER_ARCH: u32 = 0x4000_0003;

/// What a filter says of a call: a classic BPF program (Linux Documentation/networking/filter.rst), of the instructions that seccompiler makes.
fn verdict(program: &[sock_filter], arch: u32, number: i64, args: [u64; 6]) -> u32 {
    // struct seccomp_data, Linux include/uapi/linux/seccomp.h.
    let mut data = Vec::new();
    data.extend((number as u32).to_le_bytes());
    data.extend(arch.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    data.extend(args.into_iter().flat_map(u64::to_le_bytes));
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let step = &program[at];
        at += 1;
        let k = step.k;
        let jump = |yes: bool| usize::from(if yes { step.jt } else { step.jf });
        match u32::from(step.code) {
            c if c == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                let bytes = &data[k as usize..k as usize + 4];
                accumulator = u32::from_le_bytes(bytes.try_into().unwrap());
            }
            c if c == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => accumulator &= k,
            c if c == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => at += jump(accumulator == k),
            c if c == libc::BPF_JMP | libc::BPF_JA => at += k as usize,
            c if c == libc::BPF_RET | libc::BPF_K => return k,
            other => panic!("unknown instruction {other:#x}"),
        }
    }
}

fn lines(class: Class) -> impl Iterator<Item = &'static Rule> {
    RULES.iter().filter(move |rule| class == Class::Spawner || rule.who.contains(&class))
}

fn is_allowed(class: Class, number: i64, args: [u64; 6]) -> bool {
    lines(class).any(|rule| rule.call.number == number && rule.when.iter().all(|c| c.holds(args)))
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
            let expected = if is_allowed(class, number, args) {
                libc::SECCOMP_RET_ALLOW
            } else {
                libc::SECCOMP_RET_KILL_PROCESS
            };
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
    let dangerous = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_mount,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_open_by_handle_at,
        libc::SYS_kill,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_memfd_create,
        libc::SYS_pkey_mprotect,
    ];
    for number in dangerous {
        assert!(RULES.iter().all(|rule| rule.call.number != number), "{number}");
    }
}

/// What the victim's process is told to do: the index of a class, and of a deed.
const ORDER: &str = "KVRUN_TEST_VICTIM";

type Deed = (&'static str, fn());

/// A system call, made for its number and arguments; it would fail or do no harm.
fn call(number: i64, args: [u64; 4]) {
    // SAFETY: every caller passes null pointers, invalid descriptors or values that change nothing.
    unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], 0, 0) };
}

const NONE: u64 = u64::MAX;

/// What no class may do, so that it kills.
const CRIMES: &[Deed] = &[
    ("another program", || call(libc::SYS_execve, [0; 4])),
    ("another process", || call(libc::SYS_clone, [u64::from(u32::MAX), 0, 0, 0])),
    ("a socket", || call(libc::SYS_socket, [NONE; 4])),
    ("a trace", || call(libc::SYS_ptrace, [NONE; 4])),
    ("a mount", || call(libc::SYS_mount, [0; 4])),
    ("a namespace", || call(libc::SYS_unshare, [0x7e02_0000 | libc::CLONE_FS as u64, 0, 0, 0])),
    ("a signal to all", || call(libc::SYS_kill, [NONE, 0, 0, 0])),
    ("a file handle", || call(libc::SYS_open_by_handle_at, [NONE, 0, 0, 0])),
    ("code", || call(libc::SYS_mmap, [0, 0, libc::PROT_EXEC as u64 | libc::PROT_READ as u64, 0])),
    ("memory turned to code", || call(libc::SYS_mprotect, [0, 0, libc::PROT_EXEC as u64, 0])),
    ("another device's request", || call(libc::SYS_ioctl, [NONE, libc::TIOCSTI, 0, 0])),
    ("core dumps again", || call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0])),
    ("another kick", || call(libc::SYS_tgkill, [NONE, NONE, libc::SIGKILL as u64, 0])),
    ("a call of tomorrow", || call(NUMBERS - 1, [0; 4])),
];

#[test]
fn a_call_outside_the_table_kills_the_process() {
    for class in Class::ALL {
        for (index, (name, _)) in CRIMES.iter().enumerate() {
            assert_eq!(victim(class, index).signal(), Some(libc::SIGSYS), "{class:?}: {name}");
        }
    }
}

/// Whose own calls another class may not make.
const PRIVATE: &[(Class, Deed)] = &[
    (Class::Vcpu, ("KVM_RUN", || call(libc::SYS_ioctl, [NONE, 0xae80, 0, 0]))),
    (Class::Main, ("KVM_IOEVENTFD", || call(libc::SYS_ioctl, [NONE, 0x4040_ae79, 0, 0]))),
    (Class::EventLoop, ("socketpair", || call(libc::SYS_socketpair, [1, 0x80801, 0, 0]))),
    (Class::Fs, ("openat", || call(libc::SYS_openat, [NONE, 0, 0, 0]))),
    (Class::Blk, ("io_uring_enter", || call(libc::SYS_io_uring_enter, [NONE, 0, 0, 0]))),
];

#[test]
fn a_class_may_make_its_own_calls_and_not_those_of_another() {
    for class in Class::ALL {
        for (index, (owner, (name, _))) in PRIVATE.iter().enumerate() {
            let status = victim(class, CRIMES.len() + index);
            // The spawner's filter is under all others.
            let expected = if class == *owner || class == Class::Spawner { None } else { Some(libc::SIGSYS) };
            assert_eq!(status.signal(), expected, "{class:?}: {name}");
        }
    }
}

/// How a thread may end the process otherwise.
const ENDS: &[(Deed, i32)] = &[
    (("abort", || std::process::abort()), libc::SIGABRT),
    // SAFETY: it is meant to crash.
    (("crash", || unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) }), libc::SIGSEGV),
    (("a stack overflow", || assert_eq!(overflow(1), 0)), libc::SIGABRT),
];

#[allow(unconditional_recursion, reason = "meant")]
fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 512]);
    overflow(depth + 1) + frame[0]
}

#[test]
fn a_crash_is_reported_as_the_crash_it_is() {
    for class in Class::ALL {
        for (index, ((name, _), signal)) in ENDS.iter().enumerate() {
            let status = victim(class, CRIMES.len() + PRIVATE.len() + index);
            assert_eq!(status.signal(), Some(*signal), "{class:?}: {name}");
        }
    }
}

/// Has a process do the deed on a thread of `class`; how it ended.
fn victim(class: Class, deed: usize) -> ExitStatus {
    let class = Class::ALL.iter().position(|c| *c == class).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "thread::tests::victim_process",
        "--ignored",
        "--nocapture",
        "--test-threads=1",
    ]);
    command.env(ORDER, format!("{class} {deed}"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().unwrap()
}

#[test]
#[ignore = "not a test: the process of the others' victims"]
fn victim_process() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let (class, deed) = order.split_once(' ').unwrap();
    let class = Class::ALL[class.parse::<usize>().unwrap()];
    let deeds: Vec<Deed> = CRIMES
        .iter()
        .copied()
        .chain(PRIVATE.iter().map(|(_, deed)| *deed))
        .chain(ENDS.iter().map(|(deed, _)| *deed))
        .collect();
    let deed = deeds[deed.parse::<usize>().unwrap()].1;
    confine_spawned().unwrap();
    let (done, told) = std::sync::mpsc::channel();
    // Started from a vCPU's thread, as workers may be: what that may not do is no matter.
    let nested = spawn(Class::Vcpu, "vcpu0", 128 * 1024, move || {
        spawn(class, class.name(), 128 * 1024, move || {
            deed();
            done.send(()).unwrap();
        })
        .unwrap()
        .join()
    });
    nested.unwrap().join().unwrap().unwrap();
    told.recv().unwrap();
}
