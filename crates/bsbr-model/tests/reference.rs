//! Every switch of the decoder against the decoder written out in f64.

mod common;

use bsbr_model::{
    Activation, BlockConfig, BlockForm, DecoderConfig, ExpertGroups, ExpertsConfig, HeadNorm, LayerRotary, ModelConfig,
    Norm, PositionPolicy, Positions, QueryTemperature, RotaryScaling, RouterKind,
};
use common::{
    devices, difference, families, gemma_like, gpt2_like, llama_like, load, logits, mixture, multi_query, naive::Naive,
    rotary, softmax_mixture, text,
};

const TOLERANCE: f64 = 1e-4;

/// The decoder computes what the reference does.
fn check(config: &ModelConfig, reference: &Naive, tokens: &[u32]) {
    let expected = reference.logits(tokens);
    for device in devices() {
        let error = difference(&logits(&load(config.clone(), &device), tokens), &expected);
        assert!(error <= TOLERANCE, "differs by {error} on {device:?}: {:?}", config.decoder);
    }
}

/// The decoder with a switch set computes what the reference does, and the switch does something.
fn check_switch(base: DecoderConfig, change: impl FnOnce(&mut DecoderConfig)) {
    let mut changed = base.clone();
    change(&mut changed);
    let (base, changed) = (ModelConfig::original(base), ModelConfig::original(changed));
    let (tokens, reference) = (text(30, 1), Naive::new(&changed));
    let effect = difference(&Naive::new(&base).logits(&tokens), &reference.logits(&tokens));
    assert!(effect > 10.0 * TOLERANCE, "the switch changes nothing in {:?}", changed.decoder);
    check(&changed, &reference, &tokens);
}

#[test]
fn every_family_is_the_written_out_decoder() {
    for decoder in families() {
        let config = ModelConfig::original(decoder);
        for length in [1, 2, 30] {
            check(&config, &Naive::new(&config), &text(length, length as u64));
        }
    }
}

#[test]
fn long_texts_cross_the_tiles_of_full_attention() {
    for decoder in [gpt2_like(), gemma_like()] {
        let config = ModelConfig::original(decoder);
        check(&config, &Naive::new(&config), &text(140, 2));
    }
}

#[test]
fn every_activation_runs_plain_and_gated() {
    for activation in [Activation::GeluTanh, Activation::GeluErf, Activation::Silu, Activation::Relu, Activation::Relu2]
    {
        for gated_mlp in [false, true] {
            // The other activation of each base, so that there is something to change.
            let other = if activation == Activation::Relu { Activation::Silu } else { Activation::Relu };
            for base in [gpt2_like(), llama_like()] {
                let base = DecoderConfig { activation: other, gated_mlp, ..base };
                check_switch(base, |decoder| decoder.activation = activation);
            }
        }
    }
}

#[test]
fn the_two_forms_of_gelu_are_told_apart() {
    check_switch(gpt2_like(), |decoder| decoder.activation = Activation::GeluErf);
    check_switch(multi_query(), |decoder| decoder.activation = Activation::GeluTanh);
}

#[test]
fn experts_are_chosen_and_weighed_as_their_router_says() {
    type Change = fn(&mut ExpertsConfig);
    let changes: [(fn() -> DecoderConfig, Change); 13] = [
        (mixture, |it| it.router.kind = RouterKind::Softmax),
        (mixture, |it| it.router.correction = false),
        (mixture, |it| it.router.groups = None),
        (mixture, |it| it.router.groups = Some(ExpertGroups { count: 2, kept: 1, by_highest: false })),
        (mixture, |it| it.router.groups = Some(ExpertGroups { count: 3, kept: 1, by_highest: true })),
        (mixture, |it| it.router.normalised = None),
        (mixture, |it| it.router.scale = None),
        (mixture, |it| it.shared = None),
        (mixture, |it| it.dense_layers.clear()),
        (softmax_mixture, |it| it.router.normalised = None),
        (softmax_mixture, |it| it.chosen = 1),
        (softmax_mixture, |it| it.chosen = 5),
        (softmax_mixture, |it| {
            (it.router.kind, it.router.normalised) = (RouterKind::Sparsemixer { jitter: 0.2 }, None);
        }),
    ];
    for (base, change) in changes {
        check_switch(base(), |decoder| decoder.experts.iter_mut().for_each(change));
    }
    check_switch(mixture(), |decoder| {
        decoder.experts.iter_mut().for_each(|it| {
            it.shared.iter_mut().for_each(|shared| shared.gate = false);
        })
    });
}

#[test]
fn experts_run_without_a_gate_and_in_every_form_of_a_block() {
    check_switch(mixture(), |decoder| decoder.gated_mlp = false);
    check_switch(mixture(), |decoder| decoder.mlp_bias = true);
    for form in [BlockForm::Sandwich, BlockForm::NormedBranches, BlockForm::Parallel, BlockForm::ParallelSharedNorm] {
        check_switch(mixture(), |decoder| decoder.block.form = form);
        check_switch(softmax_mixture(), |decoder| decoder.block.residual_multiplier = Some(0.4));
    }
}

