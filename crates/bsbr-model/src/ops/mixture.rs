//! A mixture of experts: every token goes through those its router chooses, and nothing is computed for the others.

mod choice;

use burn::{
    module::Param,
    tensor::{IndexingUpdateOp, Int, Tensor, TensorData, activation},
};

use self::choice::{Choice, choose};
use super::{Packing, linear};
use crate::{
    RouterConfig, RouterKind,
    modules::{Mixture, Mlp, Normalisation},
    stored::Weight,
};

/// `[tokens, hidden_size]` to the same; `norm` is that of what they read in `stream`.
pub(super) fn forward(
    stream: &Tensor<2>,
    norm: Option<&Normalisation>,
    mixture: &Mixture,
    packing: Packing,
) -> Tensor<2> {
    if let Some(beside) = &mixture.beside {
        let made = super::mlp(stream.clone(), norm, &beside.mlp, None, packing);
        let x = beside.experts_norm.forward(stream.clone());
        let routed = routed(&x, stream, mixture, packing);
        return beside.post_norm.forward(made) + beside.experts_post_norm.forward(routed);
    }
    let x = &super::normalised(norm, stream);
    let routed = routed(x, stream, mixture, packing);
    let Some(shared) = &mixture.shared else { return routed };
    let made = super::mlp(x.clone(), None, shared, None, packing);
    routed
        + match &mixture.shared_gate {
            Some(gate) => {
                made * activation::sigmoid(linear(x.clone(), Weight::Tensor(gate.weight.val()), None, packing))
            }
            None => made,
        }
}

/// The scores of the experts, `[tokens, experts]`.
fn scores(x: &Tensor<2>, stream: &Tensor<2>, mixture: &Mixture, packing: Packing) -> Tensor<2> {
    let weight = Weight::Tensor(mixture.router.weight.val());
    let bias = mixture.router.bias.as_ref().map(Param::val);
    let Some(norm) = &mixture.router_norm else { return linear(x.clone(), weight, bias, packing) };
    let width = stream.dims()[1] as f64;
    linear(norm.forward(stream.clone()) / width.sqrt(), weight, bias, packing)
}

/// What the chosen experts give.
fn routed(x: &Tensor<2>, stream: &Tensor<2>, mixture: &Mixture, packing: Packing) -> Tensor<2> {
    let router = &mixture.config.router;
    let factor = |expert: usize| mixture.expert_scale.as_ref().map_or(1.0, |factors| factors[expert]);
    let scores = scores(x, stream, mixture, packing);
    let [tokens, count] = scores.dims();
    // Which experts they are has no gradient, how much they weigh has.
    let Ok(numbers) = scores.clone().try_into_vec_as::<f64>() else {
        unreachable!("numbers of a device can be read");
    };
    let correction = mixture.correction.as_deref();
    let of_token = |scores| choose(scores, correction, mixture.config.chosen, router);
    let choices: Vec<Choice> = numbers.chunks_exact(count).map(of_token).collect();
    #[cfg(feature = "flex")]
    if super::fused::runs(&scores) {
        let mut experts: Vec<(&Mlp, Vec<(usize, f32)>)> = mixture.experts.iter().map(|it| (it, Vec::new())).collect();
        for (token, (choice, scores)) in choices.iter().zip(numbers.chunks_exact(count)).enumerate() {
            for (expert, weight) in choice.weights(scores, router) {
                experts[expert].1.push((token, weight as f32 * factor(expert)));
            }
        }
        experts.retain(|(_, rows)| !rows.is_empty());
        if let Some(routed) = super::fused::experts(x, &experts, packing) {
            return routed;
        }
    }
    let weights = weights(scores, &choices, router);
    let device = x.device();
    let mut routed = Tensor::zeros([tokens, x.dims()[1]], (&device, x.dtype()));
    for (number, expert) in mixture.experts.iter().enumerate() {
        let chosen = choices.iter().enumerate().filter(|(_, choice)| choice.experts.contains(&number));
        let rows: Vec<i32> = chosen.map(|(token, _)| token as i32).collect();
        if rows.is_empty() {
            continue;
        }
        let length = rows.len();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [length]), &device);
        let made = super::mlp(x.clone().select(0, rows.clone()), None, expert, None, packing);
        let weight = weights.clone().narrow(1, number, 1).select(0, rows.clone()) * factor(number);
        routed = routed.select_assign(0, rows, made * weight, IndexingUpdateOp::Add);
    }
    routed
}

/// The weights of all experts, `[tokens, experts]`, 0 for those a token does not go through.
fn weights(scores: Tensor<2>, choices: &[Choice], router: &RouterConfig) -> Tensor<2> {
    let [tokens, count] = scores.dims();
    let device = scores.device();
    let dtype = scores.dtype();
    let mask = |of: &dyn Fn(&Choice, usize) -> bool, yes: f32, no: f32| {
        let mask = choices.iter().flat_map(|choice| (0..count).map(|it| if of(choice, it) { yes } else { no }));
        Tensor::<2>::from_data(TensorData::new(mask.collect::<Vec<f32>>(), [tokens, count]), (&device, dtype))
    };
    let weights = match router.kind {
        RouterKind::Softmax => {
            activation::softmax(scores, 1) * mask(&|it, expert| it.experts.contains(&expert), 1.0, 0.0)
        }
        RouterKind::Sigmoid => activation::sigmoid(scores) * mask(&|it, expert| it.experts.contains(&expert), 1.0, 0.0),
        RouterKind::Sparsemixer { .. } => {
            let of = |slot: usize| {
                let among = mask(&|it, expert| it.among[slot].contains(&expert), 0.0, -1e30);
                let own = mask(&|it, expert| it.experts[slot] == expert, 1.0, 0.0);
                activation::softmax(scores.clone() + among, 1) * own
            };
            of(0) + of(1)
        }
    };
    let weights = match router.normalised {
        Some(least) => weights.clone() / weights.sum_dim(1).clamp_min(least),
        None => weights,
    };
    match router.scale {
        Some(scale) => weights * scale,
        None => weights,
    }
}
