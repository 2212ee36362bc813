//! Both forms of every operation against each other, and gradients against differences in f64.

use burn::{
    module::{Module, ModuleMapper, Param},
    nn::{LayerNormConfig, Linear, RmsNorm},
    tensor::{DType, Device, Distribution, Tensor},
};

use bsbr_weights::{Arithmetic, StoredMatrix};

use super::*;
use crate::{
    Activation, ClampedGate,
    modules::{EachHeadNorm, HeadNormalisation, LayerNormalisation, Xielu},
    rotary::Rotation,
};

const HEADS: usize = 3;
const WIDTH: usize = 10;
const HIDDEN: usize = 22;

fn device() -> Device {
    let device = Device::flex();
    device.seed(7);
    device
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// As loaded: `[outputs, inputs]` in memory.
fn map(inputs: usize, outputs: usize, bias: bool, device: &Device) -> Linear {
    let weight = (random([outputs, inputs], device) / (inputs as f64).sqrt()).transpose();
    Linear { weight: Param::from_tensor(weight), bias: bias.then(|| Param::from_tensor(random([outputs], device))) }
}

fn rms(width: usize, device: &Device) -> RmsNorm {
    RmsNorm { gamma: Param::from_tensor(random([width], device)), epsilon: 1e-5 }
}

fn layer_norm(width: usize, bias: bool, device: &Device) -> Normalisation {
    let epsilon = 1e-5;
    let mut norm = LayerNormConfig::new(width).with_epsilon(epsilon).with_bias(bias).init(device);
    norm.gamma = Param::from_tensor(random([width], device));
    norm.beta = bias.then(|| Param::from_tensor(random([width], device)));
    Normalisation::Layer(LayerNormalisation { norm, epsilon })
}

fn layer_plus_one(width: usize, device: &Device) -> Normalisation {
    match layer_norm(width, true, device) {
        Normalisation::Layer(norm) => Normalisation::LayerPlusOne(norm),
        other => other,
    }
}

fn norms(width: usize, device: &Device) -> Vec<Normalisation> {
    vec![
        Normalisation::Rms(rms(width, device)),
        Normalisation::RmsPlusOne(rms(width, device)),
        layer_norm(width, false, device),
        layer_norm(width, true, device),
        layer_plus_one(width, device),
    ]
}

fn head_norms(device: &Device) -> Vec<Option<HeadNormalisation>> {
    let each = |plus_one| {
        let weight = Param::from_tensor(random([HEADS, WIDTH], device));
        Some(HeadNormalisation::EachHead(EachHeadNorm { plain: layer_norm(WIDTH, false, device), weight, plus_one }))
    };
    let mut all = vec![None, each(false), each(true)];
    all.extend(norms(WIDTH, device).into_iter().map(|norm| Some(HeadNormalisation::Head(norm))));
    all.extend(norms(HEADS * WIDTH, device).into_iter().map(|norm| Some(HeadNormalisation::AllHeads(norm))));
    all
}

fn projections(norm: Option<HeadNormalisation>, bias: bool, device: &Device) -> Projections {
    let of = |heads: usize| map(HIDDEN, heads * WIDTH, bias, device).into();
    Projections {
        query: of(HEADS),
        key: Some(of(HEADS)),
        value: Some(of(1)),
        latent: None,
        gate: None,
        recurrent: None,
        output: map(HEADS * WIDTH, HIDDEN, bias, device).into(),
        query_norm: norm.clone(),
        key_norm: norm,
        value_norm: None,
        norm_after_rotary: false,
        sink_logits: None,
        meta_query: None,
        meta_key: None,
        state_basis: None,
        gates: None,
        adapters: None,
    }
}

fn an_mlp(activation: Activation, gate: bool, bias: bool, device: &Device) -> Mlp {
    Mlp {
        gate: gate.then(|| map(HIDDEN, 50, bias, device).into()),
        up: map(HIDDEN, 50, bias, device).into(),
        down: map(50, HIDDEN, bias, device).into(),
        activation,
        xielu: Some(Xielu::of_stored([0.8, 0.3, 0.5, -1e-6])),
        clamped_gate: None,
    }
}

/// Largest difference, in units of the largest number.
fn difference<const D: usize>(a: &Tensor<D>, b: &Tensor<D>) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let numbers = |x: &Tensor<D>| x.clone().cast(DType::F64).try_into_vec_as::<f64>().unwrap();
    let (a, b) = (numbers(a), numbers(b));
    let largest = b.iter().fold(1e-30f64, |largest, x| largest.max(x.abs()));
    let apart = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, |worst: f64, x| if x.is_nan() { f64::INFINITY } else { worst.max(x) }) / largest
}

