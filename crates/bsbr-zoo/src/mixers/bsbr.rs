//! BSBR attention: exact softmax attention near a token, retrieval of whole blocks further back, all in one softmax; the
//! formulas are those of [`bsbr_attn`].
//!
//! Parallel through [`bsbr_attn::attend`], recurrent through [`bsbr_attn::AttentionCache`], as in a converted model. The layer is
//! the one of [`standard`](super::standard) with settings.
//!
//! Beside the Python original: that read later tokens of its own chunk and later chunks, nothing earlier, and mixed states by
//! the last token of the reading chunk. Here a token is told what to read by itself or by anything earlier, and only blocks
//! that end before its local region can be retrieved.

use super::standard::Softmax;
use crate::{DecoderConfig, init::Init};

/// The layer with the settings of `config`.
pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Softmax {
    Softmax::new(config, Some(config.bsbr.clone()), name, init)
}
