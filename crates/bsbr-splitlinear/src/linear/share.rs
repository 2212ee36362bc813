//! One part of a layer.

use std::ops::Range;

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};

use super::Pivots;
use crate::Share;

/// What a part computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareState {
    /// Its columns of the layer's weight.
    Original,
    /// The same, and its inputs are looked at.
    Calibrating,
    /// A basis and a coefficient.
    Compressed,
}

/// Two maps in place of one: `x left right`. One of them may be held by other layers as well, and is in memory once
/// then: tensors are counted references.
#[derive(Module, Debug)]
pub struct Factors {
    /// `[inputs, rank]`: the basis where inputs are shared, else the coefficient. Without the rows of the pivots, where
    /// there are some.
    pub left: Param<Tensor<2>>,
    /// `[rank, outputs]`: the coefficient where inputs are shared, else the basis.
    pub right: Param<Tensor<2>>,
    /// The inputs that the left map passes on as they are.
    pub pivots: Option<Pivots>,
    /// Which side is the basis.
    #[module(skip)]
    pub share: Share,
}

impl Factors {
    /// Numbers between the two maps.
    pub fn rank(&self) -> usize {
        self.left.dims()[1]
    }

    /// The map they make together, `[inputs, outputs]`.
    pub fn product(&self) -> Tensor<2> {
        match &self.pivots {
            Some(pivots) => pivots.product(self.left.val(), self.right.val()),
            None => self.left.val().matmul(self.right.val()),
        }
    }

    /// What the left map makes of `x` `[tokens, inputs]`.
    pub(super) fn reduce(&self, x: &Tensor<2>) -> Tensor<2> {
        match &self.pivots {
            Some(pivots) => pivots.reduce(x, self.left.val()),
            None => x.clone().matmul(self.left.val()),
        }
    }
}

/// Consecutive outputs of a layer: its own columns of the weight, or [`Factors`] in their place.
#[derive(Module, Debug)]
pub struct ShareLinear {
    /// What the part is compressed to.
    pub factors: Option<Factors>,
    #[module(skip)]
    name: String,
    #[module(skip)]
    columns: Range<usize>,
}

impl ShareLinear {
    /// A part of columns of the layer's weight.
    pub fn original(name: impl Into<String>, columns: Range<usize>) -> Self {
        Self { factors: None, name: name.into(), columns }
    }

    /// A part of factors.
    pub fn compressed(name: impl Into<String>, columns: Range<usize>, factors: Factors) -> Self {
        Self { factors: Some(factors), name: name.into(), columns }
    }

    /// Its name, the layer's included.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which outputs of the layer these are.
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }
}
