//! What can be seen of a machine from outside: the log of its guest.

use std::io::{Read, Write};

use anyhow::{Result, ensure};
use kvrun_agent_api::STREAM_PORT;
use kvrun_e2e::vm::{Machine, Shape};
use kvrun_e2e::{Case, Test, cases, time};

pub(crate) const CASES: &[Case] = cases![guest_and_agent_are_heard_in_the_log];

fn guest_and_agent_are_heard_in_the_log(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape::default())?;
    // So bad that it is written to the console too.
    vm.sh("printf '<0>a \\033[31mred\\033[0m word\\n' > /dev/kmsg")?;
    let mut stream = vm.block_on(vm.pod().vmm().connect(STREAM_PORT))?;
    stream.set_read_timeout(Some(time::scaled(time::RUN)))?;
    // A stream that nobody can ask for: the agent says so, and closes it.
    stream.write_all(&[0; 8])?;
    stream.read_to_end(&mut Vec::new())?;
    let log = String::from_utf8(vm.block_on(vm.pod().agent().read_log())?)?;
    for words in ["] Linux version ", "word\n", "] kvrun-agent: a stdio stream with token 0 was closed\n"] {
        ensure!(log.contains(words), "{words:?}: {log}");
    }
    let console = vm.block_on(vm.pod().vmm().console())?;
    ensure!(console.contains("word") && !console.contains("kvrun-agent"), "{console}");
    Ok(())
}
