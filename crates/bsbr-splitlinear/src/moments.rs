//! Second moments of what linear layers read: all that calibration has to remember of a text.

mod file;

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, get_global_parallelism};

pub use file::{MomentsFile, MomentsHeader, MomentsWriter};

use crate::SplitError;

/// Rows whose products are summed in `f32` before they are added in `f64`.
const BATCH: usize = 1024;

/// Second moments, sums and count of the inputs of a linear layer, or of layers that read the same.
///
/// Sums over tokens, never means, so that parts of a text add up.
///
/// ```
/// use bsbr_splitlinear::Moments;
///
/// let mut moments = Moments::new(2);
/// moments.add_rows("h.0.mlp.c_fc", &[1.0, 2.0, 3.0, 4.0])?; // two tokens
/// assert_eq!(moments.tokens(), 2);
/// assert_eq!(moments.second_moments()[(1, 0)], 1.0 * 2.0 + 3.0 * 4.0);
/// # Ok::<(), bsbr_splitlinear::SplitError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    tokens: u64,
    /// `sum x x^T`; only the lower triangle is kept up to date.
    lower: Mat<f64>,
    sum: Vec<f64>,
}

impl Moments {
    /// Of no tokens yet, of inputs `width` wide.
    pub fn new(width: usize) -> Self {
        Self { tokens: 0, lower: Mat::zeros(width, width), sum: vec![0.0; width] }
    }

    /// Width of the inputs.
    pub fn width(&self) -> usize {
        self.sum.len()
    }

    /// How many tokens have been added.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The sum of all inputs.
    pub fn sum(&self) -> &[f64] {
        &self.sum
    }

    /// The sum of `x x^T`, symmetric.
    pub fn second_moments(&self) -> Mat<f64> {
        Mat::from_fn(self.width(), self.width(), |row, column| self.lower[(row.max(column), row.min(column))])
    }

    /// Adds tokens: `rows` is `[tokens, width]`, row by row. Leave out padding. `module` is named in errors.
    ///
    /// # Errors
    /// Where the length of `rows` is no multiple of the width, or a number is not finite; nothing is added then.
    pub fn add_rows(&mut self, module: &str, rows: &[f32]) -> Result<(), SplitError> {
        let width = self.width();
        let count = check_rows(module, rows, width)?;
        for batch in rows.chunks(BATCH * width) {
            add_lower(&mut self.lower, batch, width);
        }
        for row in rows.chunks_exact(width) {
            for (sum, &value) in self.sum.iter_mut().zip(row) {
                *sum += f64::from(value);
            }
        }
        self.tokens += count as u64;
        Ok(())
    }

    /// Adds the tokens of another part of the text. `module` is named in errors.
    ///
    /// # Errors
    /// Where the widths differ.
    pub fn merge(&mut self, module: &str, other: &Self) -> Result<(), SplitError> {
        if self.width() != other.width() {
            let expected = format!("moments of inputs {} wide", self.width());
            return Err(SplitError::shape(module, expected, other.width().to_string()));
        }
        self.lower += &other.lower;
        self.sum.iter_mut().zip(&other.sum).for_each(|(sum, other)| *sum += other);
        self.tokens += other.tokens;
        Ok(())
    }
}

/// Second moments of the inputs of a linear layer in the original model (`x`) and, for the same tokens, in the compressed
/// one (`xh`).
#[derive(Debug, Clone, PartialEq)]
pub struct PairedMoments {
    original: Moments,
    compressed: Moments,
    cross: Mat<f64>,
}

impl PairedMoments {
    /// Of no tokens yet, of inputs `width` wide.
    pub fn new(width: usize) -> Self {
        Self { original: Moments::new(width), compressed: Moments::new(width), cross: Mat::zeros(width, width) }
    }

    /// Those of `x`.
    pub fn original(&self) -> &Moments {
        &self.original
    }

    /// Those of `xh`.
    pub fn compressed(&self) -> &Moments {
        &self.compressed
    }

