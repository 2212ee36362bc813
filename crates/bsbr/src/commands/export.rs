//! `bsbr export`.

use std::path::PathBuf;

use anyhow::Result;
use bsbr_convert::OutputKind;

use crate::{
    args::check_output_dir,
    model::HubArgs,
    output::{self, Progress, bytes},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Converted model
    #[arg(short, long, value_name = "DIR|NAME")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Where to write the checkpoint
    #[arg(short, long, value_name = "DIR")]
    output_dir: PathBuf,
    /// What to write: huggingface, the original files, of a GGUF file the numbers that its codes mean; gguf, that file byte for byte
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Form::Huggingface)]
    to: Form,
    /// Replace an earlier export
    #[arg(long)]
    force: bool,
}

/// The form of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    Huggingface,
    Gguf,
}

pub(crate) fn run(args: Args) -> Result<()> {
    check_output_dir(&args.output_dir, OutputKind::Checkpoint, args.force)?;
    let model = args.hub.resolve(&args.model)?;
    let mut bar = Progress::new("exporting");
    let export = match args.to {
        Form::Huggingface => bsbr_convert::export,
        Form::Gguf => bsbr_convert::export_gguf,
    };
    let report = export(&model.dir, &args.output_dir, args.force, &mut |progress| {
        bar.set(progress.done, progress.total);
    })?;
    drop(bar);
    for file in &report.files {
        let state = match (&file.instead_of, file.is_original) {
            (None, true) => "the original, byte for byte",
            (Some(name), true) if file.decoded => &format!("the numbers of {name}, decoded"),
            (Some(name), true) => &format!("the tensors of {name}, bit for bit"),
            (_, false) => "changed since it was converted",
        };
        output::result(&format!("{}  {}  sha256 {}  {state}", file.name, bytes(file.bytes), file.sha256))?;
    }
    Ok(())
}
