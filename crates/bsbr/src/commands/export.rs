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
    /// Where to write the Hugging Face checkpoint
    #[arg(short, long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Replace an earlier export
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    check_output_dir(&args.output_dir, OutputKind::Checkpoint, args.force)?;
    let model = args.hub.resolve(&args.model)?;
    let mut bar = Progress::new("exporting");
    let report = bsbr_convert::export(&model.dir, &args.output_dir, args.force, &mut |progress| {
        bar.set(progress.done, progress.total);
    })?;
    drop(bar);
    for file in &report.files {
        let state = match (&file.instead_of, file.is_original) {
            (None, true) => "the original, byte for byte",
            (Some(name), true) if file.decoded => {
                &format!("the numbers of {name}, decoded: its quantised codes are lost")
            }
            (Some(name), true) => &format!("the tensors of {name}, bit for bit"),
            (_, false) => "changed since it was converted",
        };
        output::result(&format!("{}  {}  sha256 {}  {state}", file.name, bytes(file.bytes), file.sha256))?;
    }
    Ok(())
}
