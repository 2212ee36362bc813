//! `bsbr split compress`.

use std::{collections::HashMap, path::PathBuf, time::Instant};

use anyhow::{Context, Result, bail};
use bsbr_convert::{ConvertOptions, OutputKind, ScratchDir, WeightsPolicy, write_split};
use bsbr_model::Decoder;
use bsbr_splitlinear::{
    AnchoredSettings, CalibrationMode, CompressedGroup, MomentsFile, Objective, Plan, RankAllocation, Refit,
    SavedSplit, compress_alone, compress_anchored, stored_tensors,
};

use super::{
    allocation::{self, Allocation},
    report,
    setup::{Setup, SplitArgs, TextArgs, Windows, describe, gather, peak_memory},
};
use crate::{
    args::{check_output_dir, renamed},
    device::DeviceArgs,
    output::{self, Progress},
    report::{Format, Forms, ReportArgs},
    running::load,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    split: SplitArgs,
    /// Moments that `split calibrate` gathered for this model; beside --text, or alone where no text is run (--preset each,
    /// published)
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// Where to write the compressed model
    #[arg(short, long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Number format of the factors, and of the other weights of a checkpoint: keep, f32, f16, bf16; with int8 and int4 factors are f16
    #[arg(long, value_name = "FORMAT", value_parser = crate::args::by_name::<WeightsPolicy>, default_value = "keep")]
    weights: WeightsPolicy,
    #[arg(long, hide = true, value_parser = renamed("--weights"))]
    dtype: Option<String>,
    /// Replace an earlier model
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: Args) -> Result<()> {
    args.report.check()?;
    check_output_dir(&args.output_dir, OutputKind::Model, args.force)?;
    let started = Instant::now();
    let mut setup = args.split.resolve()?;
    args.text.overlay(&mut setup.config.calibration);
    setup.config.validate()?;
    let sha256 = setup.source.sha256()?;
    let needs_text = setup.config.objective == Objective::Activations;
    let anchored = needs_text && setup.config.calibration.mode == CalibrationMode::SequentialAnchored;
    let text = if needs_text && !args.text.text.is_empty() {
        let tokenizer = setup.source.text_tokenizer()?;
        Some(args.text.windows(&tokenizer, &setup.config.calibration, &sha256)?)
    } else {
        None
    };
    if anchored && text.is_none() {
        bail!("--text FILE is needed: layers are fitted front to back, to what the compressed ones before them give");
    }
    let measured = needs_text && setup.config.rank == RankAllocation::Sensitivity;
    if measured && text.is_none() {
        bail!("--text FILE is needed: what compressing each layer does is measured on it (not so with --preset each)");
    }
    if measured && text.as_ref().is_some_and(|text| text.windows.iter().all(|window| !window.held_out)) {
        bail!("the text has one window: held-out text must judge; give more text or a smaller --seq-len");
    }
    if needs_text && text.is_none() && args.calibration.is_none() {
        bail!("--text FILE or --calibration FILE is needed: what to calibrate on (not so with --preset svd)");
    }
    if let Some(text) = &text {
        output::note(&describe(text));
    }
    let device = args.device.resolve()?;
    let (all, _) = setup.source.parameter_counts();
    let decoder = load(bsbr_convert::ModelSource::open(&setup.model.dir)?, &device)?;

    let needs_moments = needs_text && (!anchored || setup.config.rank != RankAllocation::Uniform);
    let scratch = needs_moments.then(|| ScratchDir::beside(&args.output_dir)).transpose()?;
    let gathered = |scratch: &ScratchDir| moments(&args, &decoder, text.as_ref(), &sha256, scratch.path());
    let moments = scratch.as_ref().map(gathered).transpose()?;
    let Allocation { plan, groups, measured } = allocation::of(&setup, &decoder, moments.as_ref(), text.as_ref())?;
    let header = moments.as_ref().map(MomentsFile::header).or(text.as_ref().map(|text| &text.header));
    let calibration = header.map(|header| header.text_sha256.clone()).unwrap_or_default();
    let saved = setup.saved(&plan, calibration)?;
    let groups = match &text {
        Some(text) if anchored => front_to_back(&setup, &decoder, &saved, text)?,
        _ => match groups {
            Some(groups) => groups,
            None => alone(&setup, &decoder, &saved, moments.as_ref())?,
        },
    };
    drop((moments, scratch, decoder));

    let mut report = report::of(&setup, &plan, &saved, &groups, all, started.elapsed().as_secs_f64());
    report["allocation"] = serde_json::to_value(measured)?;
    let mut factors: HashMap<String, Vec<f32>> = HashMap::new();
    for group in groups {
        factors.extend(stored_tensors(&group.saved, &group.factors)?);
    }
    let name = args.split.is_builtin().then(|| "the built-in GPT-2".to_owned());
    let origin = setup.model.origin.clone();
    let options = ConvertOptions {
        source_name: name.or_else(|| origin.as_ref().map(|origin| origin.repository.clone())),
        hub: origin,
        attention: None,
        weights: args.weights,
        force: args.force,
        ..Default::default()
    };
    let mut bar = Progress::new("writing");
    let text = format!("{}\n", serde_json::to_string_pretty(&report)?);
    let files = [(report::FILE, text.as_bytes())];
    let written = write_split(
        &setup.model.dir,
        &args.output_dir,
        &saved,
        &mut |name| factors.remove(name),
        (&options, &files),
        &mut |progress| bar.set(progress.done, progress.total),
    )?;
    drop(bar);
    args.report.emit(&Forms {
        table: &|| report::table(&report),
        json: &|| Ok(report::described(&report, &setup.source.description())),
        rows: Some(&|report| report["groups"].as_array().cloned().unwrap_or_default()),
    })?;
    if args.report.format() == Format::Table {
        let peak =
            peak_memory().map_or_else(String::new, |bytes| format!(", at most {} of memory", output::bytes(bytes)));
        output::result(&format!(
            "compressed to {} ({}) in {:.1} s{peak}",
            args.output_dir.display(),
            output::bytes(written.bytes),
            started.elapsed().as_secs_f64()
        ))?;
    }
    note_warnings(&plan);
    Ok(())
}

