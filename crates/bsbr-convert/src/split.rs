//! Models whose linear layers are compressed: the layers under the names of the checkpoint, writing such a model, and
//! folding it back.

mod defaults;
mod fold;
mod numbers;
mod paths;
mod write;

pub use defaults::SplitPreset;
pub use fold::{FoldReport, fold};
pub use paths::{CheckpointLinear, checkpoint_linears};
pub use write::{SplitReport, write_split};
