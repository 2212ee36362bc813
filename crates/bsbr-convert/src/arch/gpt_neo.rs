//! GPT-Neo: the names of GPT-2's MLP with linear weights `[out, in]`, scores that are not scaled, a window in every second
//! layer.

use bsbr_model::{Activation, Norm, Positions};
use serde_json::Value;

use super::keys::{self, Sizes};
use super::names::copy;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::{Ignore, Tie};
use crate::rules::{Architecture, SourceModel};

pub(super) const GPT_NEO: Architecture = Architecture {
    id: "gpt_neo",
    version: 1,
    model_types: &["gpt_neo"],
    prefixes: &["transformer.", ""],
    anchor: "{p}wte.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[],
    rules: &[
        copy("{p}wte.weight", &["embed.weight"]),
        copy("{p}wpe.weight", &["position.weight"]),
        copy("{p}h.{i}.ln_1.weight", &["layers.{i}.attention_norm.weight"]),
        copy("{p}h.{i}.ln_1.bias", &["layers.{i}.attention_norm.bias"]),
        copy("{p}h.{i}.attn.attention.q_proj.weight", &["layers.{i}.attention.query.weight"]),
        copy("{p}h.{i}.attn.attention.k_proj.weight", &["layers.{i}.attention.key.weight"]),
        copy("{p}h.{i}.attn.attention.v_proj.weight", &["layers.{i}.attention.value.weight"]),
        copy("{p}h.{i}.attn.attention.out_proj.weight", &["layers.{i}.attention.output.weight"]),
        copy("{p}h.{i}.attn.attention.out_proj.bias", &["layers.{i}.attention.output.bias"]),
        copy("{p}h.{i}.ln_2.weight", &["layers.{i}.mlp_norm.weight"]),
        copy("{p}h.{i}.ln_2.bias", &["layers.{i}.mlp_norm.bias"]),
        copy("{p}h.{i}.mlp.c_fc.weight", &["layers.{i}.mlp.up.weight"]),
        copy("{p}h.{i}.mlp.c_fc.bias", &["layers.{i}.mlp.up.bias"]),
        copy("{p}h.{i}.mlp.c_proj.weight", &["layers.{i}.mlp.down.weight"]),
        copy("{p}h.{i}.mlp.c_proj.bias", &["layers.{i}.mlp.down.bias"]),
        copy("{p}ln_f.weight", &["final_norm.weight"]),
        copy("{p}ln_f.bias", &["final_norm.bias"]),
        Tie { head: "lm_head.weight", embed: "{p}wte.weight", target: "head.weight" },
        Ignore { name: "{p}h.{i}.attn.attention.bias", why: "the causal mask" },
        Ignore { name: "{p}h.{i}.attn.attention.masked_bias", why: "the score of a masked position" },
    ],
    read_config,
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let hidden_size = config.usize("hidden_size")?;
    let heads = keys::usize_of(config, &["num_heads", "num_attention_heads"])?;
    let layers = keys::usize_of(config, &["num_layers", "num_hidden_layers"])?;
    let max_positions = config.usize("max_position_embeddings")?;
    let mut sizes = Sizes::plain(config, hidden_size, layers, ("num_heads", heads), max_positions)?;
    sizes.intermediate_size = config.optional_usize("intermediate_size")?.unwrap_or(sizes.intermediate_size);
    let norm = (Norm::Layer, config.optional_f64("layer_norm_epsilon")?.unwrap_or(1e-5));
    let activation = keys::activation(config, "activation_function", Activation::GeluTanh)?;
    let mut model = keys::decoder(config, sizes, norm, Positions::Learned, activation, true)?;
    let decoder = &mut model.decoder;
    (decoder.attention_output_bias, decoder.mlp_bias) = (true, true);
    decoder.attention_scale = 1.0;
    decoder.windows = windows(config, layers)?;
    Ok(model)
}

/// One kind of attention for each layer, from `attention_layers` or from `attention_types`, `[[[kind, ..], times], ..]`.
fn windows(config: &ConfigFile, layers: usize) -> Result<Vec<Option<usize>>, ConvertError> {
    let wrong = || config.error("attention_types", "a list of kinds and how often they repeat");
    let types = config.get("attention_types").map(|types| repeated(types).ok_or_else(wrong)).transpose()?;
    let (key, kinds) = match (config.optional_str_list("attention_layers")?, types) {
        (Some(kinds), Some(types)) if kinds != types => {
            let shown = |key: &str| config.get(key).map_or_else(String::new, ToString::to_string);
            let (kinds, types) = (shown("attention_layers"), shown("attention_types"));
            return Err(keys::contradiction(config, ("attention_layers", &kinds), ("attention_types", &types)));
        }
        (Some(kinds), _) => ("attention_layers", kinds),
        (None, Some(types)) => ("attention_types", types),
        (None, None) => {
            let kinds = ["global", "local"].map(str::to_owned).into_iter().cycle().take(layers);
            ("attention_types", kinds.collect())
        }
    };
    keys::one_for_each_layer(config, key, kinds.len(), layers)?;
    let window = config.optional_usize("window_size")?.unwrap_or(256);
    let windows: Vec<Option<usize>> = kinds
        .iter()
        .map(|kind| match kind.as_str() {
            "global" => Ok(None),
            "local" => Ok(Some(window)),
            _ => Err(config.error(key, "a list of global and local")),
        })
        .collect::<Result<_, _>>()?;
    Ok(if windows.iter().any(Option::is_some) { windows } else { Vec::new() })
}

fn repeated(types: &Value) -> Option<Vec<String>> {
    let mut all = Vec::new();
    for entry in types.as_array()? {
        let [kinds, times] = entry.as_array()?.as_slice() else { return None };
        let kinds: Vec<String> =
            kinds.as_array()?.iter().map(|kind| kind.as_str().map(str::to_owned)).collect::<Option<_>>()?;
        // More repetitions than any model has layers would only fill the memory.
        let times = times.as_u64()?.min(1 << 16) as usize;
        all.extend(std::iter::repeat_n(&kinds, times).flatten().cloned());
    }
    Some(all)
}
