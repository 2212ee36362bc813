//! A conversation in one cache: each turn reads its own tokens alone. The model has random weights and the tokens are numbers; with a
//! checkpoint, `bsbr_convert::load` and `ChatTemplate` take their places.
//!
//! cargo run --release --example conversation
#![allow(clippy::print_stdout)]

use bsbr_model::{
    Activation, Decoder, DecoderConfig, Device, GenerateConfig, ModelConfig, ModelError, Norm, Positions, Sampler,
    SamplingConfig, Step, WeightSource, WeightSpec, generate_behind,
};

/// Small numbers without order.
struct Weights(u64);

impl WeightSource for Weights {
    fn read(&mut self, spec: &WeightSpec) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        Ok((0..spec.shape.iter().product()).map(|_| next()).collect())
    }
}

fn main() -> Result<(), ModelError> {
    let decoder = DecoderConfig {
        vocab_size: 100,
        hidden_size: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        intermediate_size: 64,
        max_positions: 1024,
        norm: Norm::Rms,
        norm_eps: 1e-5,
        positions: Positions::Rotary { theta: 10_000.0, rotary_dim: 8, scaling: None },
        activation: Activation::Silu,
        gated_mlp: true,
        clamped_gate: None,
        attention_scale: 8f64.sqrt().recip(),
        scale_by_layer: false,
        attention_softcap: None,
        windows: vec![],
        sink_logits: false,
        qkv_bias: false,
        attention_output_bias: false,
        mlp_bias: false,
        tied_head: true,
        embedding: Default::default(),
        block: Default::default(),
        head: Default::default(),
        layer_rotary: vec![],
        query_temperature: None,
        layer_shapes: vec![],
        latent: None,
        attention_gate: false,
        recurrent: None,
        experts: None,
    };
    let model = Decoder::load(ModelConfig::original(decoder), &mut Weights(1), &Device::flex())?;
    let mut sampler = Sampler::new(SamplingConfig { temperature: 0.8, min_p: Some(0.05), ..Default::default() })?;
    let config = GenerateConfig { max_new_tokens: 12, stop_tokens: vec![0] };
    let mut cache = model.new_cache(&[0])?;
    let mut unread = Vec::new();
    for (turn, said) in [vec![5, 6, 7, 8], vec![9, 10], vec![11]].into_iter().enumerate() {
        let held = cache.length(0);
        let new = [unread, said].concat();
        let answer = generate_behind(&model, &mut cache, &new, &config, &mut sampler, |step| {
            // Returning false ends the answer here.
            !matches!(step, Step::Token(99))
        })?;
        println!("turn {turn}: read {} tokens behind {held}, answered {:?}", new.len(), answer.tokens);
        unread = answer.unread;
    }
    Ok(())
}
