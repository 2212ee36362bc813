//! An evaluation over long texts that shows what an average hides: the end of the window, numbers hidden far back, and
//! beside each figure the original, nothing but the neighbourhood, and the same without the far term.

use bsbr_attn::{BlockAttentionConfig, Far, Retrieval};
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::{
    prompts::{Prompt, PromptMaker, RecallTask},
    recall::{RecallScores, TurnScores, recall},
    report::{Agreement, EvaluateConfig, EvaluationReport, Perplexity, PositionBucket},
    windows::{check_windows, evaluate},
};
use crate::{Decoder, ModelError, Reads, TextTokenizer};

/// The longest window taken unasked: what is longer takes its time.
const LONGEST_DEFAULT: usize = 8192;

/// The shortest window taken unasked, if the model reads as much.
const SHORTEST_DEFAULT: usize = 1024;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LongTask {
    /// Perplexity and agreement over windows of the text.
    Perplexity,
    /// See [`RecallTask::Passkey`].
    Passkey,
    /// See [`RecallTask::Needle`].
    Needle,
    /// See [`RecallTask::Queries`].
    Queries,
    /// See [`RecallTask::Chain`].
    Chain,
}

impl LongTask {
    /// Every task.
    pub const ALL: [Self; 5] = [Self::Perplexity, Self::Passkey, Self::Needle, Self::Queries, Self::Chain];

    fn recall(self) -> Option<RecallTask> {
        match self {
            Self::Perplexity => None,
            Self::Passkey => Some(RecallTask::Passkey),
            Self::Needle => Some(RecallTask::Needle),
            Self::Queries => Some(RecallTask::Queries),
            Self::Chain => Some(RecallTask::Chain),
        }
    }
}

/// On what to measure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LongConfig {
    /// Lengths of windows and prompts, in tokens.
    pub lengths: Vec<usize>,
    /// Most windows of each length.
    pub windows: usize,
    /// Prompts of each kind, length and depth.
    pub samples: usize,
    /// What to measure.
    pub tasks: Vec<LongTask>,
}

/// The whole measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LongReport {
    /// On what it was measured.
    pub config: LongConfig,
    /// One for each length.
    pub lengths: Vec<LengthReport>,
}

/// What was measured at one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LengthReport {
    /// Tokens of a window or prompt.
    pub length: usize,
    /// Windows read.
    pub windows: usize,
    /// Positions left out of `later` and of agreement.
    pub skip: usize,
    /// The original first.
    pub variants: Vec<LongVariant>,
}

/// One kind of attention at one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LongVariant {
    /// Its name.
    pub name: String,
    /// Keys read exactly, as a share of those the original reads: the mean over tokens and layers, measured on the windows, or
    /// on the prompts where there are none.
    pub keys_share: f64,
    /// Statistics of blocks, sections and chunks read or scored, as a share of the same number.
    pub summaries_share: f64,
    /// Share of the choices of keys, one for each token and KV head, that `max_keys` cut.
    pub capped_share: f64,
    /// Bytes of the cache at the end, as the cache counts them.
    pub cache_bytes: usize,
    /// The same as a share of the original's.
    pub cache_share: f64,
    /// Perplexity, where it was asked for.
    pub perplexity: Option<LongPerplexity>,
    /// Answers, a kind of prompt each.
    pub recall: Vec<RecallScores>,
}

/// Perplexity, and agreement with the original, which itself has none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LongPerplexity {
    /// Over every predicted token.
    pub all: f64,
    /// Over tokens after the first `skip` of each window.
    pub later: f64,
    /// Over the last quarter of each window.
    pub last_quarter: f64,
    /// By position in the window.
    pub by_position: Vec<PositionBucket>,
    /// After the first `skip` tokens.
    pub agreement: Option<Agreement>,
    /// Over the last quarter.
    pub agreement_last_quarter: Option<Agreement>,
}

