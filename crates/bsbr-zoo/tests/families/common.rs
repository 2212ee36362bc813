//! Random cases and what is read out of a decoder.

use bsbr_attn::{BlockAttentionConfig, Far};
use bsbr_zoo::{DecoderConfig, Family, Positions, SmallDecoder};
use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Device, Gradients, Int, Tensor, TensorData},
};
use proptest::{prelude::*, test_runner::RngSeed};

/// A decoder and texts for it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) config: DecoderConfig,
    pub(crate) seed: u64,
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
}

impl Case {
    pub(crate) fn decoder(&self, device: &Device) -> SmallDecoder {
        SmallDecoder::new(&self.config, self.seed, device).unwrap()
    }

    /// Token ids, text after text.
    pub(crate) fn ids(&self) -> Vec<i64> {
        let mut state = self.seed;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % self.config.vocabulary as u64) as i64
        };
        (0..self.batch * self.tokens).map(next).collect()
    }

    pub(crate) fn tensor(&self, ids: Vec<i64>, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(ids, [self.batch, self.tokens]), device)
    }

    pub(crate) fn input(&self, device: &Device) -> Tensor<2, Int> {
        self.tensor(self.ids(), device)
    }
}

/// Settings for `cases` cases from a fixed seed, or from the one in the environment.
pub(crate) fn settings(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let rng_seed = if default.rng_seed == RngSeed::Random { RngSeed::Fixed(1) } else { default.rng_seed };
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..default }
}

/// Cases of every family: chunks and windows that do not divide the length, and ones longer than the text.
pub(crate) fn cases() -> impl Strategy<Value = Case> {
    let shape = (
        prop::sample::select(Family::ALL.to_vec()),
        prop::sample::select(vec![(1, 4), (2, 4), (2, 6), (3, 2)]),
        1usize..=2,
        0usize..=2,
        0usize..=4,
        prop::sample::select(vec![Positions::None, Positions::Rotary]),
        any::<bool>(),
    );
    let sizes = (1usize..=17, 1usize..=17, 0usize..=5);
    let hopfield = (1usize..=3, prop::sample::select(vec![0.5, 1.0, 2.0]), any::<bool>());
    let bsbr = (
        prop::sample::select(vec![64, 128]),
        0usize..=1,
        0usize..=3,
        1usize..=20,
        prop::sample::select(vec![Far::None, Far::Mean]),
    );
    let text = (any::<u64>(), 1usize..=2, 1usize..=70);
    (shape, sizes, hopfield, bsbr, text).prop_map(|(shape, sizes, hopfield, bsbr, text)| {
        let (family, (heads, head_dim), layers, mlp_factor, short_convolution, positions, tied_head) = shape;
        let (bsbr_chunk, local_chunks, sink_tokens, max_keys, far) = bsbr;
        let (seed, batch, tokens) = text;
        // An index has chunks of whole sections: what is behind them begins where other families have long been far.
        let tokens = if family == Family::Bsbr { 3 * tokens } else { tokens };
        let config = DecoderConfig {
            family,
            vocabulary: 13,
            width: heads * head_dim,
            layers,
            heads,
            mlp_factor,
            short_convolution,
            positions,
            tied_head,
            chunk_size: sizes.0,
            window: sizes.1,
            sinks: sizes.2,
            hopfield_steps: hopfield.0,
            hopfield_beta: hopfield.1,
            hopfield_learned: hopfield.2,
            bsbr: BlockAttentionConfig {
                chunk_size: bsbr_chunk,
                local_chunks,
                sink_tokens,
                max_keys,
                far,
                exact_tokens: 0,
                ..Default::default()
            },
        };
        Case { config, seed, batch, tokens }
    })
}

pub(crate) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().unwrap()
}

/// The largest difference.
pub(crate) fn difference(left: &[f64], right: &[f64]) -> f64 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f64::max)
}

/// A weight, or its gradient.
#[derive(Debug, Clone)]
pub(crate) struct Weight {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) numbers: Vec<f64>,
}

/// Every weight of a decoder in a fixed order, or their gradients.
pub(crate) fn weights(decoder: &SmallDecoder, gradients: Option<&Gradients>) -> Vec<Weight> {
    struct Reader<'a> {
        path: Vec<String>,
        gradients: Option<&'a Gradients>,
        found: Vec<Weight>,
    }
    impl ModuleVisitor for Reader<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            let shape = value.dims().to_vec();
            let name = self.path.join(".");
            let value = match self.gradients {
                Some(gradients) => value.grad(gradients).unwrap_or_else(|| panic!("`{name}` has no gradient")),
                None => value,
            };
            let numbers = value.try_into_vec_as::<f64>().unwrap();
            self.found.push(Weight { name, shape, numbers });
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut reader = Reader { path: Vec::new(), gradients, found: Vec::new() };
    decoder.visit(&mut reader);
    reader.found
}
