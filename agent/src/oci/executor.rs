//! The last step of a process: finding its program, and exec. Runs inside the container, as the container's user.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{AccessFlags, execve, faccessat};
use oci_spec::runtime::Process;

use super::error::{SetupError, system};

/// Where a command without '/' is looked for when `process.env` has no `PATH`: what Docker gives to every container.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Whether the program can be found: a missing one is an error of "create", as with runc.
///
/// # Errors
///
/// [`SetupError`].
pub fn check(process: &Process, env: &[String]) -> Result<(), SetupError> {
    find(command(process)?, path_variable(env)).map(drop)
}

/// A program, with all it is started with.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    c_path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Finds `process.args[0]`.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn find(process: &Process, env: &[String]) -> Result<Self, SetupError> {
        let path = find(command(process)?, path_variable(env))?;
        let c_strings =
            |list: &[String]| list.iter().map(|text| c_string(text.as_bytes())).collect::<Result<_, _>>();
        Ok(Self {
            c_path: c_string(path.as_os_str().as_bytes())?,
            path,
            args: c_strings(process.args().as_deref().unwrap_or_default())?,
            env: c_strings(env)?,
        })
    }

    /// Becomes it.
    ///
    /// # Errors
    ///
    /// execve(2).
    pub fn exec(self) -> Result<Infallible, SetupError> {
        // Rust's runtime ignores SIGPIPE, and an ignored signal stays ignored over exec.
        // SAFETY: SIG_DFL installs no handler.
        let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
        let _ = SigSet::empty().thread_set_mask();
        let Err(errno) = execve(&self.c_path, &self.args, &self.env);
        let program = self.path.display();
        Err(match errno {
            // The program itself was found just now.
            Errno::ENOENT => SetupError::NotFound(format!(
                "cannot execute {program:?}: the interpreter or dynamic loader it names does not exist"
            )),
            Errno::EACCES | Errno::EPERM | Errno::ENOEXEC | Errno::EISDIR | Errno::ELIBBAD => {
                SetupError::NotExecutable(format!("cannot execute {program:?}: {}", errno.desc()))
            }
            _ => system(format!("cannot execute {program:?}"))(errno),
        })
    }
}

fn c_string(bytes: &[u8]) -> Result<CString, SetupError> {
    CString::new(bytes).map_err(|_| SetupError::field("process", "has a NUL character in args or env"))
}

fn command(process: &Process) -> Result<&str, SetupError> {
    let first = process.args().as_ref().and_then(|args| args.first()).map(String::as_str);
    first
        .filter(|name| !name.is_empty())
        .ok_or_else(|| SetupError::field("process.args", "is missing or empty"))
}

fn path_variable(env: &[String]) -> &str {
    env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH)
}

/// The program that `name` means: a path if it has a '/', else the first executable file of that name along `path`.
fn find(name: &str, path: &str) -> Result<PathBuf, SetupError> {
    if name.contains('/') {
        return match look(Path::new(name)) {
            Look::Executable | Look::Unknown => Ok(name.into()),
            Look::Missing => Err(SetupError::NotFound(format!(
                "executable {name:?} does not exist in the container: no such file or directory"
            ))),
            Look::Unusable(why) => Err(SetupError::NotExecutable(format!("cannot execute {name:?}: {why}"))),
        };
    }
    let mut unusable = None;
    for dir in path.split(':') {
        // POSIX: an empty entry means the working directory.
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match look(&candidate) {
            Look::Executable | Look::Unknown => return Ok(candidate),
            Look::Missing => {}
            Look::Unusable(why) => {
                unusable.get_or_insert_with(|| format!("cannot execute {:?}: {why}", candidate.display()));
            }
        }
    }
    match unusable {
        Some(text) => Err(SetupError::NotExecutable(text)),
        None => Err(SetupError::NotFound(format!(
            // In these words engines recognise it, and tell their users so.
            "exec {name:?}: executable file not found in $PATH ({path})"
        ))),
    }
}

enum Look {
    Executable,
    Missing,
    Unusable(&'static str),
    /// The seccomp filter forbids to look: exec will tell.
    Unknown,
}

fn look(path: &Path) -> Look {
    match std::fs::metadata(path) {
        Err(err) => match err.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ENOTDIR) => Look::Missing,
            Some(errno @ (Errno::EACCES | Errno::ELOOP | Errno::ENAMETOOLONG)) => {
                Look::Unusable(errno.desc())
            }
            _ => Look::Unknown,
        },
        Ok(metadata) if metadata.is_dir() => Look::Unusable("it is a directory"),
        Ok(_) => match faccessat(AT_FDCWD, path, AccessFlags::X_OK, nix::fcntl::AtFlags::AT_EACCESS) {
            Ok(()) => Look::Executable,
            Err(Errno::EACCES) => Look::Unusable("permission denied"),
            Err(_) => Look::Unknown,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_and_one_without_permission_are_told_apart() {
        let dir = std::env::temp_dir().join(format!("kvrun-executor-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("sub")).unwrap();
        std::fs::write(dir.join("data"), "x").unwrap();
        let path = dir.to_str().unwrap();

        assert!(
            matches!(find("no-such", path), Err(SetupError::NotFound(text)) if text.contains("\"no-such\""))
        );
        assert!(
            matches!(find("/no/such", path), Err(SetupError::NotFound(text)) if text.contains("\"/no/such\""))
        );
        assert!(
            matches!(find("data", path), Err(SetupError::NotExecutable(text)) if text.contains("permission denied"))
        );
        assert!(
            matches!(find("sub", path), Err(SetupError::NotExecutable(text)) if text.contains("directory"))
        );
        assert!(matches!(find(&format!("{path}/data"), ""), Err(SetupError::NotExecutable(_))));
        assert_eq!(find("sh", &format!("{path}:/bin")).unwrap(), Path::new("/bin/sh"));

        std::fs::remove_dir_all(dir).unwrap();
    }
}
