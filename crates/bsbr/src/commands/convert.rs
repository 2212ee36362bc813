//! `bsbr convert`.

use std::{
    collections::{BTreeMap, HashMap},
    io::Read,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use bsbr_attn::BlockAttentionConfig;
use bsbr_convert::{
    ConversionReport, ConvertOptions, Estimate, ExpectedLogits, FormatTotal, OutputKind, ScratchDir, WeightsPolicy,
    convert, estimate, plan_checkpoint,
};
use bsbr_model::{EvaluationReport, PositionPolicy, parameter_counts};
use bsbr_splitlinear::{CalibrationSettings, MomentsFile};

use super::{split::setup, verify};
use crate::{
    args::{AttentionArgs, check_output_dir, renamed},
    bench::sweep::length,
    builtin,
    device::DeviceArgs,
    model::{HubArgs, LocalModel},
    output::{self, Progress, bytes, grouped},
    running::{evaluation_tables, load, measure, open, read_tokens},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint or GGUF file; the built-in one when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Where to write the converted model
    #[arg(short, long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Print what would become what, and how large, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace an earlier conversion
    #[arg(long)]
    force: bool,
    /// Number format of the weights: keep, f32, f16, bf16, int8 (8.5 bits a number), int4 (4.5). A cast that loses anything is told, and
    /// cannot be exported; keep leaves the codes of a GGUF file as they are
    #[arg(long, value_name = "FORMAT", value_parser = crate::args::by_name::<WeightsPolicy>, default_value = "keep")]
    weights: WeightsPolicy,
    #[arg(long, hide = true, value_parser = renamed("--weights"))]
    dtype: Option<String>,
    /// With --weights int4: text to run, or moments that `split calibrate` gathered; errors then count by what inputs are like
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Layers that keep the original attention
    #[arg(long, value_name = "I,...", value_delimiter = ',')]
    original_layers: Vec<usize>,
    /// Past the trained length: error; clamp, interpolate, slide (learned); grouped (rotary)
    #[arg(long, value_name = "POLICY", value_parser = crate::args::by_name::<PositionPolicy>, default_value = "error")]
    positions: PositionPolicy,
    /// Measure on this text before converting and put the numbers on the model card
    #[arg(long, value_name = "FILE")]
    eval_text: Option<PathBuf>,
    /// Tokens of a window to measure on
    #[arg(long, value_name = "N", value_parser = length, default_value = "1024")]
    seq_len: usize,
    /// Most windows to measure on
    #[arg(long, value_name = "N", default_value_t = 12)]
    windows: usize,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    attention: AttentionArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let attention = args.attention.resolve(None)?.unwrap_or_default();
    let is_builtin = args.model.is_none();
    let dir = builtin::or_builtin(args.model.clone())?;
    let options = |model: &LocalModel| ConvertOptions {
        source_name: is_builtin
            .then(|| "the built-in GPT-2".to_owned())
            .or_else(|| model.origin.as_ref().map(|origin| origin.repository.clone())),
        hub: model.origin.clone(),
        attention: Some(attention.clone()),
        original_layers: args.original_layers.clone(),
        position_policy: args.positions,
        weights: args.weights,
        ..Default::default()
    };
    if args.dry_run {
        let model = args.hub.resolve(&dir)?;
        let planned = plan_checkpoint(&model.dir)?;
        let sizes = sizes(&estimate(&planned, &options(&model))?, &planned.notes());
        return output::result(&format!("{}\n{sizes}", planned.plan));
    }
    let Some(output_dir) = args.output_dir.clone().or_else(|| is_builtin.then(builtin::output)) else {
        bail!("--output-dir DIR is needed: where to write the converted model (--dry-run writes nothing)");
    };
    let force = args.force || (is_builtin && args.output_dir.is_none());
    check_output_dir(&output_dir, OutputKind::Model, force)?;
    let model = args.hub.resolve(&dir)?;
    let eval_text = match (&args.eval_text, is_builtin) {
        (None, true) => Some(builtin::heldout()?),
        (asked, _) => asked.clone(),
    };
    let report = eval_text.map(|text| measure_before(&args, &model, &attention, &text)).transpose()?;
    let importance = importance(&args, &model)?;
    let options = ConvertOptions { force, measured: report.as_ref().map(card_numbers), importance, ..options(&model) };
    let started = Instant::now();
    let mut bar = Progress::new("converting");
    let conversion =
        convert(&model.dir, &output_dir, &options, &mut |progress| bar.set(progress.done, progress.total))?;
    drop(bar);
    let seconds = started.elapsed().as_secs_f64();
    if is_builtin {
        output::result(&conversion.mapping)?;
    }
    output::result(&summary(&conversion, &output_dir, seconds))?;
    if is_builtin {
        let expected = ExpectedLogits::open(&builtin::expected()?)?;
        for (name, path) in [("original", &model.dir), ("converted", &output_dir)] {
            let decoder = load(open(&LocalModel::at(path))?, &args.device.resolve()?)?;
            output::result(&format!("parity, {name}: {}", verify::check(&decoder, &expected, 1e-4)?))?;
        }
    }
    if let Some(report) = report {
        output::result(&format!("\n{}", evaluation_tables(&report)))?;
    }
    Ok(())
}

/// Measures the checkpoint under the settings it is about to be converted with.
fn measure_before(
    args: &Args,
    model: &LocalModel,
    attention: &BlockAttentionConfig,
    text: &Path,
) -> Result<EvaluationReport> {
    let source = open(model)?;
    if source.is_converted() {
        bail!("{} is a converted model already", model.dir.display());
    }
    let tokenizer = source.text_tokenizer()?;
    let (tokens, _) = read_tokens(&tokenizer, text)?;
    let source = source.with_attention(Some(attention.clone()))?;
    let decoder = load(source, &args.device.resolve()?)?.with_config(|config| {
        config.original_layers.clone_from(&args.original_layers);
        config.position_policy = args.positions;
    })?;
    let mut report = None;
    measure(&decoder, None, attention, &tokens, (&[args.seq_len], args.windows), |measured| {
        report = Some(measured);
        Ok(())
    })?;
    report.context("nothing was measured")
}

/// The numbers of a measurement that do not depend on the machine.
fn card_numbers(report: &EvaluationReport) -> Vec<(String, String)> {
    let mut numbers = vec![
        ("windows".to_owned(), format!("{} of {} tokens", report.windows, report.window)),
        ("perplexity, original".to_owned(), format!("{:.3}", report.original.all)),
    ];
    for variant in &report.variants {
        let (perplexity, agreement) = (&variant.perplexity, &variant.agreement);
        numbers.push((format!("perplexity, {}", variant.name), format!("{:.3}", perplexity.all)));
        numbers.push((format!("top-1 agreement, {}", variant.name), format!("{:.2} %", 100.0 * agreement.top1)));
        numbers.push((format!("KL, {}", variant.name), format!("{:.5}", agreement.kl)));
    }
    numbers
}

/// What a conversion would write: a table with a line for the same weight of all layers, and the totals.
fn sizes(estimate: &Estimate, notes: &[String]) -> String {
    let mut groups: Vec<([String; 3], u64, u64)> = Vec::new();
    for tensor in &estimate.tensors {
        let parts = tensor.name.split('.').map(|part| if part.parse::<usize>().is_ok() { "{i}" } else { part });
        let format = match &tensor.source_format {
            same if *same == tensor.format => same.clone(),
            other => format!("{other} to {}", tensor.format),
        };
        let key = [parts.collect::<Vec<_>>().join("."), format, format!("{:?}", tensor.shape)];
        match groups.iter_mut().find(|(other, ..)| *other == key) {
            Some((_, count, _)) => *count += 1,
            None => groups.push((key, 1, tensor.bytes)),
        }
    }
    let row = |([name, format, shape], count, each): ([String; 3], u64, u64)| {
        vec![name, format, shape, grouped(each), count.to_string(), grouped(each * count)]
    };
    let rows: Vec<Vec<String>> = groups.into_iter().map(row).collect();
    let mut lines = vec![
        output::table(&["written", "format", "shape", "bytes each", "times", "bytes"], &rows),
        String::new(),
        format!(
            "parameters: {} of the original, {} added",
            grouped(estimate.parameters_before as u64),
            grouped(estimate.parameters_added as u64)
        ),
        format!(
            "weights: {} bytes read, {} bytes written ({})",
            grouped(estimate.source_bytes),
            grouped(estimate.output_bytes),
            bytes(estimate.output_bytes)
        ),
        format!("memory: at most {} of weights at a time", bytes(estimate.peak_bytes)),
    ];
    lines.extend(by_format(&estimate.formats));
    lines.extend(notes.iter().map(|note| format!("note: {note}")));
    lines.push("a dry run: nothing was written".to_owned());
    lines.join("\n")
}

fn summary(conversion: &ConversionReport, output_dir: &Path, seconds: f64) -> String {
    let (original, extra) = parameter_counts(&conversion.config);
    let mut lines = vec![
        format!("converted to {} in {seconds:.2} s", output_dir.display()),
        format!("parameters: {} before, {} after", grouped(original as u64), grouped((original + extra) as u64)),
        format!("weights: {} read, {} written", bytes(conversion.source_bytes), bytes(conversion.output_bytes)),
    ];
    lines.extend(by_format(&conversion.formats));
    lines.extend(conversion.notes.iter().map(|note| format!("note: {note}")));
    lines.join("\n")
}

/// Bits of a number on the average, and what there is of each number format.
fn by_format(formats: &BTreeMap<String, FormatTotal>) -> Vec<String> {
    let numbers: u64 = formats.values().map(|total| total.numbers).sum();
    let all: u64 = formats.values().map(|total| total.bytes).sum();
    let each =
        formats.iter().map(|(format, total)| format!("{format} {} in {} tensors", bytes(total.bytes), total.tensors));
    let each = each.collect::<Vec<_>>().join(", ");
    vec![format!("number formats: {:.2} bits per weight: {each}", 8.0 * all as f64 / numbers.max(1) as f64)]
}

/// How much errors count, by what the inputs of each weight are like: from moments, or from a text that the model is run on.
fn importance(args: &Args, model: &LocalModel) -> Result<HashMap<String, Vec<f32>>> {
    let Some(path) = &args.calibration else { return Ok(HashMap::new()) };
    if args.weights != WeightsPolicy::Int4 {
        bail!("--calibration chooses scales of --weights int4: leave it out, or ask for int4");
    }
    let source = open(model)?;
    if source.is_converted() {
        bail!("{} is a converted model already", model.dir.display());
    }
    let (sha256, decoder) = (source.sha256()?, source.model_config().decoder.clone());
    if is_moments(path) {
        let moments = MomentsFile::open(path)?;
        if moments.header().model_sha256 != sha256 {
            bail!("{} was gathered with another model: calibrate this one", path.display());
        }
        return Ok(bsbr_convert::importance(&decoder, &moments)?);
    }
    let tokenizer = source.text_tokenizer()?;
    let text = setup::windows(&tokenizer, std::slice::from_ref(path), &CalibrationSettings::default(), &sha256)?;
    output::note(&setup::describe(&text));
    let scratch = ScratchDir::beside(args.output_dir.as_deref().unwrap_or(path))?;
    let gathered = scratch.path().join("moments.safetensors");
    setup::gather(&load(source, &args.device.resolve()?)?, &text, &gathered)?;
    Ok(bsbr_convert::importance(&decoder, &MomentsFile::open(&gathered)?)?)
}

/// Whether a file begins as safetensors do: the length of a header that is in the file, and a brace. No text begins so.
fn is_moments(path: &Path) -> bool {
    let mut start = [0; 9];
    let read = std::fs::File::open(path).and_then(|mut file| {
        file.read_exact(&mut start)?;
        file.metadata()
    });
    let length = u64::from_le_bytes([start[0], start[1], start[2], start[3], start[4], start[5], start[6], start[7]]);
    start[8] == b'{' && read.is_ok_and(|metadata| length < metadata.len())
}
