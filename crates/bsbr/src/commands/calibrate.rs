//! `bsbr calibrate`.

use std::{path::PathBuf, time::Instant};

use anyhow::{Result, bail};
use bsbr_attn::BlockAttentionConfig;
use bsbr_convert::{Calibrated, OutputKind, RecordedCalibration, write_calibrated};
use bsbr_model::{
    FarLayer, IndexCalibration, IndexCalibrationConfig, IndexSettings, IndexTrial, MetaCalibrationConfig, MetaLayer,
    StateCalibrationConfig, StateLayer, calibrate_far, calibrate_index, calibrate_meta, calibrate_states,
    has_far_shift, has_index,
};

use crate::{
    CheckFailed,
    args::{check_output_dir, renamed},
    bench::sweep::length,
    device::DeviceArgs,
    model::LocalModel,
    output::{self, Progress},
    record,
    report::{Forms, ReportArgs},
    running::{load, open, read_tokens},
};

/// Windows are no longer than this unless asked for: what is far from a chunk is plenty there.
const LONGEST_WINDOW: usize = 2048;
/// The same where only the far part is calibrated, which counts for more the longer a text is.
const LONGEST_FAR_WINDOW: usize = 8192;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Converted model
    #[arg(short, long, value_name = "DIR")]
    model: PathBuf,
    /// Text to calibrate on; not one to measure on later
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Most tokens of the text to read
    #[arg(long, value_name = "N", value_parser = length, default_value = "16384")]
    tokens: usize,
    /// Tokens of a window [default: 2048, for the far part alone 8192, or what the model was trained on if that is less]
    #[arg(long, value_name = "N", value_parser = length)]
    seq_len: Option<usize>,
    #[arg(long, hide = true, value_parser = renamed("--seq-len"))]
    window: Option<String>,
    /// Search the index as well: the cheapest threshold, most keys and channels, then a threshold for each layer, that keep
    /// the scores within a mean KL of X nats of the original's, as `eval` reports it; exit code 1 where held-out windows show that none does
    #[arg(long, value_name = "X")]
    target_kl: Option<f64>,
    /// Where to write the calibrated model; it replaces the model when absent
    #[arg(short, long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Replace an earlier model there
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    args.report.check()?;
    if let Some(output_dir) = &args.output_dir {
        check_output_dir(output_dir, OutputKind::Model, args.force)?;
    }
    let source = open(&LocalModel::at(&args.model))?;
    let description = source.description();
    let shown = args.model.display();
    if !source.is_converted() {
        bail!(
            "{shown} is not a converted model: convert it first, with settings that have something to calibrate, for example \
             `convert --model {shown} --selector meta --output-dir DIR`"
        );
    }
    if args.output_dir.is_none() {
        check_output_dir(&args.model, OutputKind::Model, true)?;
    }
    let config = source.model_config().clone();
    let any = |needs: fn(&BlockAttentionConfig) -> bool| {
        (0..config.decoder.layers).any(|layer| config.layer_attention(layer).is_some_and(needs))
    };
    let (has_meta, has_states) = (any(BlockAttentionConfig::needs_meta), any(BlockAttentionConfig::needs_states));
    let has_far = any(has_far_shift);
    if !has_meta && !has_states && !has_far && args.target_kl.is_none() {
        bail!(
            "{shown} has nothing to calibrate: under its settings every weight is one of the original model, and they are \
             meant to be used as they are. What can be calibrated are how much blocks count that are not retrieved (convert with \
             --far mean), meta projections (--selector meta) and the compression of states (--retrieval state)"
        );
    }
    if args.target_kl.is_some() && !any(has_index) {
        bail!(
            "--target-kl searches settings of an index, and {shown} has none: convert with --retrieval blocks --selector index"
        );
    }
    if args.text.as_os_str() == "-" {
        bail!("--text -: the model keeps the SHA-256 of the text it was calibrated on, so name a file");
    }
    let tokenizer = source.text_tokenizer()?;
    let (tokens, text_sha256) = read_tokens(&tokenizer, &args.text)?;
    let longest = if has_meta || has_states { LONGEST_WINDOW } else { LONGEST_FAR_WINDOW };
    let window = args.seq_len.unwrap_or_else(|| config.decoder.max_positions.min(longest));
    let windows = args.tokens / window.max(1);

    let started = Instant::now();
    let decoder = load(source, &args.device.resolve()?)?;
    let mut progress = Progress::new("calibrating");
    let settings = MetaCalibrationConfig { window, windows };
    let meta = has_meta
        .then(|| calibrate_meta(&decoder, &tokens, settings, |done, total| progress.set(done as u64, total as u64)))
        .transpose()?;
    let settings = StateCalibrationConfig { window, windows };
    let states = has_states
        .then(|| calibrate_states(&decoder, &tokens, settings, |done, total| progress.set(done as u64, total as u64)))
        .transpose()?;
    let far = has_far
        .then(|| calibrate_far(&decoder, &tokens, window, |done, total| progress.set(done as u64, total as u64)))
        .transpose()?;
    let configured = states.as_ref().map(|states| states.configured(&config));
    let configured = far.as_ref().map(|far| far.configured(configured.as_ref().unwrap_or(&config))).or(configured);
    let index = match args.target_kl {
        Some(target_kl) => {
            let settings = IndexCalibrationConfig { target_kl, window, windows };
            let shifted = decoder.with_config(|own| {
                if let Some(configured) = &configured {
                    own.clone_from(configured);
                }
            })?;
            Some(calibrate_index(&shifted, &tokens, settings, |done, total| progress.set(done as u64, total as u64))?)
        }
        None => None,
    };
    drop(progress);
    if let Some(index) = index.as_ref().filter(|index| !index.met) {
        return Err(CheckFailed(missed(index)).into());
    }
    let of_others = meta.as_ref().map(|meta| meta.windows).or(states.as_ref().map(|states| states.windows));
    let fitted = index.as_ref().map(|index| index.windows).or(of_others).unwrap_or(1);
    let held_out = meta.as_ref().map_or(usize::from(has_far), |meta| meta.held_out);
    let held_out = index.as_ref().map_or(held_out, |index| index.held_out);
    let seconds = started.elapsed().as_secs_f64();
    let recorded = RecordedCalibration {
        text_sha256: text_sha256.clone(),
        tokens: (fitted + held_out) * window,
        window,
        held_out,
        meta: meta.as_ref().map_or_else(Vec::new, |meta| meta.layers.clone()),
        states: states.as_ref().map_or_else(Vec::new, |states| states.layers.clone()),
        far: far.as_ref().map_or_else(Vec::new, |far| far.layers.clone()),
        index: index.clone(),
    };
    let mut weights = meta.as_ref().map_or_else(|| Ok(Vec::new()), |meta| meta.weights())?;
    weights.extend(states.iter().flat_map(|states| states.weights()));
    let configured =
        index.as_ref().map(|index| index.configured(configured.as_ref().unwrap_or(&config))).or(configured);
    let calibrated = Calibrated { config: configured.as_ref(), weights: &weights, calibration: recorded.clone() };
    let output_dir = args.output_dir.unwrap_or_else(|| args.model.clone());
    let mut bar = Progress::new("writing");
    write_calibrated(&args.model, &output_dir, &calibrated, args.force, &mut |progress| {
        bar.set(progress.done, progress.total);
    })?;
    drop(bar);
    args.report.emit(&Forms {
        table: &|| {
            let head = format!(
                "calibrated to {} in {seconds:.1} s, on {fitted} windows of {window} tokens; {held_out} more to choose by\n",
                output_dir.display(),
            );
            let mut tables = Vec::with_capacity(3);
            if !recorded.meta.is_empty() {
                tables.push(meta_table(&recorded.meta));
            }
            if !recorded.states.is_empty() {
                tables.push(state_table(&recorded.states));
            }
            if !recorded.far.is_empty() {
                tables.push(far_table(&recorded.far));
            }
            if let Some(index) = &recorded.index {
                tables.push(index_table(index));
            }
            Ok(format!("{head}\n{}", tables.join("\n")))
        },
        json: &|| {
            Ok(serde_json::json!({
                "schema": "bsbr-calibrate/1", "about": record::about(&description, Some(text_sha256.clone())),
                "output": output_dir, "seconds": seconds, "calibration": recorded,
            }))
        },
        rows: Some(&|json| {
            let lists = ["meta", "states", "far"].map(|name| json["calibration"][name].as_array().cloned());
            let trials = json["calibration"]["index"]["trials"].as_array().cloned();
            lists.into_iter().chain([trials]).flatten().flatten().collect()
        }),
    })
}

