#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! Attention families as layers of one small decoder, to compare what they cost and what they remember.
//!
//! Every family has two forms that compute the same: a **parallel** one for whole texts, in chunks and differentiable, for
//! training and prefill ([`SmallDecoder::forward`]), and a **recurrent** one that carries a [`State`] from piece to
//! piece or token to token ([`SmallDecoder::step`]). Around them the decoder is the same: embedding, `x + mixer(norm(x))` and
//! `x + mlp(norm(x))` in each layer, norm, head. [`DecoderConfig`] says how weights are kept as many.
//!
//! # Families
//!
//! | family | a token reads | parallel | state of a layer, numbers for each text |
//! |---|---|---|---|
//! | `standard` | all tokens, softmax | fused kernel | `2 width` for each token |
//! | `bsbr` | near tokens, sinks and retrieved blocks exactly, means of the others, one softmax | fused kernel | `2 width` for each token, and block means |
//! | `linear` | a matrix of sums, `elu + 1` features, normalised | chunks, running sums | `width (head_dim + 1)` |
//! | `delta` | a matrix corrected by the delta rule | chunks, a triangular inverse in each | `width head_dim` |
//! | `window` | the last `window` and the first `sinks` tokens, softmax | chunks of `window` | `2 width (window - 1 + sinks)` |
//! | `hopfield` | all tokens, softmax, after moving the query towards the keys | fused kernel, once a step | `2 width` for each token |
//! | `gau` | its chunk by squared ReLU, earlier chunks by a matrix of sums | chunks, running sums | `shared_width gau_width`, and a chunk |
//!
//! [`Family::source`] names the paper of each; the formulas stand at the head of each mixer's file.
//!
//! # Causality
//!
//! No output depends on a later token, bit for bit: a masked score is multiplied by zero or has a weight of exactly zero,
//! and every sum over chunks starts from the first. Of the Python original's layers, by their code, that of BSBR read ahead;
//! those of the same names as the other families did not, but computed something else:
//!
//! | family | in the original | here |
//! |---|---|---|
//! | `bsbr` | reads later tokens of its chunk and later chunks, not earlier ones | reads itself and earlier tokens |
//! | `linear` | causal; no features, no normaliser, a number in the place of each outer product | the published formula |
//! | `delta` | causal; constant rate, clipped, noise added to a state that is passed on | the published rule, learned rates |
//! | `window` | causal; all `tokens x tokens` scores, no state | `tokens x (2 window + sinks)` scores, sinks, a state |
//! | `hopfield` | causal; one step at a constant temperature, which is `standard`; the state it returns sums over all tokens and is never read | more steps, each over the token's own past; learned temperatures |
//! | `gau` | causal; softmax within the chunk, all pairs of chunks, no state | squared ReLU, running sums, a state |
//!
//! Texts end at 5,000 tokens there, where its table of positions ends.
//!
//! # What it never does
//!
//! It knows no tokenizer and loads no converted model; that is `bsbr-model`. The decoder knows no task, no loss and no
//! optimiser: [`tasks`] makes sequences and [`train`] learns from them. The only file is that of finished runs,
//! [`train::RunStore`].
//!
//! # Example
//!
//! ```
//! use bsbr_zoo::{DecoderConfig, Family, SmallDecoder};
//! use burn::tensor::{Device, Int, Tensor};
//!
//! # #[cfg(feature = "flex")] {
//! let device = Device::flex(); // `Device::flex().autodiff()` to train
//! let config = DecoderConfig { family: Family::Delta, vocabulary: 100, ..Default::default() };
//! let decoder = SmallDecoder::new(&config, 1, &device).unwrap();
//!
//! let text = Tensor::<2, Int>::from_data([[3, 1, 4, 1, 5, 9, 2, 6]], &device);
//! let logits = decoder.forward(text.clone()).unwrap();
//! assert_eq!(logits.dims(), [1, 8, 100]);
//!
//! let mut state = decoder.start(1).unwrap();
//! decoder.step(text.clone().narrow(1, 0, 7), &mut state).unwrap();
//! let last = decoder.step(text.narrow(1, 7, 1), &mut state).unwrap();
//! let difference: f32 = (logits.narrow(1, 7, 1) - last).abs().max().into_scalar();
//! assert!(difference < 1e-4);
//! # }
//! ```

mod config;
mod decoder;
mod error;
mod family;
mod heads;
mod init;
mod layer;
mod mixers;
mod original;
mod reads;
mod rows;
mod state;
pub mod tasks;
pub mod train;

pub use config::{DecoderConfig, Positions};
pub use decoder::SmallDecoder;
pub use error::ZooError;
pub use family::Family;
pub use original::{Original, original};
pub use reads::keys_read;
pub use state::State;
