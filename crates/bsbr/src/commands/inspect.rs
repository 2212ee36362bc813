//! `bsbr inspect`.

mod attention;

use std::path::PathBuf;

use anyhow::Result;
use bsbr_convert::{ARCHITECTURES, WRAPPERS, architecture_by_name, wrapper_by_name};
use bsbr_model::{DecoderCache, LayerKeys, LayerShape, ModelConfig, active_parameters};
use serde_json::{Value, json};

use crate::{
    builtin,
    device::{self, DeviceArgs},
    model::HubArgs,
    output, record,
    report::{Forms, ReportArgs},
    running::open,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint, GGUF file or converted model; the built-in checkpoint when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print the rules of an architecture instead; `list` names all of them
    #[arg(long, value_name = "ARCH", conflicts_with_all = ["model", "tensors"])]
    rules: Option<String>,
    /// List the devices of this build and this machine instead
    #[arg(long, conflicts_with_all = ["model", "tensors", "rules"])]
    devices: bool,
    #[command(flatten)]
    map: attention::MapArgs,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    args.report.check()?;
    args.map.check()?;
    if let Some(name) = args.rules {
        return output::result(&rules(&name)?);
    }
    if args.devices {
        return output::result(&output::table(&["--device", "what it is"], &device::rows()));
    }
    let model = args.hub.resolve(&builtin::or_builtin(args.model)?)?;
    let source = open(&model)?;
    if args.map.wanted() {
        return attention::run(&args.map, source, &args.report, &args.device);
    }
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
        format!(
            "files: {}, {:.2} bits per weight of the original",
            output::bytes(source.total_bytes()),
            source.bits_per_weight()?
        ),
        format!(
            "cache: {} for each token of full attention in f32, {} before the first token",
            output::bytes(source.cache_bytes_per_token() as u64),
            output::bytes(empty as u64)
        ),
    ];
    if let Some(experts) = &config.decoder.experts {
        lines.push(format!(
            "experts: {} in a layer, {} for each token, which goes through {} parameters",
            experts.count,
            experts.chosen,
            output::grouped(active_parameters(config) as u64)
        ));
    }
    if let Some(recurrent) = &config.decoder.recurrent {
        lines.push(format!(
            "recurrent: {} of {} layers, which keep {} of a text, however long it is; the others have attention",
            recurrent.layers.len(),
            config.decoder.layers,
            output::bytes(4 * config.decoder.state_width() as u64)
        ));
    }
    for (dtype, (count, bytes)) in source.dtype_totals() {
        lines.push(format!("{dtype}: {count} tensors, {}", output::bytes(bytes as u64)));
    }
    lines.extend(source.notes().into_iter().map(|note| format!("note: {note}")));
    // The parts of every layer would fill pages, and TOML cannot say that a layer has no window.
    let mut shown = ModelConfig { split: None, ..config.clone() };
    if shown.decoder.windows.contains(&None) {
        lines.push(windows(&std::mem::take(&mut shown.decoder.windows)));
    }
    if !shown.decoder.layer_shapes.is_empty() {
        lines.push(shapes(&std::mem::take(&mut shown.decoder.layer_shapes)));
    }
    if let Some(split) = &config.split {
        let members: usize = split.groups.iter().map(|group| group.members.len()).sum();
        lines.push(format!(
            "compressed: {members} parts of linear layers share {} bases, {} of the parameters were to be kept",
            split.groups.len(),
            split.keep
        ));
    }
    lines.push(String::new());
    lines.push(toml::to_string(&shown)?);
    if args.tensors {
        let rows: Vec<Vec<String>> = source
            .tensors()
            .into_iter()
            .map(|tensor| {
                let shape = format!("{:?}", tensor.shape);
                vec![tensor.name.clone(), tensor.format(), shape, output::bytes(tensor.bytes as u64), tensor.file]
            })
            .collect();
        lines.push(output::table(&["tensor", "format", "shape", "size", "file"], &rows));
    }
    let tensors = || -> Vec<Value> {
        let listed = source.tensors().into_iter().map(|tensor| {
            json!({
                "name": tensor.name, "dtype": tensor.format(), "shape": tensor.shape, "bytes": tensor.bytes,
                "file": tensor.file,
            })
        });
        listed.collect()
    };
    let bits_per_weight = source.bits_per_weight()?;
    args.report.emit(&Forms {
        table: &|| Ok(lines.join("\n")),
        json: &|| {
            Ok(json!({
                "schema": "bsbr-inspect/1",
                "about": record::about(&source.description(), None),
                "parameters": {"original": original, "added": extra, "for_a_token": active_parameters(config)},
                "bytes": source.total_bytes(),
                "bits_per_weight": bits_per_weight,
                "cache_bytes_per_token": source.cache_bytes_per_token(),
                "cache_bytes_empty": empty,
                "notes": source.notes(),
                "config": config,
                "tensors": tensors(),
            }))
        },
        rows: Some(&|report| report["tensors"].as_array().cloned().unwrap_or_default()),
    })
}

