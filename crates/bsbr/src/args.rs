//! Flags that several commands share.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bsbr_attn::{
    BlockAttentionConfig, Far, REPLACED_SELECTOR, REPLACED_SETTINGS, Retrieval, Selector, replaced_setting,
};
use bsbr_convert::{ConvertError, OutputKind, prepare_output};
use bsbr_model::Arithmetic;
use burn::tensor::{DType, Device};
use serde::{Deserialize, de::IntoDeserializer};

use crate::{output, presets::Preset};

/// A type of numbers.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::BF16,
        }
    }
}

/// How a cache keeps keys and values.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct CacheArgs {
    /// Type that caches keep keys and values in; arithmetic stays f32
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub(crate) cache_dtype: Dtype,
}

impl CacheArgs {
    /// The type beside rows of this one: f32 caches hold what they get.
    pub(crate) fn stored(&self, rows: DType) -> DType {
        match self.cache_dtype {
            Dtype::F32 => rows,
            narrow => narrow.into(),
        }
    }
}

/// How a cache that serves texts keeps keys and values.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct NarrowCacheArgs {
    /// Type that caches keep keys and values in; arithmetic stays f32 [default: f16 on the CPU, f32 elsewhere]
    #[arg(long, value_enum)]
    cache_dtype: Option<Dtype>,
}

impl NarrowCacheArgs {
    /// The type on this device.
    pub(crate) fn on(&self, device: &Device) -> DType {
        #[cfg(feature = "flex")]
        let narrow = *device == Device::flex();
        #[cfg(not(feature = "flex"))]
        let narrow = {
            let _ = device;
            false
        };
        self.cache_dtype.unwrap_or(if narrow { Dtype::F16 } else { Dtype::F32 }).into()
    }
}

/// What weights are multiplied in.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct ArithmeticArgs {
    /// What weights are multiplied in; faster and less exact: int8 (quantised weights), bf16 (many tokens at once)
    #[arg(long, value_enum, default_value_t = ArithmeticName::F32)]
    arithmetic: ArithmeticName,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ArithmeticName {
    F32,
    Int8,
    Bf16,
}

impl From<ArithmeticArgs> for Arithmetic {
    fn from(args: ArithmeticArgs) -> Self {
        match args.arithmetic {
            ArithmeticName::F32 => Self::F32,
            ArithmeticName::Int8 => Self::Int8,
            ArithmeticName::Bf16 => Self::Bf16,
        }
    }
}

/// Settings of BSBR attention, and those of earlier versions, which are refused by name.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct AttentionArgs {
    #[command(flatten)]
    settings: SettingFlags,
    #[command(flatten)]
    replaced: ReplacedArgs,
}

/// Settings of BSBR attention: a file, and flags that override it.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "BSBR attention (defaults: --preset default)")]
pub(crate) struct SettingFlags {
    /// Settings that come with the program; flags override them
    #[arg(long, value_name = "NAME", value_enum)]
    preset: Option<Preset>,
    /// TOML file with settings; flags override it
    #[arg(long, value_name = "FILE", conflicts_with = "preset")]
    config: Option<PathBuf>,
    /// Tokens of a chunk, the unit of exact local attention [default: 128]
    #[arg(long, value_name = "N")]
    chunk_size: Option<usize>,
    /// Chunks before a token's own that are read exactly [default: 1]
    #[arg(long, value_name = "N")]
    local_chunks: Option<usize>,
    /// First tokens that are always read exactly [default: 4]
    #[arg(long, value_name = "N")]
    sink_tokens: Option<usize>,
    /// How the rest is read: none, blocks, state, additive [default: blocks]
    #[arg(long, value_name = "KIND", value_parser = by_name::<Retrieval>)]
    retrieval: Option<Retrieval>,
    /// Chunks that end within the first N tokens read everything [default: 512]
    #[arg(long, value_name = "N")]
    exact_tokens: Option<usize>,
    /// What chooses the keys that are read exactly: index, meta [default: index]
    #[arg(long, value_name = "KIND", value_parser = selector)]
    selector: Option<Selector>,
    /// Estimated probability from which on the index has a key read exactly; 0 reads every key up to --max-keys
    /// [default: 0.00048828125]
    #[arg(long, value_name = "P")]
    threshold: Option<f64>,
    /// Most keys a token reads by the index [default: 1024]
    #[arg(long, value_name = "N")]
    max_keys: Option<usize>,
    /// Channels of a head in which the index keeps what a key has beyond the mean of its block [default: half, at least 32]
    #[arg(long, value_name = "N")]
    index_channels: Option<usize>,
    /// What is further back than N tokens is scored by sections of 64 tokens first [default: 8192]
    #[arg(long, value_name = "N")]
    fine_tokens: Option<usize>,
    /// Most of those sections whose keys a token scores [default: 32]
    #[arg(long, value_name = "N")]
    max_sections: Option<usize>,
    /// Tokens of a block with --retrieval state or --selector meta [default: 16]
    #[arg(long, value_name = "N")]
    block_size: Option<usize>,
    /// Blocks each token reads exactly with --selector meta [default: 32]
    #[arg(long, value_name = "N")]
    meta_blocks: Option<usize>,
    /// How blocks that are not retrieved count: none, mean, state [default: mean]
    #[arg(long, value_name = "KIND", value_parser = by_name::<Far>)]
    far: Option<Far>,
    /// Nats added to the log-mass of blocks that are not retrieved [default: 0.0]
    #[arg(long, value_name = "NATS", allow_negative_numbers = true)]
    far_shift: Option<f64>,
    /// Weight of the covariance in a block's estimated mass [default: 0.8]
    #[arg(long, value_name = "W")]
    covariance_weight: Option<f64>,
    /// Store states as 1/N of their numbers [default: 1]
    #[arg(long, value_name = "N")]
    compression_factor: Option<usize>,
    /// Tokens that keep their own keys and values under --retrieval state [default: 0]
    #[arg(long, value_name = "N")]
    kept_tokens: Option<usize>,
    /// Most block statistics kept under --retrieval state; bounds the memory
    #[arg(long, value_name = "N")]
    max_chunks: Option<usize>,
    /// Gate of --retrieval additive [default: 1]
    #[arg(long, value_name = "G")]
    additive_gate: Option<f64>,
}

