//! Gradients against central finite differences, in f64; through an index, of its definition.

mod common;

use bsbr_attn::{
    AttentionCache, AttentionOptions, BlockAttentionConfig, CacheConfig, Far, Kernel, Meta, Retrieval, Selector, attend,
};
use burn::tensor::{DType, Device, Tensor, TensorData};
use common::{Case, Inputs, Numbers, Rows, cpu_devices, index::Reference, naive, sinks_from};

const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const WIDTH: usize = 4;
const TOKENS: usize = 15;

/// Half of the distance between two points of a finite difference: errors of its square and of rounding meet here.
const STEP: f64 = 1e-5;
const TOLERANCE: f64 = 1e-6;

struct Problem {
    attention: Option<BlockAttentionConfig>,
    options: AttentionOptions,
    /// Query, keys, values, and with the meta selector its queries and keys.
    inputs: Vec<Input>,
    /// The loss is the sum of the output, weighted by these.
    weights: Input,
}

#[derive(Clone)]
struct Input {
    shape: [usize; 4],
    data: Vec<f64>,
}

impl Input {
    fn random(numbers: &mut Numbers, heads: usize, rows: usize) -> Self {
        let shape = [1, heads, rows, WIDTH];
        Self { shape, data: (0..heads * rows * WIDTH).map(|_| numbers.normal()).collect() }
    }

    fn tensor(&self, device: &Device) -> Tensor<4> {
        Tensor::from_data(TensorData::new(self.data.clone(), self.shape), (device, DType::F64))
    }
}

impl Problem {
    fn new(attention: Option<BlockAttentionConfig>, options: AttentionOptions) -> Self {
        let mut numbers = Numbers::new(11);
        let mut inputs = vec![
            Input::random(&mut numbers, HEADS, TOKENS),
            Input::random(&mut numbers, KV_HEADS, TOKENS),
            Input::random(&mut numbers, KV_HEADS, TOKENS),
        ];
        if let Some(config) = attention.as_ref().filter(|config| config.needs_meta()) {
            inputs.push(Input::random(&mut numbers, HEADS, TOKENS.div_ceil(config.chunk_size)));
            inputs.push(Input::random(&mut numbers, HEADS, TOKENS / config.statistics_block()));
        }
        Self { attention, options, inputs, weights: Input::random(&mut numbers, HEADS, TOKENS) }
    }

    fn loss(&self, inputs: &[Tensor<4>], device: &Device) -> Tensor<1> {
        let [query, keys, values, meta @ ..] = inputs else { unreachable!() };
        let meta = match meta {
            [query, key] => Some(Meta { query: Some(query.clone()), key: Some(key.clone()) }),
            _ => None,
        };
        let output =
            attend(query.clone(), keys.clone(), values.clone(), meta, self.attention.as_ref(), self.options.clone())
                .unwrap();
        (output * self.weights.tensor(device)).sum()
    }

    /// The loss with number `at` of input `which` moved by `by`.
    fn moved(&self, which: usize, at: usize, by: f64, device: &Device) -> f64 {
        let mut inputs = self.inputs.clone();
        inputs[which].data[at] += by;
        let tensors: Vec<Tensor<4>> = inputs.iter().map(|input| input.tensor(device)).collect();
        self.loss(&tensors, device).into_scalar()
    }

    fn assert_gradients(&self, device: &Device) {
        let training = device.clone().autodiff();
        let tensors: Vec<Tensor<4>> = self.inputs.iter().map(|input| input.tensor(&training).require_grad()).collect();
        let gradients = self.loss(&tensors, &training).backward();
        for (which, (input, tensor)) in self.inputs.iter().zip(&tensors).enumerate() {
            let name = ["query", "keys", "values", "meta.query", "meta.key"][which];
            // What only chooses blocks has no gradient at all.
            let found = match tensor.grad(&gradients) {
                Some(gradient) => gradient.try_into_vec_as::<f64>().unwrap(),
                None => vec![0.0; input.data.len()],
            };
            assert_eq!(found.len(), input.data.len());
            for (at, found) in found.into_iter().enumerate() {
                let expected =
                    (self.moved(which, at, STEP, device) - self.moved(which, at, -STEP, device)) / (2.0 * STEP);
                assert!(
                    (found - expected).abs() <= TOLERANCE * (1.0 + expected.abs()),
                    "gradient {at} of {name}: {found} instead of {expected} with {:?}, {:?}",
                    self.attention,
                    self.options
                );
            }
        }
    }
}