/// The moments that were gathered before, or those of the text.
fn moments(
    args: &Args,
    decoder: &Decoder,
    text: Option<&Windows>,
    sha256: &str,
    scratch: &std::path::Path,
) -> Result<MomentsFile> {
    let Some(path) = &args.calibration else {
        let text = text.context("there is no text")?;
        let path = scratch.join("moments.safetensors");
        gather(decoder, text, &path)?;
        return Ok(MomentsFile::open(&path)?);
    };
    let file = MomentsFile::open(path)?;
    if file.header().model_sha256 != sha256 {
        bail!("{} was gathered with another model: calibrate this one", path.display());
    }
    Ok(file)
}

pub(super) fn alone(
    setup: &Setup,
    decoder: &Decoder,
    saved: &SavedSplit,
    moments: Option<&MomentsFile>,
) -> Result<Vec<CompressedGroup>> {
    let settings = setup.config.solve_settings();
    let mut bar = Progress::new("compressing");
    let mut groups = Vec::new();
    for group in &saved.groups {
        groups.push(compress_alone(decoder, group, moments, &settings)?);
        bar.set(groups.len() as u64, saved.groups.len() as u64);
    }
    Ok(groups)
}

fn front_to_back(setup: &Setup, decoder: &Decoder, saved: &SavedSplit, text: &Windows) -> Result<Vec<CompressedGroup>> {
    let mut compressed = decoder.divided(saved)?;
    let refit_blocks = setup.config.refit.c == Refit::Guarded;
    let settings = AnchoredSettings { solve: setup.config.solve_settings(), refit_blocks };
    let mut bar = Progress::new("compressing");
    let windows = (&text.tokens[..], &text.windows[..]);
    Ok(compress_anchored(decoder, &mut compressed, &saved.groups, windows, &settings, &mut |_, done, total| {
        bar.set(done as u64, total as u64);
    })?)
}

fn note_warnings(plan: &Plan) {
    for warning in plan.warnings() {
        output::note(&format!("warning: {warning}"));
    }
}