    /// The sum of `xh x^T`.
    pub fn cross(&self) -> MatRef<'_, f64> {
        self.cross.as_ref()
    }

    /// Adds tokens: both are `[tokens, width]`, row by row. Leave out padding. `module` is named in errors.
    ///
    /// # Errors
    /// As [`Moments::add_rows`], and where there are not as many of one as of the other.
    pub fn add_rows(&mut self, module: &str, original: &[f32], compressed: &[f32]) -> Result<(), SplitError> {
        let width = self.original.width();
        if original.len() != compressed.len() {
            let expected = format!("as many inputs of the compressed model as of the original, {}", original.len());
            return Err(SplitError::shape(module, expected, compressed.len().to_string()));
        }
        check_rows(module, original, width)?;
        check_rows(module, compressed, width)?;
        self.original.add_rows(module, original)?;
        self.compressed.add_rows(module, compressed)?;
        let batch = BATCH * width;
        for (original, compressed) in original.chunks(batch).zip(compressed.chunks(batch)) {
            add_cross(&mut self.cross, compressed, original, width);
        }
        Ok(())
    }

    /// Adds the tokens of another part of the text. `module` is named in errors.
    ///
    /// # Errors
    /// Where the widths differ.
    pub fn merge(&mut self, module: &str, other: &Self) -> Result<(), SplitError> {
        self.original.merge(module, &other.original)?;
        self.compressed.merge(module, &other.compressed)?;
        self.cross += &other.cross;
        Ok(())
    }
}

/// How many rows there are. All numbers must be finite.
fn check_rows(module: &str, rows: &[f32], width: usize) -> Result<usize, SplitError> {
    if width == 0 || !rows.len().is_multiple_of(width) {
        let expected = format!("inputs {width} wide");
        return Err(SplitError::shape(module, expected, format!("{} numbers", rows.len())));
    }
    match rows.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(SplitError::NotFinite {
            module: module.to_owned(),
            what: "input",
            index: index % width,
            value: f64::from(rows.get(index).copied().unwrap_or(f32::NAN)),
            advice: "does the original model give finite logits on this text?",
        }),
        None => Ok(rows.len() / width),
    }
}

fn add_lower(lower: &mut Mat<f64>, rows: &[f32], width: usize) {
    let batch = MatRef::from_row_major_slice(rows, rows.len() / width, width);
    let mut products = Mat::<f32>::zeros(width, width);
    lower_product(&mut products, batch);
    if all_finite(&products) {
        return add(lower, &products);
    }
    // Products of large numbers leave the range of f32.
    let exact = Mat::from_fn(batch.nrows(), width, |row, column| f64::from(batch[(row, column)]));
    let mut products = Mat::<f64>::zeros(width, width);
    lower_product(&mut products, exact.as_ref());
    *lower += &products;
}

fn lower_product<T: faer::traits::RealField>(products: &mut Mat<T>, rows: MatRef<'_, T>) {
    triangular::matmul(
        products,
        BlockStructure::TriangularLower,
        Accum::Replace,
        rows.transpose(),
        BlockStructure::Rectangular,
        rows,
        BlockStructure::Rectangular,
        T::one_impl(),
        get_global_parallelism(),
    );
}

fn add_cross(cross: &mut Mat<f64>, left: &[f32], right: &[f32], width: usize) {
    let left = MatRef::from_row_major_slice(left, left.len() / width, width);
    let right = MatRef::from_row_major_slice(right, right.len() / width, width);
    let mut products = Mat::<f32>::zeros(width, width);
    matmul(&mut products, Accum::Replace, left.transpose(), right, 1.0, get_global_parallelism());
    if all_finite(&products) {
        return add(cross, &products);
    }
    let exact = |rows: MatRef<'_, f32>| Mat::from_fn(rows.nrows(), width, |row, column| f64::from(rows[(row, column)]));
    matmul(cross, Accum::Add, exact(left).transpose(), exact(right), 1.0, get_global_parallelism());
}

fn all_finite(matrix: &Mat<f32>) -> bool {
    (0..matrix.ncols()).all(|column| matrix.col_as_slice(column).iter().all(|value| value.is_finite()))
}

fn add(sum: &mut Mat<f64>, products: &Mat<f32>) {
    for column in 0..products.ncols() {
        for (sum, &product) in sum.col_as_slice_mut(column).iter_mut().zip(products.col_as_slice(column)) {
            *sum += f64::from(product);
        }
    }
}
