//! Gradients of the parallel form are slopes of the definition.

use bsbr_attn::Retrieval;
use bsbr_zoo::{DecoderConfig, Family, Positions};
use burn::tensor::{Device, Tensor, TensorData};

use crate::{
    common::{Case, weights},
    naive::Naive,
};

/// Moves of a weight in f64.
const STEP: f64 = 1e-5;

/// A factor for each logit.
fn factors(count: usize) -> Vec<f64> {
    (0..count).map(|at| ((at * 7 + 3) as f64).sin()).collect()
}

fn assert_gradients(family: Family) {
    let mut config = DecoderConfig {
        family,
        vocabulary: 7,
        width: 8,
        layers: 2,
        heads: 2,
        mlp_factor: 1,
        short_convolution: 2,
        positions: Positions::Rotary,
        chunk_size: 4,
        window: 4,
        sinks: 2,
        ..Default::default()
    };
    config.bsbr.retrieval = Retrieval::None;
    (config.bsbr.chunk_size, config.bsbr.block_size) = (4, 4);
    config.bsbr.sink_tokens = 2;
    let case = Case { config, seed: 3, batch: 1, tokens: 11 };
    let device = Device::flex().autodiff();
    let decoder = case.decoder(&device);
    let factors = factors(case.tokens * 7);
    let weighted = TensorData::new(factors.iter().map(|&x| x as f32).collect(), [1, case.tokens, 7]);
    let logits = decoder.forward(case.input(&device)).unwrap();
    let gradients = (logits * Tensor::from_data(weighted, &device)).sum().backward();

    let ids = case.ids();
    let mut moved = weights(&decoder, None);
    let found = weights(&decoder, Some(&gradients));
    for which in 0..moved.len() {
        for at in 0..moved[which].numbers.len() {
            let mut loss = |by: f64| {
                let kept = moved[which].numbers[at];
                moved[which].numbers[at] = kept + by;
                let logits = Naive { config: &case.config, weights: &moved }.logits(&ids);
                moved[which].numbers[at] = kept;
                logits.iter().zip(&factors).map(|(logit, factor)| logit * factor).sum::<f64>()
            };
            let expected = (loss(STEP) - loss(-STEP)) / (2.0 * STEP);
            let found = found[which].numbers[at];
            assert!(
                (found - expected).abs() <= 1e-4 * (1.0 + expected.abs()),
                "gradient {at} of `{}` in {family}: {found} instead of {expected}",
                moved[which].name
            );
        }
    }
}

#[test]
fn gradients_of_every_family_are_right() {
    for family in Family::ALL {
        assert_gradients(family);
    }
}