/// What layers have, in words, and the numbers of the layers that have it.
fn by_layer<T: PartialEq>(of_layers: &[T], words: impl Fn(&T) -> String) -> String {
    let mut kinds: Vec<(&T, Vec<String>)> = Vec::new();
    for (layer, own) in of_layers.iter().enumerate() {
        match kinds.iter_mut().find(|(kind, _)| *kind == own) {
            Some((_, layers)) => layers.push(layer.to_string()),
            None => kinds.push((own, vec![layer.to_string()])),
        }
    }
    let kinds = kinds.into_iter().map(|(kind, layers)| format!("{} in layers {}", words(kind), layers.join(", ")));
    kinds.collect::<Vec<_>>().join("; ")
}

/// The windows of layers that differ in them, and the layers that have each.
fn windows(windows: &[Option<usize>]) -> String {
    let words = |window: &Option<usize>| window.map_or_else(|| "none".to_owned(), |window| format!("{window} tokens"));
    format!("windows: {}", by_layer(windows, words))
}

/// The same of their sizes.
fn shapes(shapes: &[LayerShape]) -> String {
    let words = |shape: &LayerShape| {
        let keys = match shape.keys {
            LayerKeys::Own => String::new(),
            LayerKeys::AlsoValues => ", values of the keys".to_owned(),
            LayerKeys::Of { layer } => format!(", those of layer {layer}"),
        };
        format!("{} KV heads of {}{keys}, MLP of {}", shape.kv_heads, shape.head_dim, shape.intermediate_size)
    };
    format!("layers: {}", by_layer(shapes, words))
}

/// The rule table of an architecture, or the list of all.
fn rules(name: &str) -> Result<String> {
    if let Some(wrapper) = wrapper_by_name(name) {
        return Ok(wrapper.to_string().trim_end().to_owned());
    }
    if name != "list" {
        return Ok(architecture_by_name(name)?.to_string().trim_end().to_owned());
    }
    let row = |arch: &bsbr_convert::rules::Architecture| {
        vec![arch.id.to_owned(), arch.model_types.join(", "), arch.rules.len().to_string(), arch.version.to_string()]
    };
    let rows: Vec<Vec<String>> = ARCHITECTURES.iter().map(row).collect();
    let around = |wrapper: &bsbr_convert::rules::Wrapper| {
        vec![wrapper.model_types.join(", "), wrapper.text_type.to_owned(), wrapper.aside.len().to_string()]
    };
    let wrappers: Vec<Vec<String>> = WRAPPERS.iter().map(around).collect();
    Ok(format!(
        "{}\n\n{}",
        output::table(&["rules", "model type", "rules in the table", "version"], &rows),
        output::table(&["model type around a decoder", "decoder", "parts kept aside"], &wrappers)
    ))
}
