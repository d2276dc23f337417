//! `linux.resources.devices` on cgroup v2: a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`, attached to the container's cgroup, which
//! the kernel asks before a device is opened or a device node made (Linux 6.12 Documentation/admin-guide/cgroup-v2.rst, "Device
//! controller"; kernel/bpf/cgroup.c, `__cgroup_bpf_check_dev_permission`).
//!
//! Each of the accesses read, write and mknod is decided by the last rule that matches the device and names it; what no
//! rule decides is denied. So the program walks the rules backwards and strikes out the accesses that one allows, until none is
//! left, or one is denied.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// The most rules we take: engines write some twenty.
const RULES_MAX: usize = 1000;

/// `BPF_DEVCG_ACC_*` and `BPF_DEVCG_DEV_*` (Linux 6.12 include/uapi/linux/bpf.h).
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// Why a list is refused, or not enforced.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFilterError {
    /// A rule makes no sense.
    #[error("linux.resources.devices[{index}] {problem}")]
    Rule {
        /// Which.
        index: usize,
        /// The rest of the sentence.
        problem: String,
    },
    /// Too many.
    #[error("linux.resources.devices has {0} rules: at most {RULES_MAX} are supported")]
    TooMany(usize),
    /// bpf(2).
    #[error("cannot {what} for linux.resources.devices")]
    Bpf {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A rule; `None` is any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// What every container may do, whatever its list says, as with runc: make any node, and use the devices that every container has
/// (config-linux.md, "Default Devices").
fn always_allowed() -> impl Iterator<Item = Rule> {
    let node = |kind| Rule { allow: true, kind: Some(kind), major: None, minor: None, access: MKNOD };
    let character = |major, minor| Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        access: READ | WRITE | MKNOD,
    };
    [node(CHARACTER), node(BLOCK)].into_iter().chain([
        character(1, Some(3)),
        character(1, Some(5)),
        character(1, Some(7)),
        character(1, Some(8)),
        character(1, Some(9)),
        character(5, Some(0)),
        character(5, Some(2)),
        // Slaves of pseudo-terminals.
        character(136, None),
    ])
}

fn rule(index: usize, given: &LinuxDeviceCgroup) -> Result<Vec<Rule>, DeviceFilterError> {
    let wrong = |problem: String| DeviceFilterError::Rule { index, problem };
    let number = |name: &str, value: Option<i64>| match value {
        // As in runc and crun, -1 is any.
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| wrong(format!("has the {name} number {value}, which no device has"))),
    };
    let mut access = 0;
    for letter in given.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => {
                return Err(wrong(format!(
                    "has the access {letter:?}: it must be of the letters r, w and m"
                )));
            }
        };
    }
    let kinds: &[u32] = match given.typ().unwrap_or_default() {
        LinuxDeviceType::A => &[BLOCK, CHARACTER],
        LinuxDeviceType::B => &[BLOCK],
        LinuxDeviceType::C | LinuxDeviceType::U => &[CHARACTER],
        LinuxDeviceType::P => return Err(wrong("has the type p: a FIFO is no device".to_owned())),
    };
    let (major, minor) = (number("major", given.major())?, number("minor", given.minor())?);
    Ok(kinds
        .iter()
        .map(|kind| Rule { allow: given.allow(), kind: Some(*kind), major, minor, access })
        .collect())
}

/// One instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the lower, source in the upper half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Opcodes (Linux 6.12 Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61;
const MOVE_IMMEDIATE: u8 = 0xb4;
const MOVE_REGISTER: u8 = 0xbc;
const AND_IMMEDIATE: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP: u8 = 0x05;
const JUMP_IF_NOT_EQUAL: u8 = 0x56;
const JUMP_IF_ANY_BIT: u8 = 0x46;
const EXIT: u8 = 0x95;

// Registers: the context is in 1.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction { code, registers: destination | (source << 4), offset, immediate: immediate as i32 }
}

fn answer(program: &mut Vec<Instruction>, allow: bool) {
    program.push(instruction(MOVE_IMMEDIATE, RESULT, 0, 0, allow.into()));
    program.push(instruction(EXIT, 0, 0, 0, 0));
}

fn program(rules: &[Rule]) -> Vec<Instruction> {
    // `struct bpf_cgroup_dev_ctx`: access_type (access << 16 | kind), major, minor.
    let mut program = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(AND_IMMEDIATE, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut decision = Vec::with_capacity(4);
        if rule.allow {
            decision.push(instruction(AND_IMMEDIATE, ACCESS, 0, 0, !rule.access));
            decision.push(instruction(JUMP_IF_NOT_EQUAL, ACCESS, 0, 2, 0));
            answer(&mut decision, true);
        } else {
            decision.push(instruction(JUMP_IF_ANY_BIT, ACCESS, 0, 1, rule.access));
            // Over the answer.
            decision.push(instruction(JUMP, 0, 0, 2, 0));
            answer(&mut decision, false);
        }
        let tests: Vec<(u8, u32)> = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
            .into_iter()
            .filter_map(|(register, value)| Some((register, value?)))
            .collect();
        for (index, (register, value)) in tests.iter().enumerate() {
            let beyond = tests.len() - index - 1 + decision.len();
            program.push(instruction(JUMP_IF_NOT_EQUAL, *register, 0, beyond as i16, *value));
        }
        program.append(&mut decision);
    }
    answer(&mut program, false);
    program
}

