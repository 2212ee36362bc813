//! Reading `config.json`: the keys that many architectures share, with the defaults of each.

use std::collections::BTreeMap;

use bsbr_model::{Activation, BlockConfig, DecoderConfig, EmbeddingConfig, HeadConfig, LayerRotary, Norm, Positions};

use super::rope::{self, RopeKeys};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::SourceModel;

/// The sizes that every decoder has.
pub(super) struct Sizes {
    pub(super) hidden_size: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) intermediate_size: usize,
    pub(super) max_positions: usize,
}

impl Sizes {
    /// A KV head for each of `heads` heads, which the hidden size is divided among, and an MLP four times as wide.
    /// `key` is the key of the heads.
    pub(super) fn plain(
        config: &ConfigFile,
        hidden_size: usize,
        layers: usize,
        (key, heads): (&str, usize),
        max_positions: usize,
    ) -> Result<Self, ConvertError> {
        let head_dim = head_dim(config, key, hidden_size, heads)?;
        let intermediate_size = hidden_size.saturating_mul(4);
        Ok(Self { hidden_size, layers, heads, kv_heads: heads, head_dim, intermediate_size, max_positions })
    }
}

/// A sequential decoder without biases, with a plain MLP, the usual attention scale and nothing else.
pub(super) fn decoder(
    config: &ConfigFile,
    sizes: Sizes,
    (norm, norm_eps): (Norm, f64),
    positions: Positions,
    activation: Activation,
    tied: bool,
) -> Result<SourceModel, ConvertError> {
    let Sizes { hidden_size, layers, heads, kv_heads, head_dim, intermediate_size, max_positions } = sizes;
    let declared = config.optional_bool("tie_word_embeddings")?;
    let decoder = DecoderConfig {
        vocab_size: config.usize("vocab_size")?,
        hidden_size,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate_size,
        max_positions,
        norm,
        norm_eps,
        positions,
        activation,
        gated_mlp: false,
        clamped_gate: None,
        attention_scale: (head_dim as f64).powf(-0.5),
        scale_by_layer: false,
        attention_softcap: None,
        windows: Vec::new(),
        sink_logits: false,
        qkv_bias: false,
        attention_output_bias: false,
        mlp_bias: false,
        // transformers leaves the key out where it equals the default of the class.
        tied_head: declared.unwrap_or(tied),
        embedding: EmbeddingConfig::default(),
        block: BlockConfig::default(),
        head: HeadConfig::default(),
        layer_rotary: Vec::new(),
        query_temperature: None,
        layer_shapes: Vec::new(),
        latent: None,
        attention_gate: false,
        recurrent: None,
        experts: None,
    };
    Ok(SourceModel { decoder, flags: BTreeMap::new(), tie_declared: declared, next_token_layers: 0 })
}