/// A line for each layer, and one for all.
fn state_table(layers: &[StateLayer]) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let mean = layers.iter().map(|layer| layer.held_by_a_quarter).sum::<f64>() / layers.len().max(1) as f64;
    let row = |layer: &StateLayer| vec![layer.layer.to_string(), percent(layer.held_by_a_quarter)];
    let mut rows: Vec<Vec<String>> = layers.iter().map(row).collect();
    rows.push(vec!["mean".to_owned(), percent(mean)]);
    output::table(&["layer", "of the states in a quarter of the directions"], &rows)
}

/// Why nothing is written.
fn missed(index: &IndexCalibration) -> String {
    format!(
        "no settings of the index keep a KL of {} on held-out windows: the nearest have {:.5} there and {:.5} where they were \
         searched ({}); nothing was written. Allow more, or give the index more to work with, as --exact-tokens and --local-chunks of \
         `convert` do",
        index.target_kl,
        index.held_out_kl,
        index.found.kl,
        settings(index.found.settings)
    )
}

fn settings(settings: IndexSettings) -> String {
    format!(
        "threshold {}, max_keys {}, index_channels {}",
        settings.threshold, settings.max_keys, settings.index_channels
    )
}

/// A line for each trial, and what was found.
fn index_table(index: &IndexCalibration) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let row = |trial: &IndexTrial| {
        let IndexSettings { threshold, max_keys, index_channels } = trial.settings;
        vec![
            format!("1/{:.0}", 1.0 / threshold),
            max_keys.to_string(),
            index_channels.to_string(),
            format!("{:.5}", trial.kl),
            percent(trial.keys_share),
            percent(trial.cost),
        ]
    };
    let rows: Vec<Vec<String>> = index.trials.iter().map(row).collect();
    let own = index.threshold_factors.iter().filter(|factor| **factor != 1.0).count();
    let layers = match own {
        0 => "the same in every layer".to_owned(),
        own => format!("{own} layers with a threshold of their own"),
    };
    format!(
        "{}\nfound: {}, {layers}; KL {:.5} on held-out windows, within {}\n",
        output::table(&["threshold", "most keys", "channels", "KL", "keys read", "cost"], &rows),
        settings(index.found.settings),
        index.held_out_kl,
        index.target_kl
    )
}

