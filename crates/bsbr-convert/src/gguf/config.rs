//! The `config.json` that a GGUF file stands for, built from its metadata key by key.
//!
//! A key that is needed and absent is an error that names it. Where the format itself defines what absence means (as many
//! KV heads as heads, a rotary base of 10000) that is taken.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use super::names::GgufArchitecture;
use crate::ConvertError;

/// Tensors that are no weights but settings.
pub(super) const FREQUENCIES: &str = "rope_freqs.weight";
pub(super) const LONG_FACTORS: &str = "rope_factors_long.weight";
pub(super) const SHORT_FACTORS: &str = "rope_factors_short.weight";

/// Metadata of an architecture that change nothing in what a decoder computes, or repeat what the tensors say.
const HARMLESS: &[&str] = &["vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "expert_used_count"];

/// Metadata that change what a decoder computes, under every architecture that does not read them.
const REFUSED: &[(&str, &str)] = &[
    ("expert_count", "mixtures of experts are not read from GGUF files"),
    ("attention.sliding_window", "this architecture has no windows here"),
    ("attention.scale", "another scale of attention is not supported for this architecture"),
    ("attention.clamp_kqv", "clamped queries, keys and values are not supported"),
    ("attention.max_alibi_bias", "ALiBi is not supported for this architecture"),
    ("logit_scale", "scaled logits are not supported for this architecture"),
    ("embedding_scale", "scaled embeddings are not supported for this architecture"),
    ("residual_scale", "scaled residuals are not supported for this architecture"),
    ("attn_logit_softcapping", "caps on scores are not supported for this architecture"),
    ("final_logit_softcapping", "caps on logits are not supported for this architecture"),
    ("rope.scaling.attn_factor", "it is known under long factors only"),
    ("rope.scaling.yarn_attn_factor", "what it multiplies depends on the program that reads the file"),
    ("rope.scaling.yarn_ext_factor", "only the usual blend of both rotations is supported"),
    ("rope.scaling.yarn_log_multiplier", "only the usual temperature is supported"),
];

/// Numbers of a tensor that is a setting, by its name.
type Factors<'a> = dyn Fn(&str) -> Result<Option<Vec<f64>>, ConvertError> + 'a;

/// A configuration in the making.
pub(super) struct Reading<'a> {
    metadata: &'a Metadata,
    architecture: &'a GgufArchitecture,
    /// Names of the tensors.
    names: BTreeSet<&'a str>,
    /// Numbers of a tensor that is a setting.
    factors: &'a Factors<'a>,
    config: Map<String, Value>,
    used: BTreeSet<String>,
}

/// What the metadata give.
pub(super) struct GgufConfig {
    /// As in `config.json`.
    pub(super) config: Map<String, Value>,
    /// What is worth telling.
    pub(super) notes: Vec<String>,
}

/// Reads the configuration of a file that holds tensors `names`, with `vocab_size` rows in the embedding table.
pub(super) fn read(
    metadata: &Metadata,
    architecture: &GgufArchitecture,
    names: BTreeSet<&str>,
    vocab_size: usize,
    factors: &Factors<'_>,
) -> Result<GgufConfig, ConvertError> {
    let mut reading = Reading { metadata, architecture, names, factors, config: Map::new(), used: BTreeSet::new() };
    reading.set("architectures", json!([architecture.class]));
    reading.set("model_type", json!(architecture.model_type));
    reading.set("vocab_size", json!(vocab_size));
    let tied = !reading.names.contains("output.weight");
    reading.set("tie_word_embeddings", json!(tied));
    reading.special_tokens(vocab_size)?;
    (architecture.read)(&mut reading)?;
    let notes = reading.leftovers()?;
    Ok(GgufConfig { config: reading.config, notes })
}

pub(super) fn llama(reading: &mut Reading<'_>) -> Result<(), ConvertError> {
    let head_dim = reading.decoder("rms_norm_eps", "attention.layer_norm_rms_epsilon")?;
    reading.whole_heads_rotate(head_dim)?;
    reading.rotary(head_dim)?;
    let bias = |part: &str| reading.names.contains(format!("blk.0.{part}.bias").as_str());
    let (attention, mlp) = (bias("attn_q"), bias("ffn_up"));
    reading.set("hidden_act", json!("silu"));
    reading.set("attention_bias", json!(attention));
    reading.set("mlp_bias", json!(mlp));
    Ok(())
}

pub(super) fn qwen(reading: &mut Reading<'_>) -> Result<(), ConvertError> {
    let head_dim = reading.decoder("rms_norm_eps", "attention.layer_norm_rms_epsilon")?;
    reading.whole_heads_rotate(head_dim)?;
    reading.rotary(head_dim)?;
    reading.set("hidden_act", json!("silu"));
    reading.set("use_sliding_window", json!(false));
    Ok(())
}

