//! Leaves the compiler's version in the program: `cargo xtask bench` writes it into its reports.

use std::{env, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let output = env::var_os("RUSTC").and_then(|rustc| Command::new(rustc).arg("--version").output().ok());
    let version = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    println!("cargo::rustc-env=BSBR_RUSTC={}", version.unwrap_or_else(|| "unknown".into()));
}
