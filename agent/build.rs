//! Links the agent at a fixed address. A position-independent static binary relocates itself at every exec: some 16000
//! relocations, 300 KiB of private pages and 400 KiB of tables, in a machine that has just booted and waits, and again in
//! the helper of every container. What address randomization would protect, nobody but the pod engine speaks to.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Behind rustc's -static-pie, which the second takes back and with it the -static that it implies.
    println!("cargo:rustc-link-arg-bins=-static");
    println!("cargo:rustc-link-arg-bins=-no-pie");
}
