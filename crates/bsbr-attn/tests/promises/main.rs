//! What the attention promises whatever the settings, on random cases: one file per promise.

#[path = "../common/mod.rs"]
mod common;

mod bounded;
mod causal;
mod content;
mod exact;
mod narrow;
mod one_function;
mod padding;
