//! GPT-J: one norm for attention and MLP side by side, rotary positions that pair neighbours, a bias on the head.

use bsbr_model::{Activation, BlockForm, Norm, Positions};

use super::gpt2::{POSITIONS, read_sizes};
use super::keys::{self, Sizes};
use super::names::{ROPE_KEY, ROPE_QUERY, copy, map, table};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::{Ignore, Tie};
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const GPTJ: Architecture = Architecture {
    id: "gptj",
    version: 1,
    model_types: &["gptj"],
    prefixes: &["transformer.", ""],
    anchor: "{p}wte.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[],
    rules: table![EMBED, ATTENTION, REST],
    read_config,
};

pub(super) const EMBED: &[Rule] = &[copy("{p}wte.weight", &["embed.weight"])];

const ATTENTION: &[Rule] = &[
    map("{p}h.{i}.attn.q_proj.weight", &["layers.{i}.attention.query.weight"], &[ROPE_QUERY]),
    map("{p}h.{i}.attn.k_proj.weight", &["layers.{i}.attention.key.weight"], &[ROPE_KEY]),
    copy("{p}h.{i}.attn.v_proj.weight", &["layers.{i}.attention.value.weight"]),
    copy("{p}h.{i}.attn.out_proj.weight", &["layers.{i}.attention.output.weight"]),
];

/// What CodeGen shares: norms, MLP, head, and buffers of old files.
pub(super) const REST: &[Rule] = &[
    copy("{p}h.{i}.ln_1.weight", &["layers.{i}.attention_norm.weight"]),
    copy("{p}h.{i}.ln_1.bias", &["layers.{i}.attention_norm.bias"]),
    copy("{p}h.{i}.mlp.fc_in.weight", &["layers.{i}.mlp.up.weight"]),
    copy("{p}h.{i}.mlp.fc_in.bias", &["layers.{i}.mlp.up.bias"]),
    copy("{p}h.{i}.mlp.fc_out.weight", &["layers.{i}.mlp.down.weight"]),
    copy("{p}h.{i}.mlp.fc_out.bias", &["layers.{i}.mlp.down.bias"]),
    copy("{p}ln_f.weight", &["final_norm.weight"]),
    copy("{p}ln_f.bias", &["final_norm.bias"]),
    Tie { head: "lm_head.weight", embed: "{p}wte.weight", target: "head.weight" },
    copy("lm_head.bias", &["head.bias"]),
    Ignore { name: "{p}h.{i}.attn.bias", why: "the causal mask" },
    Ignore { name: "{p}h.{i}.attn.masked_bias", why: "the score of a masked position" },
    Ignore { name: "{p}h.{i}.attn.embed_positions", why: "sines and cosines, computed anew" },
    Ignore { name: "{p}h.{i}.attn.rotary_emb.inv_freq", why: "rotary frequencies, computed anew" },
];

pub(super) fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let [hidden_size, layers, heads] = read_sizes(config)?;
    let max_positions = keys::optional_usize_of(config, POSITIONS)?.unwrap_or(2048);
    let mut sizes = Sizes::plain(config, hidden_size, layers, ("n_head", heads), max_positions)?;
    sizes.intermediate_size = config.optional_usize("n_inner")?.unwrap_or(sizes.intermediate_size);
    let rotary_dim = match config.optional_usize("rotary_dim")? {
        None if config.contains("rotary_dim") => return Err(config.error("rotary_dim", "a number")),
        rotary_dim => rotary_dim.unwrap_or(64),
    };
    // Neither the base nor a scaling is a setting of this architecture: what a file says about them nothing reads.
    for key in ["rope_scaling", "rope_parameters"] {
        keys::reject_any(config, key, "transformers knows no such setting for this architecture")?;
    }
    if config.optional_f64("rope_theta")?.is_some_and(|theta| theta != 10_000.0) {
        return Err(keys::rejected(config, "rope_theta", "the base of this architecture is 10000 in transformers"));
    }
    let positions = Positions::Rotary { theta: 10_000.0, rotary_dim, scaling: None };
    let norm = (Norm::Layer, config.optional_f64("layer_norm_epsilon")?.unwrap_or(1e-5));
    let activation = keys::activation(config, "activation_function", Activation::GeluTanh)?;
    let mut model = keys::decoder(config, sizes, norm, positions, activation, false)?;
    model.decoder.mlp_bias = true;
    model.decoder.head.bias = true;
    model.decoder.block.form = BlockForm::ParallelSharedNorm;
    Ok(model)
}
