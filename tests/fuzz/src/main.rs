//! Fuzz targets: one binary, the target named by the environment variable `KVRUN_FUZZ_TARGET`. `tests/fuzz/run` builds it with coverage and
//! runs each target from its corpus.
//!
//! * [`driver`] - a hostile driver: it takes a device through the MMIO transport as a guest would, every byte of rings, descriptors and
//!   buffers the fuzzer's.
//! * [`devices`] - one target per virtio device, and the transport itself.
//! * [`memory`] - the devices of guest memory.
//! * [`host`] - what arrives by other ways: control messages, kernel images, saved states, the agent's answers, bundles.
//!
//! A target fails by panicking (overflow checks and debug assertions are on), by hanging, by growing out of bounds, or by an assertion of
//! its own, for example that a device that has been reset leaves guest memory alone.

#![no_main]

mod devices;
mod driver;
mod host;
mod memory;
mod tap;

use std::sync::OnceLock;

use libfuzzer_sys::{Corpus, fuzz_target};

/// Whether an input is worth keeping: [`Corpus::Reject`] if it was too short to say anything.
type Target = fn(&[u8]) -> Corpus;

const TARGETS: [(&str, Target); 14] = [
    ("blk", devices::blk),
    ("net", devices::net),
    ("fs", devices::fs),
    ("rng", devices::rng),
    ("vsock", devices::vsock),
    ("pmem", memory::pmem),
    ("mem", memory::mem),
    ("balloon", memory::balloon),
    ("mmio", devices::mmio),
    ("control", host::control),
    ("kernel", host::kernel),
    ("state", host::state),
    ("agent", host::agent),
    ("bundle", host::bundle),
];

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("KVRUN_FUZZ_TARGET").unwrap_or_default();
        let Some((_, target)) = TARGETS.iter().find(|(known, _)| *known == name) else {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            panic!("KVRUN_FUZZ_TARGET is {name:?}; it must be one of {}", names.join(" "));
        };
        TARGET.set(*target).expect("set once");
    },
    |data: &[u8]| -> Corpus {
        let target = TARGET.get().expect("set by init");
        target(data)
    }
);
