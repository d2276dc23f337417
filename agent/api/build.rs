//! Generates the ttrpc client, server and message types from `proto/agent.proto`.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let out_dir = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(out_dir)
        .include("proto")
        .inputs(["proto/agent.proto"])
        .rust_protobuf()
        .customize(Customize { async_all: true, gen_mod: true, ..Default::default() })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()
        .expect("proto/agent.proto is valid");
}