pub(super) fn phi3(reading: &mut Reading<'_>) -> Result<(), ConvertError> {
    let head_dim = reading.decoder("rms_norm_eps", "attention.layer_norm_rms_epsilon")?;
    let key = reading.key("rope.dimension_count");
    let rotary = reading.metadata.usize(&key)?;
    let part = rotary as f64 / head_dim as f64;
    // As the configuration is read again: the product is cut off, not rounded.
    if rotary > head_dim || (part * head_dim as f64) as usize != rotary {
        return Err(reading.metadata.error(&key, &format!("at most the width of a head, {head_dim}")));
    }
    reading.set("partial_rotary_factor", json!(part));
    reading.copy_usize("original_max_position_embeddings", "rope.scaling.original_context_length")?;
    reading.rotary(head_dim)?;
    let key = reading.key("attention.sliding_window");
    let window = reading.metadata.optional_usize(&key)?.filter(|&window| window > 0);
    reading.set("sliding_window", json!(window));
    reading.set("hidden_act", json!("silu"));
    Ok(())
}

pub(super) fn starcoder2(reading: &mut Reading<'_>) -> Result<(), ConvertError> {
    let head_dim = reading.decoder("norm_epsilon", "attention.layer_norm_epsilon")?;
    reading.whole_heads_rotate(head_dim)?;
    reading.rotary(head_dim)?;
    let bias = reading.names.contains("blk.0.attn_q.bias");
    reading.set("hidden_act", json!("gelu_pytorch_tanh"));
    reading.set("use_bias", json!(bias));
    Ok(())
}

pub(super) fn gemma(reading: &mut Reading<'_>) -> Result<(), ConvertError> {
    let head_dim = reading.decoder("rms_norm_eps", "attention.layer_norm_rms_epsilon")?;
    reading.whole_heads_rotate(head_dim)?;
    reading.rotary(head_dim)?;
    reading.set("hidden_act", json!("gelu_pytorch_tanh"));
    Ok(())
}

pub(super) fn gemma2(reading: &mut Reading<'_>) -> Result<(), ConvertError> {
    gemma(reading)?;
    reading.scalar_of_queries(46)?;
    reading.set("hidden_activation", json!("gelu_pytorch_tanh"));
    reading.copy_f64("attn_logit_softcapping", "attn_logit_softcapping")?;
    reading.copy_f64("final_logit_softcapping", "final_logit_softcapping")?;
    reading.copy_usize("sliding_window", "attention.sliding_window")?;
    Ok(())
}

pub(super) fn gemma3(reading: &mut Reading<'_>) -> Result<(), ConvertError> {
    gemma(reading)?;
    reading.scalar_of_queries(62)?;
    reading.set("hidden_activation", json!("gelu_pytorch_tanh"));
    // Unlike that of layers with a window, the base of the others has no default.
    reading.copy_f64("rope_theta", "rope.freq_base")?;
    let local = reading.key("rope.freq_base_swa");
    let local = reading.metadata.optional_f64(&local)?.unwrap_or(10_000.0);
    reading.set("rope_local_base_freq", json!(local));
    reading.copy_usize("sliding_window", "attention.sliding_window")?;
    let pattern = reading.key("attention.sliding_window_pattern");
    let pattern = reading.metadata.optional_usize(&pattern)?.unwrap_or(6);
    if pattern == 0 {
        return Err(reading.metadata.error("gemma3.attention.sliding_window_pattern", "1 or more"));
    }
    reading.set("sliding_window_pattern", json!(pattern));
    let cap = reading.key("final_logit_softcapping");
    let cap = reading.metadata.optional_f64(&cap)?.filter(|&cap| cap != 0.0);
    reading.set("final_logit_softcapping", json!(cap));
    Ok(())
}

pub(super) fn gpt2(reading: &mut Reading<'_>) -> Result<(), ConvertError> {
    reading.copy_usize("n_embd", "embedding_length")?;
    reading.copy_usize("n_layer", "block_count")?;
    reading.copy_usize("n_head", "attention.head_count")?;
    reading.copy_usize("n_positions", "context_length")?;
    reading.copy_usize("n_inner", "feed_forward_length")?;
    reading.copy_f64("layer_norm_epsilon", "attention.layer_norm_epsilon")?;
    let heads = reading.key("attention.head_count");
    let kv_heads = reading.key("attention.head_count_kv");
    let heads = reading.metadata.usize(&heads)?;
    if reading.metadata.optional_usize(&kv_heads)?.is_some_and(|kv_heads| kv_heads != heads) {
        return Err(reading.metadata.error(&kv_heads, &format!("absent or {heads}, the number of heads")));
    }
    reading.set("activation_function", json!("gelu_new"));
    Ok(())
}

