//! Everything of a decoder block but attention itself: linear maps, activations, norms, rotations, softmax and
//! what compares its scores.
//!
//! Numbers are f32. Each operation is compiled for AVX-512, for AVX2 and for any other processor, and the best one is
//! chosen at run time. Work is shared among the threads of rayon's pool; [`in_pool`] keeps a sequence of operations
//! there.
//!
//! Linear maps take their input as [`Panels`]: transposed in strips of a few tokens, so that one number of a weight
//! meets many tokens at once. Weights stay as files store them, `[outputs, inputs]` in any [`bsbr_weights::Format`]; a tile of them is
//! widened where many tokens meet it, and nothing where few do. What one map
//! makes is again [`Panels`], which the next can read: an MLP never leaves them.

mod activation;
mod clamped_gate;
mod divergence;
mod heads;
mod level;
mod math;
mod norm;
mod panels;
mod product;
mod scratch;
mod softcap;
mod softmax;
#[cfg(test)]
mod testing;
mod transpose;
mod weights;

pub use activation::{Activation, activate, activate_gated};
pub use clamped_gate::clamp_gated;
pub use divergence::ScoreSums;
pub use heads::{HeadOrder, Rotation, write_heads};
#[cfg(test)]
pub(crate) use level::levels;
pub use norm::{NormKind, RowNorm, normalise};
pub use panels::{Packing, Panels, Rows};
pub use product::{Linear, gated, project, project_joined, project_passing};
pub use softcap::softcap;
pub use softmax::softmax;

pub use crate::team::in_pool;
