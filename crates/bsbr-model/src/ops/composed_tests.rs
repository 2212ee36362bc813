//! What is put together of other operations: in f32, by the loops, and in f64, by plain operations.

use burn::{
    module::{Module, ModuleMapper, Param},
    nn::{Linear, RmsNorm},
    tensor::{DType, Device, Distribution, Tensor},
};

use super::*;
use crate::{
    Activation, BlockMlp, ExpertsConfig, Mixture, Mlp, RouterConfig, RouterKind, latent::LatentProjections,
    modules::BesideMlp, rotary::Rotation,
};

const HIDDEN: usize = 20;
const HEADS: usize = 3;
const ROTARY: usize = 4;
const STILL: usize = 6;

fn device() -> Device {
    let device = Device::flex();
    device.seed(11);
    device
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// As loaded: `[outputs, inputs]` in memory.
fn linear_of(inputs: usize, outputs: usize, device: &Device) -> Linear {
    let weight = (random([outputs, inputs], device) / (inputs as f64).sqrt()).transpose();
    Linear { weight: Param::from_tensor(weight), bias: None }
}

fn map(inputs: usize, outputs: usize, device: &Device) -> Projection {
    linear_of(inputs, outputs, device).into()
}

fn norm(width: usize, device: &Device) -> Normalisation {
    Normalisation::Rms(RmsNorm { gamma: Param::from_tensor(random([width], device) + 1.0), epsilon: 1e-5 })
}

/// Every number of a module as f64.
struct AsF64;

impl ModuleMapper for AsF64 {
    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|x| x.cast(DType::F64))
    }
}

/// Largest difference of the numbers of two tensors.
fn apart<const D: usize>(found: &Tensor<D>, wide: &Tensor<D>) -> f64 {
    assert_eq!((found.dims(), wide.dtype()), (wide.dims(), DType::F64));
    let numbers = (found.clone().cast(DType::F64) - wide.clone()).abs().try_into_vec_as::<f64>().unwrap();
    numbers.into_iter().fold(0.0, |worst, x| if x.is_nan() { f64::INFINITY } else { worst.max(x) })
}

fn an_mlp(inner: usize, device: &Device) -> Mlp {
    Mlp {
        gate: Some(map(HIDDEN, inner, device)),
        up: map(HIDDEN, inner, device),
        down: map(inner, HIDDEN, device),
        activation: Activation::GeluTanh,
        xielu: None,
        clamped_gate: None,
    }
}

#[test]
fn experts_beside_an_mlp_are_the_same() {
    let device = device();
    let router = RouterConfig {
        kind: RouterKind::Softmax,
        bias: false,
        correction: false,
        groups: None,
        normalised: Some(1e-20),
        scale: None,
        expert_scale: true,
        own_norm: true,
    };
    let (count, chosen, intermediate_size) = (5, 2, 7);
    let config = ExpertsConfig {
        count,
        chosen,
        intermediate_size,
        router,
        bias: false,
        shared: None,
        beside_mlp: true,
        dense_layers: vec![],
    };
    let mixture = Mixture {
        router: linear_of(HIDDEN, count, &device),
        correction: None,
        experts: (0..count).map(|_| an_mlp(intermediate_size, &device)).collect(),
        shared: None,
        shared_gate: None,
        beside: Some(BesideMlp {
            mlp: an_mlp(9, &device),
            post_norm: norm(HIDDEN, &device),
            experts_norm: norm(HIDDEN, &device),
            experts_post_norm: norm(HIDDEN, &device),
        }),
        router_norm: Some(norm(HIDDEN, &device)),
        expert_scale: Some(vec![0.5, 1.5, 2.0, 0.1, 1.0]),
        config,
    };
    let (block, before) = (BlockMlp::Mixture(mixture), norm(HIDDEN, &device));
    let (wide, wide_before) = (block.clone().map(&mut AsF64), before.clone().map(&mut AsF64));
    for tokens in [1, 3, 40] {
        let x = random([tokens, HIDDEN], &device);
        for factor in [None, Some(0.7)] {
            let found = block_mlp(x.clone(), Some(&before), &block, factor, Packing::ByNumber);
            let expected = block_mlp(x.clone().cast(DType::F64), Some(&wide_before), &wide, factor, Packing::ByNumber);
            assert!(apart(&found, &expected) <= 2e-5, "{tokens} {factor:?}: {}", apart(&found, &expected));
        }
    }
}