/// Flags of earlier versions: what they say is refused with what replaced them, rather than unknown.
#[derive(Debug, Clone, Default, clap::Args)]
struct ReplacedArgs {
    #[arg(long, hide = true)]
    top_k: Option<String>,
    #[arg(long, hide = true)]
    reach: Option<String>,
    #[arg(long, hide = true)]
    section_size: Option<String>,
    #[arg(long, hide = true)]
    top_sections: Option<String>,
    #[arg(long, hide = true)]
    middle_tokens: Option<String>,
    #[arg(long, hide = true)]
    page_size: Option<String>,
    #[arg(long, hide = true)]
    top_pages: Option<String>,
}

impl ReplacedArgs {
    /// Refuses whatever of them was given.
    fn check(&self) -> Result<()> {
        let given = [
            ("top_k", &self.top_k),
            ("reach", &self.reach),
            ("section_size", &self.section_size),
            ("top_sections", &self.top_sections),
            ("middle_tokens", &self.middle_tokens),
            ("page_size", &self.page_size),
            ("top_pages", &self.top_pages),
        ];
        match given.into_iter().find(|(_, value)| value.is_some()) {
            Some((name, _)) => {
                let instead = replaced_setting(name).unwrap_or_default();
                bail!("--{} is gone: {instead}", name.replace('_', "-"))
            }
            None => Ok(()),
        }
    }
}

impl AttentionArgs {
    /// As [`SettingFlags::resolve`].
    pub(crate) fn resolve(&self, base: Option<&BlockAttentionConfig>) -> Result<Option<BlockAttentionConfig>> {
        self.replaced.check()?;
        self.settings.resolve(base)
    }
}

impl SettingFlags {
    /// The settings, checked, on top of `base` or of the file where one is named; `None` if nothing was asked for.
    pub(crate) fn resolve(&self, base: Option<&BlockAttentionConfig>) -> Result<Option<BlockAttentionConfig>> {
        let mut config = match (&self.config, self.preset, base) {
            (Some(path), ..) => read_settings(path)?,
            (None, Some(preset), _) => parsed(preset.text(), &format!("the preset {}", preset.name()))?,
            (None, None, Some(base)) => base.clone(),
            (None, None, None) => BlockAttentionConfig::default(),
        };
        let mut asked = self.config.is_some() || self.preset.is_some();
        let mut set = |given: bool| asked |= given;
        macro_rules! overlay {
            ($($field:ident),*) => { $(if let Some(value) = self.$field.clone() { config.$field = value; set(true); })* };
        }
        // First the kind: what belonged to another is at rest, unless a flag asks for it.
        if let Some(retrieval) = self.retrieval {
            config = config.with_retrieval(retrieval);
            set(true);
        }
        overlay!(chunk_size, local_chunks, sink_tokens, exact_tokens, selector, threshold, max_keys, fine_tokens);
        overlay!(max_sections, block_size, meta_blocks, far, far_shift, covariance_weight, compression_factor);
        overlay!(kept_tokens, additive_gate);
        if self.index_channels.is_some() {
            config.index_channels = self.index_channels;
            set(true);
        }
        if self.max_chunks.is_some() {
            config.max_chunks = self.max_chunks;
            set(true);
        }
        config.validate()?;
        Ok(asked.then_some(config))
    }
}