fn base() -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 4,
        block_size: 2,
        sink_tokens: 1,
        meta_blocks: 2,
        exact_tokens: 0,
        ..Default::default()
    }
}

/// Checks the settings for a model as it is, with a window, with a softcap, and with sinks.
fn assert_gradients(attention: Option<BlockAttentionConfig>) {
    let plain = AttentionOptions::new(WIDTH);
    let window = AttentionOptions { window: Some(11), ..plain.clone() };
    let softcap = AttentionOptions { softcap: Some(2.0), ..plain.clone() };
    let sinks = AttentionOptions { sink_logits: Some(sinks_from(0.4, HEADS)), ..plain.clone() };
    for options in [plain, window, softcap, sinks] {
        let problem = Problem::new(attention.clone(), options);
        for device in cpu_devices() {
            problem.assert_gradients(&device);
        }
    }
}

#[test]
fn gradients_of_full_attention_are_right() {
    assert_gradients(None);
}

#[test]
fn gradients_without_retrieval_are_right() {
    assert_gradients(Some(BlockAttentionConfig { retrieval: Retrieval::None, ..base() }));
}

#[test]
fn gradients_of_blocks_that_a_chunk_retrieves_are_right() {
    let meta = BlockAttentionConfig { selector: Selector::Meta, ..base() };
    // Few candidates are masked, many are gathered.
    let many = BlockAttentionConfig { block_size: 1, meta_blocks: 1, local_chunks: 0, ..meta.clone() };
    for config in [meta, many] {
        for far in [Far::None, Far::Mean, Far::State] {
            assert_gradients(Some(BlockAttentionConfig { far, ..config.clone() }));
        }
    }
}

#[test]
fn gradients_of_states_are_right() {
    for selector in [Selector::Index, Selector::Meta] {
        for max_chunks in [None, Some(2)] {
            let state = BlockAttentionConfig { retrieval: Retrieval::State, selector, max_chunks, ..base() };
            assert_gradients(Some(state));
        }
    }
    for max_chunks in [None, Some(0), Some(2)] {
        let kept = BlockAttentionConfig { retrieval: Retrieval::State, kept_tokens: 3, max_chunks, ..base() };
        assert_gradients(Some(kept));
    }
}

#[test]
fn gradients_of_the_published_formula_are_right() {
    for selector in [Selector::Index, Selector::Meta] {
        let additive = BlockAttentionConfig { retrieval: Retrieval::Additive, selector, additive_gate: 0.5, ..base() };
        assert_gradients(Some(additive));
    }
}

#[test]
fn gradients_of_compressed_states_are_right() {
    // Rank 1 of states of rank 3, and of the one token that the sinks leave of their block.
    let compressed = BlockAttentionConfig { compression_factor: 2, covariance_weight: 0.0, block_size: 4, ..base() };
    for retrieval in [Retrieval::State, Retrieval::Additive] {
        for sink_tokens in [1, 3] {
            assert_gradients(Some(BlockAttentionConfig { retrieval, sink_tokens, ..compressed.clone() }));
        }
    }
}