impl From<&EvaluationReport> for LengthReport {
    /// The same numbers in the form of an evaluation over long texts, which hides nothing in them.
    fn from(report: &EvaluationReport) -> Self {
        let names = std::iter::once("original").chain(report.variants.iter().map(|variant| variant.name.as_str()));
        let variant = |(at, name): (usize, &str)| {
            let found = of_variant(report, at);
            LongVariant {
                name: name.to_owned(),
                keys_share: found.keys_share,
                summaries_share: found.summaries_share,
                capped_share: found.capped_share,
                cache_bytes: found.cache_bytes,
                cache_share: found.cache_bytes as f64 / report.original.cache_bytes as f64,
                perplexity: Some(perplexity(report, at)),
                recall: Vec::new(),
            }
        };
        Self {
            length: report.window,
            windows: report.windows,
            skip: report.skip,
            variants: names.enumerate().map(variant).collect(),
        }
    }
}

/// The lengths to measure where none are named: doubled from 1024 up to what the model was trained for, 8192 or what the
/// text has, whatever comes first.
pub fn default_lengths(decoder: &Decoder, text: usize) -> Vec<usize> {
    let longest = decoder.config().decoder.max_positions.min(LONGEST_DEFAULT);
    let mut lengths = vec![longest.min(SHORTEST_DEFAULT)];
    while let Some(next) = lengths.last().map(|last| last * 2).filter(|next| *next <= longest.min(text)) {
        lengths.push(next);
    }
    lengths
}

/// `attention` and its controls under their names: the original, the conversion, the conversion without its far term, and
/// nothing beyond the neighbourhood. Those that would be the same are left out.
pub fn controls(attention: &BlockAttentionConfig) -> Vec<(&'static str, Option<BlockAttentionConfig>)> {
    let mut all = vec![("original", None), ("converted", Some(attention.clone()))];
    if attention.retrieval == Retrieval::Blocks && attention.far != Far::None {
        all.push(("control: far = none", Some(BlockAttentionConfig { far: Far::None, ..attention.clone() })));
    }
    if attention.retrieval != Retrieval::None {
        all.push(("control: none", Some(attention.without_retrieval())));
    }
    all
}

/// Checks, before anything runs, that a text of `length` tokens can be measured so.
///
/// # Errors
///
/// [`ModelError::Input`] if nothing is asked for or the text is shorter than the longest length, [`ModelError::TooLong`]
/// for a length past the learned positions.
pub fn check_long(decoder: &Decoder, length: usize, config: &LongConfig) -> Result<(), ModelError> {
    let fail = |problem: &str| Err(ModelError::Input(problem.to_owned()));
    if config.lengths.is_empty() || config.tasks.is_empty() {
        return fail("no length or no task is asked for, at least one of each is needed");
    }
    if config.samples == 0 && config.tasks.iter().any(|task| task.recall().is_some()) {
        return fail("0 samples are asked for, at least 1 is needed");
    }
    for &window in &config.lengths {
        check_windows(decoder, length, EvaluateConfig { window, windows: config.windows, skip: 0 })?;
    }
    Ok(())
}

