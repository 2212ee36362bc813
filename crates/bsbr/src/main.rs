//! `bsbr`: see the library of the same name.

use std::process::ExitCode;

fn main() -> ExitCode {
    bsbr::run(bsbr::Program { name: "bsbr", repository: None, more: Vec::new() })
}