/// A text of which keys pass, and blocks and sections count through their means.
fn index_case(far: Far, options: AttentionOptions) -> Case {
    let config = BlockAttentionConfig {
        chunk_size: 64,
        local_chunks: 0,
        sink_tokens: 3,
        exact_tokens: 0,
        threshold: 1.0 / 64.0,
        fine_tokens: 64,
        max_sections: 1,
        far,
        far_shift: 0.3,
        ..Default::default()
    };
    let tokens = 3 * 64 + 9;
    Case {
        batch: 1,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: WIDTH,
        tokens,
        config,
        options,
        seed: 5,
        far: None,
        stored: DType::F32,
    }
}

/// Gradients through an index, of every 17th number: against finite differences of the definition, in which the choice and what
/// rounding takes stay as they are.
#[test]
fn gradients_of_keys_chosen_by_an_index_are_those_of_its_definition() {
    let plain = AttentionOptions::new(WIDTH);
    let window = AttentionOptions { window: Some(150), ..plain.clone() };
    let sinks = AttentionOptions { sink_logits: Some(sinks_from(0.8, HEADS)), ..plain.clone() };
    let model = AttentionOptions { softcap: Some(2.0), alibi: Some(0.1), ..sinks.clone() };
    for (options, far) in [
        (&plain, Far::Mean),
        (&plain, Far::None),
        (&window, Far::Mean),
        (&sinks, Far::Mean),
        (&model, Far::Mean),
        (&model, Far::None),
    ] {
        let case = index_case(far, options.clone());
        let inputs = case.inputs();
        let weights = Rows::random([1, HEADS, case.tokens, WIDTH], 9);
        let mut reference = Reference::new(&case, &inputs);
        let mut loss = |moved: &Inputs| -> f64 {
            let rows = (0..HEADS).flat_map(|h| (0..case.tokens).map(move |t| (h, t)));
            rows.map(|(h, t)| naive::dot(&reference.moved(moved, 0, h, t), &weights.row(0, h, t))).sum()
        };
        for device in cpu_devices() {
            let training = device.autodiff();
            let leaves =
                [&inputs.query, &inputs.keys, &inputs.values].map(|rows| rows.tensor(&training).require_grad());
            let [query, keys, values] = leaves.clone();
            let config = CacheConfig { kernel: Kernel::Plain, ..case.cache_config() };
            let mut cache = AttentionCache::new(config, &training).unwrap();
            let output = cache.prefill(query, keys, values, None).unwrap();
            assert!(cache.retrieved().keys > 0);
            let gradients = (output * weights.tensor(&training)).sum().backward();
            for (which, leaf) in leaves.iter().enumerate() {
                let found = leaf.grad(&gradients).unwrap().try_into_vec_as::<f32>().unwrap();
                for (at, &found) in found.iter().enumerate().step_by(17) {
                    let mut moved = |by: f32| {
                        let mut moved = inputs.clone();
                        let rows = [&mut moved.query, &mut moved.keys, &mut moved.values];
                        let number = &mut rows.into_iter().nth(which).unwrap().data[at];
                        *number += by;
                        (f64::from(*number), loss(&moved))
                    };
                    let ((above, upper), (below, lower)) = (moved(1e-3), moved(-1e-3));
                    let expected = (upper - lower) / (above - below);
                    assert!(
                        (f64::from(found) - expected).abs() <= 2e-4 * (1.0 + expected.abs()),
                        "gradient {at} of input {which}: {found} instead of {expected} with {far:?}, {options:?}"
                    );
                }
            }
        }
    }
}

#[cfg(feature = "flex")]
mod fused {
    use bsbr_attn::{AttentionCache, CacheConfig, Kernel, Retrieval, Selector, attend};
    use bsbr_kernels::{Level, limit_level};
    use burn::tensor::{DType, Device, Tensor};
    use proptest::prelude::*;

    use crate::common::{Case, Rows, index_cases, other_cases, settings};

