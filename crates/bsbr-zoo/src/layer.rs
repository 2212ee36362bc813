//! What stands around the attention of every family.

use burn::{
    module::{Module, Param},
    tensor::{Tensor, activation::relu},
};

use crate::{
    DecoderConfig,
    heads::{linear, residual_deviation},
    init::Init,
};

/// Root-mean-square norm with a gain (Zhang and Sennrich 2019).
#[derive(Module, Debug)]
pub(crate) struct Norm {
    gain: Param<Tensor<1>>,
}

impl Norm {
    const EPSILON: f64 = 1e-6;

    pub(crate) fn new(width: usize, init: &Init) -> Self {
        Self { gain: init.constant([width], 1.0) }
    }

    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        unit_mean_square(x) * self.gain.val().unsqueeze()
    }
}

/// Rows divided by the root of their mean square.
pub(crate) fn unit_mean_square<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let mean_square = (x.clone() * x.clone()).mean_dim(D - 1) + Norm::EPSILON;
    x / mean_square.sqrt()
}

/// Causal convolution of each channel: `y_t = sum_j weight_j x_{t-j}`.
#[derive(Module, Debug)]
pub(crate) struct ShortConvolution {
    /// `[positions, width]`, the token itself first.
    weight: Param<Tensor<2>>,
}

impl ShortConvolution {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Option<Self> {
        let positions = config.short_convolution;
        let bound = 1.0 / (positions as f64).sqrt();
        (positions > 0).then(|| Self { weight: init.uniform(name, [positions, config.width], bound) })
    }

    /// The output for `x` `[batch, tokens, width]` after the inputs `past`, and the inputs that are past then, `[batch,
    /// positions - 1, width]`. `None` stands for zeros, and for no inputs with one position.
    pub(crate) fn forward(&self, x: Tensor<3>, past: Option<Tensor<3>>) -> (Tensor<3>, Option<Tensor<3>>) {
        let [batch, tokens, width] = x.dims();
        let weight = self.weight.val();
        let positions = weight.dims()[0];
        if positions == 1 {
            return (x * weight.unsqueeze(), None);
        }
        let past = past.unwrap_or_else(|| Tensor::zeros([batch, positions - 1, width], &x.device()));
        let all = Tensor::cat(vec![past, x], 1);
        let term =
            |at: usize| all.clone().narrow(1, positions - 1 - at, tokens) * weight.clone().narrow(0, at, 1).unsqueeze();
        let output = (1..positions).map(term).fold(term(0), |sum, term| sum + term);
        (output, Some(all.narrow(1, tokens, positions - 1)))
    }
}

/// Multilayer perceptron with one hidden layer of squared ReLU (So et al. 2021).
#[derive(Module, Debug)]
pub(crate) struct Mlp {
    up: Param<Tensor<2>>,
    down: Param<Tensor<2>>,
}

impl Mlp {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Option<Self> {
        let (width, inner) = (config.width, config.width * config.mlp_factor);
        (inner > 0).then(|| Self {
            up: init.weight(&format!("{name}.up"), width, inner),
            down: init.normal(&format!("{name}.down"), [inner, width], residual_deviation(inner, config.layers)),
        })
    }

    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let inner = relu(linear(x, &self.up));
        linear(inner.clone() * inner, &self.down)
    }
}

/// A copy that does not keep the tensor alive it was cut from.
pub(crate) fn copied<const D: usize>(part: Tensor<D>) -> Tensor<D> {
    let ranges = part.dims().map(|size| 0..size);
    part.zeros_like().slice_assign(ranges, part)
}

/// Bytes of the numbers of a tensor.
pub(crate) fn bytes<const D: usize>(tensor: &Tensor<D>) -> usize {
    tensor.shape().num_elements() * tensor.dtype().size()
}
