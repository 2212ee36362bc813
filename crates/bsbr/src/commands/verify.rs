//! `bsbr verify`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use bsbr_convert::ExpectedLogits;
use bsbr_model::Decoder;

use crate::{
    CheckFailed,
    device::DeviceArgs,
    model::HubArgs,
    output,
    running::{load, open},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint, GGUF file or converted model
    #[arg(short, long, value_name = "PATH|NAME")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// safetensors file with `input_ids` [batch, tokens] and `logits` [batch, tokens, vocab]
    #[arg(short, long, value_name = "FILE")]
    expected: PathBuf,
    /// Largest absolute difference allowed
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    atol: f64,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    if args.atol.is_nan() || args.atol < 0.0 {
        bail!("--atol is {}, expected 0 or more", args.atol);
    }
    let expected = ExpectedLogits::open(&args.expected)?;
    let source = open(&args.hub.resolve(&args.model)?)?;
    let description = source.description();
    let decoder = load(source, &args.device.resolve()?)?;
    let line = check(&decoder, &expected, args.atol)?;
    output::result(&format!("{description}: {line}"))
}

/// Compares and says how far off; [`CheckFailed`] past the tolerance.
pub(crate) fn check(decoder: &Decoder, expected: &ExpectedLogits, atol: f64) -> Result<String> {
    let found = bsbr_model::compare_logits(decoder, &expected.tokens, &expected.logits)?;
    let line = format!(
        "max |difference| {:.2e}, mean {:.2e}, top-1 {:.2} % over {} tokens",
        found.max,
        found.mean,
        100.0 * found.top1,
        found.tokens
    );
    if found.max <= atol {
        return Ok(line);
    }
    Err(CheckFailed(format!("logits differ by more than {atol:e}: {line}")).into())
}
