//! `bsbr split`.

mod allocation;
mod calibrate;
mod compress;
mod fold;
mod plan;
mod report;
pub(crate) mod setup;
mod verify;

use anyhow::Result;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show what would be compressed to what, from shapes alone.
    Plan(plan::Args),
    /// Check that layers in parts compute what whole ones do; exit code 1 past the tolerance.
    Verify(verify::Args),
    /// Gather the second moments of what every linear layer reads, for any number of compressions.
    Calibrate(calibrate::Args),
    /// Replace linear layers by factors that share bases.
    Compress(Box<compress::Args>),
    /// Show what compressing did, layer by layer, and measure it against the original.
    Report(report::Args),
    /// Write a compressed model as a Hugging Face checkpoint of ordinary weights.
    Fold(fold::Args),
}

pub(crate) fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Plan(args) => plan::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Compress(args) => compress::run(*args),
        Command::Report(args) => report::run(args),
        Command::Fold(args) => fold::run(args),
    }
}
