//! Padded batches: real tokens are brought together, so that padding takes part in nothing at all.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};

use crate::{AttentionError, AttentionOptions, BlockAttentionConfig, attend, cache::check_shape};

/// Where the real tokens of a padded batch are. Padding may stand anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Padding {
    rows: Vec<Vec<usize>>,
    width: usize,
}

impl Padding {
    /// From one mask per row, `true` where a token is real.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Input`] if the rows differ in length or a row has no real token.
    pub fn new(mask: &[Vec<bool>]) -> Result<Self, AttentionError> {
        let width = mask.first().map_or(0, Vec::len);
        let mut rows = Vec::with_capacity(mask.len());
        for (index, row) in mask.iter().enumerate() {
            if row.len() != width {
                let problem = format!("mask row {index} has {} entries, row 0 has {width}", row.len());
                return Err(AttentionError::Input(problem));
            }
            let real: Vec<usize> = (0..width).filter(|&at| row[at]).collect();
            if real.is_empty() {
                return Err(AttentionError::Input(format!("mask row {index} has no real token")));
            }
            rows.push(real);
        }
        Ok(Self { rows, width })
    }

    /// Columns of row `row` that hold real tokens, in order.
    pub fn real(&self, row: usize) -> &[usize] {
        &self.rows[row]
    }

    /// Position of every column among the real tokens of its row, `[batch][tokens]`: what queries and keys are rotated by. A padded
    /// column has the position of the next real token, or of the last one where none follows; nothing reads it.
    pub fn positions(&self) -> Vec<Vec<usize>> {
        let row = |real: &Vec<usize>| {
            let before = |column: usize| real.partition_point(|&at| at < column);
            (0..self.width).map(|column| before(column).min(real.len() - 1)).collect()
        };
        self.rows.iter().map(row).collect()
    }

    /// Rows of the batch.
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// Tokens of a row, padding included.
    pub fn width(&self) -> usize {
        self.width
    }
}

/// [`attend`] of padded texts: `query` `[batch, heads, tokens, head_dim]` and so on, rotated by the position among the
/// *real* tokens of the row. Outputs of padded tokens are 0.
///
/// # Errors
///
/// As [`attend`]. The `meta` selector is refused: its inputs depend on where chunks begin in each row, which
/// [`crate::AttentionCache`] tells row by row.
pub fn attend_padded(
    query: Tensor<4>,
    keys: Tensor<4>,
    values: Tensor<4>,
    padding: &Padding,
    attention: Option<&BlockAttentionConfig>,
    options: AttentionOptions,
) -> Result<Tensor<4>, AttentionError> {
    let [batch, heads, tokens, width] = query.dims();
    if batch == 0 {
        return Err(AttentionError::Input("the batch has no rows".into()));
    }
    if padding.batch() != batch || padding.width() != tokens {
        let problem = format!("the mask is {} x {}, the batch {batch} x {tokens}", padding.batch(), padding.width());
        return Err(AttentionError::Input(problem));
    }
    let kv_heads = keys.dims()[1];
    check_shape("keys", &keys, [batch, kv_heads, tokens, width])?;
    check_shape("values", &values, [batch, kv_heads, tokens, width])?;
    let device = query.device();
    let mut rows = Vec::with_capacity(batch);
    for row in 0..batch {
        let real = padding.real(row);
        let index = indices(real.iter().copied(), &device);
        let of = |tensor: &Tensor<4>| tensor.clone().narrow(0, row, 1).select(2, index.clone());
        let output = attend(of(&query), of(&keys), of(&values), None, attention, options.clone())?;
        rows.push(spread(output, real, 0..tokens, [1, heads, tokens, width]));
    }
    Ok(Tensor::cat(rows, 0))
}

/// Puts packed tokens back to their columns; columns without a real token become 0.
fn spread(packed: Tensor<4>, real: &[usize], columns: Range<usize>, shape: [usize; 4]) -> Tensor<4> {
    let (device, dtype) = (packed.device(), packed.dtype());
    let mut source = vec![real.len(); columns.len()];
    for (at, &column) in real.iter().enumerate() {
        source[column] = at;
    }
    let [batch, heads, _, width] = shape;
    let zero = Tensor::zeros([batch, heads, 1, width], (&device, dtype));
    Tensor::cat(vec![packed, zero], 2).select(2, indices(source.into_iter(), &device))
}

fn indices(values: impl Iterator<Item = usize>, device: &burn::tensor::Device) -> Tensor<1, Int> {
    let data: Vec<i32> = values.map(|value| value as i32).collect();
    let length = data.len();
    Tensor::from_data(TensorData::new(data, [length]), device)
}
