#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! Hugging Face checkpoints to BSBR models and back.
//!
//! The crate owns checkpoint files, the rules by which the tensors of an architecture become the weights of the
//! decoder, converting, exporting, and reading weights for running. It never holds a second model in memory (nor a
//! first: one tensor at a time), never guesses (a tensor is used exactly once, ignored by a rule that names it, or
//! everything stops with a list of all problems), and never computes with weights it converts, so that an export
//! gives the original files back bit for bit. It knows no tensor framework beyond what `bsbr-model` asks of a source
//! of weights.
//!
//! Checkpoints are read from safetensors, or else from PyTorch's own files (zip archives and the legacy format, in one
//! piece or in several), and always written as safetensors: the export of a PyTorch checkpoint has the same tensors bit
//! for bit, in other files. Of a safetensors file the bytes needed are mapped; of a PyTorch file one tensor at a time is
//! read whole, and twice that while one with strides is put in order. [`ConvertOptions::weights`] asks for another number
//! format; a cast that changed any number is recorded, and such a model is not exported: its original bits are gone.
//!
//! A GGUF file is taken wherever a checkpoint is: it is read as the Hugging Face checkpoint it was made of.
//!
//! - [`plan_checkpoint`] says what would become what, from headers alone;
//! - [`convert()`] writes a converted model directory, [`export()`] and [`export_gguf()`] undo it, [`estimate()`] says how large it would be;
//! - [`write_calibrated`] gives a converted model other numbers in the weights BSBR added;
//! - [`ModelSource`] reads weights for running, from either kind of directory;
//! - [`hub`] finds a model by its name;
//! - [`rules`] is the language of the tables in [`ARCHITECTURES`].
//!
//! Planning a tiny checkpoint:
//!
//! ```
//! use std::collections::BTreeMap;
//! use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
//!
//! let dir = tempfile::tempdir()?;
//! let config = r#"{"model_type": "llama", "vocab_size": 6, "hidden_size": 4, "num_hidden_layers": 1,
//!     "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8, "tie_word_embeddings": true}"#;
//! std::fs::write(dir.path().join("config.json"), config)?;
//!
//! let data = vec![0; 4 * 4 * 8];
//! let mut tensors = BTreeMap::new();
//! for (name, shape) in [
//!     ("model.embed_tokens.weight", vec![6, 4]),
//!     ("model.layers.0.input_layernorm.weight", vec![4]),
//!     ("model.layers.0.self_attn.q_proj.weight", vec![4, 4]),
//!     ("model.layers.0.self_attn.k_proj.weight", vec![2, 4]),
//!     ("model.layers.0.self_attn.v_proj.weight", vec![2, 4]),
//!     ("model.layers.0.self_attn.o_proj.weight", vec![4, 4]),
//!     ("model.layers.0.post_attention_layernorm.weight", vec![4]),
//!     ("model.layers.0.mlp.gate_proj.weight", vec![8, 4]),
//!     ("model.layers.0.mlp.up_proj.weight", vec![8, 4]),
//!     ("model.layers.0.mlp.down_proj.weight", vec![4, 8]),
//!     ("model.norm.weight", vec![4]),
//! ] {
//!     let bytes = 4 * shape.iter().product::<usize>();
//!     tensors.insert(name, TensorView::new(Dtype::F32, shape, &data[..bytes])?);
//! }
//! serialize_to_file(&tensors, None, &dir.path().join("model.safetensors"))?;
//!
//! let planned = bsbr_convert::plan_checkpoint(dir.path())?;
//! assert_eq!(planned.plan.steps.len(), 11);
//! println!("{}", planned.plan); // the mapping table
//!
//! // A tensor that is missing, and one that nothing reads: both are reported, by name.
//! let moved = tensors.remove("model.norm.weight").expect("it was put there above");
//! tensors.insert("model.normal.weight", moved);
//! serialize_to_file(&tensors, None, &dir.path().join("model.safetensors"))?;
//! let error = bsbr_convert::plan_checkpoint(dir.path()).unwrap_err().to_string();
//! assert!(error.contains("missing: `model.norm.weight`"));
//! assert!(error.contains("unused: no rule reads `model.normal.weight`"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod arch;
mod calibrated;
mod card;
mod casts;
mod checkpoint;
mod convert;
mod converted;
mod derive;
mod error;
mod estimate;
mod expected;
mod export;
mod files;
mod gguf;
mod hashing;
mod hints;
pub mod hub;
mod importance;
mod json;
mod lint;
#[cfg(feature = "text")]
mod load;
mod memory;
mod ops;
mod output;
mod placeholder;
mod plan;
mod planning;
mod policy;
mod problem;
mod quantised;
mod record;
mod rewrite;
pub mod rules;
mod scaled;
mod source;
mod split;
mod table;
mod tensors;
mod tie;
mod weights;

pub use arch::{ARCHITECTURES, Found, WRAPPERS, architecture, architecture_by_name, find_rules, wrapper_by_name};
pub use calibrated::{Calibrated, RecordedCalibration, write_calibrated};
pub use casts::RecordedCast;
pub use checkpoint::Checkpoint;
pub use convert::{ConversionReport, ConvertOptions, Progress, convert};
pub use error::ConvertError;
pub use estimate::{Estimate, EstimatedTensor, estimate};
pub use expected::ExpectedLogits;
pub use export::{ExportReport, ExportedFile, export, export_gguf, keeps_gguf};
pub use gguf::{GgufKind, GgufProblem, is_gguf};
pub use hashing::sha256_text;
pub use importance::importance;
pub use json::ConfigFile;
pub use lint::lint;
#[cfg(feature = "text")]
pub use load::load;
pub use memory::{MachineMemory, MemoryNeed, fitting_weights};
pub use output::{OutputKind, ScratchDir, discard_unfinished, prepare_output};
pub use placeholder::{Placeholder, check_file, is_lfs_pointer};
pub use plan::{IgnoredTensor, Plan, SourceTensor, Step, TargetTensor};
pub use planning::{PlannedCheckpoint, plan_checkpoint};
pub use policy::WeightsPolicy;
pub use problem::{FormatProblem, PlanProblem, TorchProblem};
pub use record::{ConversionRecord, HubOrigin, IGNORED_PREFIX, RecordedExport, RecordedFile, RecordedTensor};
pub use rewrite::{Rewrite, rewrite};
pub use source::{ModelSource, TensorListing};
pub use split::{CheckpointLinear, FoldReport, SplitPreset, SplitReport, checkpoint_linears, fold, write_split};
pub use tensors::{Dtype, FileFormat, Header, SafetensorsFile, TensorEntry};
pub use tie::HeadForm;
pub use weights::FormatTotal;
