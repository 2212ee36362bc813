//! What a model prescribes for its attention, whatever reads the far part.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::{AttentionError, plain::float_tensor};

/// The model's own attention: factor, softcap, window, linear bias and sinks.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionOptions {
    /// Factor on `q . k`.
    pub scale: f64,
    /// `cap tanh(x / cap)` on scaled scores, before masking.
    pub softcap: Option<f64>,
    /// A token sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
    /// ALiBi: adds `-slope_h (t - i)` to the score of position `i` for the token at `t`, with this factor on the usual
    /// [slopes](AttentionOptions::alibi_slopes). A block read through its statistics counts at the mean position of its
    /// tokens.
    pub alibi: Option<f64>,
    /// One number for each query head: the logit of a column that stands beside the keys in every softmax and whose value is 0,
    /// as it is, whatever factor and softcap scores have. A head that finds nothing to read gives its attention to that. Here
    /// they are constants: gradients go through them, none goes to them.
    pub sink_logits: Option<Arc<[f32]>>,
}

impl AttentionOptions {
    /// The usual `1 / sqrt(head_dim)`, no softcap, no window, no bias, no sinks.
    pub fn new(head_dim: usize) -> Self {
        Self { scale: 1.0 / (head_dim as f64).sqrt(), softcap: None, window: None, alibi: None, sink_logits: None }
    }

    /// Checks every number. How many sinks there are is checked where heads are known.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Config`] with the setting, its value and what it must be.
    pub fn validate(&self) -> Result<(), AttentionError> {
        let fail = |setting: &'static str, value: f64, expected: &str| {
            Err(AttentionError::Config { setting, value: value.to_string(), expected: expected.to_owned() })
        };
        if !self.scale.is_finite() {
            return fail("scale", self.scale, "a finite number");
        }
        if let Some(cap) = self.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return fail("softcap", cap, "a finite number above 0, or unset");
        }
        if let Some(factor) = self.alibi.filter(|factor| !factor.is_finite()) {
            return fail("alibi", factor, "a finite number, or unset");
        }
        if self.window == Some(0) {
            return fail("window", 0.0, "at least 1 (the token itself)");
        }
        if let Some(sink) = self.sink_logits.iter().flat_map(|sinks| sinks.iter()).find(|sink| !sink.is_finite()) {
            return fail("sink_logits", f64::from(*sink), "finite numbers");
        }
        Ok(())
    }

    /// The slope of each of `heads` heads: `2^(-8 h / p)` for `h` from 1 to the largest power of two `p` there is room
    /// for, then the slopes between them that twice as many heads would have.
    pub fn alibi_slopes(heads: usize) -> Vec<f64> {
        let power = heads.checked_ilog2().map_or(0, |log| 1_usize << log);
        let slope = |step: f64| (-8.0 * step / power as f64).exp2();
        let between = (0..heads - power).map(|n| slope(n as f64 + 0.5));
        (1..=power).map(|n| slope(n as f64)).chain(between).collect()
    }

    /// The first position that the token at `position` sees.
    pub(crate) fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// An error unless there is a sink for each of `heads` heads, or none at all.
    pub(crate) fn check_sinks(&self, heads: usize) -> Result<(), AttentionError> {
        match &self.sink_logits {
            Some(sinks) if sinks.len() != heads => Err(AttentionError::Config {
                setting: "sink_logits",
                value: format!("{} numbers", sinks.len()),
                expected: format!("one for each of {heads} heads"),
            }),
            _ => Ok(()),
        }
    }

    /// The column of the sinks beside columns `like`, `[batch, kv_heads, group, tokens, 1]`, of their device and type.
    pub(crate) fn sink_column(&self, like: &Tensor<5>) -> Option<Tensor<5>> {
        let sinks = self.sink_logits.as_ref()?;
        let [batch, kv_heads, group, tokens, _] = like.dims();
        let sinks = float_tensor(sinks.to_vec(), &like.device(), like.dtype()).reshape([1, kv_heads, group, 1, 1]);
        Some(sinks.expand([batch, kv_heads, group, tokens, 1]))
    }

    /// Applies the softcap to scaled scores.
    pub(crate) fn capped<const D: usize>(&self, scores: Tensor<D>) -> Tensor<D> {
        match self.softcap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        }
    }

    /// The ALiBi slope of each head, `[1, kv_heads, group, 1, 1]`, of the device and type of `like`.
    pub(crate) fn slopes(&self, kv_heads: usize, group: usize, like: &Tensor<5>) -> Option<Tensor<5>> {
        let factor = self.alibi?;
        let slopes = Self::alibi_slopes(kv_heads * group).into_iter().map(|slope| (slope * factor) as f32).collect();
        Some(float_tensor(slopes, &like.device(), like.dtype()).reshape([1, kv_heads, group, 1, 1]))
    }
}