    /// The output and gradients of `sum(weights * output)`, of tensors of this type, by what `read` does with them.
    fn gradients_by(
        case: &Case,
        dtype: DType,
        read: impl Fn([Tensor<4>; 3]) -> Tensor<4>,
    ) -> (Vec<f64>, Vec<Vec<f64>>) {
        let device = Device::flex().autodiff();
        let inputs = case.inputs();
        let weights = Rows::random([case.batch, case.heads, case.tokens, case.head_dim], case.seed ^ 1);
        let of = |rows: &Rows| rows.tensor(&device).cast(dtype);
        let leaves = [of(&inputs.query), of(&inputs.keys), of(&inputs.values)].map(Tensor::require_grad);
        let output = read(leaves.clone());
        let gradients = (output.clone() * of(&weights)).sum().backward();
        let numbers = |tensor: Tensor<4>| tensor.try_into_vec_as::<f64>().unwrap();
        (numbers(output.inner()), leaves.map(|leaf| numbers(leaf.grad(&gradients).unwrap())).into())
    }

    /// The same of whole texts: in the plain form in f64, through the fused one in f32.
    fn gradients(case: &Case, full: bool, dtype: DType) -> (Vec<f64>, Vec<Vec<f64>>) {
        let attention = (!full).then_some(&case.config);
        gradients_by(case, dtype, |[query, keys, values]| {
            attend(query, keys, values, None, attention, case.options.clone()).unwrap()
        })
    }

    /// The same in the plain form in f32, which has the same integers.
    fn plain_gradients(case: &Case) -> (Vec<f64>, Vec<Vec<f64>>) {
        gradients_by(case, DType::F32, |[query, keys, values]| {
            let config =
                CacheConfig { dtype: DType::F32, stored: DType::F32, kernel: Kernel::Plain, ..case.cache_config() };
            let mut cache = AttentionCache::new(config, &query.device()).unwrap();
            cache.prefill(query, keys, values, None).unwrap()
        })
    }

    fn furthest(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs() / (1.0 + a.abs())).fold(0.0, f64::max)
    }

    proptest! {
        #![proptest_config(settings(96))]

        #[test]
        fn gradients_of_the_fused_form_are_those_of_the_plain_one(mut case in other_cases(), full in any::<bool>()) {
            (case.config.selector, case.config.retrieval) = (Selector::Index, Retrieval::None);
            (case.config.max_chunks, case.config.kept_tokens) = (None, 0);
            let (_, plain) = gradients(&case, full, DType::F64);
            for level in [Level::Scalar, Level::Avx2, Level::Best] {
                limit_level(level);
                let (_, fused) = gradients(&case, full, DType::F32);
                for (name, (plain, fused)) in ["query", "keys", "values"].iter().zip(plain.iter().zip(&fused)) {
                    prop_assert!(furthest(plain, fused) <= 2e-5, "{name} at {level:?}");
                }
            }
        }

        #[test]
        fn gradients_of_retrieval_by_an_index_are_those_of_the_plain_form(case in index_cases()) {
            let (expected, plain) = plain_gradients(&case);
            let (output, _) = gradients(&case, false, DType::F32);
            // A score on the threshold may be rounded to either side; few are.
            prop_assume!(furthest(&expected, &output) < 1e-4);
            for level in [Level::Scalar, Level::Avx2, Level::Best] {
                limit_level(level);
                let (_, fused) = gradients(&case, false, DType::F32);
                for (name, (plain, fused)) in ["query", "keys", "values"].iter().zip(plain.iter().zip(&fused)) {
                    let furthest = furthest(plain, fused);
                    prop_assert!(furthest <= 5e-4, "{name} at {level:?}: {furthest}");
                }
            }
        }

        #[test]
        fn an_index_works_in_f64(case in index_cases()) {
            let (expected, plain) = plain_gradients(&case);
            let (output, wide) = gradients(&case, false, DType::F64);
            // Scores differ by their rounding, and so may choices.
            prop_assume!(furthest(&expected, &output) < 1e-4);
            for (plain, wide) in plain.iter().zip(&wide) {
                prop_assert!(furthest(wide, plain) <= 5e-4);
            }
        }
    }
}
