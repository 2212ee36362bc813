#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! One configurable decoder: the models people use differ in a few switches, and here they are fields of
//! [`DecoderConfig`]. Each layer runs the original full attention or BSBR attention.
//!
//! Batches are packed, not padded: [`Decoder::hidden`] takes the new tokens of each text, whatever their number, and a
//! [`DecoderCache`] keeps what was read. At once, in pieces or token by token is the same function.
//!
//! BSBR runs in every layer that [`ModelConfig::original_layers`] does not name, within what the decoder prescribes for
//! the layer. One whose sliding window lies inside the exact set keeps its window and nothing changes; global layers, beside
//! windowed ones or alone, become BSBR; layers with ALiBi or without positions retrieve by content, the former less the
//! distance. See [`bsbr_attn`] for each.
//!
//! This crate never knows a hub name or a foreign tensor name: weights come through [`WeightSource`] under the names of
//! [`weight_specs`].
//!
//! # Example
//!
//! ```
//! use bsbr_model::{
//!     Activation, Decoder, DecoderConfig, GenerateConfig, ModelConfig, Norm, Positions, Sampler, SamplingConfig,
//!     WeightSource, WeightSpec, generate,
//! };
//!
//! # #[cfg(feature = "flex")] {
//! // A model without training: every weight 0.01.
//! struct Constant;
//! impl WeightSource for Constant {
//!     fn read(&mut self, spec: &WeightSpec) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
//!         Ok(vec![0.01; spec.shape.iter().product()])
//!     }
//! }
//! let decoder = DecoderConfig {
//!     vocab_size: 10, hidden_size: 8, layers: 2, heads: 2, kv_heads: 1, head_dim: 4, intermediate_size: 16,
//!     max_positions: 64, norm: Norm::Rms, norm_eps: 1e-5,
//!     positions: Positions::Rotary { theta: 10000.0, rotary_dim: 4, scaling: None },
//!     activation: Activation::Silu, gated_mlp: true, clamped_gate: None, sink_logits: false, attention_scale: 0.5, scale_by_layer: false, query_temperature: None, layer_shapes: vec![], latent: None, attention_gate: false, recurrent: None, experts: None,
//!     attention_softcap: None, windows: vec![], qkv_bias: false, attention_output_bias: false, mlp_bias: false,
//!     tied_head: true, embedding: Default::default(), block: Default::default(), head: Default::default(),
//!     layer_rotary: vec![],
//! };
//! let device = burn::tensor::Device::flex();
//! let model = Decoder::load(ModelConfig::original(decoder), &mut Constant, &device).unwrap();
//! let mut sampler = Sampler::new(SamplingConfig::default()).unwrap();
//! let settings = GenerateConfig { max_new_tokens: 3, stop_tokens: vec![] };
//! let continuation = generate(&model, &[1, 2, 3], &settings, &mut sampler, |_| true).unwrap();
//! assert_eq!(continuation.tokens.len(), 3);
//! # }
//! ```

mod attention_map;
mod blocks;
mod cache;
mod calibrate_far;
mod calibrate_index;
mod calibrate_meta;
mod calibrate_state;
mod config;
mod decoder;
mod embedding;
mod error;
mod evaluate;
mod generate;
mod latent;
mod layer_attention;
mod loading;
mod modules;
mod ops;
mod projection;
mod reads;
mod recurrent;
mod rotary;
mod sampling;
mod slide;
mod split;
mod stored;
#[cfg(feature = "text")]
mod text;
mod tune;
mod weights;

pub use attention_map::{AttentionMap, AttentionMapConfig, HeadMap, LayerMap, PartShare, SHARE, attention_map};
/// What codes of weights are multiplied in.
pub use bsbr_weights::Arithmetic;
/// Where tensors are and who computes with them.
pub use burn::tensor::Device;
pub use cache::DecoderCache;
pub use calibrate_far::{FarCalibration, FarLayer, calibrate_far, has_far_shift};
pub use calibrate_index::{
    IndexCalibration, IndexCalibrationConfig, IndexSettings, IndexTrial, calibrate_index, has_index,
};
pub use calibrate_meta::{MetaCalibration, MetaCalibrationConfig, MetaLayer, calibrate_meta};
pub use calibrate_state::{StateCalibration, StateCalibrationConfig, StateLayer, calibrate_states};
pub use config::{
    Activation, AdapterConfig, AdapterTarget, BlockConfig, BlockForm, ClampedGate, DecoderConfig, EmbeddingConfig,
    ExpertGroups, ExpertsConfig, GatedDelta, HeadConfig, HeadNorm, LatentAttention, LayerKeys, LayerRotary, LayerShape,
    ModelConfig, Norm, PerLayerInputs, PositionPolicy, Positions, QueryTemperature, RotaryScaling, RouterConfig,
    RouterKind, SharedExpert,
};
pub use decoder::Decoder;
pub use error::ModelError;
pub use evaluate::{
    Agreement, EvaluateConfig, EvaluationReport, LogitDifference, Perplexity, PositionBucket, VariantReport,
    check_windows, compare_logits, evaluate,
};
#[cfg(feature = "text")]
pub use evaluate::{
    DEPTHS, DepthScores, LengthReport, LongConfig, LongPerplexity, LongReport, LongTask, LongVariant, Prompt,
    PromptMaker, Recall, RecallScores, RecallTask, Turn, TurnScores, check_long, controls, default_lengths,
    evaluate_long, recall,
};
pub use generate::{GenerateConfig, Generation, PREFILL_PIECE, Step, generate, generate_behind, next_piece, prefill};
pub use latent::{LatentPart, LatentProjections};
pub use layer_attention::LayerTrace;
pub use loading::WeightSource;
pub use modules::{
    Adapter, Adapters, BesideMlp, Block, BlockMlp, EachHeadNorm, HeadNormalisation, LayerInputs, LayerNormalisation,
    Mixture, Mlp, Normalisation, PerLayerInput, Projections, Xielu,
};
pub use projection::{BlockInput, LinearPlace, LinearRole, MlpPart, Projection};
pub use reads::Reads;
pub use recurrent::DeltaRule;
pub use rotary::rotary_frequencies;
pub use sampling::{Sampler, SamplingConfig};
pub use stored::{StoredLinear, StoredTable, Table};
#[cfg(feature = "text")]
pub use text::{ChatTemplate, Message, StopTexts, TextStream, TextTokenizer, strftime};
pub use tune::{
    Checkpoint, Ending, HeldOutRecord, LayerLoss, NamedNumbers, Stage, StepRecord, TuneConfig, TuneEvent, TuneLog,
    Tuned, tune,
};
pub use weights::{EXTRA_PREFIX, WeightSpec, active_parameters, parameter_counts, weight_specs};
