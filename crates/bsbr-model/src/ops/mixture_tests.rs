//! Mixtures of experts against the definition in f64, number by number.

use burn::{
    module::{Module, ModuleMapper, Param},
    nn::Linear,
    tensor::{DType, Device, Distribution, Tensor},
};

use super::{Packing, block_mlp, mixture};
use crate::{Activation, BlockMlp, ExpertGroups, ExpertsConfig, Mixture, Mlp, RouterConfig, RouterKind, SharedExpert};

const HIDDEN: usize = 22;
const INNER: usize = 30;

fn device() -> Device {
    let device = Device::flex();
    device.seed(11);
    device
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// As loaded: `[outputs, inputs]` in memory.
fn map(inputs: usize, outputs: usize, device: &Device) -> Linear {
    let weight = (random([outputs, inputs], device) / (inputs as f64).sqrt()).transpose();
    Linear { weight: Param::from_tensor(weight), bias: None }
}

fn an_mlp(inner: usize, device: &Device) -> Mlp {
    Mlp {
        gate: Some(map(HIDDEN, inner, device).into()),
        up: map(HIDDEN, inner, device).into(),
        down: map(inner, HIDDEN, device).into(),
        activation: Activation::Silu,
        xielu: None,
        clamped_gate: None,
    }
}

fn router(kind: RouterKind) -> RouterConfig {
    RouterConfig {
        kind,
        bias: false,
        correction: false,
        groups: None,
        normalised: None,
        scale: None,
        expert_scale: false,
        own_norm: false,
    }
}

fn a_mixture(count: usize, chosen: usize, router: RouterConfig, device: &Device) -> Mixture {
    let correction: Option<Vec<f32>> =
        router.correction.then(|| random::<1>([count], device).try_into_vec_as::<f32>().unwrap());
    Mixture {
        router: map(HIDDEN, count, device),
        correction,
        experts: (0..count).map(|_| an_mlp(INNER, device)).collect(),
        shared: Some(an_mlp(17, device)),
        shared_gate: Some(map(HIDDEN, 1, device)),
        beside: None,
        router_norm: None,
        expert_scale: None,
        config: ExpertsConfig {
            count,
            chosen,
            intermediate_size: INNER,
            router,
            bias: false,
            shared: Some(SharedExpert { intermediate_size: 17, gate: true }),
            beside_mlp: false,
            dense_layers: vec![],
        },
    }
}

fn numbers<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.clone().cast(DType::F64).try_into_vec_as::<f64>().unwrap()
}

/// `x` times a weight `[inputs, outputs]`.
fn product(x: &[f64], weight: &Tensor<2>) -> Vec<f64> {
    let [_, outputs] = weight.dims();
    let weight = numbers(weight);
    (0..outputs).map(|out| x.iter().enumerate().map(|(at, x)| x * weight[at * outputs + out]).sum()).collect()
}

fn through(x: &[f64], mlp: &Mlp) -> Vec<f64> {
    let gate = product(x, &mlp.gate.as_ref().unwrap().dense_weight(&Device::flex()));
    let up = product(x, &mlp.up.dense_weight(&Device::flex()));
    let inner: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
    product(&inner, &mlp.down.dense_weight(&Device::flex()))
}

/// The weight of each expert by the definition: of `a` and `b` the better has the higher rank, or the same and the lower
/// number.
fn expert_weights(scores: &[f64], mixture: &Mixture) -> Vec<f64> {
    let ExpertsConfig { count, chosen, ref router, .. } = mixture.config;
    let place = |ranks: &[f64], it: usize| {
        let better = |other: usize| ranks[other] > ranks[it] || (ranks[other] == ranks[it] && other < it);
        (0..ranks.len()).filter(|&other| better(other)).count()
    };
    let softmax = |among: &dyn Fn(usize) -> bool| -> Vec<f64> {
        let powers: Vec<f64> = (0..count).map(|it| if among(it) { scores[it].exp() } else { 0.0 }).collect();
        powers.iter().map(|power| power / powers.iter().sum::<f64>()).collect()
    };
    if let RouterKind::Sparsemixer { jitter } = router.kind {
        let near = |best: usize, it: usize| {
            best == it || (scores[best] - scores[it]) / scores[it].abs().max(scores[best]) <= 2.0 * jitter
        };
        let [first, second] = [0, 1].map(|wanted| (0..count).find(|&it| place(scores, it) == wanted).unwrap());
        let weights = [softmax(&|it| near(first, it)), softmax(&|it| it != first && near(second, it))];
        let weight = |it| {
            if it == first {
                weights[0][it]
            } else if it == second {
                weights[1][it]
            } else {
                0.0
            }
        };
        return (0..count).map(weight).collect();
    }
    let all: Vec<f64> = match router.kind {
        RouterKind::Sigmoid => scores.iter().map(|score| 1.0 / (1.0 + (-score).exp())).collect(),
        _ => softmax(&|_| true),
    };
    let correction = |it: usize| mixture.correction.as_ref().map_or(0.0, |correction| f64::from(correction[it]));
    let mut ranks: Vec<f64> = (0..count).map(|it| all[it] + correction(it)).collect();
    if let Some(groups) = router.groups {
        let best_two = |group: &[f64]| {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            group.iter().take(2).sum::<f64>()
        };
        let size = count / groups.count;
        let sums: Vec<f64> = ranks.chunks(size).map(best_two).collect();
        for (it, rank) in ranks.iter_mut().enumerate() {
            if place(&sums, it / size) >= groups.kept {
                *rank = f64::NEG_INFINITY;
            }
        }
    }
    let weights: Vec<f64> = (0..count).map(|it| if place(&ranks, it) < chosen { all[it] } else { 0.0 }).collect();
    let sum = router.normalised.map_or(1.0, |least| weights.iter().sum::<f64>().max(least));
    weights.iter().map(|weight| weight / sum * router.scale.unwrap_or(1.0)).collect()
}