/// Where the keys of the models after Llama differ, and the defaults of their classes.
#[derive(Clone, Copy)]
pub(super) struct Defaults {
    pub(super) norm: Norm,
    pub(super) eps: (&'static str, f64),
    pub(super) activation: (&'static str, Activation),
    /// `None`: `hidden_size / heads`.
    pub(super) head_dim: Option<usize>,
    /// For an absent key; one that is null means one KV head for each head. `None`: the same.
    pub(super) kv_heads: Option<usize>,
    pub(super) max_positions: usize,
    pub(super) rope: RopeKeys,
    pub(super) tied: bool,
}

impl Defaults {
    pub(super) const LLAMA: Self = Self {
        norm: Norm::Rms,
        eps: ("rms_norm_eps", 1e-6),
        activation: ("hidden_act", Activation::Silu),
        head_dim: None,
        kv_heads: None,
        max_positions: 2048,
        rope: RopeKeys::LLAMA,
        tied: false,
    };
}

/// Reads the keys of the models after Llama: a sequential decoder with rotary positions and a gated MLP, without biases.
pub(super) fn read(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let hidden_size = config.usize("hidden_size")?;
    let heads = config.usize("num_attention_heads")?;
    let head_dim = match (config.optional_usize("head_dim")?, defaults.head_dim) {
        (Some(head_dim), _) => head_dim,
        (None, Some(head_dim)) if !config.contains("head_dim") => head_dim,
        (None, _) => head_dim(config, "num_attention_heads", hidden_size, heads)?,
    };
    let kv_heads = match (config.optional_usize("num_key_value_heads")?, defaults.kv_heads) {
        (Some(kv_heads), _) => kv_heads,
        (None, Some(kv_heads)) if !config.contains("num_key_value_heads") => kv_heads,
        (None, _) => heads,
    };
    let max_positions = config.optional_usize("max_position_embeddings")?.unwrap_or(defaults.max_positions);
    let sizes = Sizes {
        hidden_size,
        layers: config.usize("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        intermediate_size: config.usize("intermediate_size")?,
        max_positions,
    };
    let eps = config.optional_f64(defaults.eps.0)?.unwrap_or(defaults.eps.1);
    let activation = activation(config, defaults.activation.0, defaults.activation.1)?;
    let positions = rope::read(config, &defaults.rope, head_dim, max_positions)?;
    let mut model = decoder(config, sizes, (defaults.norm, eps), positions, activation, defaults.tied)?;
    model.decoder.gated_mlp = true;
    Ok(model)
}

/// Reads `attention_bias` into the decoder and a flag: biases on all four projections.
pub(super) fn read_attention_bias(config: &ConfigFile, model: &mut SourceModel) -> Result<(), ConvertError> {
    read_attention_bias_or(config, model, false)
}

/// The same with the default of the class.
pub(super) fn read_attention_bias_or(
    config: &ConfigFile,
    model: &mut SourceModel,
    default: bool,
) -> Result<(), ConvertError> {
    let bias = config.bool_or("attention_bias", default)?;
    model.decoder.qkv_bias = bias;
    model.decoder.attention_output_bias = bias;
    model.flags.insert("attention_bias", bias);
    Ok(())
}

/// Sets the biases of queries, keys and values, and that of the output projection, and their flags.
pub(super) fn set_attention_biases(model: &mut SourceModel, qkv: bool, output: bool) {
    model.decoder.qkv_bias = qkv;
    model.decoder.attention_output_bias = output;
    model.flags.extend([("qkv_bias", qkv), ("output_bias", output)]);
}

/// A window in the layers whose number is no multiple of `sliding_window_pattern`, unless `layer_types` says which have one.
pub(super) fn read_pattern_windows(
    config: &ConfigFile,
    model: &mut SourceModel,
    window: Option<usize>,
    pattern: usize,
) -> Result<(), ConvertError> {
    let pattern = config.optional_usize("sliding_window_pattern")?.unwrap_or(pattern);
    if pattern == 0 {
        return Err(config.error("sliding_window_pattern", "1 or more"));
    }
    let slides = |layer: usize| !(layer + 1).is_multiple_of(pattern);
    model.decoder.windows = layer_windows(config, model.decoder.layers, window, slides)?;
    Ok(())
}

/// Layers without a window do not rotate.
pub(super) fn rotate_within_windows_only(model: &mut SourceModel) {
    let decoder = &mut model.decoder;
    let rotary = |layer| if decoder.window(layer).is_some() { LayerRotary::Global } else { LayerRotary::Off };
    decoder.layer_rotary = (0..decoder.layers).map(rotary).collect();
}

/// Layers with a window rotate with the base `theta`, without scaling.
pub(super) fn rotate_locally_within_windows(model: &mut SourceModel, theta: f64) {
    let rotary =
        |window: &Option<usize>| if window.is_some() { LayerRotary::Local { theta } } else { LayerRotary::Global };
    model.decoder.layer_rotary = model.decoder.windows.iter().map(rotary).collect();
}

/// `sliding_window`, which may be null, or the default of the class.
pub(super) fn window(config: &ConfigFile, default: usize) -> Result<Option<usize>, ConvertError> {
    if config.contains("sliding_window") { config.optional_usize("sliding_window") } else { Ok(Some(default)) }
}

/// Reads `mlp_bias` into the decoder and a flag.
pub(super) fn read_mlp_bias(config: &ConfigFile, model: &mut SourceModel) -> Result<(), ConvertError> {
    read_mlp_bias_or(config, model, false)
}

/// The same with the default of the class.
pub(super) fn read_mlp_bias_or(
    config: &ConfigFile,
    model: &mut SourceModel,
    default: bool,
) -> Result<(), ConvertError> {
    model.decoder.mlp_bias = config.bool_or("mlp_bias", default)?;
    model.flags.insert("mlp_bias", model.decoder.mlp_bias);
    Ok(())
}

/// The window of each layer: by `layer_types` where it is there, else where `slides` says; empty when none has one.
pub(super) fn layer_windows(
    config: &ConfigFile,
    layers: usize,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>, ConvertError> {
    let windows: Vec<Option<usize>> = match config.optional_str_list("layer_types")? {
        None => (0..layers).map(|layer| window.filter(|_| slides(layer))).collect(),
        Some(types) => {
            one_for_each_layer(config, "layer_types", types.len(), layers)?;
            let window = |kind: &String| match kind.as_str() {
                // The second is a name of older files.
                "full_attention" | "attention" => Ok(None),
                "sliding_attention" if window.is_some() => Ok(window),
                "sliding_attention" => Err(config.error("sliding_window", "a number, as `layer_types` has windows")),
                _ => Err(config.error("layer_types", "a list of full_attention and sliding_attention")),
            };
            types.iter().map(window).collect::<Result<_, _>>()?
        }
    };
    Ok(if windows.iter().any(Option::is_some) { windows } else { Vec::new() })
}

/// A key with several names: transformers has renamed some and reads all.
///
/// # Errors
///
/// [`ConvertError::Contradiction`] where two of them say different things; which of them is read differs between releases.
pub(super) fn optional_usize_of(config: &ConfigFile, names: &[&str]) -> Result<Option<usize>, ConvertError> {
    let mut found: Option<(&str, usize)> = None;
    for name in names {
        match (config.optional_usize(name)?, found) {
            (Some(other), Some((first, number))) if other != number => {
                return Err(contradiction(config, (first, &number), (name, &other)));
            }
            (Some(number), None) => found = Some((name, number)),
            _ => {}
        }
    }
    Ok(found.map(|(_, number)| number))
}

/// The same, where the key is needed.
pub(super) fn usize_of(config: &ConfigFile, names: &[&str]) -> Result<usize, ConvertError> {
    match optional_usize_of(config, names)? {
        Some(found) => Ok(found),
        None => config.usize(names.first().copied().unwrap_or_default()),
    }
}

/// The error for two names of one setting with different values.
pub(super) fn contradiction(
    config: &ConfigFile,
    (first, one): (&str, &dyn std::fmt::Display),
    (second, other): (&str, &dyn std::fmt::Display),
) -> ConvertError {
    ConvertError::Contradiction {
        path: config.path().to_owned(),
        first: format!("`{first}` = {one}"),
        second: format!("`{second}` = {other}"),
        advice: "they are two names of one setting: keep the one that is meant".to_owned(),
    }
}

/// An error unless a list under `key` has an entry for each layer.
pub(super) fn one_for_each_layer(
    config: &ConfigFile,
    key: &str,
    entries: usize,
    layers: usize,
) -> Result<(), ConvertError> {
    if entries == layers {
        return Ok(());
    }
    Err(ConvertError::ConfigKey {
        path: config.path().to_owned(),
        key: config.full_key(key),
        expected: format!("a list with one entry for each of the {layers} layers"),
        found: format!("{entries} entries"),
    })
}

/// The activation under `key`, or `default`.
pub(super) fn activation(config: &ConfigFile, key: &str, default: Activation) -> Result<Activation, ConvertError> {
    let Some(name) = config.optional_str(key)? else { return Ok(default) };
    // The tanh forms differ from the exact one by up to 5e-4 in the logits: mixing them up shows in no sample text.
    Ok(match name.as_str() {
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_python_tanh" => Activation::GeluTanh,
        "gelu" | "gelu_python" => Activation::GeluErf,
        "silu" | "swish" => Activation::Silu,
        "relu" => Activation::Relu,
        "relu2" => Activation::Relu2,
        _ => {
            let expected = "one of gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, silu, swish, relu, relu2";
            return Err(config.error(key, expected));
        }
    })
}

/// `width / heads`, which must be whole. `key` is the key of the heads.
pub(super) fn head_dim(config: &ConfigFile, key: &str, width: usize, heads: usize) -> Result<usize, ConvertError> {
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(config.error(key, &format!("a divisor of the hidden size {width}")));
    }
    Ok(width / heads)
}

/// The error for a variant that the decoder does not compute.
pub(super) fn rejected(config: &ConfigFile, key: &str, why: &'static str) -> ConvertError {
    let value = config.get(key).map_or("null".to_owned(), ToString::to_string);
    ConvertError::Rejected { path: config.path().to_owned(), key: config.full_key(key), value, why }
}

/// The object of rotary settings, which a class that has settings of its own for its absence must state.
pub(super) fn stated_rope(config: &ConfigFile) -> Result<ConfigFile, ConvertError> {
    let object = |key: &str| Ok::<_, ConvertError>(config.object(key)?.filter(|object| !object.entries().is_empty()));
    match object("rope_scaling")? {
        Some(object) => Ok(object),
        None => object("rope_parameters")?.ok_or_else(|| {
            let expected = "an object, or `rope_scaling` in older files: without either transformers scales this \
                            architecture in a way of its own";
            config.error("rope_parameters", expected)
        }),
    }
}

/// An error if `key` is there with any value.
pub(super) fn reject_any(config: &ConfigFile, key: &str, why: &'static str) -> Result<(), ConvertError> {
    if config.get(key).is_some() { Err(rejected(config, key, why)) } else { Ok(()) }
}