#[test]
fn inputs_of_a_layer_are_joined_the_same() {
    let device = device();
    for activation in [Activation::GeluTanh, Activation::GeluErf, Activation::Silu, Activation::Relu2] {
        let (gate, down) = (map(HIDDEN, 6, &device), map(6, HIDDEN, &device));
        let own = PerLayerInput { gate, down, norm: norm(HIDDEN, &device), activation };
        let wide = own.clone().map(&mut AsF64);
        for tokens in [1, 3, 40] {
            let (x, inputs) = (random([tokens, HIDDEN], &device), random([tokens, 6], &device));
            let found = per_layer(&x, inputs.clone(), &own, Packing::ByNumber);
            let expected = per_layer(&x.cast(DType::F64), inputs.cast(DType::F64), &wide, Packing::ByNumber);
            assert!(apart(&found, &expected) <= 5e-6, "{activation:?} {tokens}: {}", apart(&found, &expected));
        }
    }
}

#[test]
fn heads_of_narrow_vectors_are_the_same() {
    let device = device();
    for (narrow, value_dim) in [(true, 7), (false, 7), (true, ROTARY + STILL)] {
        let (rank, query_rank) = (8, 11);
        let source = if narrow { query_rank } else { HIDDEN };
        let projections = Projections {
            query: map(source, HEADS * STILL, &device),
            key: Some(map(rank, HEADS * STILL, &device)),
            value: Some(map(rank, HEADS * value_dim, &device)),
            output: map(HEADS * value_dim, HIDDEN, &device),
            latent: Some(LatentProjections {
                query_latent: narrow.then(|| map(HIDDEN, query_rank, &device)),
                query_latent_norm: narrow.then(|| norm(query_rank, &device)),
                query_rotary: map(source, HEADS * ROTARY, &device),
                latent: map(HIDDEN, rank, &device),
                latent_norm: norm(rank, &device),
                key_rotary: map(HIDDEN, ROTARY, &device),
                rotary_dim: ROTARY,
                value_dim,
            }),
            gate: None,
            recurrent: None,
            query_norm: None,
            key_norm: None,
            value_norm: None,
            norm_after_rotary: false,
            meta_query: None,
            meta_key: None,
            state_basis: None,
            gates: None,
            sink_logits: None,
            adapters: None,
        };
        let before = norm(HIDDEN, &device);
        let (wide, wide_before) = (projections.clone().map(&mut AsF64), before.clone().map(&mut AsF64));
        for tokens in [1, 3, 40] {
            let x = random([tokens, HIDDEN], &device);
            let frequencies = (vec![0.3, 0.1], 1.1);
            let rotation = |dtype| Rotation::new((0..tokens).map(|at| (at, &frequencies)), &device, dtype);
            let (turned, wide_turned) = (rotation(DType::F32), rotation(DType::F64));
            let factors: Vec<f32> = (0..tokens).map(|token| 1.0 + token as f32 / 7.0).collect();
            let places = |rotation| Places {
                rotation: Some(rotation),
                temperature: Some(&factors[..]),
                packing: Packing::ByNumber,
            };
            let width = ROTARY + STILL;
            let found = heads(&x, Some(&before), &projections, places(&turned), width);
            let expected = heads(&x.cast(DType::F64), Some(&wide_before), &wide, places(&wide_turned), width);
            assert!(apart(&found.query, &expected.query) <= 2e-5);
            for (found, expected) in found.rows.unwrap().iter().zip(&expected.rows.unwrap()) {
                assert_eq!(found.dims(), [HEADS, tokens, width]);
                assert!(apart(found, expected) <= 2e-5);
            }
        }
    }
}