impl Reading<'_> {
    fn set(&mut self, key: &str, value: Value) {
        self.config.insert(key.to_owned(), value);
    }

    /// The full metadata key, remembered as read.
    fn key(&mut self, key: &str) -> String {
        let full = format!("{}.{key}", self.architecture.name);
        self.used.insert(full.clone());
        full
    }

    fn copy_usize(&mut self, to: &str, key: &str) -> Result<usize, ConvertError> {
        let key = self.key(key);
        let value = self.metadata.usize(&key)?;
        self.set(to, json!(value));
        Ok(value)
    }

    fn copy_f64(&mut self, to: &str, key: &str) -> Result<(), ConvertError> {
        let key = self.key(key);
        let value = self.metadata.f64(&key)?;
        self.set(to, json!(value));
        Ok(())
    }

    /// The sizes that all architectures after Llama share; returns the width of a head.
    fn decoder(&mut self, eps: &str, eps_key: &str) -> Result<usize, ConvertError> {
        let hidden = self.copy_usize("hidden_size", "embedding_length")?;
        self.copy_usize("num_hidden_layers", "block_count")?;
        self.copy_usize("intermediate_size", "feed_forward_length")?;
        self.copy_usize("max_position_embeddings", "context_length")?;
        self.copy_f64(eps, eps_key)?;
        let heads = self.copy_usize("num_attention_heads", "attention.head_count")?;
        let key = self.key("attention.head_count_kv");
        let kv_heads = self.metadata.optional_usize(&key)?.unwrap_or(heads);
        self.set("num_key_value_heads", json!(kv_heads));
        let (keys, values) = (self.key("attention.key_length"), self.key("attention.value_length"));
        let head_dim = match self.metadata.optional_usize(&keys)? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let key = format!("{}.attention.head_count", self.architecture.name);
                return Err(self.metadata.error(&key, &format!("a divisor of the hidden size {hidden}")));
            }
        };
        if head_dim == 0 || head_dim % 2 == 1 {
            return Err(self.metadata.error(&keys, "an even number, 2 or more"));
        }
        if self.metadata.optional_usize(&values)?.is_some_and(|values| values != head_dim) {
            return Err(self.metadata.error(&values, &format!("{head_dim} like the keys")));
        }
        self.set("head_dim", json!(head_dim));
        Ok(head_dim)
    }

    /// What the scores of Gemma are divided by the root of. No metadata say it: the format defines it as the width of a
    /// head, and for the largest model, known by its number of layers, as the share of a head in the hidden size.
    fn scalar_of_queries(&mut self, layers_of_the_largest: usize) -> Result<(), ConvertError> {
        let size = |key: &str| self.config.get(key).and_then(Value::as_u64).unwrap_or_default();
        let (hidden, heads) = (size("hidden_size"), size("num_attention_heads"));
        let largest = size("num_hidden_layers") == layers_of_the_largest as u64;
        // A whole number: transformers opens no other.
        let scalar = if largest && heads > 0 { hidden / heads } else { size("head_dim") };
        self.set("query_pre_attn_scalar", json!(scalar));
        Ok(())
    }

    fn whole_heads_rotate(&mut self, head_dim: usize) -> Result<(), ConvertError> {
        let key = self.key("rope.dimension_count");
        match self.metadata.optional_usize(&key)? {
            Some(rotary) if rotary != head_dim => {
                Err(self.metadata.error(&key, &format!("{head_dim}, the width of a head, or absent")))
            }
            _ => Ok(()),
        }
    }

    fn rotary(&mut self, head_dim: usize) -> Result<(), ConvertError> {
        let key = self.key("rope.freq_base");
        let theta = self.metadata.optional_f64(&key)?.unwrap_or(10_000.0);
        self.set("rope_theta", json!(theta));
        let scaling = self.scaling(head_dim)?;
        self.set("rope_scaling", scaling);
        Ok(())
    }

    fn scaling(&mut self, head_dim: usize) -> Result<Value, ConvertError> {
        let (kind, factor) = (self.key("rope.scaling.type"), self.key("rope.scaling.factor"));
        let old = self.key("rope.scale_linear");
        let factors = |name: &str| -> Result<Option<Vec<f64>>, ConvertError> {
            match (self.factors)(name)? {
                Some(numbers)
                    if numbers.len() > head_dim / 2 || numbers.iter().any(|&n| !n.is_finite() || n <= 0.0) =>
                {
                    let problem = format!("at most {} positive numbers", head_dim / 2);
                    Err(ConvertError::ConfigKey {
                        path: self.metadata.path().to_owned(),
                        key: name.to_owned(),
                        expected: problem,
                        found: format!("{} numbers", numbers.len()),
                    })
                }
                other => Ok(other),
            }
        };
        let (shared, long, short) = (factors(FREQUENCIES)?, factors(LONG_FACTORS)?, factors(SHORT_FACTORS)?);
        let stated = self.metadata.optional_str(&kind)?.unwrap_or("none");
        match (stated, shared, long, short) {
            // One divisor for each frequency, as the scaling of Llama 3 comes out: what longrope does with equal lists.
            ("none", Some(shared), None, None) => Ok(json!({
                "rope_type": "longrope", "short_factor": shared, "long_factor": shared, "attention_factor": 1.0,
                "original_max_position_embeddings": self.config.get("max_position_embeddings"),
            })),
            ("none" | "longrope", None, Some(long), Some(short)) => {
                let trained = self.key("rope.scaling.original_context_length");
                let attention = self.key("rope.scaling.attn_factor");
                Ok(json!({
                    "rope_type": "longrope", "short_factor": short, "long_factor": long,
                    "attention_factor": self.metadata.f64(&attention)?,
                    "original_max_position_embeddings": self.metadata.usize(&trained)?,
                }))
            }
            ("none", None, None, None) => match self.metadata.optional_f64(&old)?.filter(|&factor| factor != 1.0) {
                None => Ok(Value::Null),
                Some(factor) => Ok(json!({"rope_type": "linear", "factor": factor})),
            },
            ("linear", None, None, None) => Ok(json!({"rope_type": "linear", "factor": self.metadata.f64(&factor)?})),
            ("yarn", None, None, None) => {
                let trained = self.key("rope.scaling.original_context_length");
                let (fast, slow) = (self.key("rope.scaling.yarn_beta_fast"), self.key("rope.scaling.yarn_beta_slow"));
                Ok(json!({
                    "rope_type": "yarn", "factor": self.metadata.f64(&factor)?,
                    "original_max_position_embeddings": self.metadata.usize(&trained)?,
                    "beta_fast": self.metadata.optional_f64(&fast)?, "beta_slow": self.metadata.optional_f64(&slow)?,
                }))
            }
            ("none" | "linear" | "yarn" | "longrope", ..) => {
                let why = "it does not go together with the factors of the tensors `rope_freqs` and `rope_factors_*`";
                Err(self.metadata.rejected(&kind, why))
            }
            _ => Err(self.metadata.error(&kind, "one of none, linear, yarn, longrope")),
        }
    }

    /// Tokens that begin, end and pad a text. One outside the vocabulary would never be met.
    fn special_tokens(&mut self, vocab_size: usize) -> Result<(), ConvertError> {
        let known = |key: &str| {
            let key = format!("tokenizer.ggml.{key}");
            Ok::<_, ConvertError>(self.metadata.optional_usize(&key)?.filter(|&token| token < vocab_size))
        };
        let begin = known("bos_token_id")?;
        let ends = [known("eos_token_id")?, known("eot_token_id")?, known("eom_token_id")?];
        let mut ends: Vec<usize> = ends.into_iter().flatten().collect();
        ends.sort_unstable();
        ends.dedup();
        // Left out, some classes of transformers have one outside small vocabularies, which they refuse.
        let padding = known("padding_token_id")?;
        self.set("pad_token_id", json!(padding));
        self.set("bos_token_id", json!(begin));
        self.set("eos_token_id", if let [end] = ends[..] { json!(end) } else { json!(ends) });
        Ok(())
    }

    /// What nothing read: an error where it changes what is computed, a note otherwise.
    fn leftovers(&self) -> Result<Vec<String>, ConvertError> {
        let prefix = format!("{}.", self.architecture.name);
        let mut unknown = Vec::new();
        for key in self.metadata.keys().filter(|key| key.starts_with(&prefix) && !self.used.contains(*key)) {
            let name = &key[prefix.len()..];
            if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
                if self.metadata.optional_f64(key)? != Some(0.0) {
                    return Err(self.metadata.rejected(key, why));
                }
            } else if name == "attention.causal" {
                if self.metadata.optional_bool(key)? == Some(false) {
                    return Err(self.metadata.rejected(key, "a decoder reads backwards only"));
                }
            } else if !HARMLESS.contains(&name) {
                unknown.push(format!("`{key}`"));
            }
        }
        Ok(if unknown.is_empty() {
            Vec::new()
        } else {
            vec![format!("metadata that nothing here reads: {}", unknown.join(", "))]
        })
    }
}
