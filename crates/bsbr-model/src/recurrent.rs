//! The weights and the states of recurrent layers: [`GatedDelta`].

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{
        Device, Tensor,
        activation::{sigmoid, silu},
    },
};

use crate::{
    GatedDelta,
    modules::{Normalisation, Projections},
    ops::{self, Packing},
};

/// What a recurrent layer has besides the usual projections; see [`GatedDelta`].
#[derive(Module, Debug)]
pub struct DeltaRule {
    /// How fast a token lets the states fade, `[hidden_size]` to `[value_heads]`.
    pub decay: Linear,
    /// Logarithms of what that is multiplied by, `[value_heads]`.
    pub decay_log: Param<Tensor<1>>,
    /// How much of what is stored under its key a token replaces, `[hidden_size]` to `[value_heads]`.
    pub rate: Linear,
    /// `[kernel, channels]`, the current token last; channels of queries, keys, values.
    pub conv: Param<Tensor<2>>,
    /// Of what each head reads.
    pub read_norm: Normalisation,
    /// Its sizes.
    #[module(skip)]
    pub config: GatedDelta,
}

/// What one recurrent layer keeps of one text.
#[derive(Debug, Clone)]
pub(crate) struct RecurrentState {
    /// The last inputs of the convolution, `[kernel - 1, channels]`.
    pub(crate) inputs: Tensor<2>,
    /// `[value_heads, key_dim, value_dim]`.
    pub(crate) matrices: Tensor<3>,
}

impl RecurrentState {
    /// Before the first token.
    pub(crate) fn new(config: &GatedDelta, device: &Device) -> Self {
        let GatedDelta { value_heads, key_dim, value_dim, kernel, .. } = *config;
        Self {
            inputs: Tensor::zeros([kernel - 1, config.channels()], device),
            matrices: Tensor::zeros([value_heads, key_dim, value_dim], device),
        }
    }

    /// Whether it is one of a layer of these sizes.
    pub(crate) fn fits(&self, config: &GatedDelta) -> bool {
        let GatedDelta { value_heads, key_dim, value_dim, kernel, .. } = *config;
        self.inputs.dims() == [kernel - 1, config.channels()]
            && self.matrices.dims() == [value_heads, key_dim, value_dim]
    }

    /// Bytes of its numbers.
    pub(crate) fn bytes(&self) -> usize {
        let numbers = self.inputs.shape().num_elements() + self.matrices.shape().num_elements();
        numbers * self.matrices.dtype().size()
    }
}

fn by_head(x: Tensor<2>, heads: usize, width: usize) -> Tensor<4> {
    let tokens = x.dims()[0];
    x.reshape([1, tokens, heads, width]).swap_dims(1, 2)
}

impl Projections {
    /// What the output projection takes of what the heads read, `[1, heads, tokens, width]`: without the zeros that fill values up,
    /// of recurrent layers normalised, and times its gate. `normed` are the inputs of the projections, `[tokens, hidden_size]`.
    pub(crate) fn opened(&self, read: Tensor<4>, normed: impl FnOnce() -> Tensor<2>, packing: Packing) -> Tensor<4> {
        let read = self.values_read(read);
        let Some(gate) = &self.gate else { return read };
        let [_, heads, _, width] = read.dims();
        let gate = by_head(ops::projected(normed(), gate, packing), heads, width);
        match &self.recurrent {
            Some(rule) => rule.read_norm.forward(read) * silu(gate),
            None => read * sigmoid(gate),
        }
    }

    /// What multiplies what the `heads` heads of attention read, `[1, heads, tokens, width]`, where something does.
    pub(crate) fn opening(&self, normed: &Tensor<2>, heads: usize) -> Option<Tensor<4>> {
        let gate = ops::projected(normed.clone(), self.gate.as_ref()?, Packing::ByNumber);
        let width = gate.dims()[1] / heads;
        Some(sigmoid(by_head(gate, heads, width)))
    }
}
