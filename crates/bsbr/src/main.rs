//! `bsbr`: see the library of the same name.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    bsbr::run(bsbr::Program { name: "bsbr", repository: None, more: Vec::new() })
}
