//! The guest's clock is the host's, also after the machine was held.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use kvrun_e2e::vm::{Machine, Script, Shape};
use kvrun_e2e::{Case, Test, cases, time};

pub(crate) const CASES: &[Case] = cases![date_is_that_of_the_host_also_right_after_a_pause];

/// How far the guest's date may lie outside of the host's time between question and answer, on hardware. (The lab's kernel measures its
/// emulated TSC, by which the guest counts, with an error of up to a per cent when its host is busy.)
const TOLERANCE: Duration = Duration::from_millis(50);
/// Far more than the tolerance anywhere.
const PAUSE: Duration = Duration::from_secs(3);

fn date_is_that_of_the_host_also_right_after_a_pause(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { vcpus: 2, ..Shape::default() })?;
    ensure!(
        vm.sh("cat /sys/devices/system/clocksource/clocksource0/available_clocksource")?
            .contains("kvm-clock")
    );
    // That of busybox knows no nanoseconds.
    vm.install("/usr/bin/date")?;
    let mut clock = vm.start(
        "echo ready; n=0; while read line; do n=$((n + 1)); echo $n $(/bin/date +%s.%N) end$n; done",
    )?;
    clock.until("ready\n")?;
    compare(&mut clock, 1)?;
    for number in 2..5 {
        vm.pause()?;
        std::thread::sleep(PAUSE);
        vm.resume()?;
        // Asked at once: nothing has set the clock in between.
        compare(&mut clock, number)?;
    }
    let complaints = vm.run("dmesg | grep -iE 'stall|lockup|clocksource.*unstable|hung'")?;
    ensure!(complaints.code == 1 && complaints.stdout.is_empty(), "{complaints}");
    Ok(())
}

/// Asks the guest for its date.
fn compare(clock: &mut Script<'_>, number: usize) -> Result<()> {
    let asked = SystemTime::now();
    clock.write("what time is it\n")?;
    clock.until(&format!(" end{number}\n"))?;
    let answered = SystemTime::now();
    let said = clock.stdout.text();
    let line = said.lines().find(|line| line.starts_with(&format!("{number} ")));
    let date = line.and_then(|line| line.split(' ').nth(1)).context("no date")?;
    let (seconds, nanoseconds) = date.split_once('.').with_context(|| format!("{date} is no date"))?;
    let date = UNIX_EPOCH + Duration::new(seconds.parse()?, nanoseconds.parse()?);
    let tolerance = time::scaled(TOLERANCE);
    ensure!(
        date + tolerance >= asked && date <= answered + tolerance,
        "answer {number}: {date:?} is not between {asked:?} and {answered:?}"
    );
    Ok(())
}
