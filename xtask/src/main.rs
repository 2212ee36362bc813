//! `cargo xtask`: the commands of `bsbr`, and what only its repository needs: the comparison of attention families.

mod compare;
mod compare_command;

use std::{path::Path, process::ExitCode};

use bsbr::{MoreCommand, Program};
use clap::{Args as _, FromArgMatches};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let flags = clap::Command::new("compare")
        .about("Compare attention families: time and memory by length, and what small models of each learn");
    let compare = MoreCommand {
        command: compare_command::Args::augment_args(flags),
        run: |matches| compare_command::run(compare_command::Args::from_arg_matches(matches)?),
    };
    bsbr::run(Program { name: "cargo xtask", repository: package.parent().map(Path::to_owned), more: vec![compare] })
}
