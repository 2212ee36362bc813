//! Which inputs the meta projections read: the same attention put together here from the parts of the model.

mod common;

use bsbr_attn::{AttentionOptions, BlockAttentionConfig, Meta, Retrieval, Selector, attend};
use bsbr_model::{Decoder, DecoderConfig, Normalisation, Positions, Projection, Table};
use burn::{
    nn::Linear,
    tensor::{Int, Tensor, TensorData},
};
use common::{devices, difference, gpt2_like, retrieving, rotary, rows, text};

const TOKENS: usize = 61;

/// `[tokens, width]` of the projection of these rows as `[1, heads, tokens, head_dim]`.
fn heads(linear: &Linear, x: Tensor<2>, head_dim: usize) -> Tensor<4> {
    let y = linear.forward(x);
    let [tokens, width] = y.dims();
    y.reshape([1, tokens, width / head_dim, head_dim]).swap_dims(1, 2)
}

/// `[1, heads, tokens, head_dim]` turned by `position * theta^(-2 i / dim)` in the plane of dimensions `i` and `dim / 2 + i`
/// of the first `dim`; the tokens stand at `positions`.
fn rotated(x: Tensor<4>, positions: &[usize], decoder: &DecoderConfig) -> Tensor<4> {
    let Positions::Rotary { theta, rotary_dim, .. } = &decoder.positions else { return x };
    let (shape, half) = (x.dims(), rotary_dim / 2);
    let (device, width) = (x.device(), shape[3]);
    let mut numbers = x.try_into_vec_as::<f32>().unwrap();
    for (row, numbers) in numbers.chunks_exact_mut(width).enumerate() {
        for i in 0..half {
            let angle = positions[row % positions.len()] as f64 * theta.powf(-2.0 * i as f64 / *rotary_dim as f64);
            let (a, b) = (f64::from(numbers[i]), f64::from(numbers[half + i]));
            numbers[i] = (a * angle.cos() - b * angle.sin()) as f32;
            numbers[half + i] = (a * angle.sin() + b * angle.cos()) as f32;
        }
    }
    Tensor::from_data(TensorData::new(numbers, shape), &device)
}

/// Logits of a decoder of one block, with the meta inputs of the first token of each chunk and of the
/// last token of each block.
fn put_together(model: &Decoder, tokens: &[u32], attention: &BlockAttentionConfig) -> Vec<Vec<f32>> {
    let (device, decoder, block) = (model.device(), &model.config().decoder, &model.blocks[0]);
    let index = |at: Vec<i32>| {
        let count = at.len();
        Tensor::<1, Int>::from_data(TensorData::new(at, [count]), &device)
    };
    let every = |step: usize, from: usize| (from..TOKENS).step_by(step).collect::<Vec<_>>();
    let Table::Dense(table) = &model.embed else { panic!("a table in f32") };
    let mut x = table.weight.val().select(0, index(tokens.iter().map(|&token| token as i32).collect()));
    if let Some(table) = &model.position {
        x = x + table.val().narrow(0, 0, TOKENS);
    }
    let norm = |norm: &Option<Normalisation>, x: Tensor<2>| norm.as_ref().unwrap().forward(x);
    let normed = norm(&block.attention_norm, x.clone());
    let of = |linear: &Linear, positions: &[usize]| {
        let x = normed.clone().select(0, index(positions.iter().map(|&at| at as i32).collect()));
        heads(linear, x, decoder.head_dim)
    };
    let projections = &block.attention;
    let (all, first) = (every(1, 0), every(attention.chunk_size, 0));
    let last = every(attention.block_size, attention.block_size - 1);
    let turned = |linear: &Linear, positions: &[usize]| rotated(of(linear, positions), positions, decoder);
    let meta = Meta {
        query: projections.meta_query.as_ref().map(|linear| turned(linear, &first)),
        key: projections.meta_key.as_ref().map(|linear| turned(linear, &last)),
    };
    let read = attend(
        turned(dense(&projections.query), &all),
        turned(dense(projections.key.as_ref().unwrap()), &all),
        of(dense(projections.value.as_ref().unwrap()), &all),
        Some(meta),
        Some(attention),
        AttentionOptions::new(decoder.head_dim),
    );
    let read = read.unwrap().swap_dims(1, 2).reshape([TOKENS, decoder.heads * decoder.head_dim]);
    let x = x + projections.output.forward(read);
    let x = x.clone() + block.mlp.forward(norm(&block.mlp_norm, x));
    rows(model.logits(norm(&model.final_norm, x)))
}

#[test]
fn chunks_ask_with_their_first_token_and_blocks_answer_with_their_last() {
    for retrieval in [Retrieval::Blocks, Retrieval::State] {
        let attention = BlockAttentionConfig {
            chunk_size: 8,
            block_size: 4,
            local_chunks: 0,
            meta_blocks: 2,
            selector: Selector::Meta,
            retrieval,
            exact_tokens: 0,
            ..Default::default()
        };
        let positions = [Positions::Learned, rotary(8), rotary(4)];
        for (device, positions) in devices().into_iter().flat_map(|d| positions.clone().map(|p| (d.clone(), p))) {
            let decoder = DecoderConfig { layers: 1, positions, ..gpt2_like() };
            let model = retrieving(decoder, attention.clone(), &device);
            let tokens = text(TOKENS, 8);
            let found = common::logits(&model, &tokens);
            let error = difference(&found, &put_together(&model, &tokens, &attention));
            assert!(error <= 1e-4, "{retrieval:?}: differs by {error}");

            let mut other = model.clone();
            for block in &mut other.blocks {
                std::mem::swap(&mut block.attention.meta_query, &mut block.attention.meta_key);
            }
            let effect = difference(&found, &common::logits(&other, &tokens));
            assert!(effect > 0.01, "{retrieval:?}: the projections change nothing");
        }
    }
}

/// The linear layer of a projection nobody split.
fn dense(projection: &Projection) -> &Linear {
    match projection {
        Projection::Dense(linear) => linear,
        Projection::Stored(_) | Projection::Split(_) => panic!("the model is as it was loaded"),
    }
}
