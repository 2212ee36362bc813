#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! The command line of BSBR. Parses flags, calls the libraries, prints.
//!
//! [`run`] is the whole program: `bsbr` calls it, and a program with more commands can, by its own name. Results go to standard
//! output, progress and notes to standard error. Exit codes: 0 done, 1 a check failed (parity out of tolerance, tensors that
//! do not fit, weights that are no numbers), 2 usage or input and output.

mod args;
mod bench;
mod builtin;
mod chat;
mod commands;
mod device;
pub mod harness;
mod loss_curve;
mod markup;
mod model;
mod output;
mod page;
mod plot;
mod presets;
mod record;
mod report;
mod running;
mod sampling;
mod signals;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::OnceLock,
};

use bsbr_convert::ConvertError;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};

/// Under which name the program runs, and what it can do beyond the commands of this crate.
#[derive(Debug)]
pub struct Program {
    /// How it is called, in help and in messages.
    pub name: &'static str,
    /// The repository whose tool it is, if it is one: reports name its commit, and what has no other place goes to its `target`.
    pub repository: Option<PathBuf>,
    /// Commands besides those of this crate.
    pub more: Vec<MoreCommand>,
}

/// A command that this crate does not have.
#[derive(Debug)]
pub struct MoreCommand {
    /// Its name and flags.
    pub command: clap::Command,
    /// What it does.
    pub run: fn(&ArgMatches) -> anyhow::Result<()>,
}

#[derive(Debug, Parser)]
#[command(name = "bsbr", version, about = "Long-context conversion of pretrained transformers", max_term_width = 110)]
struct Cli {
    /// Tell nothing but results and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Tell more
    #[arg(short, long, global = true)]
    verbose: bool,
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
    Generate(Box<commands::generate::Args>),
    /// Talk with a model: a conversation in the terminal.
    Chat(Box<commands::chat::Args>),
    /// Answer over HTTP as OpenAI's API does, many at once, with a chat page.
    #[cfg(feature = "serve")]
    Serve(Box<commands::serve::Args>),
    /// Compare logits with expected ones; exit code 1 past the tolerance.
    Verify(commands::verify::Args),
    /// Show architecture, tensors, parameters, settings and cache size.
    Inspect(commands::inspect::Args),
    /// Train a converted model to read as its original does.
    Tune(Box<commands::tune::Args>),
    /// Measure time, memory and quality by length, against dense attention and other implementations.
    Bench(Box<commands::bench::Args>),
    /// Split linear layers into parts that share low-rank bases.
    Split(commands::split::Args),
    /// Print a script that completes commands and flags in a shell.
    Completions(commands::completions::Args),
}

/// The repository of the program that runs.
static REPOSITORY: OnceLock<Option<PathBuf>> = OnceLock::new();

fn repository() -> Option<&'static Path> {
    REPOSITORY.get()?.as_deref()
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

/// Runs the command line of this process.
pub fn run(program: Program) -> ExitCode {
    signals::clean_up_when_asked_to_end();
    // Once for each process; a second program in it keeps the place of the first.
    let _ = REPOSITORY.set(program.repository.clone());
    let matches = command(&program).get_matches();
    output::set_level(match (matches.get_flag("quiet"), matches.get_flag("verbose")) {
        (true, _) => output::Level::Quiet,
        (_, true) => output::Level::Verbose,
        _ => output::Level::Normal,
    });
    let result = match matches.subcommand() {
        Some((name, inner)) => match program.more.iter().find(|more| more.command.get_name() == name) {
            Some(more) => (more.run)(inner),
            None => run_own(&program, &matches),
        },
        None => run_own(&program, &matches),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            signals::wait_if_ending();
            output::say(&format!("error: {error:#}"));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Whether a command line is one of this program's; nothing is run.
///
/// # Errors
///
/// What is wrong with it; asking for help or the version is not.
pub fn parses<I, T>(program: &Program, arguments: I) -> Result<(), clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<std::ffi::OsString> + Clone,
{
    match command(program).try_get_matches_from(arguments) {
        Err(error) if error.use_stderr() => Err(error),
        _ => Ok(()),
    }
}

/// All commands of a program.
fn command(program: &Program) -> clap::Command {
    let more = program.more.iter().map(|more| more.command.clone());
    with_negative_numbers(Cli::command().name(program.name).bin_name(program.name).subcommands(more))
}

fn run_own(program: &Program, matches: &ArgMatches) -> anyhow::Result<()> {
    let cli = Cli::from_arg_matches(matches).unwrap_or_else(|error| error.exit());
    match cli.command {
        Command::Convert(args) => commands::convert::run(args),
        Command::Calibrate(args) => commands::calibrate::run(args),
        Command::Export(args) => commands::export::run(args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Generate(args) => commands::generate::run(*args),
        Command::Chat(args) => commands::chat::run(*args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => commands::serve::run(*args),
        Command::Verify(args) => commands::verify::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Tune(args) => commands::tune::run(*args),
        Command::Bench(args) => commands::bench::run(*args),
        Command::Split(args) => commands::split::run(args),
        Command::Completions(args) => commands::completions::run(&args, command(program)),
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