#[test]
fn every_layer_has_the_numbers_of_its_own_xielu() {
    for base in [gpt2_like(), llama_like()] {
        let base = DecoderConfig { gated_mlp: false, ..base };
        check_switch(base, |decoder| decoder.activation = Activation::Xielu);
    }
}

#[test]
fn norms_add_one_to_their_weights_or_have_none() {
    for base in [gpt2_like(), llama_like()] {
        check_switch(base.clone(), |decoder| decoder.norm = Norm::LayerPlusOne);
        check_switch(base, |decoder| decoder.norm = Norm::RmsPlain);
    }
    let block = BlockConfig { head_norm: Some(HeadNorm::Head), ..Default::default() };
    let base = DecoderConfig { norm: Norm::RmsPlain, ..llama_like() };
    check_switch(base, |decoder| decoder.block = block);
}

#[test]
fn heads_are_normalised_before_or_after_they_are_rotated() {
    for over in [HeadNorm::Head, HeadNorm::EachHead] {
        for rotary_dim in [4, 8] {
            let block = BlockConfig { head_norm: Some(over), ..Default::default() };
            let base = DecoderConfig { block, positions: rotary(rotary_dim), ..llama_like() };
            check_switch(base, |decoder| decoder.block.head_norm_after_rotary = true);
        }
    }
}

#[test]
fn queries_grow_with_their_position() {
    for base in [gpt2_like(), llama_like(), gemma_like()] {
        let temperature = QueryTemperature { beta: 0.7, length: 6 };
        check_switch(base, |decoder| decoder.query_temperature = Some(temperature));
    }
}

#[test]
fn both_norms_run_with_both_position_schemes() {
    for positions in [Positions::Learned, rotary(8)] {
        let base = DecoderConfig { positions, ..gpt2_like() };
        check_switch(base, |decoder| decoder.norm = Norm::Rms);
    }
}

#[test]
fn the_epsilon_of_a_norm_is_the_configured_one() {
    for base in [gpt2_like(), llama_like()] {
        check_switch(base, |decoder| decoder.norm_eps = 0.5);
    }
}

#[test]
fn each_group_of_biases_can_be_left_out() {
    check_switch(gpt2_like(), |decoder| decoder.qkv_bias = false);
    check_switch(gpt2_like(), |decoder| decoder.attention_output_bias = false);
    check_switch(gpt2_like(), |decoder| decoder.mlp_bias = false);
}

#[test]
fn each_group_of_biases_can_be_added() {
    check_switch(llama_like(), |decoder| decoder.qkv_bias = true);
    check_switch(llama_like(), |decoder| decoder.attention_output_bias = true);
    check_switch(llama_like(), |decoder| decoder.mlp_bias = true);
}

#[test]
fn the_head_can_be_tied_or_its_own() {
    check_switch(gpt2_like(), |decoder| decoder.tied_head = false);
    check_switch(llama_like(), |decoder| decoder.tied_head = true);
}

#[test]
fn the_attention_scale_is_the_configured_one_in_every_layer() {
    for base in families() {
        check_switch(base.clone(), |decoder| decoder.attention_scale = 0.9);
        check_switch(base, |decoder| decoder.scale_by_layer = true);
    }
}

#[test]
fn scores_can_be_capped() {
    check_switch(gpt2_like(), |decoder| decoder.attention_softcap = Some(0.7));
    check_switch(llama_like(), |decoder| decoder.attention_softcap = Some(0.7));
}

#[test]
fn each_layer_has_its_own_window() {
    for windows in [vec![Some(1), None], vec![None, Some(5)], vec![Some(29), Some(3)]] {
        check_switch(llama_like(), |decoder| decoder.windows = windows.clone());
        check_switch(gpt2_like(), |decoder| decoder.windows = windows);
    }
}

#[test]
fn heads_need_not_fill_the_hidden_size() {
    for (heads, kv_heads, head_dim) in [(2, 1, 4), (5, 5, 6), (6, 2, 10)] {
        let base = DecoderConfig { heads, kv_heads, head_dim, positions: rotary(2), ..llama_like() };
        check_switch(base, |decoder| decoder.positions = rotary(4));
    }
}

#[test]
fn part_of_a_head_can_rotate() {
    check_switch(llama_like(), |decoder| decoder.positions = rotary(6));
    check_switch(multi_query(), |decoder| decoder.positions = rotary(2));
}

#[test]
fn the_base_of_the_rotation_is_the_configured_one() {
    let positions = Positions::Rotary { theta: 50.0, rotary_dim: 8, scaling: None };
    check_switch(llama_like(), |decoder| decoder.positions = positions);
}