fn read_settings(path: &Path) -> Result<BlockAttentionConfig> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parsed(&text, &path.display().to_string())
}

/// Settings from TOML that is called `name` in errors.
fn parsed(text: &str, name: &str) -> Result<BlockAttentionConfig> {
    let read = toml::from_str(text).with_context(|| format!("{name} is not a settings file"));
    if read.is_err() {
        // Only where reading fails, so that nothing depends on this list.
        let table: toml::Table = toml::from_str(text).unwrap_or_default();
        if let Some((gone, instead)) = REPLACED_SETTINGS.iter().find(|(gone, _)| table.contains_key(*gone)) {
            bail!("{name}: `{gone}` is gone: {instead}");
        }
        let (gone, instead) = REPLACED_SELECTOR;
        if table.get("selector").and_then(toml::Value::as_str) == Some(gone) {
            bail!("{name}: `selector = \"{gone}\"` is gone: {instead}");
        }
    }
    read
}

/// A selector by the name it has in files.
fn selector(name: &str) -> Result<Selector, String> {
    let (gone, instead) = REPLACED_SELECTOR;
    if name == gone {
        return Err(format!("{gone} is gone: {instead}"));
    }
    by_name(name)
}

/// Parses an enum by the name it has in files; an error suggests the name that is nearest.
pub(crate) fn by_name<T: for<'de> Deserialize<'de>>(name: &str) -> Result<T, String> {
    let read = T::deserialize(name.into_deserializer());
    read.map_err(|error: serde::de::value::Error| {
        let error = error.to_string();
        // "unknown variant `x`, expected one of `a`, `b`"
        let known = error.split('`').skip(3).step_by(2);
        let nearest = known.map(|known| (distance(name, known), known)).min();
        match nearest {
            Some((steps, known)) if steps <= known.len().div_ceil(3) => format!("{error}; did you mean `{known}`?"),
            _ => error,
        }
    })
}

/// Letters to add, leave out or change, and neighbours to exchange, from one word to another.
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut rows = vec![(0..=to.len()).collect::<Vec<usize>>()];
    for (at, letter) in from.iter().enumerate() {
        let mut row = vec![at + 1];
        for (column, other) in to.iter().enumerate() {
            let changed = rows[at][column] + usize::from(letter != other);
            let mut least = changed.min(rows[at][column + 1] + 1).min(row[column] + 1);
            if at > 0 && column > 0 && *letter == to[column - 1] && from[at - 1] == *other {
                least = least.min(rows[at - 1][column - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

/// Refuses a flag of an earlier version, with the name it has now.
pub(crate) fn renamed(now: &'static str) -> impl Fn(&str) -> Result<String, String> + Clone + Send + Sync + 'static {
    move |_| Err(format!("this flag is called {now} now"))
}

/// Checks that `dir` can be written, before anything that takes long: it is absent, empty or an earlier result to be
/// replaced. Tells what an interrupted run left there.
pub(crate) fn check_output_dir(dir: &Path, kind: OutputKind, force: bool) -> Result<()> {
    match prepare_output(dir, kind, force, &mut output::note) {
        Ok(()) => {}
        Err(ConvertError::OutputExists { dir }) => {
            bail!("{} exists and is not empty: choose another directory or replace it with --force", dir.display())
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_gets_a_suggestion() {
        let wrong = |name: &str| by_name::<Retrieval>(name).unwrap_err();
        assert!(wrong("blcoks").ends_with("did you mean `blocks`?"), "{}", wrong("blcoks"));
        assert!(wrong("Additive").ends_with("did you mean `additive`?"), "{}", wrong("Additive"));
        assert!(!wrong("everything").contains("did you mean"), "{}", wrong("everything"));
    }

    #[test]
    fn distances_count_changes_and_exchanges() {
        for (from, to, steps) in [
            ("kitten", "sitting", 3),
            ("", "abc", 3),
            ("abc", "", 3),
            ("flaw", "lawn", 2),
            ("a", "a", 0),
            ("f61", "f16", 1),
        ] {
            assert_eq!(distance(from, to), steps, "{from} {to}");
        }
    }
}
