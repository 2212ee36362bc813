//! Projections to heads and back, and rotary positions.

use burn::{
    module::{Module, Param},
    tensor::{Device, Tensor, TensorData},
};

use crate::{DecoderConfig, init::Init};

/// Query, key, value and output projections of `width x width`, without biases.
#[derive(Module, Debug)]
pub(crate) struct Projections {
    /// Queries and keys side by side, since most of what is done to one is done to the other.
    query_key: Param<Tensor<2>>,
    value: Param<Tensor<2>>,
    output: Param<Tensor<2>>,
    #[module(skip)]
    heads: usize,
}

impl Projections {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Self {
        let width = config.width;
        Self {
            query_key: init.weight(&format!("{name}.query_key"), width, 2 * width),
            value: init.weight(&format!("{name}.value"), width, width),
            output: init.normal(&format!("{name}.output"), [width, width], residual_deviation(width, config.layers)),
            heads: config.heads,
        }
    }

    /// Heads and their width.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        (self.heads, self.value.dims()[1] / self.heads)
    }

    /// Queries and keys, `[batch, tokens, 2 heads, head_dim]`: those of all heads, then the keys.
    pub(crate) fn query_key(&self, x: &Tensor<3>) -> Tensor<4> {
        let [batch, tokens, width] = x.dims();
        linear(x.clone(), &self.query_key).reshape([batch, tokens, 2 * self.heads, width / self.heads])
    }

    /// Queries, keys and values `[batch, heads, tokens, head_dim]` each, rotated where there is a rotation.
    pub(crate) fn heads(&self, x: &Tensor<3>, rotation: Option<&Rotation>) -> [Tensor<4>; 3] {
        let query_key = self.query_key(x);
        let query_key = match rotation {
            Some(rotation) => rotation.apply(query_key),
            None => query_key,
        };
        let [query, keys] = self.split(query_key);
        [query, keys, self.values(x)]
    }

    /// Queries and keys `[batch, heads, tokens, head_dim]` out of [`Projections::query_key`].
    pub(crate) fn split(&self, query_key: Tensor<4>) -> [Tensor<4>; 2] {
        let both = query_key.swap_dims(1, 2);
        [both.clone().narrow(1, 0, self.heads), both.narrow(1, self.heads, self.heads)]
    }

    /// Values `[batch, heads, tokens, head_dim]`.
    pub(crate) fn values(&self, x: &Tensor<3>) -> Tensor<4> {
        let [batch, tokens, width] = x.dims();
        linear(x.clone(), &self.value).reshape([batch, tokens, self.heads, width / self.heads]).swap_dims(1, 2)
    }

    /// What the heads read, `[batch, heads, tokens, head_dim]`, to `[batch, tokens, width]`.
    pub(crate) fn output(&self, read: Tensor<4>) -> Tensor<3> {
        let [batch, heads, tokens, width] = read.dims();
        linear(read.swap_dims(1, 2).reshape([batch, tokens, heads * width]), &self.output)
    }
}

/// Deviation of the start values of a weight that writes to the residual stream, so that all layers together do not
/// make it larger (Radford et al. 2019).
pub(crate) fn residual_deviation(inputs: usize, layers: usize) -> f64 {
    1.0 / ((inputs * 2 * layers) as f64).sqrt()
}

/// `x W` of `[batch, tokens, inputs]`, as one product.
pub(crate) fn linear(x: Tensor<3>, weight: &Param<Tensor<2>>) -> Tensor<3> {
    let [batch, tokens, inputs] = x.dims();
    let weight = weight.val();
    let outputs = weight.dims()[1];
    x.reshape([batch * tokens, inputs]).matmul(weight).reshape([batch, tokens, outputs])
}

/// Cosines and sines of consecutive positions.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    /// `[tokens, width]`, of the first and of the second half of a head alike.
    cos: Tensor<2>,
    sin: Tensor<2>,
    /// `[width, width]`: takes `(a, b)` to `(-b, a)`, both halves of a head.
    turn: Tensor<2>,
}

impl Rotation {
    const BASE: f64 = 10_000.0;

    /// Of `tokens` positions from `first` on, for heads of `width` numbers.
    pub(crate) fn new(first: usize, tokens: usize, width: usize, device: &Device) -> Self {
        let half = width / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| Self::BASE.powf(-((2 * i) as f64) / width as f64)).collect();
        let (mut cos, mut sin) = (Vec::with_capacity(tokens * width), Vec::with_capacity(tokens * width));
        for position in first..first + tokens {
            for at in 0..width {
                let angle = position as f64 * frequencies[at % half];
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        let mut turn = vec![0.0; width * width];
        for at in 0..half {
            turn[(at + half) * width + at] = -1.0_f32;
            turn[at * width + at + half] = 1.0;
        }
        let tensor = |data, rows| Tensor::from_data(TensorData::new(data, [rows, width]), device);
        Self { cos: tensor(cos, tokens), sin: tensor(sin, tokens), turn: tensor(turn, width) }
    }

    /// Rotates `[batch, tokens, heads, width]`.
    pub(crate) fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, tokens, heads, width] = x.dims();
        // One row for each token, so that only texts are broadcast over.
        let all = |rows: &Tensor<2>| {
            rows.clone().reshape([1, tokens, 1, width]).repeat_dim(2, heads).reshape([1, tokens, heads * width])
        };
        let turned = x.clone().reshape([batch * tokens * heads, width]).matmul(self.turn.clone());
        let rows = [batch, tokens, heads * width];
        (x.reshape(rows) * all(&self.cos) + turned.reshape(rows) * all(&self.sin))
            .reshape([batch, tokens, heads, width])
    }
}
