//! Falcon in its three forms. 7B: one KV head, one norm for attention and MLP side by side. 40B and 180B: grouped KV
//! heads, a norm for each (11B: one for both). RW: ALiBi and a sequential block.

use bsbr_model::{Activation, BlockForm, Norm, Positions};

use super::keys::{self, Sizes};
use super::names::{QKV_BIAS, QKV_PER_HEAD, QKV_WEIGHT, copy, copy_if, map};
use super::rope::{self, RopeKeys};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::{Ignore, Map, Tie};
use crate::rules::When::{All, Flag, Not};
use crate::rules::{Architecture, SourceModel, When};

pub(super) const FALCON: Architecture = Architecture {
    id: "falcon",
    version: 1,
    model_types: &["falcon"],
    prefixes: &["transformer.", ""],
    anchor: "{p}word_embeddings.weight",
    alternatives: &["bias"],
    layouts: &[],
    rejects: &[],
    rules: &[
        copy("{p}word_embeddings.weight", &["embed.weight"]),
        copy_if("{p}h.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"], ONE_NAME),
        copy_if("{p}h.{i}.input_layernorm.bias", &["layers.{i}.attention_norm.bias"], ONE_NAME),
        copy_if("{p}h.{i}.ln_attn.weight", &["layers.{i}.attention_norm.weight"], TWO_NORMS),
        copy_if("{p}h.{i}.ln_attn.bias", &["layers.{i}.attention_norm.bias"], TWO_NORMS),
        // With one KV head, or one for each head, this is the contiguous or the per-head order of these forms.
        map("{p}h.{i}.self_attention.query_key_value.weight", QKV_WEIGHT, &[QKV_PER_HEAD]),
        Map {
            source: "{p}h.{i}.self_attention.query_key_value.bias",
            targets: QKV_BIAS,
            ops: &[QKV_PER_HEAD],
            when: Flag("bias"),
        },
        copy("{p}h.{i}.self_attention.dense.weight", &["layers.{i}.attention.output.weight"]),
        copy_if("{p}h.{i}.self_attention.dense.bias", &["layers.{i}.attention.output.bias"], Flag("bias")),
        copy_if("{p}h.{i}.ln_mlp.weight", &["layers.{i}.mlp_norm.weight"], TWO_NORMS),
        copy_if("{p}h.{i}.ln_mlp.bias", &["layers.{i}.mlp_norm.bias"], TWO_NORMS),
        copy_if("{p}h.{i}.post_attention_layernorm.weight", &["layers.{i}.mlp_norm.weight"], SEQUENTIAL),
        copy_if("{p}h.{i}.post_attention_layernorm.bias", &["layers.{i}.mlp_norm.bias"], SEQUENTIAL),
        copy("{p}h.{i}.mlp.dense_h_to_4h.weight", &["layers.{i}.mlp.up.weight"]),
        copy_if("{p}h.{i}.mlp.dense_h_to_4h.bias", &["layers.{i}.mlp.up.bias"], Flag("bias")),
        copy("{p}h.{i}.mlp.dense_4h_to_h.weight", &["layers.{i}.mlp.down.weight"]),
        copy_if("{p}h.{i}.mlp.dense_4h_to_h.bias", &["layers.{i}.mlp.down.bias"], Flag("bias")),
        copy("{p}ln_f.weight", &["final_norm.weight"]),
        copy("{p}ln_f.bias", &["final_norm.bias"]),
        Tie { head: "lm_head.weight", embed: "{p}word_embeddings.weight", target: "head.weight" },
        // One buffer under the names of several releases.
        Ignore { name: "{p}h.{i}.self_attention.rotary_emb.inv_freq", why: "rotary frequencies, computed anew" },
        Ignore { name: "{p}h.{i}.self_attention.maybe_rotary.inv_freq", why: "rotary frequencies, computed anew" },
        Ignore { name: "{p}h.{i}.self_attention.rotary.inv_freq", why: "rotary frequencies, computed anew" },
    ],
    read_config,
};

const TWO_NORMS: When = Flag("two_norms");
const ONE_NAME: When = Not("two_norms");
const SEQUENTIAL: When = All(&[ONE_NAME, Flag("sequential")]);

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let hidden_size = keys::usize_of(config, &["hidden_size", "n_embed"])?;
    let heads = keys::usize_of(config, &["num_attention_heads", "n_head"])?;
    let head_dim = keys::head_dim(config, "num_attention_heads", hidden_size, heads)?;
    let grouped = config.bool_or("new_decoder_architecture", false)?;
    // Files of the older forms hold a number of KV heads that nothing reads.
    let kv_heads = match (grouped, config.bool_or("multi_query", true)?) {
        (true, _) => config.optional_usize("num_kv_heads")?.unwrap_or(heads),
        (false, true) => 1,
        (false, false) => heads,
    };
    let sizes = Sizes {
        hidden_size,
        layers: keys::usize_of(config, &["num_hidden_layers", "n_layer"])?,
        heads,
        kv_heads,
        head_dim,
        intermediate_size: config.optional_usize("ffn_hidden_size")?.unwrap_or(hidden_size.saturating_mul(4)),
        max_positions: config.optional_usize("max_position_embeddings")?.unwrap_or(2048),
    };
    let positions = if config.bool_or("alibi", false)? {
        // Scores and bias are scaled together here.
        Positions::Alibi { factor: (head_dim as f64).powf(-0.5) }
    } else {
        rope::read(config, &RopeKeys::LLAMA, head_dim, sizes.max_positions)?
    };
    let norm = (Norm::Layer, config.optional_f64("layer_norm_epsilon")?.unwrap_or(1e-5));
    let activation = keys::activation(config, "activation", Activation::GeluErf)?;
    let mut model = keys::decoder(config, sizes, norm, positions, activation, true)?;
    let parallel = config.bool_or("parallel_attn", true)?;
    let two_norms = grouped && config.optional_usize("num_ln_in_parallel_attn")?.unwrap_or(2) == 2;
    if grouped && !parallel && !two_norms {
        return Err(keys::rejected(config, "parallel_attn", "the newer form runs attention and MLP side by side"));
    }
    let bias = config.bool_or("bias", false)?;
    let decoder = &mut model.decoder;
    (decoder.qkv_bias, decoder.attention_output_bias, decoder.mlp_bias) = (bias, bias, bias);
    decoder.block.form = match (two_norms, parallel) {
        (true, _) => BlockForm::Parallel,
        (false, true) => BlockForm::ParallelSharedNorm,
        (false, false) => BlockForm::Sequential,
    };
    let sequential = decoder.block.form == BlockForm::Sequential;
    model.flags.extend([("bias", bias), ("two_norms", two_norms), ("sequential", sequential)]);
    Ok(model)
}
