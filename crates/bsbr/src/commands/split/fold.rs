//! `bsbr split fold`.

use std::path::PathBuf;

use anyhow::Result;
use bsbr_convert::OutputKind;

use crate::{
    args::check_output_dir,
    model::HubArgs,
    output::{self, Progress, bytes},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Compressed model
    #[arg(short, long, value_name = "DIR|NAME")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Where to write the Hugging Face checkpoint
    #[arg(short, long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Replace an earlier checkpoint
    #[arg(long)]
    force: bool,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    check_output_dir(&args.output_dir, OutputKind::Checkpoint, args.force)?;
    let model = args.hub.resolve(&args.model)?;
    let mut bar = Progress::new("folding");
    let report = bsbr_convert::fold(&model.dir, &args.output_dir, args.force, &mut |progress| {
        bar.set(progress.done, progress.total);
    })?;
    drop(bar);
    if args.json {
        let files = report
            .files
            .iter()
            .map(|(name, bytes, sha256)| serde_json::json!({ "name": name, "bytes": bytes, "sha256": sha256 }));
        let json = serde_json::json!({
            "schema": "bsbr-split-fold/1", "folded": report.folded, "files": files.collect::<Vec<_>>(),
        });
        return output::result(&serde_json::to_string_pretty(&json)?);
    }
    for (name, size, sha256) in &report.files {
        output::result(&format!("{name}  {}  sha256 {sha256}", bytes(*size)))?;
    }
    output::result(&format!("{} tensors made of factors, as F32", report.folded))
}
