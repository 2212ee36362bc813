//! Texts cut into chunks, and what the recurrences over chunks share.

use burn::tensor::{Device, Tensor, TensorData};

/// `[batch, heads, tokens, width]` to `[batch * heads, chunks, size, width]`, filled up with rows of zeros.
pub(crate) fn chunked(x: Tensor<4>, size: usize) -> Tensor<4> {
    let [batch, heads, tokens, width] = x.dims();
    let chunks = tokens.div_ceil(size);
    let missing = chunks * size - tokens;
    let x = if missing == 0 {
        x
    } else {
        let zeros = Tensor::zeros([batch, heads, missing, width], &x.device());
        Tensor::cat(vec![x, zeros], 2)
    };
    x.reshape([batch * heads, chunks, size, width])
}

/// The reverse of [`chunked`], for `tokens` tokens of `heads` heads.
pub(crate) fn joined(x: Tensor<4>, heads: usize, tokens: usize) -> Tensor<4> {
    let [rows, chunks, size, width] = x.dims();
    x.reshape([rows / heads, heads, chunks * size, width]).narrow(2, 0, tokens)
}

/// `[1, 1, size, size]`, one where `of(row, column)`, else zero.
pub(crate) fn pattern(size: usize, device: &Device, of: impl Fn(usize, usize) -> bool) -> Tensor<4> {
    let at = |at: usize| if of(at / size, at % size) { 1.0_f32 } else { 0.0 };
    let data: Vec<f32> = (0..size * size).map(at).collect();
    Tensor::from_data(TensorData::new(data, [1, 1, size, size]), device)
}

/// Ones on and below the diagonal: what a token of a chunk may read of it.
pub(crate) fn causal(size: usize, device: &Device) -> Tensor<4> {
    pattern(size, device, |row, column| column <= row)
}

/// Running sums over chunks: of `[rows, chunks, a, b]`, the sum of `start` `[rows, a, b]` and all chunks before each one,
/// and the sum of everything.
pub(crate) fn sums_before(chunks: Tensor<4>, start: Tensor<3>) -> (Tensor<4>, Tensor<3>) {
    let count = chunks.dims()[1];
    let sums = Tensor::cat(vec![start.unsqueeze_dim(1), chunks], 1).cumsum(1);
    (sums.clone().narrow(1, 0, count), sums.narrow(1, count, 1).squeeze_dim(1))
}