mod fused_and_plain {
    use super::*;

    const CLOSE: f64 = 3e-6;

    /// Few tokens, as many as a strip has, and more.
    const TOKENS: [usize; 5] = [1, 5, 17, 64, 90];

    #[test]
    fn every_norm_is_the_same() {
        let device = device();
        for tokens in TOKENS {
            for norm in norms(HIDDEN, &device) {
                let x = random([tokens, HIDDEN], &device) + 0.5;
                let found = fused::normalise(&norm, &x).unwrap();
                assert!(difference(&found, &plain::normalise(&norm, x)) <= CLOSE, "{norm:?}");
            }
        }
    }

    #[test]
    fn linear_maps_are_the_same_and_weights_in_another_order_take_the_plain_form() {
        let device = device();
        for tokens in TOKENS {
            let (x, map) = (random([tokens, HIDDEN], &device), map(HIDDEN, 70, true, &device));
            let (weight, bias) = (map.weight.val(), map.bias.as_ref().map(Param::val));
            let expected = plain::linear(x.clone(), weight.clone(), bias.clone());
            let found = fused::linear(&x, &Weight::Tensor(weight.clone()), bias.as_ref(), Packing::ByNumber).unwrap();
            assert!(difference(&found, &expected) <= CLOSE);
            let other = Tensor::<2>::zeros([HIDDEN, 70], &device) + weight.clone();
            let other = other.slice_assign([0..HIDDEN, 0..70], weight);
            assert!(difference(&linear(x, Weight::Tensor(other), bias, Packing::ByNumber), &expected) <= CLOSE);
        }
    }

    #[test]
    fn stored_weights_are_those_of_the_same_numbers_in_f32() {
        let device = device();
        let (inputs, outputs) = (64, 33);
        for format in bsbr_weights::Format::ALL.into_iter().filter(|format| inputs % format.block() == 0) {
            // Any bits are codes; scales of one, since 0x3c00 is.
            let bytes = (0..outputs * format.row_bytes(inputs).unwrap()).map(|at| match format.block_bytes() {
                2 | 4 => [0x20, 0x3c][at % 2],
                size => {
                    if at % size % 2 == 0 {
                        0
                    } else {
                        0x3c
                    }
                }
            });
            let stored = StoredMatrix::new(format, [outputs, inputs], bytes.collect::<Vec<u8>>()).unwrap();
            for tokens in TOKENS {
                let (x, bias) = (random([tokens, inputs], &device), random([outputs], &device));
                let weight = || Weight::Stored(stored.clone(), Arithmetic::F32);
                let dense = weight().like(&x);
                let expected = plain::linear(x.clone(), dense, Some(bias.clone()));
                let found = linear(x, weight(), Some(bias), Packing::ByNumber);
                let scale = difference(&expected, &Tensor::zeros([tokens, outputs], &device));
                assert!(difference(&found, &expected) <= CLOSE * scale.max(1.0), "{format} {tokens}");
            }
        }
    }

