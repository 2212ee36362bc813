#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! The attention of BSBR: exact softmax attention near a token, retrieval of the keys that matter further back.
//!
//! For each token, everything goes through **one softmax**: its own chunk and the chunks just before it, the first
//! tokens of the text (sinks), the keys it retrieves through an [`index`] in 8 bits, and optionally one column for the rest of each
//! block, weighted by an estimate of its mass. Where nothing lies beyond the exact part the far code
//! does not run at all, and a short text takes the same operations as full attention.
//!
//! Everything exists in plain tensor operations: differentiable, on every burn device, and the reference that fused kernels
//! are held to. On the CPU (`flex`) full attention, `blocks` chosen by an index, and `none` run in the fused loops of
//! `bsbr-kernels` instead, with the same meaning and with a backward pass that keeps no scores; [`Kernel`] chooses. A cache can
//! keep keys and values in f16 or bf16 ([`CacheConfig::stored`]); arithmetic and everything else it keeps stay f32. The
//! scores of full attention exist for one tile of queries at a time; no kind ever builds a tensor of tokens by tokens.
//!
//! This crate never reads files and knows no model: it gets queries, keys and values that are already projected and
//! rotated.
//!
//! # Example
//!
//! ```
//! use bsbr_attn::{AttentionOptions, BlockAttentionConfig, attend};
//! use burn::tensor::{Device, Distribution, Tensor};
//!
//! # #[cfg(feature = "flex")] {
//! let device = Device::flex();
//! let random = |heads| Tensor::<4>::random([1, heads, 600, 16], Distribution::Default, &device);
//! let (query, keys, values) = (random(4), random(2), random(2)); // 4 query heads on 2 KV heads
//!
//! let settings = BlockAttentionConfig { chunk_size: 64, ..Default::default() };
//! let options = AttentionOptions::new(16);
//! let output = attend(query, keys, values, None, Some(&settings), options).unwrap();
//! assert_eq!(output.dims(), [1, 4, 600, 16]);
//! # }
//! ```
//!
//! # What a model prescribes
//!
//! [`AttentionOptions`] hold within BSBR as they do within full attention:
//!
//! - **Windows.** A key outside the window is never read. A window that lies inside the local region of every token, up to
//!   `local_chunks * chunk_size + 1` tokens, leaves nothing to retrieve: such a layer keeps the attention it had. With a
//!   longer one, keys inside the window are retrieved; where the window cuts a section of 64 tokens (with the `meta` selector a
//!   block), only keys inside it are read and its statistics are not used.
//! - **ALiBi.** A key is chosen by what it holds, less the distance to the middle of its block; read exactly it loses what its
//!   true distance costs.
//! - **No positions.** Keys that carry none are chosen by content alone: the order of what is far does not matter.
//! - **Softcaps** apply to the scores of keys and of blocks alike.
//! - **Sinks.** A [logit of each head](AttentionOptions::sink_logits) takes part in the one softmax of a token once, whatever the token
//!   reads, and in the sum that probabilities of keys are estimated by: what a sink takes makes fewer keys count. (The first tokens of
//!   a text, which are always read, are called sinks too.)
//!
//! # Constant memory
//!
//! Under `retrieval = state` with `kept_tokens` and `max_chunks` a cache stops growing. At every chunk border the last
//! queries of the chunk before tell which tokens behind the local region keep their own keys and values, per KV head; the
//! others are summarised in statistics, neighbours of which merge. A token that is not kept is gone as itself: what no one
//! asked for in time is not found later.
//!
//! # Past the trained length
//!
//! With [`AttentionCache::with_far_positions`] a token past a trained length reads the local region at its true rotary
//! positions and everything before it at positions within that length; see [`FarPositions`]. Up to the trained length nothing
//! changes, and then the cache turns its keys, once for each further stage: positions depend on the token alone.
//!
//! # What was read
//!
//! [`AttentionCache::retrieved`] counts; a cache that is [`watching`](AttentionCache::watching) writes down which keys single tokens
//! read, which runs of tokens counted through statistics, and the probability of each. [`full_reads`] says the same of full attention.
//!
//! # Causality
//!
//! A token is told what to read by its own query, by the first token of its chunk, or by anything earlier; only blocks
//! that end before its local region can be retrieved. So no output depends on a later token, and any way of cutting a
//! text into pieces gives the same function. [`AttentionCache`] is that function; [`attend`] computes it of a whole text, on the
//! CPU without keeping a cache.

mod attend;
mod buffer;
mod cache;
mod compress;
mod config;
mod error;
mod far_positions;
mod full;
#[cfg(feature = "flex")]
mod fused;
pub mod index;
mod kept;
mod kernel;
mod module;
mod options;
mod padding;
mod plain;
mod reads;
mod replaced;
mod seen;
mod shares;
mod statistics;
mod tile;

pub use attend::attend;
pub use cache::{AttentionCache, CacheConfig, Meta};
pub use config::{BlockAttentionConfig, Far, Retrieval, Selector};
pub use error::AttentionError;
pub use far_positions::FarPositions;
pub use index::Retrieved;
pub use kernel::Kernel;
pub use module::{BlockAttention, BlockAttentionLayer};
pub use options::AttentionOptions;
pub use padding::{Padding, attend_padded};
pub use reads::KeysRead;
pub use replaced::{REPLACED_SELECTOR, REPLACED_SETTINGS, replaced_setting};
pub use seen::{HeadReads, TokenReads, full_reads};
pub use shares::{ChunkShares, block_shares};
