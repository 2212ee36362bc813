#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! The loops of a decoder on the CPU: attention and everything else of a layer, over slices of f32; keys and values may be
//! [stored](Stored) in f16 or bf16.
//!
//! - [`attention`] reads keys and values: all of them, or those near a token and those it retrieves; forward and backward.
//! - [`index`] is what it finds keys by: every key in 8 bits.
//! - [`layer`] is the rest: linear maps, norms, activations, rotary embedding.
//!
//! Every loop is written once for any width of vector registers; AVX-512, AVX2 or plain scalar code is chosen at run time.
//! Scores exist for one tile of queries at a time. Work is shared among rayon's threads.
//!
//! This crate knows no tensor framework, no model and no file. Its functions check shapes by assertions: whoever calls them
//! has checked what comes from outside.
//!
//! # Example
//!
//! ```
//! use bsbr_kernels::{
//!     Heads,
//!     attention::{CausalOptions, causal_attention},
//! };
//!
//! let (heads, tokens, head_dim) = (2, 5, 4);
//! let rows: Vec<f32> = (0..heads * tokens * head_dim).map(|i| (i as f32).sin()).collect();
//! let rows = Heads::contiguous(&rows, [1, heads, tokens, head_dim]);
//! let options = CausalOptions { scale: 0.5, softcap: None, window: None, slopes: None, sink_logits: None };
//! let (output, _) = causal_attention(rows, rows, rows, &options);
//! // The first token of a head reads itself alone.
//! let error = output[..4].iter().zip([0.0_f32, 1.0, 2.0, 3.0]).map(|(o, x)| (o - x.sin()).abs()).fold(0.0, f32::max);
//! assert!(error < 1e-6);
//! ```

mod gather;
mod heads;
mod level;
mod prefetch;
mod product;
mod stored;
mod team;
mod vector;

pub mod attention;
pub mod index;
pub mod layer;

pub use heads::Heads;
pub use level::{Level, limit_level};
pub use stored::Stored;
