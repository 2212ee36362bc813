//! What every family promises: it computes its definition, in both forms and in any pieces, looks at nothing ahead, and has
//! the right gradients.
#![cfg(feature = "flex")]

mod causal;
mod common;
mod comparable;
mod definitions;
mod errors;
mod gradients;
mod naive;
mod one_function;