/// Measures `decoder` under `attention` beside its [`controls`], on windows of `tokens` and on prompts that hide numbers in
/// it. Every prompt is read under the attention that answers it. `each` hears how many of how many steps are done.
///
/// # Errors
///
/// As [`check_long`], [`PromptMaker::prompts`] and [`Decoder::hidden`]; the prompts are made before anything runs.
pub fn evaluate_long(
    decoder: &Decoder,
    attention: &BlockAttentionConfig,
    tokenizer: &TextTokenizer,
    tokens: &[u32],
    config: LongConfig,
    mut each: impl FnMut(usize, usize),
) -> Result<LongReport, ModelError> {
    check_long(decoder, tokens.len(), &config)?;
    let mut variants = Vec::new();
    for (name, attention) in controls(attention) {
        let original = attention.is_none();
        let variant = decoder.with_config(|config| config.attention = attention)?;
        // The original is what everything is held against: nothing of it is rounded.
        variants.push((name, if original { variant.with_cache_type(DType::F32) } else { variant }));
    }
    let prompts: Vec<Vec<Vec<Prompt>>> = config
        .lengths
        .iter()
        .map(|&length| make_prompts(tokenizer, tokens, &config, length))
        .collect::<Result<_, _>>()?;
    let windows = |length: usize| (tokens.len() / length).min(config.windows);
    let reads = config.tasks.contains(&LongTask::Perplexity);
    let steps = config.lengths.iter().zip(&prompts);
    let steps =
        steps.map(|(&length, prompts)| usize::from(reads) * windows(length) + prompts.len() * variants.len()).sum();
    let mut done = 0;
    let mut lengths = Vec::with_capacity(config.lengths.len());
    for (&length, prompts) in config.lengths.iter().zip(&prompts) {
        let skip = attention.chunk_size.min(length.saturating_sub(2));
        let measure = EvaluateConfig { window: length, windows: config.windows, skip };
        let mut report = None;
        if reads {
            let others: Vec<(&str, &Decoder)> = variants[1..].iter().map(|(name, model)| (*name, model)).collect();
            report = Some(evaluate(&variants[0].1, &others, tokens, measure, |_, _| {
                done += 1;
                each(done, steps);
            })?);
        }
        let mut found: Vec<LongVariant> = Vec::with_capacity(variants.len());
        for (at, (name, model)) in variants.iter().enumerate() {
            let (mut turns, mut bytes, mut reads) = (Vec::<TurnScores>::new(), 0, Reads::default());
            for sample in prompts {
                let answered = recall(model, sample)?;
                turns.extend(answered.scores);
                bytes = answered.cache_bytes.max(bytes);
                reads += answered.reads;
                done += 1;
                each(done, steps);
            }
            let windows = report.as_ref().map(|report| of_variant(report, at));
            let cache_bytes = windows.map_or(bytes, |windows| windows.cache_bytes);
            let full = found.first().map_or(cache_bytes, |original| original.cache_bytes);
            let of_prompts = [reads.keys_share(), reads.summaries_share(), reads.capped_share()];
            let [keys_share, summaries_share, capped_share] = windows
                .map_or(of_prompts, |windows| [windows.keys_share, windows.summaries_share, windows.capped_share]);
            found.push(LongVariant {
                name: (*name).to_owned(),
                keys_share,
                summaries_share,
                capped_share,
                cache_bytes,
                cache_share: cache_bytes as f64 / full as f64,
                perplexity: report.as_ref().map(|report| perplexity(report, at)),
                recall: config.tasks.iter().filter_map(|task| RecallScores::of(task.recall()?, &turns)).collect(),
            });
        }
        let read = if reads { windows(length) } else { 0 };
        lengths.push(LengthReport { length, windows: read, skip, variants: found });
    }
    Ok(LongReport { config, lengths })
}

/// The prompts of one length, those of a sample together: needles and queries begin alike.
fn make_prompts(
    tokenizer: &TextTokenizer,
    tokens: &[u32],
    config: &LongConfig,
    length: usize,
) -> Result<Vec<Vec<Prompt>>, ModelError> {
    let tasks: Vec<RecallTask> = config.tasks.iter().filter_map(|task| task.recall()).collect();
    if tasks.is_empty() {
        return Ok(Vec::new());
    }
    let maker = PromptMaker::new(tokenizer, tokens)?;
    let of_sample = |sample: usize| {
        let prompts = tasks.iter().map(|&task| maker.prompts(task, length, sample as u64));
        Ok(prompts.collect::<Result<Vec<_>, ModelError>>()?.concat())
    };
    (0..config.samples).map(of_sample).collect()
}

/// What was measured of variant `at`, the original being the first.
fn of_variant(report: &EvaluationReport, at: usize) -> &Perplexity {
    at.checked_sub(1).map_or(&report.original, |at| &report.variants[at].perplexity)
}

/// Perplexity and agreement of variant `at`.
fn perplexity(report: &EvaluationReport, at: usize) -> LongPerplexity {
    let variant = at.checked_sub(1).map(|at| &report.variants[at]);
    let Perplexity { all, later, last_quarter, by_position, .. } = of_variant(report, at);
    LongPerplexity {
        all: *all,
        later: *later,
        last_quarter: *last_quarter,
        by_position: by_position.clone(),
        agreement: variant.map(|variant| variant.agreement.clone()),
        agreement_last_quarter: variant.map(|variant| variant.last_quarter.clone()),
    }
}
