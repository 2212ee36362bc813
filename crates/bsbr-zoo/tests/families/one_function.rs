//! At once, in pieces or token by token is one function.

use burn::tensor::{Device, Tensor};
use proptest::prelude::*;

use crate::common::{cases, difference, numbers, settings};

proptest! {
    #![proptest_config(settings(384))]

    #[test]
    fn the_recurrent_form_is_the_parallel_form(case in cases(), pieces in prop::collection::vec(1usize..=40, 1..8)) {
        let device = Device::flex();
        let decoder = case.decoder(&device);
        let input = case.input(&device);
        let of = |logits: Tensor<3>| -> Vec<f64> { numbers(logits).into_iter().map(f64::from).collect() };
        let whole = of(decoder.forward(input.clone()).unwrap());
        for pieces in [vec![1], pieces] {
            let mut state = decoder.start(case.batch).unwrap();
            let mut outputs = Vec::new();
            let mut sizes = pieces.iter().cycle();
            while state.len() < case.tokens {
                let size = (*sizes.next().unwrap()).min(case.tokens - state.len());
                let piece = input.clone().narrow(1, state.len(), size);
                outputs.push(decoder.step(piece, &mut state).unwrap());
            }
            let apart = difference(&of(Tensor::cat(outputs, 1)), &whole);
            prop_assert!(apart <= 1e-4, "{apart} in pieces of {pieces:?}");
        }
    }
}