/// All of it, and how many tokens go through each expert.
fn exact(x: &Tensor<2>, mixture: &Mixture) -> (Vec<f64>, Vec<usize>) {
    let (mut visits, mut rows) = (vec![0; mixture.config.count], Vec::new());
    for x in numbers(x).chunks(HIDDEN) {
        let weights = expert_weights(&product(x, &mixture.router.weight.val()), mixture);
        let mut sum = vec![0.0; HIDDEN];
        let mut add = |weight: f64, made: Vec<f64>| sum.iter_mut().zip(made).for_each(|(sum, y)| *sum += weight * y);
        for (expert, weight) in weights.into_iter().enumerate().filter(|(_, weight)| *weight != 0.0) {
            visits[expert] += 1;
            add(weight, through(x, &mixture.experts[expert]));
        }
        if let Some(shared) = &mixture.shared {
            let gate = mixture.shared_gate.as_ref().map(|gate| product(x, &gate.weight.val())[0]);
            add(gate.map_or(1.0, |gate| 1.0 / (1.0 + (-gate).exp())), through(x, shared));
        }
        rows.extend(sum);
    }
    (rows, visits)
}

fn apart(found: &Tensor<2>, expected: &[f64]) -> f64 {
    let largest = expected.iter().fold(1.0_f64, |largest, x| largest.max(x.abs()));
    let apart = numbers(found).iter().zip(expected).map(|(a, b)| (a - b).abs()).collect::<Vec<_>>();
    apart.into_iter().fold(0.0, |worst: f64, x| if x.is_nan() { f64::INFINITY } else { worst.max(x) }) / largest
}

fn routers() -> Vec<(usize, usize, RouterConfig)> {
    let grouped = |count, kept| RouterConfig {
        groups: Some(ExpertGroups { count, kept, by_highest: false }),
        correction: true,
        normalised: Some(1e-20),
        scale: Some(2.5),
        ..router(RouterKind::Sigmoid)
    };
    vec![
        (5, 2, router(RouterKind::Softmax)),
        (8, 8, RouterConfig { normalised: Some(1e-20), ..router(RouterKind::Softmax) }),
        (7, 1, RouterConfig { scale: Some(0.3), ..router(RouterKind::Softmax) }),
        (6, 3, RouterConfig { correction: true, normalised: Some(1e-12), ..router(RouterKind::Softmax) }),
        (1, 1, router(RouterKind::Sigmoid)),
        (9, 4, RouterConfig { correction: true, ..router(RouterKind::Sigmoid) }),
        (12, 4, grouped(4, 2)),
        (12, 3, grouped(3, 1)),
        (6, 2, router(RouterKind::Sparsemixer { jitter: 0.3 })),
        (6, 2, router(RouterKind::Sparsemixer { jitter: 1e-3 })),
    ]
}

#[test]
fn every_router_chooses_and_weighs_as_its_definition_in_f64_whatever_the_number_of_tokens() {
    let device = device();
    for (count, chosen, router) in routers() {
        for tokens in [1, 2, 7, 30, 90] {
            let mixture = a_mixture(count, chosen, router.clone(), &device);
            let x = random([tokens, HIDDEN], &device);
            let (expected, visits) = exact(&x, &mixture);
            assert_eq!(visits.iter().sum::<usize>(), tokens * chosen);
            let found = apart(&mixture::forward(&x, None, &mixture, Packing::ByNumber), &expected);
            assert!(found <= 3e-6, "{count} {chosen} {tokens} {router:?}: {found}");
            // The plain form, which other devices run.
            let wide = mixture.clone().map(&mut AsF64);
            let found = apart(&mixture::forward(&x.cast(DType::F64), None, &wide, Packing::ByNumber), &expected);
            assert!(found <= 1e-6, "plain, {count} {chosen} {tokens} {router:?}: {found}");
        }
    }
}

