//! Weights that stay as their file stores them.

use std::ops::Range;

use bsbr_weights::{Arithmetic, StoredMatrix};
use burn::{
    module::{Module, Param},
    nn::{Embedding, Linear},
    tensor::{Device, Int, Tensor, TensorData},
};

use crate::ops;

/// A linear layer whose weight `[outputs, inputs]` is in the format of its file, in memory or in the mapped file itself.
///
/// Unless [`Decoder::with_arithmetic`](crate::Decoder::with_arithmetic) says otherwise, arithmetic is f32 over exactly the numbers
/// that the weight means. It has no gradient, and it moves to no other device: there
/// it is widened anew for every product. Load a model that is to be trained or moved in f32.
#[derive(Module, Debug)]
pub struct StoredLinear {
    /// `[outputs, inputs]`.
    #[module(skip)]
    pub weight: StoredMatrix,
    /// What it is multiplied in.
    #[module(skip)]
    pub arithmetic: Arithmetic,
    /// `[outputs]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl StoredLinear {
    /// `[.., inputs]` to `[.., outputs]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut shape = x.dims();
        let [outputs, inputs] = self.weight.shape();
        let rows = shape.iter().product::<usize>() / inputs.max(1);
        shape[D - 1] = outputs;
        let bias = self.bias.as_ref().map(Param::val);
        let weight = Weight::Stored(self.weight.clone(), self.arithmetic);
        ops::linear(x.reshape([rows, inputs]), weight, bias, ops::Packing::ByNumber).reshape(shape)
    }

    /// The same layer in f32 on a device.
    pub fn widened(&self, device: &Device) -> Linear {
        Linear { weight: Param::from_tensor(widened(&self.weight, device).transpose()), bias: self.bias.clone() }
    }
}

/// A table of embeddings.
#[derive(Module, Debug)]
pub enum Table {
    /// In f32.
    Dense(Embedding),
    /// In the format of its file.
    Stored(StoredTable),
}

/// A table `[rows, width]` in the format of its file.
#[derive(Module, Debug)]
pub struct StoredTable {
    /// `[rows, width]`.
    #[module(skip)]
    pub rows: StoredMatrix,
    /// What it is multiplied in where the table is the head.
    #[module(skip)]
    pub arithmetic: Arithmetic,
}

impl Table {
    /// Some of the rows, `[indices, width]`.
    pub(crate) fn rows(&self, indices: impl Iterator<Item = u32>, device: &Device) -> Tensor<2> {
        match self {
            Self::Dense(table) => {
                let indices: Vec<i32> = indices.map(|row| row as i32).collect();
                let count = indices.len();
                let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [count]), device);
                table.weight.val().select(0, indices)
            }
            Self::Stored(table) => {
                let [_, width] = table.rows.shape();
                let (view, mut numbers) = (table.rows.view(), Vec::new());
                for row in indices.map(|row| row as usize) {
                    let start = numbers.len();
                    numbers.resize(start + width, 0.0);
                    view.widen(row..row + 1, &mut numbers[start..]);
                }
                let count = numbers.len() / width.max(1);
                Tensor::from_data(TensorData::new(numbers, [count, width]), device)
            }
        }
    }

    /// The table as the weight of a head.
    pub(crate) fn as_weight(&self) -> Weight {
        match self {
            Self::Dense(table) => Weight::Tensor(table.weight.val().transpose()),
            Self::Stored(table) => Weight::Stored(table.rows.clone(), table.arithmetic),
        }
    }
}

/// The weight of a linear layer.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "it is made and taken, never kept")]
pub(crate) enum Weight {
    /// `[inputs, outputs]`.
    Tensor(Tensor<2>),
    /// `[outputs, inputs]`, as it is stored.
    Stored(StoredMatrix, Arithmetic),
}

impl Weight {
    /// The part of it that makes some of the outputs.
    pub(crate) fn part(&self, outputs: Range<usize>) -> Self {
        match self {
            Self::Tensor(weight) => Self::Tensor(weight.clone().narrow(1, outputs.start, outputs.len())),
            Self::Stored(weight, arithmetic) => Self::Stored(weight.rows(outputs), *arithmetic),
        }
    }

    /// `[inputs, outputs]`, on the device of `x` and in its type.
    pub(crate) fn like(self, x: &Tensor<2>) -> Tensor<2> {
        match self {
            Self::Tensor(weight) => weight,
            Self::Stored(weight, _) => widened(&weight, &x.device()).cast(x.dtype()).transpose(),
        }
    }
}

/// A stored matrix in f32, `[outputs, inputs]`.
fn widened(weight: &StoredMatrix, device: &Device) -> Tensor<2> {
    let [outputs, inputs] = weight.shape();
    let mut numbers = vec![0.0; outputs * inputs];
    weight.view().widen(0..outputs, &mut numbers);
    Tensor::from_data(TensorData::new(numbers, [outputs, inputs]), device)
}