    #[test]
    fn heads_are_the_same_with_every_norm_and_rotation() {
        let device = device();
        for (at, head_norm) in head_norms(&device).into_iter().enumerate() {
            let tokens = TOKENS[at % TOKENS.len()];
            // All heads together are normalised first, whatever they are rotated by.
            let together = matches!(head_norm, Some(HeadNormalisation::AllHeads(_)));
            let mut projections = projections(head_norm, at % 2 == 0, &device);
            projections.norm_after_rotary = !together && at % 3 == 0;
            let factors: Vec<f32> = (0..tokens).map(|token| 1.0 + token as f32 / 7.0).collect();
            let temperature = (at % 2 == 1).then_some(&factors[..]);
            let x = random([tokens, HIDDEN], &device);
            for rotated in [0, 4, WIDTH] {
                let frequencies = ((0..rotated / 2).map(|at| 0.3 / (at + 1) as f64).collect::<Vec<_>>(), 1.1);
                let positions = (0..tokens).map(|position| (position, &frequencies));
                let rotation = (rotated > 0).then(|| Rotation::new(positions, &device, DType::F32));
                for (form, norm) in norms(HIDDEN, &device).iter().map(Some).chain([None]).enumerate() {
                    let places = Places { rotation: rotation.as_ref(), temperature, packing: Packing::ByNumber };
                    let mut projections = projections.clone();
                    // Values normed, values of the keys, and a layer that has neither.
                    if form % 2 == 1 {
                        let norm = Normalisation::Rms(rms(WIDTH, &device));
                        projections.value_norm = Some(HeadNormalisation::Head(norm));
                    }
                    projections.value = projections.value.filter(|_| form % 3 == 0);
                    projections.key = projections.key.filter(|_| form % 3 != 2);
                    let parts =
                        |heads: Heads| [vec![heads.query], heads.rows.map(Vec::from).unwrap_or_default()].concat();
                    let found = parts(fused::heads(&x, norm, &projections, places, WIDTH).unwrap());
                    let expected = parts(plain::heads(&x, norm, &projections, places, WIDTH));
                    assert_eq!((found.len(), expected.len()), if form % 3 == 2 { (1, 1) } else { (3, 3) });
                    for (found, expected) in found.iter().zip(&expected) {
                        assert!(difference(found, expected) <= CLOSE, "{:?}", projections.query_norm);
                    }
                }
            }
        }
    }

    #[test]
    fn heads_are_joined_the_same_however_they_lie_in_memory() {
        let device = device();
        let output = map(HEADS * WIDTH, HIDDEN, true, &device).into();
        for tokens in TOKENS {
            let in_order = random([1, HEADS, tokens, WIDTH], &device);
            let by_token = random([1, tokens, HEADS, WIDTH], &device).swap_dims(1, 2);
            let by_number = random([1, HEADS, WIDTH, tokens], &device).swap_dims(2, 3);
            let cut = random([1, HEADS, tokens + 3, WIDTH], &device).narrow(2, 2, tokens);
            for read in [in_order, by_token, by_number, cut] {
                for factor in [None, Some(1.0), Some(0.3)] {
                    let x = random([tokens, HIDDEN], &device);
                    let onto = factor.map(|factor| (x.clone(), factor));
                    assert!(fused::JoinHeads::new(&read, (&output, None), &onto).is_some());
                    let expected = plain::join_heads(read.clone(), (&output, None), onto.clone());
                    let kept = onto.clone();
                    assert!(
                        difference(&join_heads(read.clone(), (&output, None), onto, Packing::ByNumber), &expected)
                            <= CLOSE
                    );
                    // What another still holds is not changed.
                    assert!(kept.is_none_or(|(kept, _)| difference(&kept, &x) == 0.0));
                }
            }
        }
    }

