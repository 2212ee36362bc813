//! `cargo xtask inspect`.

use std::path::PathBuf;

use anyhow::Result;
use bsbr_model::DecoderCache;

use crate::{args::DeviceArgs, builtin, model::HubArgs, output, running::open};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint or converted model; the built-in checkpoint when absent
    #[arg(short, long, value_name = "DIR|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let model = args.hub.resolve(&args.model.unwrap_or_else(builtin::dir))?;
    let source = open(&model)?;
    let config = source.model_config();
    let (original, extra) = source.parameter_counts();
    let empty = DecoderCache::new(config, &[0], &args.device.resolve()?)?.bytes();
    let mut lines = vec![
        source.description(),
        format!(
            "parameters: {} of the original, {} added",
            output::grouped(original as u64),
            output::grouped(extra as u64)
        ),
        format!("files: {}", output::bytes(source.total_bytes())),
        format!(
            "cache: {} for each token of full attention in f32, {} before the first token",
            output::bytes(source.cache_bytes_per_token() as u64),
            output::bytes(empty as u64)
        ),
    ];
    for (dtype, (count, bytes)) in source.dtype_totals() {
        lines.push(format!("{dtype:?}: {count} tensors, {}", output::bytes(bytes as u64)));
    }
    lines.extend(source.notes().into_iter().map(|note| format!("note: {note}")));
    lines.push(String::new());
    lines.push(toml::to_string(&config)?);
    if args.tensors {
        let rows: Vec<Vec<String>> = source
            .tensors()
            .into_iter()
            .map(|tensor| {
                let shape = format!("{:?}", tensor.shape);
                vec![tensor.name, format!("{:?}", tensor.dtype), shape, output::bytes(tensor.bytes as u64), tensor.file]
            })
            .collect();
        lines.push(output::table(&["tensor", "dtype", "shape", "size", "file"], &rows));
    }
    output::result(&lines.join("\n"))
}