/// A line for each layer, and one for all.
fn far_table(layers: &[FarLayer]) -> String {
    let mean = |of: fn(&FarLayer) -> f64| layers.iter().map(of).sum::<f64>() / layers.len().max(1) as f64;
    let row = |name: String, shift: String, before: f64, after: f64| {
        vec![name, shift, format!("{before:.5}"), format!("{after:.5}")]
    };
    let mut rows: Vec<Vec<String>> = layers
        .iter()
        .map(|layer| row(layer.layer.to_string(), format!("{:+.1}", layer.shift), layer.before, layer.after))
        .collect();
    let shifted = layers.iter().filter(|layer| layer.shift != 0.0).count();
    let all = format!("{shifted} of {} shifted", layers.len());
    rows.push(row("mean".to_owned(), all, mean(|layer| layer.before), mean(|layer| layer.after)));
    output::table(&["layer", "far shift, nats", "error of its output before", "after"], &rows)
}

/// A line for each layer, and one for all.
fn meta_table(layers: &[MetaLayer]) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let mean = |of: fn(&MetaLayer) -> f64| layers.iter().map(of).sum::<f64>() / layers.len().max(1) as f64;
    let kept = |layer: &MetaLayer| if layer.accepted { layer.after } else { layer.before };
    let mut rows: Vec<Vec<String>> = layers
        .iter()
        .map(|layer| {
            let taken = if layer.accepted { "fitted" } else { "start values" };
            vec![
                layer.layer.to_string(),
                percent(layer.before),
                percent(layer.after),
                format!("{}", layer.key_ridge),
                taken.to_owned(),
            ]
        })
        .collect();
    let accepted = layers.iter().filter(|layer| layer.accepted).count();
    let kept = layers.iter().map(kept).sum::<f64>() / layers.len().max(1) as f64;
    rows.push(vec![
        "mean".to_owned(),
        percent(mean(|layer| layer.before)),
        percent(kept),
        "-".to_owned(),
        format!("{accepted} of {} fitted", layers.len()),
    ]);
    output::table(&["layer", "far attention caught before", "after", "ridge", "kept"], &rows)
}