    #[test]
    fn every_mlp_is_the_same() {
        let device = device();
        for activation in [
            Activation::GeluTanh,
            Activation::GeluErf,
            Activation::Silu,
            Activation::Relu,
            Activation::Relu2,
            Activation::Xielu,
        ] {
            for (at, tokens) in TOKENS.into_iter().enumerate() {
                let gate = at % 2 == 0 && activation != Activation::Xielu;
                let mut block = an_mlp(activation, gate, at % 3 == 0, &device);
                // Bounds that some numbers reach and some do not.
                let bounded = gate && activation == Activation::Silu && at > 0;
                block.clamped_gate = bounded.then_some(ClampedGate { limit: 0.8, alpha: 1.702 });
                let norm = &norms(HIDDEN, &device)[at % 5];
                for (norm, factor) in [(None, None), (Some(norm), Some(1.0)), (Some(norm), Some(0.3))] {
                    let x = random([tokens, HIDDEN], &device);
                    assert!(fused::WholeMlp::new(&x, norm, &block, Packing::ByNumber).is_some());
                    let expected = plain::mlp(x.clone(), norm, &block, factor);
                    assert!(
                        difference(&mlp(x, norm, &block, factor, Packing::ByNumber), &expected) <= CLOSE,
                        "{activation:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_softcap_is_the_same() {
        let device = device();
        let x = random([20, 33], &device) * 40.0;
        assert!(fused::runs(&x));
        let expected = (x.clone() / 30.0).tanh() * 30.0;
        assert!(difference(&softcap(x, 30.0), &expected) <= CLOSE);
    }

    #[test]
    fn other_types_and_tracked_tensors_are_left_to_the_plain_form() {
        let (device, tracked) = (device(), device().autodiff());
        assert!(fused::runs(&random([3, 4], &device)));
        assert!(!fused::runs(&random([3, 4], &device).cast(DType::F64)));
        assert!(!fused::runs(&random([3, 4], &device).cast(DType::F16)));
        assert!(!fused::runs(&random([3, 4], &tracked)));
    }
}

/// A block in small: norm, heads, join, MLP, to one number.
fn one_number(x: Tensor<2>, norm: &Normalisation, projections: &Projections, block: &Mlp) -> Tensor<1> {
    let Heads { query, rows } = heads(&x, Some(norm), projections, Places::default(), WIDTH);
    let [key, value] = rows.unwrap();
    let [query, key, value] = [query, key, value].map(Tensor::unsqueeze::<4>);
    let read = query * key + value;
    let x = join_heads(read, (&projections.output, None), Some((x, 0.5)), Packing::ByNumber);
    mlp(x, Some(norm), block, Some(1.0), Packing::ByNumber).square().sum()
}

/// Every number of a module as f64.
struct AsF64;

impl ModuleMapper for AsF64 {
    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|x| x.cast(DType::F64))
    }
}

#[test]
fn gradients_through_the_operations_are_those_of_differences_in_f64() {
    let device = device();
    let tracked = device.clone().autodiff();
    let norm = Normalisation::Rms(rms(HIDDEN, &device));
    let projections = projections(head_norms(&device).swap_remove(1), true, &device);
    let block = an_mlp(Activation::GeluTanh, true, false, &device);
    let x = random([4, HIDDEN], &device);
    let towards = random([4, HIDDEN], &device);

    let input = Tensor::<2>::from_data(x.clone().into_data(), &tracked).require_grad();
    let (on_norm, on_projections) = (norm.clone().to_device(&tracked), projections.clone().to_device(&tracked));
    let on_block = block.clone().to_device(&tracked);
    let gradients = one_number(input.clone(), &on_norm, &on_projections, &on_block).backward();
    let gradient = Tensor::<2>::from_data(input.grad(&gradients).unwrap().into_data(), &device);
    let found = (gradient * towards.clone()).sum().into_scalar::<f32>() as f64;

    let (norm, projections, block) = (norm.map(&mut AsF64), projections.map(&mut AsF64), block.map(&mut AsF64));
    let (x, towards) = (x.cast(DType::F64), towards.cast(DType::F64));
    let moved =
        |by: f64| one_number(x.clone() + towards.clone() * by, &norm, &projections, &block).into_scalar::<f64>();
    // Wide steps, because on this device not every operation on f64 is right to more than f32; two of them, so that what is
    // left is of the fourth order in the step (Richardson).
    let slope = |step: f64| (moved(step) - moved(-step)) / (2.0 * step);
    let expected = (4.0 * slope(2e-2) - slope(4e-2)) / 3.0;
    assert!((found - expected).abs() <= 2e-5 * expected.abs(), "{found}, expected {expected}");
}
