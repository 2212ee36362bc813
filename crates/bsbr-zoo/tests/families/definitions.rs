//! Every family is what its definition says.

use bsbr_attn::Retrieval;
use bsbr_zoo::Family;
use burn::tensor::Device;
use proptest::prelude::*;

use crate::{
    common::{Case, cases, difference, numbers, settings, weights},
    naive::Naive,
};

/// Cases of which the definition is written out: `bsbr` without retrieval, or retrieving everything, which is `standard`.
fn defined() -> impl Strategy<Value = Case> {
    (cases(), any::<bool>()).prop_map(|(mut case, none)| {
        if none {
            case.config.bsbr.retrieval = Retrieval::None;
        } else {
            (case.config.bsbr.threshold, case.config.bsbr.max_keys) = (0.0, 1000);
        }
        case
    })
}

proptest! {
    #![proptest_config(settings(256))]

    #[test]
    fn the_parallel_form_is_the_definition(case in defined()) {
        let device = Device::flex();
        let decoder = case.decoder(&device);
        let weights = weights(&decoder, None);
        let naive = Naive { config: &case.config, weights: &weights };
        let expected: Vec<f64> = case.ids().chunks(case.tokens).flat_map(|text| naive.logits(text)).collect();
        let found = numbers(decoder.forward(case.input(&device)).unwrap());
        let found: Vec<f64> = found.into_iter().map(f64::from).collect();
        let apart = difference(&found, &expected);
        prop_assert!(apart <= 1e-4, "{apart}");
    }
}

/// Keys that are all alike make the triangular system of a chunk as badly scaled as it can be.
#[test]
fn a_text_of_one_token_is_no_harder() {
    let device = Device::flex();
    for family in Family::ALL {
        let config = bsbr_zoo::DecoderConfig {
            family,
            vocabulary: 3,
            width: 32,
            chunk_size: 64,
            bsbr: bsbr_attn::BlockAttentionConfig {
                threshold: 0.0,
                max_keys: 1000,
                ..bsbr_zoo::DecoderConfig::default().bsbr
            },
            ..Default::default()
        };
        let case = Case { config, seed: 5, batch: 1, tokens: 200 };
        let decoder = case.decoder(&device);
        let weights = weights(&decoder, None);
        let expected = Naive { config: &case.config, weights: &weights }.logits(&[1; 200]);
        let found = numbers(decoder.forward(case.tensor(vec![1; 200], &device)).unwrap());
        let found: Vec<f64> = found.into_iter().map(f64::from).collect();
        let apart = difference(&found, &expected);
        assert!(apart <= 1e-4, "{family}: {apart}");
    }
}
