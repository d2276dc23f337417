//! vCPUs.

use anyhow::{Result, ensure};
use kvrun_e2e::vm::{Machine, Shape};
use kvrun_e2e::{Case, Test, cases};

pub(crate) const CASES: &[Case] = cases![guest_starts_with_the_vcpus_it_was_given];

fn guest_starts_with_the_vcpus_it_was_given(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { vcpus: 2, max_vcpus: 4, ..Shape::default() })?;
    let online = vm.sh("cat /sys/devices/system/cpu/online /sys/devices/system/cpu/possible")?;
    ensure!(online == "0-1\n0-3\n", "{online}");
    Ok(())
}
