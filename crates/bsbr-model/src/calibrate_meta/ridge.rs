//! Ridge regression through its normal equations, in f64.

use faer::{
    Accum, Mat, MatRef, Par, Side,
    linalg::{matmul::matmul, solvers::Solve},
};

use crate::Decoder;

/// `X^T X` and `X^T Y` of the rows seen so far.
#[derive(Debug)]
pub(super) struct NormalEquations {
    /// Inputs, with a last one that is always 1 where there is a bias.
    gram: Mat<f64>,
    moments: Mat<f64>,
    bias: bool,
}

/// `y = W x + b`.
#[derive(Debug)]
pub(super) struct Solution {
    /// `[outputs, inputs]`.
    pub(super) weight: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
}

impl NormalEquations {
    /// Of the inputs of a layer to all of its heads; with a bias where its projections have one.
    pub(super) fn new(decoder: &Decoder, layer: usize) -> Self {
        let decoder = &decoder.config().decoder;
        Self::of(decoder.hidden_size, decoder.heads * decoder.shape(layer).head_dim, decoder.qkv_bias)
    }

    fn of(inputs: usize, outputs: usize, bias: bool) -> Self {
        let inputs = inputs + usize::from(bias);
        Self { gram: Mat::zeros(inputs, inputs), moments: Mat::zeros(inputs, outputs), bias }
    }

    /// Bytes of the two for the largest layer.
    pub(super) fn bytes(decoder: &Decoder) -> usize {
        let decoder = &decoder.config().decoder;
        let inputs = decoder.hidden_size + 1;
        2 * size_of::<f64>() * inputs * (inputs + decoder.heads * decoder.widest_head())
    }

    /// Adds rows of inputs, `[rows, inputs]`, and what they should give, `[rows, outputs]`.
    pub(super) fn add(&mut self, inputs: &[f32], outputs: &[f64]) {
        let (width, out) = (self.gram.ncols() - usize::from(self.bias), self.moments.ncols());
        let rows = inputs.len() / width;
        debug_assert_eq!(rows * out, outputs.len());
        let at = |row: usize, column: usize| if column < width { inputs[row * width + column] as f64 } else { 1.0 };
        let x = Mat::from_fn(rows, self.gram.ncols(), at);
        let y = MatRef::from_row_major_slice(outputs, rows, out);
        // One thread: the order of the sums must not depend on how many there are.
        matmul(self.gram.as_mut(), Accum::Add, x.transpose(), x.as_ref(), 1.0, Par::Seq);
        matmul(self.moments.as_mut(), Accum::Add, x.transpose(), y, 1.0, Par::Seq);
    }

    /// The solution under a ridge relative to the mean square of an input; the bias is free. `None` if there is none: of
    /// inputs that are all 0, or no numbers.
    pub(super) fn solve(&self, ridge: f64) -> Option<Solution> {
        let size = self.gram.ncols();
        let width = size - usize::from(self.bias);
        let mean = (0..width).map(|i| self.gram[(i, i)]).sum::<f64>() / width as f64;
        let mut gram = self.gram.clone();
        for i in 0..width {
            gram[(i, i)] += ridge * mean;
        }
        let solution = gram.llt(Side::Lower).ok()?.solve(&self.moments);
        let column = |i: usize| (0..size).map(move |j| (i, j));
        let outputs = self.moments.ncols();
        let weight = (0..outputs).flat_map(column).filter(|&(_, j)| j < width);
        let weight: Vec<f32> = weight.map(|(i, j)| solution[(j, i)] as f32).collect();
        let bias = self.bias.then(|| (0..outputs).map(|i| solution[(width, i)] as f32).collect::<Vec<f32>>());
        let finite = weight.iter().chain(bias.iter().flatten()).all(|x| x.is_finite());
        finite.then_some(Solution { weight, bias })
    }
}

#[cfg(test)]
mod tests {
    use super::NormalEquations;

    /// Numbers without a pattern, the same everywhere.
    fn noise(seed: usize) -> impl Iterator<Item = f64> {
        (1..).map(move |n| ((n * n + seed * 7919) as f64 * 0.618_033_988_749_895).fract() - 0.5)
    }

    #[test]
    fn a_planted_map_of_low_rank_is_found_with_its_bias() {
        let (rows, inputs, outputs) = (60, 7, 5);
        let x: Vec<f32> = noise(1).take(rows * inputs).map(|x| x as f32).collect();
        let (left, right): (Vec<f64>, Vec<f64>) =
            (noise(2).take(outputs * 2).collect(), noise(3).take(2 * inputs).collect());
        let planted = |i: usize, j: usize| left[2 * i] * right[j] + left[2 * i + 1] * right[inputs + j];
        let y: Vec<f64> = (0..rows * outputs)
            .map(|at| {
                let (row, i) = (at / outputs, at % outputs);
                (0..inputs).map(|j| planted(i, j) * x[row * inputs + j] as f64).sum::<f64>() + i as f64
            })
            .collect();
        let mut equations = NormalEquations::of(inputs, outputs, true);
        // In two pieces: what was added first must not matter.
        equations.add(&x[..20 * inputs], &y[..20 * outputs]);
        equations.add(&x[20 * inputs..], &y[20 * outputs..]);
        let solution = equations.solve(1e-12).expect("independent inputs");
        for i in 0..outputs {
            assert!((solution.bias.as_ref().unwrap()[i] as f64 - i as f64).abs() < 1e-5);
            for j in 0..inputs {
                assert!((solution.weight[i * inputs + j] as f64 - planted(i, j)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_ridge_shrinks_one_input_as_its_formula_says() {
        let mut equations = NormalEquations::of(1, 1, false);
        equations.add(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]);
        // sum x y / (sum x^2 (1 + ridge)) = 28 / (14 * 1.5)
        let solution = equations.solve(0.5).expect("a positive gram");
        assert!((solution.weight[0] as f64 - 28.0 / 21.0).abs() < 1e-6);
        assert!(solution.bias.is_none());
    }

    #[test]
    fn inputs_that_are_all_nought_have_no_solution() {
        let mut equations = NormalEquations::of(2, 1, false);
        equations.add(&[0.0; 4], &[1.0, 2.0]);
        assert!(equations.solve(0.1).is_none());
    }
}
