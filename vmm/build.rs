//! Makes the system call filters from their table, so that the program has them ready as constants.

#![allow(dead_code, unreachable_pub, reason = "the table is also part of the program")]

#[path = "src/thread/class.rs"]
mod class;
#[path = "src/thread/table.rs"]
mod table;

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use class::Class;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    sock_filter,
};
use table::{Condition, NEVER, RULES, Rule};

fn main() -> Result<(), Box<dyn Error>> {
    for path in ["build.rs", "src/thread/class.rs", "src/thread/table.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let mut code = String::new();
    for class in Class::ALL {
        let name = match class {
            Class::Main => "MAIN",
            Class::Vcpu => "VCPU",
            Class::EventLoop => "EVENT_LOOP",
            Class::Fs => "FS",
            Class::Blk => "BLK",
            Class::Net => "NET",
            Class::Spawner => "SPAWNER",
        };
        write_program(&mut code, name, &filter(class)?)?;
    }
    fs::write(Path::new(&env::var("OUT_DIR")?).join("filters.rs"), code)?;
    Ok(())
}

/// The program of a class. It searches for the number of the call by halves: the kernel goes through it for each number there is when it is put
/// on, and for most calls when they are made (Linux kernel/seccomp.c, seccomp_cache_prepare).
fn filter(class: Class) -> Result<BpfProgram, Box<dyn Error>> {
    let mut answers: BTreeMap<u32, BpfProgram> = BTreeMap::new();
    // All others inherit from the spawner.
    if matches!(class, Class::Main | Class::Spawner) {
        for call in NEVER {
            answers.insert(call.number.try_into()?, vec![answer_with(SeccompAction::KillProcess)]);
        }
    }
    let mut rules: BTreeMap<u32, Vec<&Rule>> = BTreeMap::new();
    // The spawner hands its filter down, so it allows what the filters of all others may.
    for rule in RULES.iter().filter(|rule| class == Class::Spawner || rule.who.contains(&class)) {
        rules.entry(rule.call.number.try_into()?).or_default().push(rule);
    }
    for (number, rules) in rules {
        answers.insert(number, answer(&rules)?);
    }

    let unknown = vec![answer_with(SeccompAction::Trap)];
    // Each from its number up to the next.
    let mut ranges = vec![(0, unknown.clone())];
    for (number, answer) in answers {
        ranges.push((number, answer));
        ranges.push((number + 1, unknown.clone()));
    }
    // Of two from the same number, the later counts.
    ranges.dedup_by(|later, earlier| {
        let same = later.0 == earlier.0;
        if same {
            std::mem::swap(&mut later.1, &mut earlier.1);
        }
        same
    });
    ranges.dedup_by(|later, earlier| later.1 == earlier.1);

    // A filter without rules looks at the architecture and gives its answer, which is not to be given yet.
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let (no, yes) = (SeccompAction::Trap, SeccompAction::Allow);
    let mut program: BpfProgram =
        SeccompFilter::new(BTreeMap::new(), no, yes, arch.as_str().try_into()?)?.try_into()?;
    program.pop();
    // The number is the first field of struct seccomp_data (Linux include/uapi/linux/seccomp.h).
    program.push(step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0));
    program.extend(search(&ranges)?);
    Ok(program)
}

/// Finds the range of the number and gives its answer.
fn search(ranges: &[(u32, BpfProgram)]) -> Result<BpfProgram, Box<dyn Error>> {
    if let [(_, answer)] = ranges {
        return Ok(answer.clone());
    }
    let (below, above) = ranges.split_at(ranges.len() / 2);
    let border = above.first().ok_or("no ranges")?.0;
    let below = search(below)?;
    let at_least = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    // A jump that depends on something does not reach far.
    let mut program = match u8::try_from(below.len()) {
        Ok(length) => vec![step(at_least, length, 0, border)],
        Err(_) => vec![
            step(at_least, 0, 1, border),
            step(libc::BPF_JMP | libc::BPF_JA, 0, 0, below.len().try_into()?),
        ],
    };
    program.extend(below);
    program.extend(search(above)?);
    Ok(program)
}

/// The answer to a call that these lines are about.
fn answer(rules: &[&Rule]) -> Result<BpfProgram, Box<dyn Error>> {
    let mut program = BpfProgram::new();
    let mut otherwise = SeccompAction::Trap;
    for rule in rules {
        if let Some(error) = rule.refused {
            assert!(rule.when.is_empty(), "refused under conditions: {rule:?}");
            otherwise = SeccompAction::Errno(error.into());
        } else if rule.when.is_empty() {
            return Ok(vec![answer_with(SeccompAction::Allow)]);
        } else {
            let conditions = rule.when.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
            // Where they do not hold, it jumps past the instruction after it.
            program.extend(BpfProgram::from(SeccompRule::new(conditions)?));
            program.push(answer_with(SeccompAction::Allow));
        }
    }
    program.push(answer_with(otherwise));
    Ok(program)
}

fn answer_with(action: SeccompAction) -> sock_filter {
    step(libc::BPF_RET | libc::BPF_K, 0, 0, action.into())
}

/// An instruction of classic BPF (Linux Documentation/networking/filter.rst).
fn step(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

fn condition(condition: &Condition) -> Result<SeccompCondition, seccompiler::BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    let (argument, length, operator, value) = match *condition {
        Condition::Is(argument, value) => (argument, Dword, SeccompCmpOp::Eq, value),
        Condition::Without(argument, bits) => (argument, Dword, SeccompCmpOp::MaskedEq(bits.into()), 0),
        Condition::Null(argument) => (argument, Qword, SeccompCmpOp::Eq, 0),
    };
    SeccompCondition::new(argument, length, operator, value.into())
}

fn write_program(code: &mut String, name: &str, program: &BpfProgram) -> Result<(), std::fmt::Error> {
    writeln!(code, "/// Made by the build script.\npub(super) const {name}: &[sock_filter] = &[")?;
    for step in program {
        let (opcode, jt, jf, k) = (step.code, step.jt, step.jf, step.k);
        writeln!(code, "    sock_filter {{ code: {opcode:#x}, jt: {jt}, jf: {jf}, k: {k:#x} }},")?;
    }
    writeln!(code, "];")
}
