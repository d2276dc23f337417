//! `kvrun kill`: a signal to the container's process.

use std::time::Duration;

use kvrun_pod::record::Status;
use nix::sys::signal::Signal;

use super::delete;
use crate::cli::{Global, KillArgs};
use crate::error::Error;
use crate::monitor::client::Known;
use crate::monitor::protocol::Request;

/// How long delivering a signal may take: the guest has 10 s, after which its machine is ended.
const PATIENCE: Duration = Duration::from_secs(12);
/// How long SIGKILL may take until we deliver it ourselves. The guest has 1.5 s.
const KILL_PATIENCE: Duration = Duration::from_millis(1650);
/// Linux include/uapi/asm-generic/signal.h: `SIGRTMIN` as programs know it, and `SIGRTMAX`.
const REAL_TIME: (i32, i32) = (34, 64);

/// Sends it.
pub(crate) fn kill(global: &Global, args: &KillArgs) -> Result<(), Error> {
    let signal = parse(&args.signal)?;
    let container = Known::get(&global.root, &args.id)?;
    let (id, status) = (container.id().clone(), container.record.status());
    match (status, args.all) {
        (Status::Stopped, true) => return Ok(()),
        (Status::Stopped, false) => return Err(Error::NotRunning { id, status }),
        _ => {}
    }
    let is_kill = signal == Signal::SIGKILL as i32;
    let patience = if is_kill { KILL_PATIENCE } else { PATIENCE };
    let request = Request::Kill { signal, all: args.all };
    match container.connect(&global.root, patience).and_then(|connection| connection.tell(request)) {
        // Whoever serves it hangs: with it ends the machine, and with that every process of the container.
        Err(Error::Silent { .. }) if is_kill => {
            delete::end_machine(&container.record);
            Ok(())
        }
        other => other,
    }
}

/// The number of a signal, by number or by name, with or without `SIG`.
fn parse(text: &str) -> Result<i32, Error> {
    let unknown = || Error::Option(format!("{text:?} is not a signal"));
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=REAL_TIME.1).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let offset = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<i32>().ok() };
    let real_time = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => offset(rest).map(|n| REAL_TIME.0 + n),
        (_, Some(rest)) => offset(rest).map(|n| REAL_TIME.1 + n),
        _ => None,
    };
    if let Some(number) = real_time.filter(|n| (REAL_TIME.0..=REAL_TIME.1).contains(n)) {
        return Ok(number);
    }
    let name = match name {
        "POLL" => "IO",
        "CLD" => "CHLD",
        "IOT" => "ABRT",
        name => name,
    };
    format!("SIG{name}").parse::<Signal>().map(|signal| signal as i32).map_err(|_| unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_number_and_name() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGKILL", 9),
            ("sigterm", 15),
            ("0", 0),
            ("RTMIN+3", 37),
            ("SIGRTMAX", 64),
            ("cld", 17),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["", "SIG", "65", "-1", "NOSUCH", "RTMIN+99", "RTMIN-1", "9x"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
