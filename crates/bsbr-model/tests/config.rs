//! The configuration as data: what it refuses, what it counts, and its JSON.

mod common;

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_model::{
    Activation, DecoderConfig, EXTRA_PREFIX, LayerRotary, ModelConfig, ModelError, Norm, PositionPolicy, Positions,
    RotaryScaling, WeightSpec, parameter_counts, weight_specs,
};
use common::{families, gpt2_like, llama_like, original, rotary};
use serde_json::{Value, json};

/// What a change of a valid decoder is refused for.
fn refused(change: impl FnOnce(&mut DecoderConfig)) -> &'static str {
    let mut decoder = llama_like();
    change(&mut decoder);
    let Err(ModelError::Config { setting, problem }) = ModelConfig::original(decoder).validate() else {
        panic!("accepted");
    };
    assert!(!problem.is_empty());
    setting
}

#[test]
fn sizes_must_not_be_zero() {
    assert_eq!(refused(|d| d.vocab_size = 0), "vocab_size");
    assert_eq!(refused(|d| d.hidden_size = 0), "hidden_size");
    assert_eq!(refused(|d| d.layers = 0), "layers");
    assert_eq!(refused(|d| d.heads = 0), "heads");
    assert_eq!(refused(|d| d.kv_heads = 0), "kv_heads");
    assert_eq!(refused(|d| d.head_dim = 0), "head_dim");
    assert_eq!(refused(|d| d.intermediate_size = 0), "intermediate_size");
    assert_eq!(refused(|d| d.max_positions = 0), "max_positions");
}

#[test]
fn heads_must_come_in_whole_groups() {
    assert_eq!(refused(|d| d.kv_heads = 3), "kv_heads");
    assert_eq!(refused(|d| d.kv_heads = 8), "kv_heads");
}

#[test]
fn factors_must_be_positive_numbers() {
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(refused(|d| d.norm_eps = bad), "norm_eps");
        assert_eq!(refused(|d| d.attention_scale = bad), "attention_scale");
        assert_eq!(refused(|d| d.attention_softcap = Some(bad)), "attention_softcap");
        let positions = Positions::Rotary { theta: bad, rotary_dim: 8, scaling: None };
        assert_eq!(refused(|d| d.positions = positions), "positions.theta");
    }
}

#[test]
fn there_must_be_no_window_or_one_per_layer() {
    for windows in [vec![None], vec![None; 3], vec![Some(0), None]] {
        assert_eq!(refused(|d| d.windows = windows), "windows");
    }
    for windows in [vec![], vec![None; 2], vec![Some(1), None]] {
        DecoderConfig { windows, ..llama_like() }.validate().unwrap();
    }
}

#[test]
fn an_even_part_of_a_head_must_rotate() {
    for bad in [0, 3, 10] {
        assert_eq!(refused(|d| d.positions = rotary(bad)), "positions.rotary_dim");
    }
}

#[test]
fn longrope_needs_a_divisor_for_each_frequency() {
    let longrope = |short: usize, long: usize| Positions::Rotary {
        theta: 10000.0,
        rotary_dim: 8,
        scaling: Some(RotaryScaling::Longrope {
            short_factor: vec![1.0; short],
            long_factor: vec![1.0; long],
            original_max_positions: 100,
            attention_factor: 1.0,
            long_attention_factor: None,
        }),
    };
    assert_eq!(refused(|d| d.positions = longrope(3, 4)), "positions.scaling.short_factor");
    assert_eq!(refused(|d| d.positions = longrope(4, 5)), "positions.scaling.long_factor");
    DecoderConfig { positions: longrope(4, 4), ..llama_like() }.validate().unwrap();
}

