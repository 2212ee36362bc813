//! The gated delta rule (Yang et al. 2024, `arXiv:2412.06464`), token by token and in chunks.
//!
//! With the running sum `G_t` of the logarithms of decays within a chunk, the corrections of its tokens solve a triangular system:
//! `A_ij = r_i k_i . k_j exp(G_i - G_j)` for `j < i`, and with
//! `[W, U] = (I + A)^-1 [diag(r exp(G)) K, diag(r) V]` a chunk that starts from `S` and ends with `G_n` computes
//!
//! ```text
//! N = U - W S        O = diag(exp(G)) Q S + (Q K^T * exp(G_i - G_j), j <= i) N
//! S' = exp(G_n) S + (diag(exp(G_n - G)) K)^T N
//! ```

use burn::tensor::{Device, Tensor, TensorData};

/// Tokens of a chunk: beyond, solving the system costs more than the states save.
const CHUNK: usize = 32;

/// What is read, `[heads, tokens, value_dim]`, and the states behind it. Queries and keys are `[heads, tokens, key_dim]`, values
/// `[heads, tokens, value_dim]`, logarithms of decays and rates `[heads, tokens]`, `state` is `[heads, key_dim, value_dim]`.
pub(crate) fn gated_delta(
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    rows: [Tensor<2>; 2],
    state: Tensor<3>,
) -> (Tensor<3>, Tensor<3>) {
    match query.dims()[1] {
        1 => step(query, key, value, rows, state),
        tokens => in_chunks(query, key, value, rows, state, CHUNK.min(tokens)),
    }
}

/// [`gated_delta`] of one token, by the rule itself.
fn step(
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    rows: [Tensor<2>; 2],
    state: Tensor<3>,
) -> (Tensor<3>, Tensor<3>) {
    let [decay, rate] = rows.map(|row| row.unsqueeze_dim::<3>(2));
    let state = state * decay.exp();
    let correction = (value - key.clone().matmul(state.clone())) * rate;
    let state = state + key.transpose() * correction;
    (query.matmul(state.clone()), state)
}

/// [`gated_delta`] in chunks of `size` tokens, the last one filled up.
fn in_chunks(
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    rows: [Tensor<2>; 2],
    state: Tensor<3>,
    size: usize,
) -> (Tensor<3>, Tensor<3>) {
    let [heads, tokens, value_dim] = value.dims();
    let device = value.device();
    let [query, key, value] = [query, key, value].map(|x| chunked(x, size));
    let [decay, rate] = rows.map(|row| chunked(row.unsqueeze_dim(2), size));
    let chunks = query.dims()[1];
    // `[heads, chunks, size, 1]`.
    let sums = decay.cumsum(2);
    let causal = pattern(size, &device, |row, column| column <= row);
    // Nothing above the diagonal: there the exponential could be of something large.
    let between = ((sums.clone() - sums.clone().transpose()) * causal.clone()).exp() * causal;
    let keys_across = key.clone().transpose();
    let scaled = key.clone() * rate.clone();
    let below = between.clone() * pattern(size, &device, |row, column| column < row);
    let inverse = unit_lower_inverse(scaled.clone().matmul(keys_across.clone()) * below);
    let new = inverse.clone().matmul(value * rate);
    let known = inverse.matmul(scaled * sums.clone().exp());
    let scores = query.clone().matmul(keys_across) * between;
    let query = query * sums.clone().exp();
    let end = sums.clone().narrow(2, size - 1, 1);
    let carried = (key * (end.clone() - sums).exp()).transpose();
    let kept = end.exp();

    let mut state = state;
    let mut reads = Vec::with_capacity(chunks);
    for chunk in 0..chunks {
        let of = |x: &Tensor<4>| -> Tensor<3> { x.clone().narrow(1, chunk, 1).squeeze_dim(1) };
        let corrections = of(&new) - of(&known).matmul(state.clone());
        reads.push(of(&query).matmul(state.clone()) + of(&scores).matmul(corrections.clone()));
        state = state * of(&kept) + of(&carried).matmul(corrections);
    }
    let read = if reads.len() == 1 { reads.remove(0) } else { Tensor::cat(reads, 1) };
    debug_assert_eq!(read.dims(), [heads, chunks * size, value_dim]);
    (read.narrow(1, 0, tokens), state)
}

/// `[heads, tokens, width]` to `[heads, chunks, size, width]`, filled up with rows of zeros.
fn chunked(x: Tensor<3>, size: usize) -> Tensor<4> {
    let [heads, tokens, width] = x.dims();
    let chunks = tokens.div_ceil(size);
    let missing = chunks * size - tokens;
    let x = if missing == 0 {
        x
    } else {
        let zeros = Tensor::zeros([heads, missing, width], (&x.device(), x.dtype()));
        Tensor::cat(vec![x, zeros], 1)
    };
    x.reshape([heads, chunks, size, width])
}

/// `[1, 1, size, size]`, one where `of(row, column)`, else zero.
fn pattern(size: usize, device: &Device, of: impl Fn(usize, usize) -> bool) -> Tensor<4> {
    let at = |at: usize| if of(at / size, at % size) { 1.0_f32 } else { 0.0 };
    let data: Vec<f32> = (0..size * size).map(at).collect();
    Tensor::from_data(TensorData::new(data, [1, 1, size, size]), device)
}

/// `(I + A)^-1` of strictly lower triangular matrices `A` `[heads, chunks, size, size]`.
///
/// Of two neighbouring diagonal blocks with inverses `X` and `Y` and the block `B` below the first and beside the second, the
/// inverse is `[X, 0; -Y B X, Y]`: all pairs of blocks at once, blocks twice as large each time. The series `(I - A)(I + A^2)
/// (I + A^4)...` takes as many products, but its powers grow past what f32 can cancel where keys are alike.
///
/// No graph is kept of that. One Newton step `X - X ((I + A) X - I)` on the result has the gradient of the inverse, and takes off
/// some of its rounding.
fn unit_lower_inverse(a: Tensor<4>) -> Tensor<4> {
    let size = a.dims()[3];
    let device = a.device();
    let identity = pattern(size, &device, |row, column| row == column);
    let fixed = a.clone().detach();
    let mut inverse = identity.clone().expand(a.dims());
    let mut block = 1;
    while block < size {
        let beside = |row: usize, column: usize| {
            row / (2 * block) == column / (2 * block) && row / block % 2 == 1 && (column / block).is_multiple_of(2)
        };
        let pairs = fixed.clone() * pattern(size, &device, beside);
        inverse =
            if block == 1 { inverse - pairs } else { inverse.clone() - inverse.clone().matmul(pairs).matmul(inverse) };
        block *= 2;
    }
    let rest = inverse.clone() + a.matmul(inverse.clone()) - identity;
    inverse.clone() - inverse.matmul(rest)
}
