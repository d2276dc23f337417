//! What a debug socket is asked when nobody answers, and what is asked of the guest.

use std::fs::File;
use std::os::unix::net::UnixListener;

use super::*;
use crate::bundle::Bundle;
use crate::state_dir::POD_SOCKET;
use crate::stdio::Stdio;

#[test]
fn program_is_a_container_that_we_would_run() {
    let root = tempfile::tempdir().unwrap();
    let some = Terminal { kind: "linux".to_owned(), size: Some((24, 80)) };
    for terminal in [None, Some(&some)] {
        let config = server::config(&["sh".to_owned(), "-l".to_owned()], terminal);
        let (bundle, _) = Bundle::of_config(root.path(), config.to_string().into()).unwrap();
        assert_eq!(bundle.has_terminal(), terminal.is_some());
        assert!(bundle.is_root_read_only() && bundle.binds().is_empty() && bundle.siblings().is_empty());
    }
}

#[test]
fn that_nobody_answers_is_told_from_that_nobody_may() {
    crate::pod::tests::run(async {
        let dir = tempfile::tempdir().unwrap();
        let ask =
            || Client::run(File::open(dir.path()).unwrap(), vec!["sh".to_owned()], None, Stdio::default());
        assert!(matches!(ask().await, Err(DebugError::NotRunning)));
        let listener = UnixListener::bind(dir.path().join(POD_SOCKET)).unwrap();
        assert!(matches!(ask().await, Err(DebugError::Off)));
        drop(listener);
    });
}