#[test]
fn the_numbers_of_a_rotary_scaling_must_be_possible() {
    let scaled = |scaling| Positions::Rotary { theta: 10000.0, rotary_dim: 8, scaling: Some(scaling) };
    let llama3 = |low_freq_factor, high_freq_factor| RotaryScaling::Llama3 {
        factor: 8.0,
        low_freq_factor,
        high_freq_factor,
        original_max_positions: 100,
    };
    for factor in [0.0, -2.0, f64::NAN] {
        let found = refused(|d| d.positions = scaled(RotaryScaling::Linear { factor }));
        assert_eq!(found, "positions.scaling.factor");
    }
    let no_length = RotaryScaling::Dynamic { factor: 2.0, original_max_positions: 0 };
    assert_eq!(refused(|d| d.positions = scaled(no_length)), "positions.scaling.original_max_positions");
    let band = "positions.scaling.high_freq_factor - low_freq_factor";
    assert_eq!(refused(|d| d.positions = scaled(llama3(4.0, 4.0))), band);
    DecoderConfig { positions: scaled(llama3(1.0, 4.0)), ..llama_like() }.validate().unwrap();
}

#[test]
fn a_cache_of_other_settings_is_refused() {
    let model = original(gpt2_like());
    let converted = model.with_config(|config| config.attention = Some(Default::default())).unwrap();
    let mut cache = model.new_cache(&[3]).unwrap();
    let error = converted.hidden(&[vec![1, 2, 3]], &mut cache).unwrap_err();
    assert!(error.to_string().contains("made for another model or other settings"), "{error}");
    assert_eq!(cache.length(0), 0);
    model.hidden(&[vec![1, 2, 3]], &mut cache).unwrap();
}

#[test]
fn a_model_must_be_of_this_format_with_layers_it_has_and_possible_attention() {
    let model = |change: fn(&mut ModelConfig)| {
        let mut config = ModelConfig::original(gpt2_like());
        change(&mut config);
        config.validate()
    };
    let setting = |result| match result {
        Err(ModelError::Config { setting, .. }) => setting,
        other => panic!("{other:?}"),
    };
    assert_eq!(setting(model(|c| c.format_version = 2)), "format_version");
    assert_eq!(setting(model(|c| c.original_layers = vec![0, 2])), "original_layers");
    let impossible = model(|c| c.attention = Some(BlockAttentionConfig { chunk_size: 0, ..Default::default() }));
    assert!(matches!(impossible, Err(ModelError::Attention(_))), "{impossible:?}");
    model(|c| c.original_layers = vec![0, 1]).unwrap();
}

#[test]
fn a_loaded_model_changes_its_attention_and_nothing_it_has_no_weights_for() {
    let model = original(gpt2_like());
    let attention = |selector| Some(BlockAttentionConfig { selector, ..Default::default() });
    let refused = |change: &dyn Fn(&mut ModelConfig)| match model.with_config(change) {
        Err(ModelError::Config { setting, .. }) => setting,
        other => panic!("{:?}", other.map(|model| model.config().clone())),
    };
    assert_eq!(refused(&|c| c.decoder.attention_scale = 1.0), "decoder");
    assert_eq!(refused(&|c| c.attention = attention(Selector::Meta)), "selector");
    assert_eq!(refused(&|c| c.original_layers = vec![2]), "original_layers");
    let changed = model.with_config(|c| c.attention = attention(Selector::Index)).unwrap();
    assert_eq!(changed.config().attention, attention(Selector::Index));
    // Without any layer that uses it, the selector asks for nothing.
    let unused = |c: &mut ModelConfig| {
        c.attention = attention(Selector::Meta);
        c.original_layers = vec![0, 1];
    };
    assert!(model.with_config(unused).is_ok());
}

/// A decoder of which only sizes matter.
fn sizes(vocab: usize, hidden: usize, layers: usize, heads: [usize; 3], inner: usize) -> DecoderConfig {
    let [heads, kv_heads, head_dim] = heads;
    DecoderConfig {
        vocab_size: vocab,
        hidden_size: hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate_size: inner,
        ..gpt2_like()
    }
}

