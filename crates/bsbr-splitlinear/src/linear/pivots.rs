//! The inputs of a layer in the order in which a pivoted basis takes them.

use std::sync::Arc;

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor, TensorData},
};

use crate::{SplitError, pivots::others};

/// Which input each dimension of a basis passes on as it is.
#[derive(Module, Debug)]
pub struct Pivots {
    taken: Tensor<1, Int>,
    rest: Tensor<1, Int>,
    #[module(skip)]
    order: Arc<[u32]>,
}

impl Pivots {
    /// Of a basis of `inputs` inputs that is called `name`; pivots as [`crate::checked_pivots`] gives them.
    ///
    /// # Errors
    ///
    /// [`SplitError::Pivots`] if there are as many as inputs, or one is no input or is there twice.
    pub fn new(name: &str, pivots: &[u32], inputs: usize, device: &Device) -> Result<Self, SplitError> {
        let rest = others(inputs, pivots.iter().map(|&pivot| pivot as usize));
        if rest.is_empty() || pivots.len() + rest.len() != inputs {
            let problem = format!("has {} pivots of {inputs} inputs, expected fewer, each once", pivots.len());
            return Err(SplitError::Pivots { tensor: name.to_owned(), problem });
        }
        let rest: Vec<u32> = rest.into_iter().map(|at| at as u32).collect();
        let order = pivots.iter().chain(&rest).copied().collect();
        Ok(Self { taken: indices(pivots, device), rest: indices(&rest, device), order })
    }

    /// Every input once: those that are passed on, dimension after dimension, then the others, rising.
    pub fn order(&self) -> &Arc<[u32]> {
        &self.order
    }

    /// How many inputs are passed on.
    pub fn rank(&self) -> usize {
        self.taken.dims()[0]
    }

    /// What a basis makes of `x` `[tokens, inputs]`; `rest` `[inputs - rank, rank]` are its rows that are no pivots.
    pub fn reduce(&self, x: &Tensor<2>, rest: Tensor<2>) -> Tensor<2> {
        x.clone().select(1, self.taken.clone()) + x.clone().select(1, self.rest.clone()).matmul(rest)
    }

    /// The product of the basis with `coefficients` `[rank, outputs]`.
    pub(super) fn product(&self, rest: Tensor<2>, coefficients: Tensor<2>) -> Tensor<2> {
        let mut place = vec![0; self.order.len()];
        for (at, &input) in self.order.iter().enumerate() {
            place[input as usize] = at as u32;
        }
        let place = indices(&place, &coefficients.device());
        Tensor::cat(vec![coefficients.clone(), rest.matmul(coefficients)], 0).select(0, place)
    }
}

fn indices(numbers: &[u32], device: &Device) -> Tensor<1, Int> {
    let numbers: Vec<i64> = numbers.iter().map(|&number| i64::from(number)).collect();
    let count = numbers.len();
    Tensor::from_data(TensorData::new(numbers, [count]), device)
}
