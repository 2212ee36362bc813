//! `cargo xtask`: the command line of BSBR. Parses flags, calls the libraries, prints.
//!
//! Results go to standard output, progress and notes to standard error. Exit codes: 0 done, 1 a check failed (parity out
//! of tolerance, tensors that do not fit, weights that are no numbers), 2 usage or input and output.

mod args;
mod bench;
mod builtin;
mod commands;
mod compare;
mod device;
mod loss_curve;
mod model;
mod output;
mod running;
mod signals;

use std::process::ExitCode;

use bsbr_convert::ConvertError;
use clap::{CommandFactory, FromArgMatches, Parser};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    about = "Long-context conversion of pretrained transformers",
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Convert a Hugging Face checkpoint; without --model the built-in one, with a full report.
    Convert(commands::convert::Args),
    /// Fit the weights a conversion added to a text, in closed form.
    Calibrate(commands::calibrate::Args),
    /// Write a converted model back as the Hugging Face checkpoint it was made of.
    Export(commands::export::Args),
    /// Measure perplexity and agreement with the original attention.
    Eval(commands::eval::Args),
    /// Continue a text.
    Generate(commands::generate::Args),
    /// Compare logits with expected ones; exit code 1 past the tolerance.
    Verify(commands::verify::Args),
    /// Show architecture, tensors, parameters, settings and cache size.
    Inspect(commands::inspect::Args),
    /// Train a converted model to read as its original does.
    Tune(Box<commands::tune::Args>),
    /// Measure time, memory and quality by length, against dense attention and other implementations.
    Bench(Box<commands::bench::Args>),
    /// Compare attention families: time and memory by length, and what small models of each learn.
    Compare(Box<commands::compare::Args>),
    /// Split linear layers into parts that share low-rank bases.
    Split(commands::split::Args),
}

/// A check that ran and failed: exit code 1.
#[derive(Debug)]
struct CheckFailed(String);

impl std::fmt::Display for CheckFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CheckFailed {}

fn main() -> ExitCode {
    signals::clean_up_when_asked_to_end();
    let matches = with_negative_numbers(Cli::command()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match cli.command {
        Command::Convert(args) => commands::convert::run(args),
        Command::Calibrate(args) => commands::calibrate::run(args),
        Command::Export(args) => commands::export::run(args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Verify(args) => commands::verify::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Tune(args) => commands::tune::run(*args),
        Command::Bench(args) => commands::bench::run(*args),
        Command::Compare(args) => commands::compare::run(*args),
        Command::Split(args) => commands::split::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            signals::wait_if_ending();
            output::note(&format!("error: {error:#}"));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Every flag takes a number below zero as a value, so that its own check can say what is wrong with it.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|inner| inner.get_name().to_owned()).collect();
    let relaxed = |arg: clap::Arg| if arg.is_positional() { arg } else { arg.allow_negative_numbers(true) };
    let command = command.mut_args(relaxed);
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, with_negative_numbers))
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let failed_check = |cause: &(dyn std::error::Error + 'static)| {
        let convert = cause.downcast_ref::<ConvertError>();
        cause.is::<CheckFailed>() || matches!(convert, Some(ConvertError::Plan { .. } | ConvertError::NotFinite { .. }))
    };
    if error.chain().any(failed_check) { 1 } else { 2 }
}