#[test]
fn known_models_have_their_known_number_of_parameters() {
    let gpt2 = DecoderConfig { max_positions: 1024, ..sizes(50257, 768, 12, [12, 12, 64], 3072) };
    assert_eq!(parameter_counts(&ModelConfig::original(gpt2)), (124_439_808, 0));
    let sized = sizes(49152, 576, 30, [9, 3, 64], 1536);
    let llama = DecoderConfig {
        norm: Norm::Rms,
        positions: rotary(64),
        activation: Activation::Silu,
        gated_mlp: true,
        qkv_bias: false,
        attention_output_bias: false,
        mlp_bias: false,
        ..sized
    };
    assert_eq!(parameter_counts(&ModelConfig::original(llama)), (134_515_008, 0));
}

#[test]
fn meta_projections_count_as_extra_in_the_layers_that_use_them() {
    let attention = Some(BlockAttentionConfig { selector: Selector::Meta, ..Default::default() });
    let config = ModelConfig { attention, original_layers: vec![0], ..ModelConfig::original(gpt2_like()) };
    let (original, extra) = parameter_counts(&config);
    assert_eq!(original, parameter_counts(&ModelConfig::original(gpt2_like())).0);
    assert_eq!(extra, 2 * (24 * 24 + 24)); // two projections with biases
    let specs = weight_specs(&config);
    let extra: Vec<&WeightSpec> = specs.iter().filter(|spec| spec.extra).collect();
    assert_eq!(extra.len(), 4);
    assert!(specs.iter().all(|spec| spec.extra == spec.name.starts_with(EXTRA_PREFIX)));
    assert!(extra.iter().all(|spec| spec.name.starts_with("bsbr.layers.1.meta_")), "{extra:?}");
}

#[test]
fn every_weight_has_a_name_of_its_own() {
    let attention = Some(BlockAttentionConfig { selector: Selector::Meta, ..Default::default() });
    for decoder in families() {
        let specs = weight_specs(&ModelConfig { attention: attention.clone(), ..ModelConfig::original(decoder) });
        let mut names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}

fn scalings() -> Vec<Option<RotaryScaling>> {
    let original_max_positions = 4096;
    vec![
        None,
        Some(RotaryScaling::Linear { factor: 1.1 }),
        Some(RotaryScaling::Dynamic { factor: 2.0, original_max_positions }),
        Some(RotaryScaling::Yarn {
            factor: 4.0,
            original_max_positions,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
            truncate: false,
        }),
        Some(RotaryScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions,
        }),
        Some(RotaryScaling::Longrope {
            short_factor: vec![1.0, 1.1, 0.3, 1e-7],
            long_factor: vec![2.0; 4],
            original_max_positions,
            attention_factor: 1.19,
            long_attention_factor: None,
        }),
    ]
}

#[test]
fn json_brings_every_configuration_back() {
    let rotary = scalings().into_iter().map(|scaling| Positions::Rotary { theta: 5e5, rotary_dim: 8, scaling });
    for positions in rotary.chain([Positions::Learned]) {
        let windows = vec![Some(3), None];
        let decoder = DecoderConfig { positions, windows, attention_softcap: Some(30.0), ..gpt2_like() };
        let config = ModelConfig {
            attention: Some(BlockAttentionConfig { max_keys: 3, ..Default::default() }),
            original_layers: vec![1],
            position_policy: PositionPolicy::Interpolate,
            stop_tokens: vec![0, 7],
            ..ModelConfig::original(decoder)
        };
        config.validate().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), config, "{text}");
    }
}

#[test]
fn json_says_the_kinds_in_plain_words() {
    let value = serde_json::to_value(ModelConfig::original(llama_like())).unwrap();
    assert_eq!(value["decoder"]["norm"], "rms");
    assert_eq!(value["decoder"]["activation"], "silu");
    assert_eq!(value["decoder"]["positions"]["kind"], "rotary");
    assert_eq!(value["position_policy"], "error");
    assert_eq!(value["attention"], Value::Null);
    let gelu = serde_json::to_value(Activation::GeluTanh).unwrap();
    assert_eq!(gelu, "gelu-tanh");
}

