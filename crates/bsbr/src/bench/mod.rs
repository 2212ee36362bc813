//! What `bsbr bench` measures, and how: several implementations ("arms") of one thing, interleaved, over a sweep
//! of lengths.
//!
//! [`setup`] turns flags into a run; [`session`] goes through parts (attention alone, a whole model), lengths and phases; [`measure`] runs the arms of one
//! point in turn; [`report`] holds what came out, and [`table`], [`plot`] and JSON show it.

pub(crate) mod arithmetic;
pub(crate) mod attention;
pub(crate) mod budget;
pub(crate) mod data;
pub(crate) mod fields;
pub(crate) mod gemm;
pub(crate) mod glued;
pub(crate) mod llama;
pub(crate) mod machine;
pub(crate) mod measure;
pub(crate) mod memory;
pub(crate) mod model;
pub(crate) mod plot;
pub(crate) mod pytorch;
pub(crate) mod report;
pub(crate) mod session;
pub(crate) mod setup;
pub(crate) mod statistics;
pub(crate) mod sweep;
pub(crate) mod table;

use std::time::Duration;

use anyhow::Result;
use bsbr_attn::Retrieved;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

/// Tokens of one sample of decoding, whose mean is the sample.
pub const DECODE_TOKENS: usize = 8;

/// Tokens that caches have room for behind the text, so that no copy of a growing cache falls into a sample.
pub(crate) const DECODE_ROOM: usize = 16 * DECODE_TOKENS;

/// One way of computing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Arm {
    /// BSBR, by the fastest kernel there is.
    Bsbr,
    /// BSBR in plain tensor operations.
    BsbrPlain,
    /// Full causal attention of this project, by the fastest kernel there is.
    Dense,
    /// Full causal attention of burn; attention alone.
    Burn,
    /// PyTorch's scaled_dot_product_attention, causal.
    #[value(skip)]
    TorchSdpa,
    /// The Python original's formula, in PyTorch.
    #[value(skip)]
    TorchOriginal,
    /// The model in Hugging Face transformers.
    #[value(skip)]
    Transformers,
    /// The model in llama.cpp.
    #[value(skip)]
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
}

impl Arm {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bsbr => "bsbr",
            Self::BsbrPlain => "bsbr-plain",
            Self::Dense => "dense",
            Self::Burn => "burn",
            Self::TorchSdpa => "torch-sdpa",
            Self::TorchOriginal => "torch-original",
            Self::Transformers => "transformers",
            Self::LlamaCpp => "llama.cpp",
        }
    }

    pub(crate) fn is_bsbr(self) -> bool {
        matches!(self, Self::Bsbr | Self::BsbrPlain)
    }

    /// Whether it is none of this project's or of burn.
    pub(crate) fn is_foreign(self) -> bool {
        self.is_python() || self == Self::LlamaCpp
    }

    /// Whether it runs in a Python process.
    pub(crate) fn is_python(self) -> bool {
        matches!(self, Self::TorchSdpa | Self::TorchOriginal | Self::Transformers)
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Part {
    /// Attention of one layer, given queries, keys and values.
    Attention,
    /// A whole model, from tokens to the scores of the next one.
    Model,
}

/// When in the life of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Reading a whole text.
    Prefill,
    /// One more token behind a text of that length.
    Decode,
    /// Reading a whole text and the gradients of queries, keys and values; attention alone.
    Training,
}

impl Part {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Model => "model",
        }
    }
}

impl Phase {
    /// Its name, as in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Training => "training",
        }
    }

    /// Whether a run takes a whole text.
    pub fn takes_text(self) -> bool {
        self != Self::Decode
    }
}

/// One arm at one length.
pub trait Subject {
    /// What a phase needs before it can be timed, like a text to decode behind.
    ///
    /// # Errors
    ///
    /// If it cannot run.
    fn prepare(&mut self, phase: Phase) -> Result<()>;

    /// Runs once: the whole text, or [`DECODE_TOKENS`] tokens and their mean.
    ///
    /// # Errors
    ///
    /// If it fails.
    fn run(&mut self, phase: Phase) -> Result<Duration>;

    /// Bytes it keeps of the text for decoding, where it knows.
    fn kept_bytes(&self) -> Option<u64> {
        None
    }

    /// What an index retrieves for the tokens of the whole text, where there is one.
    ///
    /// # Errors
    ///
    /// If it fails.
    fn retrieved(&mut self) -> Result<Option<Retrieved>> {
        Ok(None)
    }
}

/// Waits until the device has done everything asked of it.
///
/// # Errors
///
/// If the device fails.
pub fn sync(device: &Device) -> Result<()> {
    device.sync().map_err(|error| anyhow::anyhow!("the device failed: {error:?}"))
}
