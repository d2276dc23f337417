//! Time limits. All scale by one factor, which is all a test may know about how fast its host is.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// The environment variable with the factor, for example `6` in the lab.
pub const FACTOR_VARIABLE: &str = "KVRUN_TIMEOUT_FACTOR";
/// How long one `kvrun` may take on hardware.
pub const RUN: Duration = Duration::from_secs(10);
/// How long one test may take on hardware.
pub const TEST: Duration = Duration::from_secs(30);

static FACTOR: LazyLock<f64> = LazyLock::new(|| match std::env::var(FACTOR_VARIABLE) {
    Err(_) => 1.0,
    Ok(text) => match text.parse() {
        Ok(factor) if (0.1..=1000.0).contains(&factor) => factor,
        _ => panic!("{FACTOR_VARIABLE}={text} is not a number from 0.1 to 1000"),
    },
});

/// Asks until the answer is yes. For what nobody tells of.
///
/// # Errors
/// When it never is, or cannot be given.
pub fn until(what: &str, holds: impl FnMut() -> Result<bool>) -> Result<()> {
    until_within(RUN, what, holds)
}

/// The same, with a limit as it is on hardware.
///
/// # Errors
/// As [`until`].
pub fn until_within(limit: Duration, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + scaled(limit);
    while !holds()? {
        ensure!(Instant::now() < deadline, "waited in vain until {what}");
        // Asking costs the guest's time, where there is one CPU for both.
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A limit for this host.
pub fn scaled(on_hardware: Duration) -> Duration {
    on_hardware.mul_f64(*FACTOR)
}
