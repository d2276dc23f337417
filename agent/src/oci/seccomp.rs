//! `linux.seccomp`: a filter built by libseccomp, which knows the system calls of every architecture.

use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};

use super::error::SetupError;

fn failed(what: impl Into<String>) -> impl FnOnce(SeccompError) -> SetupError {
    let what = what.into();
    move |source| SetupError::Seccomp { what, source }
}

/// Builds a filter.
///
/// # Errors
///
/// [`SetupError`].
pub fn build(seccomp: &LinuxSeccomp) -> Result<ScmpFilterContext, SetupError> {
    let default =
        action("linux.seccomp.defaultAction", seccomp.default_action(), seccomp.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(failed("make a filter"))?;
    // process.noNewPrivileges says whether that bit is set, and nobody else.
    filter.set_ctl_nnp(false).map_err(failed("leave no_new_privs alone"))?;
    for arch in seccomp.architectures().iter().flatten() {
        let wanted = architecture(*arch);
        if !filter.is_arch_present(wanted).map_err(failed("look at the architectures"))? {
            filter.add_arch(wanted).map_err(failed(format!("add the architecture {arch}")))?;
        }
    }
    for flag in seccomp.flags().iter().flatten() {
        match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => filter.set_ctl_log(true),
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => filter.set_ctl_tsync(true),
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => filter.set_ctl_ssb(true),
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                let problem = "has SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, which is for SCMP_ACT_NOTIFY";
                return Err(SetupError::field("linux.seccomp.flags", problem));
            }
        }
        .map_err(failed(format!("set the flag {flag}")))?;
    }
    for (index, rule) in seccomp.syscalls().iter().flatten().enumerate() {
        add(&mut filter, index, rule, default)?;
    }
    Ok(filter)
}

fn add(
    filter: &mut ScmpFilterContext,
    index: usize,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), SetupError> {
    let field = format!("linux.seccomp.syscalls[{index}]");
    let action = action(&format!("{field}.action"), rule.action(), rule.errno_ret())?;
    if action == default {
        // libseccomp refuses a rule that says what holds anyway.
        return Ok(());
    }
    let args = rule.args().as_deref().unwrap_or_default();
    if let Some(arg) = args.iter().find(|arg| arg.index() > 5) {
        return Err(SetupError::field(
            format!("{field}.args"),
            format!("has the index {}: a system call has 6 arguments", arg.index()),
        ));
    }
    let comparisons: Vec<ScmpArgCompare> = args.iter().map(compare).collect();
    // libseccomp takes one comparison per argument. Several of one argument are alternatives, as with runc.
    let repeated =
        args.iter().enumerate().any(|(n, arg)| args[..n].iter().any(|other| other.index() == arg.index()));
    for name in rule.names() {
        // A name that no architecture knows: a profile may be newer than libseccomp.
        let Ok(call) = ScmpSyscall::from_name(name) else { continue };
        let what = || failed(format!("add the rule for {name:?} of syscalls[{index}]"));
        if comparisons.is_empty() {
            filter.add_rule(action, call).map_err(what())?;
        } else if repeated {
            for comparison in &comparisons {
                filter.add_rule_conditional(action, call, &[*comparison]).map_err(what())?;
            }
        } else {
            filter.add_rule_conditional(action, call, &comparisons).map_err(what())?;
        }
    }
    Ok(())
}

fn compare(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let (operator, datum) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // seccomp_rule_add(3): the mask first.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
        }
    };
    ScmpArgCompare::new(arg.index() as u32, operator, datum)
}

fn action(field: &str, action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, SetupError> {
    let number = errno.unwrap_or(libc::EPERM.unsigned_abs());
    let too_large = || SetupError::field(field, format!("has the errno {number}, which is none"));
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        // SECCOMP_RET_DATA has 16 bits, of which the kernel takes MAX_ERRNO.
        LinuxSeccompAction::ScmpActErrno if number <= 4095 => ScmpAction::Errno(number as i32),
        LinuxSeccompAction::ScmpActErrno => return Err(too_large()),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(number).map_err(|_| too_large())?)
        }
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(SetupError::field(
                field,
                "is SCMP_ACT_NOTIFY, for which there is no agent in the guest",
            ));
        }
    })
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// Puts this process under the filter.
///
/// # Errors
///
/// seccomp(2).
pub fn load(filter: &ScmpFilterContext) -> Result<(), SetupError> {
    filter.load().map_err(failed("put the filter in force"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(json: &str) -> Result<(), String> {
        let seccomp: LinuxSeccomp = serde_json::from_str(json).unwrap();
        build(&seccomp).map(drop).map_err(|err| err.to_string())
    }

    #[test]
    fn a_profile_as_engines_write_it_is_taken() {
        built(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,
                "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
                "flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_SPEC_ALLOW","SECCOMP_FILTER_FLAG_TSYNC"],
                "syscalls":[{"names":["read","no_such_call"],"action":"SCMP_ACT_ALLOW"},
                 {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"},
                  {"index":0,"value":0,"op":"SCMP_CMP_EQ"}]},
                 {"names":["clone"],"action":"SCMP_ACT_ALLOW",
                  "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
                 {"names":["write"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}"#,
        )
        .unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (json, field) in [
            (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "linux.seccomp.defaultAction"),
            (r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":5000}"#, "linux.seccomp.defaultAction"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#,
                "linux.seccomp.flags",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_KILL",
                    "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
                "linux.seccomp.syscalls[0].args",
            ),
        ] {
            let text = built(json).unwrap_err();
            assert!(text.starts_with(field), "{text}");
        }
    }
}
