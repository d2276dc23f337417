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
        // The spawner hands its filter down, so it allows what the filters of all others may.
        let rules = RULES.iter().filter(|rule| class == Class::Spawner || rule.who.contains(&class));
        let filter = compile(rules, SeccompAction::Trap, SeccompAction::Allow)?;
        write_program(&mut code, name, &filter)?;
    }
    let never = of_numbers(NEVER.iter().map(|call| call.number), SeccompAction::KillProcess)?;
    write_program(&mut code, "NEVER", &never)?;
    let no_clone3 = of_numbers([libc::SYS_clone3], SeccompAction::Errno(libc::ENOSYS as u32))?;
    write_program(&mut code, "NO_CLONE3", &no_clone3)?;
    let no_files = of_numbers([libc::SYS_openat], SeccompAction::Errno(libc::ENOENT as u32))?;
    write_program(&mut code, "NO_FILES", &no_files)?;
    fs::write(Path::new(&env::var("OUT_DIR")?).join("filters.rs"), code)?;
    Ok(())
}

fn compile<'r>(
    rules: impl Iterator<Item = &'r Rule>,
    otherwise: SeccompAction,
    allowed: SeccompAction,
) -> Result<BpfProgram, Box<dyn Error>> {
    // Without a rule, any arguments will do; then there must be no other line for the same call.
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut any: BTreeMap<i64, bool> = BTreeMap::new();
    for rule in rules {
        let conditions = rule.when.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
        let free = any.entry(rule.call.number).or_insert(conditions.is_empty());
        *free |= conditions.is_empty();
        let chain = calls.entry(rule.call.number).or_default();
        if *free {
            chain.clear();
        } else {
            chain.push(SeccompRule::new(conditions)?);
        }
    }
    assemble(calls, otherwise, allowed)
}

/// A filter that lets everything pass but calls of these numbers.
fn of_numbers(
    numbers: impl IntoIterator<Item = i64>,
    action: SeccompAction,
) -> Result<BpfProgram, Box<dyn Error>> {
    let calls = numbers.into_iter().map(|number| (number, Vec::new())).collect();
    assemble(calls, SeccompAction::Allow, action)
}

fn assemble(
    calls: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, Box<dyn Error>> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    Ok(SeccompFilter::new(calls, otherwise, listed, arch.as_str().try_into()?)?.try_into()?)
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
