//! `bsbr completions`.

use anyhow::Result;
use clap_complete::{Shell, generate};

use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell; for bash: bsbr completions bash > ~/.local/share/bash-completion/completions/bsbr
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(args: &Args, mut command: clap::Command) -> Result<()> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    generate(args.shell, &mut command, name, &mut script);
    output::result(String::from_utf8(script)?.trim_end())
}