fn scaled(scaling: RotaryScaling) -> ModelConfig {
    let positions = Positions::Rotary { theta: 10000.0, rotary_dim: 8, scaling: Some(scaling) };
    ModelConfig::original(DecoderConfig { positions, ..llama_like() })
}

#[test]
fn the_attention_factor_of_a_scaling_multiplies_queries_and_keys() {
    // YaRN by a factor of 1 leaves the frequencies as they are.
    let config = scaled(RotaryScaling::Yarn {
        factor: 1.0,
        original_max_positions: 64,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.4,
        truncate: true,
    });
    let mut reference = Naive::new(&config);
    reference.rotation.1 = 1.4;
    check(&config, &reference, &text(30, 3));
}

#[test]
fn the_length_of_the_text_chooses_the_frequencies_of_longrope() {
    let config = scaled(RotaryScaling::Longrope {
        short_factor: vec![1.0, 2.0, 3.0, 4.0],
        long_factor: vec![2.0, 4.0, 6.0, 8.0],
        original_max_positions: 20,
        attention_factor: 1.1,
        long_attention_factor: None,
    });
    for (length, factors) in [(20, [1.0, 2.0, 3.0, 4.0]), (21, [2.0, 4.0, 6.0, 8.0])] {
        let mut reference = Naive::new(&config);
        reference.rotation.1 = 1.1;
        reference.rotation.0.iter_mut().zip(factors).for_each(|(frequency, factor)| *frequency /= factor);
        check(&config, &reference, &text(length, 4));
    }
}

#[test]
fn position_policies_go_on_past_the_last_learned_position() {
    let decoder = DecoderConfig { max_positions: 16, ..gpt2_like() };
    let mut seen = Vec::new();
    for position_policy in [PositionPolicy::Clamp, PositionPolicy::Interpolate] {
        let config = ModelConfig { position_policy, ..ModelConfig::original(decoder.clone()) };
        let reference = Naive::new(&config);
        for length in [15, 16, 17, 40] {
            check(&config, &reference, &text(length, 5));
        }
        seen.push(reference.logits(&text(40, 5)));
    }
    assert!(difference(&seen[0], &seen[1]) > 0.1, "the policies are two");
}

#[test]
fn every_norm_and_every_form_of_a_block_is_its_own() {
    for norm in [Norm::Layer, Norm::LayerWeight, Norm::LayerPlain, Norm::RmsPlusOne] {
        check_switch(llama_like(), |decoder| decoder.norm = norm);
    }
    for form in [
        BlockForm::Sandwich,
        BlockForm::NormedBranches,
        BlockForm::NormAfter,
        BlockForm::Parallel,
        BlockForm::ParallelSharedNorm,
    ] {
        for base in [gpt2_like(), llama_like()] {
            check_switch(base.clone(), |decoder| decoder.block.form = form);
            let base = DecoderConfig { block: BlockConfig { form, ..base.block }, ..base };
            check_switch(base, |decoder| decoder.block.residual_multiplier = Some(0.4));
        }
    }
}

#[test]
fn queries_and_keys_can_be_normed_in_three_ways() {
    for over in [HeadNorm::Head, HeadNorm::EachHead, HeadNorm::AllHeads] {
        for norm in [Norm::Layer, Norm::Rms, Norm::RmsPlusOne] {
            let base = DecoderConfig { norm, ..llama_like() };
            check_switch(base, |decoder| decoder.block.head_norm = Some(over));
        }
    }
}

#[test]
fn each_layer_rotates_in_its_own_way() {
    let local = LayerRotary::Local { theta: 50.0 };
    for layers in [[local, LayerRotary::Global], [LayerRotary::Global, LayerRotary::Off], [LayerRotary::Off, local]] {
        check_switch(llama_like(), |decoder| decoder.layer_rotary = layers.to_vec());
    }
}

#[test]
fn scores_can_fall_with_the_distance() {
    for base in [gpt2_like(), llama_like()] {
        check_switch(base.clone(), |decoder| decoder.positions = Positions::Alibi { factor: 1.0 });
        let base = DecoderConfig { positions: Positions::Alibi { factor: 1.0 }, ..base };
        check_switch(base, |decoder| decoder.positions = Positions::Alibi { factor: 0.3 });
    }
}

#[test]
fn embeddings_and_heads_have_their_switches() {
    for base in [gpt2_like(), llama_like()] {
        check_switch(base.clone(), |decoder| decoder.embedding.norm = true);
        check_switch(base.clone(), |decoder| decoder.embedding.scale = Some(3.0));
        check_switch(base.clone(), |decoder| decoder.head.scale = Some(0.1));
        check_switch(base.clone(), |decoder| decoder.head.softcap = Some(1.0));
        check_switch(base, |decoder| decoder.head.bias = true);
    }
    check_switch(gpt2_like(), |decoder| decoder.embedding.width = Some(10));
    check_switch(llama_like(), |decoder| decoder.embedding.width = Some(30));
    check_switch(gpt2_like(), |decoder| decoder.embedding.position_offset = 2);
}
