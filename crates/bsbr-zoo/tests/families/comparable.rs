//! What makes families comparable: weights, and the bytes they keep.

use bsbr_zoo::{DecoderConfig, Family, SmallDecoder};
use burn::tensor::{Device, Int, Tensor};

use crate::common::{numbers, weights};

fn decoder(family: Family, width: usize) -> SmallDecoder {
    SmallDecoder::new(&DecoderConfig { family, width, ..Default::default() }, 1, &Device::flex()).unwrap()
}

#[test]
fn families_have_as_many_weights() {
    for width in [32, 64, 128] {
        let standard = decoder(Family::Standard, width);
        // Embedding, then in each of two layers two norms, four taps, four projections and a perceptron of twice the width.
        assert_eq!(standard.parameters(), 256 * width + 2 * (2 * width + 4 * width + 8 * width * width) + width);
        for family in Family::ALL {
            let ratio = decoder(family, width).parameters() as f64 / standard.parameters() as f64;
            assert!((ratio - 1.0).abs() < 0.02, "{family} at width {width}: {ratio}");
        }
    }
}

#[test]
fn what_families_share_starts_the_same() {
    let standard = weights(&decoder(Family::Standard, 64), None);
    for family in Family::ALL {
        for weight in weights(&decoder(family, 64), None) {
            let name = weight.name.rsplit('.').next().unwrap().to_owned();
            if ["embedding", "up", "down", "gain", "weight"].contains(&name.as_str()) {
                let other = standard.iter().find(|other| other.name == weight.name).unwrap();
                assert_eq!(weight.numbers, other.numbers, "{} of {family}", weight.name);
            }
        }
    }
    let other = SmallDecoder::new(&DecoderConfig::default(), 2, &Device::flex()).unwrap();
    assert_ne!(weights(&other, None)[0].numbers, standard[0].numbers);
}

/// Bytes of the state after `tokens` tokens, those of the convolutions left out.
fn bytes(decoder: &SmallDecoder, tokens: usize) -> usize {
    let mut state = decoder.start(3).unwrap();
    let input = Tensor::<2, Int>::zeros([3, tokens], &Device::flex());
    decoder.step(input, &mut state).unwrap();
    let convolutions = 2 * 3 * 3 * 64 * 4;
    state.bytes() - convolutions
}

#[test]
fn states_hold_what_their_definitions_need() {
    // Two layers, three texts, numbers of four bytes.
    let each = 2 * 3 * 4;
    for tokens in [40, 133, 300] {
        let of = |family| bytes(&decoder(family, 64), tokens) / each;
        assert_eq!(of(Family::Linear), 4 * 16 * 17);
        assert_eq!(of(Family::Delta), 4 * 16 * 16);
        assert_eq!(of(Family::Window), 2 * 64 * (31 + 4));
        assert_eq!(of(Family::Hopfield), 2 * 64 * tokens);
        let (shared, inner, rows) = (32, 75, tokens % 32);
        assert_eq!(of(Family::Gau), shared * inner + rows * (2 * shared + inner));
        assert!(of(Family::Standard) >= 2 * 64 * tokens);
        assert!(of(Family::Bsbr) >= 2 * 64 * tokens);
    }
}

#[test]
fn logits_at_some_places_are_those_of_all() {
    let device = Device::flex();
    let decoder = decoder(Family::Delta, 64);
    let tokens = Tensor::<2, Int>::from_data([[1, 2, 3, 4], [5, 6, 7, 8]], &device);
    let all = decoder.forward(tokens.clone()).unwrap().reshape([8, 256]);
    let places = Tensor::<1, Int>::from_data([6, 1], &device);
    let some = decoder.logits_at(tokens, places.clone()).unwrap();
    let expected = numbers(all.select(0, places));
    let apart = numbers(some).iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-5, "{apart}");
}
