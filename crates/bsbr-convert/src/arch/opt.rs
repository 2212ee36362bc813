//! OPT: learned positions that begin at row 2 of their table. The 350M form has its norms after attention and MLP, no
//! last norm, and embeddings of another width.

use bsbr_model::{Activation, BlockForm, Norm, Positions};

use super::keys::{self, Sizes};
use super::names::{copy, copy_if};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::Tie;
use crate::rules::When::{Flag, Not};
use crate::rules::{Architecture, Reject, SourceModel, When};

pub(super) const OPT: Architecture = Architecture {
    id: "opt",
    version: 1,
    model_types: &["opt"],
    prefixes: &["model.", ""],
    anchor: "{p}decoder.embed_tokens.weight",
    alternatives: &["enable_bias", "do_layer_norm_before"],
    layouts: &[],
    rejects: &[Reject {
        key: "_remove_final_layer_norm",
        why: "no form of the decoder has norms before its blocks and none before the head",
    }],
    rules: &[
        copy("{p}decoder.embed_tokens.weight", &["embed.weight"]),
        copy("{p}decoder.embed_positions.weight", &["position.weight"]),
        copy_if("{p}decoder.project_in.weight", &["project_in.weight"], Flag("projected")),
        copy_if("{p}decoder.project_out.weight", &["project_out.weight"], Flag("projected")),
        copy("{p}decoder.layers.{i}.self_attn.q_proj.weight", &["layers.{i}.attention.query.weight"]),
        copy_if("{p}decoder.layers.{i}.self_attn.q_proj.bias", &["layers.{i}.attention.query.bias"], BIAS),
        copy("{p}decoder.layers.{i}.self_attn.k_proj.weight", &["layers.{i}.attention.key.weight"]),
        copy_if("{p}decoder.layers.{i}.self_attn.k_proj.bias", &["layers.{i}.attention.key.bias"], BIAS),
        copy("{p}decoder.layers.{i}.self_attn.v_proj.weight", &["layers.{i}.attention.value.weight"]),
        copy_if("{p}decoder.layers.{i}.self_attn.v_proj.bias", &["layers.{i}.attention.value.bias"], BIAS),
        copy("{p}decoder.layers.{i}.self_attn.out_proj.weight", &["layers.{i}.attention.output.weight"]),
        copy_if("{p}decoder.layers.{i}.self_attn.out_proj.bias", &["layers.{i}.attention.output.bias"], BIAS),
        copy("{p}decoder.layers.{i}.fc1.weight", &["layers.{i}.mlp.up.weight"]),
        copy_if("{p}decoder.layers.{i}.fc1.bias", &["layers.{i}.mlp.up.bias"], BIAS),
        copy("{p}decoder.layers.{i}.fc2.weight", &["layers.{i}.mlp.down.weight"]),
        copy_if("{p}decoder.layers.{i}.fc2.bias", &["layers.{i}.mlp.down.bias"], BIAS),
        copy_if("{p}decoder.layers.{i}.self_attn_layer_norm.weight", &["layers.{i}.attention_norm.weight"], BEFORE),
        copy_if("{p}decoder.layers.{i}.self_attn_layer_norm.bias", &["layers.{i}.attention_norm.bias"], BEFORE),
        copy_if("{p}decoder.layers.{i}.self_attn_layer_norm.weight", &["layers.{i}.attention_post_norm.weight"], AFTER),
        copy_if("{p}decoder.layers.{i}.self_attn_layer_norm.bias", &["layers.{i}.attention_post_norm.bias"], AFTER),
        // A norm of each layer, despite its name.
        copy_if("{p}decoder.layers.{i}.final_layer_norm.weight", &["layers.{i}.mlp_norm.weight"], BEFORE),
        copy_if("{p}decoder.layers.{i}.final_layer_norm.bias", &["layers.{i}.mlp_norm.bias"], BEFORE),
        copy_if("{p}decoder.layers.{i}.final_layer_norm.weight", &["layers.{i}.mlp_post_norm.weight"], AFTER),
        copy_if("{p}decoder.layers.{i}.final_layer_norm.bias", &["layers.{i}.mlp_post_norm.bias"], AFTER),
        copy_if("{p}decoder.final_layer_norm.weight", &["final_norm.weight"], BEFORE),
        copy_if("{p}decoder.final_layer_norm.bias", &["final_norm.bias"], BEFORE),
        Tie { head: "lm_head.weight", embed: "{p}decoder.embed_tokens.weight", target: "head.weight" },
    ],
    read_config,
};

const BIAS: When = Flag("enable_bias");
const BEFORE: When = Flag("do_layer_norm_before");
const AFTER: When = Not("do_layer_norm_before");

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let hidden_size = config.usize("hidden_size")?;
    let (layers, heads) = (config.usize("num_hidden_layers")?, config.usize("num_attention_heads")?);
    let max_positions = config.usize("max_position_embeddings")?;
    let mut sizes = Sizes::plain(config, hidden_size, layers, ("num_attention_heads", heads), max_positions)?;
    sizes.intermediate_size = config.usize("ffn_dim")?;
    if !config.bool_or("layer_norm_elementwise_affine", true)? {
        let why = "there is no rule for norms without weights";
        return Err(keys::rejected(config, "layer_norm_elementwise_affine", why));
    }
    let activation = keys::activation(config, "activation_function", Activation::Relu)?;
    let mut model = keys::decoder(config, sizes, (Norm::Layer, 1e-5), Positions::Learned, activation, true)?;
    let bias = config.bool_or("enable_bias", true)?;
    let before = config.bool_or("do_layer_norm_before", true)?;
    let width = config.optional_usize("word_embed_proj_dim")?.filter(|&width| width != hidden_size);
    let decoder = &mut model.decoder;
    (decoder.qkv_bias, decoder.attention_output_bias, decoder.mlp_bias) = (bias, bias, bias);
    decoder.embedding.position_offset = 2;
    decoder.embedding.width = width;
    if !before {
        decoder.block.form = BlockForm::NormAfter;
    }
    model.flags.extend([("enable_bias", bias), ("do_layer_norm_before", before), ("projected", width.is_some())]);
    Ok(model)
}
