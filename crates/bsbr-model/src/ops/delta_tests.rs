//! The gated delta rule in chunks and one token at a time against the rule itself in f64.

use burn::tensor::{Device, Distribution, Tensor, activation::log_sigmoid, activation::sigmoid};
use proptest::prelude::*;

use super::delta::gated_delta;

/// Sizes: heads, tokens, width of keys, width of values.
type Sizes = [usize; 4];

/// Inputs as a layer makes them: keys of length one, decays below one, rates between 0 and 1.
struct Inputs {
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    decay: Tensor<2>,
    rate: Tensor<2>,
    state: Tensor<3>,
}

impl Inputs {
    fn new(
        [heads, tokens, key_dim, value_dim]: Sizes,
        (seed, fading, alike): (u64, f64, f64),
        device: &Device,
    ) -> Self {
        device.seed(seed);
        let random = |shape: [usize; 3]| Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), device);
        // The more alike keys are, the larger the corrections of corrections.
        let key = random([heads, tokens, key_dim]) + random([heads, 1, key_dim]) * alike;
        let length = (key.clone().square().sum_dim(2) + 1e-6).sqrt();
        let rows = || Tensor::<2>::random([heads, tokens], Distribution::Normal(0.0, 1.0), device);
        Self {
            query: random([heads, tokens, key_dim]),
            key: key / length,
            value: random([heads, tokens, value_dim]),
            decay: log_sigmoid(rows()) * fading,
            rate: sigmoid(rows()),
            state: random([heads, key_dim, value_dim]),
        }
    }

    /// Tokens `from..to` from `state`.
    fn read(&self, from: usize, to: usize, state: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let rows = |x: &Tensor<3>| x.clone().narrow(1, from, to - from);
        let row = |x: &Tensor<2>| x.clone().narrow(1, from, to - from);
        let (query, key, value) = (rows(&self.query), rows(&self.key), rows(&self.value));
        gated_delta(query, key, value, [row(&self.decay), row(&self.rate)], state)
    }

    /// What is read and the states at the end, by the rule.
    fn by_the_rule(&self) -> (Vec<f64>, Vec<f64>) {
        let [heads, tokens, key_dim] = self.query.dims();
        let value_dim = self.value.dims()[2];
        let [query, key, value, mut states] = [&self.query, &self.key, &self.value, &self.state].map(numbers);
        let [decay, rate] = [&self.decay, &self.rate].map(numbers);
        let mut read = vec![0.0; heads * tokens * value_dim];
        for head in 0..heads {
            let state = &mut states[head * key_dim * value_dim..][..key_dim * value_dim];
            for token in head * tokens..(head + 1) * tokens {
                state.iter_mut().for_each(|x| *x *= decay[token].exp());
                let (query, key) = (&query[token * key_dim..][..key_dim], &key[token * key_dim..][..key_dim]);
                for column in 0..value_dim {
                    let stored: f64 = (0..key_dim).map(|row| key[row] * state[row * value_dim + column]).sum();
                    let correction = rate[token] * (value[token * value_dim + column] - stored);
                    (0..key_dim).for_each(|row| state[row * value_dim + column] += key[row] * correction);
                    read[token * value_dim + column] =
                        (0..key_dim).map(|row| query[row] * state[row * value_dim + column]).sum();
                }
            }
        }
        (read, states)
    }
}

fn numbers<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.clone().try_into_vec_as::<f32>().unwrap().into_iter().map(f64::from).collect()
}

/// Largest difference relative to the largest number.
fn apart(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1.0, |most: f64, x| most.max(x.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |worst: f64, x| if x.is_nan() { f64::INFINITY } else { worst.max(x) }) / largest
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn chunks_of_any_length_and_single_tokens_are_the_rule(
        heads in 1usize..4, tokens in 1usize..140, key_dim in 1usize..12, value_dim in 1usize..12,
        seed in 1u64..1000, fading in prop::sample::select(vec![0.001, 0.1, 1.0, 30.0]),
        alike in prop::sample::select(vec![0.0, 1.0, 5.0]), pieces in prop::collection::vec(1usize..70, 1..5),
    ) {
        let inputs = Inputs::new([heads, tokens, key_dim, value_dim], (seed, fading, alike), &Device::flex());
        let (expected, states) = inputs.by_the_rule();
        for pieces in [&pieces[..], &[tokens], &[1], &[32], &[33]] {
            let (mut from, mut state, mut reads) = (0, inputs.state.clone(), Vec::new());
            for piece in pieces.iter().cycle() {
                if from == tokens {
                    break;
                }
                let to = tokens.min(from + piece);
                let read;
                (read, state) = inputs.read(from, to, state);
                reads.push(read);
                from = to;
            }
            let error = apart(&numbers(&Tensor::cat(reads, 1)), &expected).max(apart(&numbers(&state), &states));
            prop_assert!(error <= 2e-5, "pieces of {pieces:?}: {error}");
        }
    }
}

/// Gradients of a sum over what is read and the last states, of the part of [`Inputs`] that `part` takes and gives back.
fn gradient<const D: usize>(
    inputs: &Inputs,
    steps: &[usize],
    part: impl Fn(&mut Inputs) -> &mut Tensor<D>,
) -> Vec<f64> {
    let mut tracked = Inputs {
        query: inputs.query.clone().autodiff(),
        key: inputs.key.clone().autodiff(),
        value: inputs.value.clone().autodiff(),
        decay: inputs.decay.clone().autodiff(),
        rate: inputs.rate.clone().autodiff(),
        state: inputs.state.clone().autodiff(),
    };
    let leaf = part(&mut tracked).clone().require_grad();
    *part(&mut tracked) = leaf.clone();
    let (mut from, mut state, mut sum) = (0, tracked.state.clone(), None);
    for step in steps {
        let (read, after) = tracked.read(from, from + step, state);
        state = after;
        from += step;
        let part = read.sin().sum();
        sum = Some(match sum {
            Some(sum) => sum + part,
            None => part,
        });
    }
    let loss: Tensor<1> = sum.unwrap() + state.square().sum();
    numbers(&leaf.grad(&loss.backward()).unwrap())
}

#[test]
fn chunks_have_the_gradients_of_the_rule() {
    let inputs = Inputs::new([2, 45, 5, 4], (7, 0.3, 1.0), &Device::flex());
    let single = [1; 45];
    macro_rules! check {
        ($($part:ident),+) => {$(
            let expected = gradient(&inputs, &single, |inputs| &mut inputs.$part);
            assert!(expected.iter().any(|x| x.abs() > 1e-2), stringify!($part));
            for steps in [&[45][..], &[32, 13], &[7, 38]] {
                let error = apart(&gradient(&inputs, steps, |inputs| &mut inputs.$part), &expected);
                assert!(error <= 1e-4, "{} in {steps:?}: {error}", stringify!($part));
            }
        )+};
    }
    check!(query, key, value, decay, rate, state);
}
