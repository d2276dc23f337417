//! Generates the ttrpc client, server and message types from `proto/agent.proto`.

use std::fs;
use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize};

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .out_dir(&out_dir)
        .include("proto")
        .inputs(["proto/agent.proto"])
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("proto/agent.proto is valid");
    // The files are included into a module, where inner attributes and docs are not allowed.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out_dir.join(name);
        let text = fs::read_to_string(&path).expect("the generator wrote the file");
        let outer: String = text
            .lines()
            .filter(|l| !l.starts_with("#![") && !l.starts_with("//!"))
            .flat_map(|l| [l, "\n"])
            .collect();
        fs::write(&path, outer).expect("OUT_DIR is writable");
    }
}