#[test]
fn unknown_keys_are_refused_everywhere() {
    let scaling = scalings().remove(3);
    let positions = Positions::Rotary { theta: 10000.0, rotary_dim: 8, scaling };
    let decoder = DecoderConfig { positions, ..llama_like() };
    let config = ModelConfig { attention: Some(BlockAttentionConfig::default()), ..ModelConfig::original(decoder) };
    let whole = serde_json::to_value(&config).unwrap();
    assert!(serde_json::from_value::<ModelConfig>(whole.clone()).is_ok());
    for place in ["", "/decoder", "/decoder/positions", "/decoder/positions/scaling", "/attention"] {
        let mut value = whole.clone();
        value.pointer_mut(place).unwrap()["surprise"] = json!(1);
        let error = serde_json::from_value::<ModelConfig>(value).unwrap_err();
        assert!(error.to_string().contains("surprise"), "at `{place}`: {error}");
    }
}

#[test]
fn settings_with_a_plain_default_may_be_left_out_of_the_json() {
    let mut value = serde_json::to_value(ModelConfig::original(llama_like())).unwrap();
    let keys = value.as_object_mut().unwrap();
    for key in ["original_layers", "position_policy", "stop_tokens"] {
        assert!(keys.remove(key).is_some());
    }
    assert_eq!(serde_json::from_value::<ModelConfig>(value.clone()).unwrap(), ModelConfig::original(llama_like()));
    value.as_object_mut().unwrap().remove("decoder");
    assert!(serde_json::from_value::<ModelConfig>(value).is_err());
}

#[test]
fn the_switches_of_embedding_block_head_and_positions_are_checked() {
    for bad in [0.0, -1.0, f64::NAN] {
        assert_eq!(refused(|d| d.block.residual_multiplier = Some(bad)), "block.residual_multiplier");
        assert_eq!(refused(|d| d.embedding.scale = Some(bad)), "embedding.scale");
        assert_eq!(refused(|d| d.head.scale = Some(bad)), "head.scale");
        assert_eq!(refused(|d| d.head.softcap = Some(bad)), "head.softcap");
        assert_eq!(refused(|d| d.positions = Positions::Alibi { factor: bad }), "positions.factor");
        assert_eq!(refused(|d| d.layer_rotary = vec![LayerRotary::Local { theta: bad }; 2]), "layer_rotary.theta");
    }
    assert_eq!(refused(|d| d.embedding.width = Some(0)), "embedding.width");
    // Sizes of which no list can be made and that cannot be multiplied.
    assert_eq!(refused(|d| d.layers = usize::MAX), "layers");
    assert_eq!(refused(|d| d.layers = 100_000), "layers");
    assert_eq!(refused(|d| d.vocab_size = 1 << 40), "vocab_size");
    assert_eq!(refused(|d| d.max_positions = usize::MAX), "max_positions");
    assert_eq!(refused(|d| d.embedding.position_offset = usize::MAX), "embedding.position_offset");
    assert_eq!(refused(|d| (d.heads, d.kv_heads) = (1 << 60, 1 << 60)), "heads");
    assert_eq!(refused(|d| d.layer_rotary = vec![LayerRotary::Off]), "layer_rotary");
    let unrotated = |d: &mut DecoderConfig| {
        d.layer_rotary = vec![LayerRotary::Off; 2];
        d.positions = Positions::Learned;
    };
    assert_eq!(refused(unrotated), "layer_rotary");
}

#[test]
fn models_written_before_a_switch_existed_have_it_off() {
    let config = ModelConfig::original(llama_like());
    let mut value = serde_json::to_value(&config).unwrap();
    for key in ["embedding", "block", "head", "layer_rotary"] {
        assert!(value["decoder"].as_object_mut().unwrap().remove(key).is_some());
    }
    assert_eq!(serde_json::from_value::<ModelConfig>(value).unwrap(), config);
}

#[test]
fn json_brings_every_family_back() {
    for decoder in families() {
        let config = ModelConfig::original(decoder);
        config.validate().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), config, "{text}");
    }
}
