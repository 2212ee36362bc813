//! `bsbr split calibrate`.

use std::{path::PathBuf, time::Instant};

use anyhow::{Result, bail};
use bsbr_convert::ScratchDir;

use super::setup::{SplitArgs, TextArgs, describe, gather};
use crate::{device::DeviceArgs, output, record, report::Format, running::load};

/// Name of the file until it is complete.
const MOMENTS: &str = "moments.safetensors";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    text: TextArgs,
    /// File to write the moments to
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace the file
    #[arg(long)]
    force: bool,
    /// How to print [default: table]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: Args) -> Result<()> {
    if args.format == Some(Format::Csv) {
        bail!("--format csv: what is printed is no list; json has all of it");
    }
    if args.text.text.is_empty() {
        bail!("--text FILE is needed: what to calibrate on");
    }
    if args.output.exists() && !args.force {
        bail!("{} exists: choose another file or replace it with --force", args.output.display());
    }
    let mut setup = args.split.resolve()?;
    args.text.overlay(&mut setup.config.calibration);
    setup.config.validate()?;
    let tokenizer = setup.source.text_tokenizer()?;
    let text = args.text.windows(&tokenizer, &setup.config.calibration, &setup.source.sha256()?)?;
    let started = Instant::now();
    let description = setup.source.description();
    let decoder = load(setup.source, &args.device.resolve()?)?;
    let scratch = ScratchDir::beside(&args.output)?;
    gather(&decoder, &text, &scratch.path().join(MOMENTS))?;
    scratch.publish_file(MOMENTS, args.force)?;
    let bytes = std::fs::metadata(&args.output).map_or(0, |metadata| metadata.len());
    let seconds = started.elapsed().as_secs_f64();
    if args.json || args.format == Some(Format::Json) {
        let tokens = |held: bool| -> usize {
            text.windows.iter().filter(|window| window.held_out == held).map(|window| window.tokens.len()).sum()
        };
        let json = serde_json::json!({
            "schema": "bsbr-split-calibrate/1",
            "about": record::about(&description, Some(text.header.text_sha256.clone())),
            "file": args.output,
            "bytes": bytes,
            "model_sha256": text.header.model_sha256,
            "text_sha256": text.header.text_sha256,
            "settings": text.header.settings,
            "tokens": tokens(false),
            "held_out_tokens": tokens(true),
            "seconds": seconds,
        });
        return output::result(&serde_json::to_string_pretty(&json)?);
    }
    output::result(&format!(
        "{}\nmoments of {} layers' inputs in {} ({}), {:.1} s",
        describe(&text),
        setup.linears.len(),
        args.output.display(),
        output::bytes(bytes),
        seconds
    ))
}