/// Enforces a list on a cgroup and those below it.
///
/// # Errors
///
/// [`DeviceFilterError`].
pub fn enforce(cgroup: BorrowedFd<'_>, list: &[LinuxDeviceCgroup]) -> Result<(), DeviceFilterError> {
    if list.len() > RULES_MAX {
        return Err(DeviceFilterError::TooMany(list.len()));
    }
    let mut rules = Vec::with_capacity(list.len() + 10);
    for (index, given) in list.iter().enumerate() {
        rules.extend(rule(index, given)?);
    }
    rules.extend(always_allowed());
    let program =
        load(&program(&rules)).map_err(|source| DeviceFilterError::Bpf { what: "load a program", source })?;
    attach(cgroup, &program).map_err(|source| DeviceFilterError::Bpf { what: "attach a program", source })
}

/// The fields of `union bpf_attr` for `BPF_PROG_LOAD`, as far as we use them.
#[repr(C)]
struct LoadAttr {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

/// As above, for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttr {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let attr = LoadAttr {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        // It calls no function that asks for one.
        license: c"Apache-2.0".as_ptr() as u64,
    };
    // SAFETY: the kernel reads the attribute, the instructions and the license, all of which outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<LoadAttr>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor (with O_CLOEXEC) and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn attach(cgroup: BorrowedFd<'_>, program: &OwnedFd) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    // A container may attach a stricter one to cgroups of its own; this one is asked all the same.
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attr = AttachAttr {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the kernel reads the attribute, which outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<AttachAttr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn run(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u32; 6];
        let mut at = 0;
        loop {
            let Instruction { code, registers: names, offset, immediate } = program[at];
            let (to, from) = (usize::from(names & 15), usize::from(names >> 4));
            let immediate = immediate as u32;
            at += 1;
            let mut jump = |taken: bool| {
                if taken {
                    at = (at as isize + isize::from(offset)) as usize;
                }
            };
            match code {
                LOAD_WORD => registers[to] = context[offset as usize / 4],
                MOVE_IMMEDIATE => registers[to] = immediate,
                MOVE_REGISTER => registers[to] = registers[from],
                AND_IMMEDIATE => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP => jump(true),
                JUMP_IF_NOT_EQUAL => jump(registers[to] != immediate),
                JUMP_IF_ANY_BIT => jump(registers[to] & immediate != 0),
                EXIT => return registers[0] == 1,
                _ => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    fn rules(json: &str) -> Vec<Rule> {
        let list: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        list.iter().enumerate().flat_map(|(index, given)| rule(index, given).unwrap()).collect()
    }

    #[test]
    fn the_last_rule_that_names_an_access_decides_it() {
        let program = program(&rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","major":10,"minor":200,"access":"rw"},
                {"allow":true,"type":"b","major":8,"access":"rwm"},
                {"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#,
        ));
        let allowed = |kind, access, major, minor| run(&program, kind, access, major, minor);
        assert!(allowed(CHARACTER, READ | WRITE, 10, 200));
        assert!(!allowed(CHARACTER, MKNOD, 10, 200) && !allowed(CHARACTER, READ | MKNOD, 10, 200));
        assert!(!allowed(BLOCK, READ, 10, 200) && !allowed(CHARACTER, READ, 10, 201));
        assert!(allowed(BLOCK, READ | WRITE | MKNOD, 8, 0) && allowed(BLOCK, READ, 8, 1));
        assert!(!allowed(BLOCK, WRITE, 8, 1) && !allowed(BLOCK, READ | WRITE, 8, 1));
        assert!(!allowed(BLOCK, READ, 9, 0));
    }

    #[test]
    fn every_container_has_its_default_devices() {
        let program = program(&always_allowed().collect::<Vec<_>>());
        assert!(run(&program, CHARACTER, READ | WRITE, 1, 3) && run(&program, CHARACTER, READ, 136, 77));
        assert!(run(&program, BLOCK, MKNOD, 8, 0) && !run(&program, BLOCK, READ, 8, 0));
        assert!(!run(&program, CHARACTER, READ, 1, 1), "/dev/mem");
    }

    #[test]
    fn rules_that_make_no_sense_are_refused_by_name() {
        for (json, words) in [
            (r#"{"allow":true,"access":"rx"}"#, "linux.resources.devices[0] has the access 'x'"),
            (r#"{"allow":true,"type":"c","major":-2}"#, "linux.resources.devices[0] has the major number -2"),
            (r#"{"allow":true,"type":"p"}"#, "linux.resources.devices[0] has the type p"),
        ] {
            let given: LinuxDeviceCgroup = serde_json::from_str(json).unwrap();
            let text = rule(0, &given).unwrap_err().to_string();
            assert!(text.starts_with(words), "{text}");
        }
    }
}
