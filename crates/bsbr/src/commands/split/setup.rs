//! The model, the configuration and the plan that the commands share.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use bsbr_convert::{CheckpointLinear, ModelSource, SplitPreset, checkpoint_linears};
use bsbr_model::TextTokenizer;
use bsbr_splitlinear::{
    CalibrationSettings, LinearShape, MomentsHeader, MomentsWriter, Plan, SavedSplit, SplitConfig, Window, calibrate,
    choose_windows, moments_entries, plan,
};

use crate::{
    args::renamed,
    bench::sweep::length,
    builtin,
    model::{HubArgs, LocalModel},
    output::{self, Progress},
    running::{open, read_tokens},
};

/// The model and the configuration.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct SplitArgs {
    /// Hugging Face checkpoint, GGUF file or converted model; the built-in checkpoint when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// What is split and shared: TOML, or the YAML of the Python original
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Configuration made for the model where none is given: pivoted, each, published, anchored, svd
    #[arg(long, value_name = "NAME", value_parser = crate::args::by_name::<SplitPreset>, default_value = "pivoted", conflicts_with = "config")]
    preset: SplitPreset,
    /// Fraction of the parameters to keep [default: that of the configuration, 0.8]
    #[arg(long, value_name = "X")]
    keep: Option<f64>,
}

/// Text to calibrate on.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct TextArgs {
    /// Text to calibrate on; may be given several times
    #[arg(long, value_name = "FILE")]
    pub(super) text: Vec<PathBuf>,
    /// Windows of text, held-out ones included [default: that of the configuration, 64]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Tokens of a window [default: that of the configuration, 1024]
    #[arg(long, value_name = "N", value_parser = length)]
    seq_len: Option<usize>,
    #[arg(long, hide = true, value_parser = renamed("--windows"))]
    samples: Option<String>,
    #[arg(long, hide = true, value_parser = renamed("--seq-len"))]
    length: Option<String>,
}

/// A model with its plan.
pub(super) struct Setup {
    pub(super) model: LocalModel,
    pub(super) source: ModelSource,
    pub(super) linears: Vec<CheckpointLinear>,
    pub(super) config: SplitConfig,
    pub(super) plan: Plan,
}

impl SplitArgs {
    pub(super) fn is_builtin(&self) -> bool {
        self.model.is_none()
    }

    pub(super) fn resolve(&self) -> Result<Setup> {
        let model = self.hub.resolve(&builtin::or_builtin(self.model.clone())?)?;
        let source = open(&model)?;
        if source.model_config().split.is_some() {
            bail!("{} is compressed already: begin with the original model", model.dir.display());
        }
        let linears = checkpoint_linears(&source)?;
        let mut config = match &self.config {
            Some(path) => SplitConfig::load(path)?,
            None => self.preset.config(&linears)?,
        };
        if let Some(keep) = self.keep {
            config.keep = keep;
            config.validate()?;
        }
        let shapes: Vec<LinearShape> = linears.iter().map(|linear| linear.shape.clone()).collect();
        let plan = plan(&config, &shapes)?;
        Ok(Setup { model, source, linears, config, plan })
    }
}

impl Setup {
    /// For the path of each layer the layers of the decoder that it is.
    pub(super) fn targets(&self) -> BTreeMap<String, Vec<(String, usize)>> {
        let names = |linear: &CheckpointLinear| {
            linear.targets.iter().map(|(place, width)| (place.to_string(), *width)).collect()
        };
        self.linears.iter().map(|linear| (linear.shape.path.clone(), names(linear))).collect()
    }

    /// What a compressed model with the groups of `plan` says of itself.
    pub(super) fn saved(&self, plan: &Plan, calibration: String) -> Result<SavedSplit> {
        Ok(SavedSplit { base: self.source.sha256()?, calibration, ..self.draft(plan)? })
    }

    /// The same without what it was made of.
    pub(super) fn draft(&self, plan: &Plan) -> Result<SavedSplit> {
        let groups = SavedSplit::of_plan(plan, &self.targets()).map_err(anyhow::Error::msg)?;
        let (base, calibration, keep) = (String::new(), String::new(), self.config.keep);
        Ok(SavedSplit { format_version: SavedSplit::FORMAT_VERSION, keep, base, calibration, groups })
    }
}

/// Text in windows.
pub(crate) struct Windows {
    pub(crate) tokens: Vec<u32>,
    pub(crate) windows: Vec<Window>,
    pub(crate) header: MomentsHeader,
}

impl TextArgs {
    /// Sets what was asked for.
    pub(super) fn overlay(&self, settings: &mut CalibrationSettings) {
        settings.samples = self.windows.unwrap_or(settings.samples);
        settings.length = self.seq_len.unwrap_or(settings.length);
    }

    /// The windows that `settings` choose of the text for the model `sha256`.
    pub(super) fn windows(
        &self,
        tokenizer: &TextTokenizer,
        settings: &CalibrationSettings,
        sha256: &str,
    ) -> Result<Windows> {
        windows(tokenizer, &self.text, settings, sha256)
    }
}

/// The windows that `settings` choose of the text in `files` for the model `sha256`.
pub(crate) fn windows(
    tokenizer: &TextTokenizer,
    files: &[PathBuf],
    settings: &CalibrationSettings,
    sha256: &str,
) -> Result<Windows> {
    let mut tokens = Vec::new();
    for path in files {
        tokens.extend(read_tokens(tokenizer, path)?.0);
    }
    let windows = choose_windows(tokens.len(), settings)?;
    let chosen = windows.iter().flat_map(|window| &tokens[window.tokens.clone()]);
    let bytes: Vec<u8> = chosen.flat_map(|token| token.to_le_bytes()).collect();
    let numbers = [
        ("samples", windows.len().to_string()),
        ("length", settings.length.to_string()),
        ("holdout", settings.holdout.to_string()),
        ("seed", settings.seed.to_string()),
    ];
    let header = MomentsHeader {
        model_sha256: sha256.to_owned(),
        text_sha256: bsbr_convert::sha256_text(&bytes),
        settings: numbers.map(|(key, value)| (key.to_owned(), value)).into(),
    };
    Ok(Windows { tokens, windows, header })
}

/// Gathers moments into the file `path`.
pub(crate) fn gather(decoder: &bsbr_model::Decoder, text: &Windows, path: &Path) -> Result<()> {
    let mut writer = MomentsWriter::create(path, &text.header, &moments_entries(decoder))?;
    let mut bar = Progress::new("calibrating");
    calibrate(decoder, &text.tokens, &text.windows, &mut writer, &mut |done, total| {
        bar.set(done as u64, total as u64);
    })?;
    drop(bar);
    Ok(writer.finish()?)
}

/// One line about the text.
pub(crate) fn describe(text: &Windows) -> String {
    let held = text.windows.iter().filter(|window| window.held_out).count();
    let length = text.windows.first().map_or(0, |window| window.tokens.len());
    format!(
        "{} windows of {length} tokens of a text of {}, {held} of them held out",
        text.windows.len(),
        output::grouped(text.tokens.len() as u64)
    )
}

/// Most memory the process had, in bytes.
pub(super) fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Reads a file of JSON.
pub(super) fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
}
