//! What a change of attention costs: perplexity by position, agreement with the original token by token, and what the model
//! still finds in a long text.

mod divergence;
mod logits;
#[cfg(feature = "text")]
mod long;
#[cfg(feature = "text")]
mod prompts;
#[cfg(feature = "text")]
mod recall;
mod report;
mod rows;
#[cfg(not(feature = "flex"))]
mod score_sums;
mod windows;

pub(crate) use divergence::{Divergence, Reference};
pub use logits::{LogitDifference, compare_logits};
#[cfg(feature = "text")]
pub use long::{
    LengthReport, LongConfig, LongPerplexity, LongReport, LongTask, LongVariant, check_long, controls, default_lengths,
    evaluate_long,
};
#[cfg(feature = "text")]
pub use prompts::{DEPTHS, Prompt, PromptMaker, RecallTask, Turn};
#[cfg(feature = "text")]
pub use recall::{DepthScores, Recall, RecallScores, TurnScores, recall};
pub use report::{Agreement, EvaluateConfig, EvaluationReport, Perplexity, PositionBucket, VariantReport};
pub use windows::{check_windows, evaluate};
