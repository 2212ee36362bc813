//! Placeholder, being written.
mod config;
mod error;
mod weights;
pub use config::{
    Activation, DecoderConfig, ModelConfig, Norm, PositionPolicy, Positions, RotaryScaling,
};
pub use error::ModelError;
pub use weights::{EXTRA_PREFIX, WeightSpec, parameter_counts, weight_specs};