#[test]
fn experts_nobody_chose_are_not_read_and_one_that_all_chose_serves_all() {
    let device = device();
    let with_correction = RouterConfig { correction: true, ..router(RouterKind::Sigmoid) };
    let mut mixture = a_mixture(6, 2, with_correction, &device);
    // Every token chooses the fourth and one of the first two.
    mixture.correction = Some(vec![1.0, 1.0, -9.0, 9.0, -9.0, -9.0]);
    let x = random([40, HIDDEN], &device);
    let (expected, visits) = exact(&x, &mixture);
    assert_eq!((visits[3], visits[0] + visits[1], visits[2] + visits[4] + visits[5]), (40, 40, 0));
    for expert in [2, 4, 5] {
        let nothing = Tensor::full([INNER, HIDDEN], f32::NAN, &device).transpose();
        mixture.experts[expert].up = Linear { weight: Param::from_tensor(nothing), bias: None }.into();
    }
    assert!(apart(&mixture::forward(&x, None, &mixture, Packing::ByNumber), &expected) <= 3e-6);
}

#[test]
fn of_experts_that_tie_the_first_are_chosen() {
    let device = device();
    for (kind, normalised) in [(RouterKind::Softmax, Some(1e-20)), (RouterKind::Sigmoid, None)] {
        let mut mixture = a_mixture(6, 2, RouterConfig { normalised, ..router(kind) }, &device);
        mixture.router.weight = Param::from_tensor(Tensor::<2>::zeros([6, HIDDEN], &device).transpose());
        let x = random([9, HIDDEN], &device);
        let (expected, visits) = exact(&x, &mixture);
        assert_eq!(visits, [9, 9, 0, 0, 0, 0]);
        assert!(apart(&mixture::forward(&x, None, &mixture, Packing::ByNumber), &expected) <= 3e-6, "{kind:?}");
    }
}

#[test]
fn a_token_gives_the_same_bits_whichever_experts_its_neighbours_go_through() {
    let device = device();
    for (count, chosen, router) in routers() {
        for tokens in [2, 9, 20, 70] {
            let mixture = a_mixture(count, chosen, router.clone(), &device);
            let x = random([tokens, HIDDEN], &device);
            let other = Tensor::cat(vec![x.clone().narrow(0, 0, tokens - 1), random([1, HIDDEN], &device)], 0);
            let [a, b] = [x, other].map(|x| numbers(&mixture::forward(&x, None, &mixture, Packing::ByNumber)));
            assert_eq!(a[..(tokens - 1) * HIDDEN], b[..(tokens - 1) * HIDDEN], "{count} {chosen} {tokens} {router:?}");
            assert_ne!(a, b);
        }
    }
}

/// Every number of a module as f64.
struct AsF64;

impl ModuleMapper for AsF64 {
    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|x| x.cast(DType::F64))
    }
}

#[test]
fn gradients_through_a_mixture_are_those_of_differences_in_f64() {
    let device = device();
    let tracked = device.clone().autodiff();
    for (count, chosen, router) in routers() {
        let mixture = a_mixture(count, chosen, router.clone(), &device);
        let x = random([4, HIDDEN], &device);
        let towards = random([4, HIDDEN], &device);
        let block = BlockMlp::Mixture(mixture.clone());
        let one_number =
            |x: Tensor<2>, block: &BlockMlp| block_mlp(x, None, block, Some(0.7), Packing::ByNumber).square().sum();

        let input = Tensor::<2>::from_data(x.clone().into_data(), &tracked).require_grad();
        let gradients = one_number(input.clone(), &block.clone().to_device(&tracked)).backward();
        let gradient = Tensor::<2>::from_data(input.grad(&gradients).unwrap().into_data(), &device);
        let found = (gradient * towards.clone()).sum().into_scalar::<f32>() as f64;

        let block = BlockMlp::Mixture(mixture.map(&mut AsF64));
        let (x, towards) = (x.cast(DType::F64), towards.cast(DType::F64));
        let moved = |by: f64| one_number(x.clone() + towards.clone() * by, &block).into_scalar::<f64>();
        // Small steps, so that no token comes to choose other experts.
        let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        let close = (found - expected).abs() <= 1e-4 * expected.abs().max(1.0);
        assert!(close, "{count} {chosen} {router:?}: {found}, expected {expected}");
    }
}
