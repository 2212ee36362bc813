//! Flags that several commands share.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bsbr_attn::{BlockAttentionConfig, Far, Retrieval, Selector};
use bsbr_convert::{ConvertError, OutputKind, prepare_output};
use burn::tensor::DType;
use serde::{Deserialize, de::IntoDeserializer};

use crate::output;

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

/// Settings of BSBR attention: a file, and flags that override it.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "BSBR attention (defaults: configs/default.toml)")]
pub(crate) struct AttentionArgs {
    /// TOML file with settings; flags override it
    #[arg(long, value_name = "FILE")]
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
    /// Tokens of a block, the unit of retrieval [default: 4]
    #[arg(long, value_name = "N")]
    block_size: Option<usize>,
    /// Blocks each token reads exactly [default: 76]
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Chunks that end within the first N tokens read everything [default: 1024]
    #[arg(long, value_name = "N")]
    exact_tokens: Option<usize>,
    /// Blocks further back than N tokens are scored by whole sections first [default: 8192]
    #[arg(long, value_name = "N")]
    fine_tokens: Option<usize>,
    /// Tokens of a section, rounded up to whole blocks [default: 64]
    #[arg(long, value_name = "N")]
    section_size: Option<usize>,
    /// Of those sections, the ones whose blocks a token scores [default: 32]
    #[arg(long, value_name = "N")]
    top_sections: Option<usize>,
    /// Sections further back than N tokens are scored by whole pages first [default: 131072]
    #[arg(long, value_name = "N")]
    middle_tokens: Option<usize>,
    /// Tokens of a page, rounded up to whole sections [default: 512]
    #[arg(long, value_name = "N")]
    page_size: Option<usize>,
    /// Of those pages, the ones whose sections a token scores [default: 64]
    #[arg(long, value_name = "N")]
    top_pages: Option<usize>,
    /// What scores a block: mean-key, meta [default: mean-key]
    #[arg(long, value_name = "KIND", value_parser = by_name::<Selector>)]
    selector: Option<Selector>,
    /// How much the mean-key selector expects of a block beyond its mean key; 1 is a bound [default: 0.75]
    #[arg(long, value_name = "R")]
    reach: Option<f64>,
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

impl AttentionArgs {
    /// The settings, checked, on top of `base` or of the file where one is named; `None` if nothing was asked for.
    pub(crate) fn resolve(&self, base: Option<&BlockAttentionConfig>) -> Result<Option<BlockAttentionConfig>> {
        let mut config = match (&self.config, base) {
            (Some(path), _) => read_settings(path)?,
            (None, Some(base)) => base.clone(),
            (None, None) => BlockAttentionConfig::default(),
        };
        let mut asked = self.config.is_some();
        let mut set = |given: bool| asked |= given;
        macro_rules! overlay {
            ($($field:ident),*) => { $(if let Some(value) = self.$field.clone() { config.$field = value; set(true); })* };
        }
        overlay!(chunk_size, local_chunks, sink_tokens, retrieval, block_size, top_k, selector, far);
        overlay!(
            exact_tokens,
            fine_tokens,
            section_size,
            top_sections,
            middle_tokens,
            page_size,
            top_pages,
            reach,
            far_shift,
            covariance_weight,
            compression_factor,
            kept_tokens,
            additive_gate
        );
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
    toml::from_str(&text).with_context(|| format!("{} is not a settings file", path.display()))
}

/// Parses an enum by the name it has in files.
pub(crate) fn by_name<T: for<'de> Deserialize<'de>>(name: &str) -> Result<T, serde::de::value::Error> {
    T::deserialize(name.into_deserializer())
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
