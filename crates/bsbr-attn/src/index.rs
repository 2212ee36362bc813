//! The index by which keys are chosen: how `retrieval = blocks` with `selector = index` decides what a token reads.
//!
//! # Words
//!
//! - **Sinks** are the first tokens of a text: always read exactly, part of no statistic.
//! - A **block** is [`BLOCK`] tokens, a **section** [`SECTION`]; both are counted from the first token of the text. `n_b`, `n_S`
//!   are the numbers of their tokens that are no sinks.
//! - The **index** is what is known of keys in 8 bits: for each block its mean key, and for each key its **residual**, what it has
//!   beyond that mean, in some of the channels. For each section its mean key and its radius, how far its keys lie from the mean.
//! - A token passes every key whose estimated probability is above the **threshold**: it is read exactly. What is not read of a
//!   block is its **far** part, which counts through means.
//!
//! # Founding
//!
//! Once, when the first `W` tokens are in (`W` depends on the settings alone, so that any way of cutting a text gives the same):
//! from their keys `k_i`, block means `mu_b` and queries `q_t`, per KV head,
//!
//! - the centre, the mean of the `mu_b`;
//! - `R_c = sum_i (k_ic - mu_bc)^2` and `Q_c = sum_t q_tc^2` (over every query head of the group): the channels that residuals
//!   are kept of are those of largest `R_c Q_c`, each with a balance `(R_c / Q_c)^(1/4)` that shares the range of the integers
//!   between queries and residuals.
//!
//! # Integers
//!
//! A row `x` becomes integers `rint(x_c 127 / a)` with `a = max_c |x_c|` and the scale `a / 127` (where `127 / a` is no finite
//! number, 0 and 0). So become: block and section means less the centre; residuals divided by the balance, all those of a block
//! together; radii; `q' = scale q`; and `q'` times the balance, in the channels of residuals. All of it is f32 in a fixed order of
//! operations: every path through the text has the same integers.
//!
//! # Scores
//!
//! With `m`, `r` the integers, `cap` the softcap and the dots exact sums of integers:
//!
//! ```text
//! base_b  = q' . centre + qs ms_b (q8 . m_b)                   of a block, or of a section
//! est_i   = base_b + ys rs_b (y8 . r_i)                        of a key
//! bound_S = base_S + 1/2 qs rs_S (|q8| . rho_S)                what a key of a section may reach
//! tot     = log( exp(sink) + sum of exp(score) over what is read exactly anyway + sum n_b exp(cap(base_b)) + sum n_S exp(cap(base_S)) )
//! ```
//!
//! the first term for models whose heads have sinks, the last over blocks nearby and sections further back than `fine_tokens` before the local region. Under ALiBi a block and a
//! section count at the mean position of their tokens, a key by that of its block.
//!
//! # What is read
//!
//! - Of sections further back, those with `cap(bound_S) > tot + ln threshold` for any head of the group are opened, at most
//!   `max_sections` of them: the highest, of equals the later. (Fewer sections than that are not looked at: their blocks count
//!   as nearby.)
//! - Of the keys of blocks nearby and of opened sections, those with `cap(est_i) > tot + ln threshold` for any head of the group,
//!   at most `max_keys`: where more pass, the threshold of the token is doubled until they do not. Every head of the group reads
//!   all of them.
//! - One softmax over what is read exactly anyway, the keys that pass (by their true scores), and with `far = mean` each block
//!   with the weight `(n_b - passed) exp(cap(base_b) + far_shift)` and each section that is not open with
//!   `n_S exp(cap(base_S) + far_shift)`, both with the mean value of the section.
//!
//! A section that the window of a token cuts counts through no statistic; keys of it that the token sees can still pass.
//!
//! # Gradients
//!
//! The choice has none. Means pass theirs straight through the integers: `d base_b / d q'` is the mean as the index has it,
//! `d base_b / d mu_b` the query as the index has it.

mod cap;
mod founding;
mod plain;
mod plan;
mod read;
mod retrieved;
mod scores;
mod statistics;

pub(crate) use plain::PlainIndex;
pub(crate) use plan::Candidates;
pub(crate) use read::read_by_index;
pub use retrieved::Retrieved;
pub(crate) use retrieved::{Chosen, Counter};

/// Tokens of a block.
pub const BLOCK: usize = 16;
/// Tokens of a section.
pub const SECTION: usize = 64;
/// Blocks of a section.
const BLOCKS: usize = SECTION / BLOCK;
/// Largest size of an integer.
const LARGEST: f32 = 127.0;
