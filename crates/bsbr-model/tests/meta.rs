//! Which inputs the meta projections read: the same attention put together here from the parts of the model.

mod common;

use bsbr_attn::{AttentionOptions, BlockAttentionConfig, Meta, Retrieval, Selector, attend};
use bsbr_model::{Decoder, DecoderConfig, Normalisation};
use burn::{
    nn::Linear,
    tensor::{Int, Tensor, TensorData},
};
use common::{devices, difference, gpt2_like, retrieving, rows, text};

const TOKENS: usize = 61;

/// `[tokens, width]` of the projection of these rows as `[1, heads, tokens, head_dim]`.
fn heads(linear: &Linear, x: Tensor<2>, head_dim: usize) -> Tensor<4> {
    let y = linear.forward(x);
    let [tokens, width] = y.dims();
    y.reshape([1, tokens, width / head_dim, head_dim]).swap_dims(1, 2)
}

/// Logits of a decoder of one block without rotation, with the meta inputs of the first token of each chunk and of the
/// last token of each block.
fn put_together(model: &Decoder, tokens: &[u32], attention: &BlockAttentionConfig) -> Vec<Vec<f32>> {
    let (device, decoder, block) = (model.device(), &model.config().decoder, &model.blocks[0]);
    let index = |at: Vec<i32>| {
        let count = at.len();
        Tensor::<1, Int>::from_data(TensorData::new(at, [count]), &device)
    };
    let every = |step: usize, from: usize| index((from..TOKENS).step_by(step).map(|at| at as i32).collect());
    let table = model.position.as_ref().unwrap().val();
    let x = model.embed.weight.val().select(0, index(tokens.iter().map(|&token| token as i32).collect()))
        + table.narrow(0, 0, TOKENS);
    let norm = |norm: &Option<Normalisation>, x: Tensor<2>| norm.as_ref().unwrap().forward(x);
    let normed = norm(&block.attention_norm, x.clone());
    let of = |linear: &Linear, x: &Tensor<2>| heads(linear, x.clone(), decoder.head_dim);
    let projections = &block.attention;
    let (first, last) = (
        normed.clone().select(0, every(attention.chunk_size, 0)),
        normed.clone().select(0, every(attention.block_size, attention.block_size - 1)),
    );
    let meta = Meta {
        query: projections.meta_query.as_ref().map(|linear| of(linear, &first)),
        key: projections.meta_key.as_ref().map(|linear| of(linear, &last)),
    };
    let read = attend(
        of(&projections.query, &normed),
        of(&projections.key, &normed),
        of(&projections.value, &normed),
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
            top_k: 2,
            selector: Selector::Meta,
            retrieval,
            exact_tokens: 0,
            ..Default::default()
        };
        for device in devices() {
            let decoder = DecoderConfig { layers: 1, ..gpt2_like() };
            let model = retrieving(decoder, attention.clone(), &device);
            let tokens = text(TOKENS, 8);
            let found = common::logits(&model, &tokens);
            let error = difference(&found, &put_together(&model, &tokens, &attention));
            assert!(error <= 1e-4, "{retrieval:?}: differs by {error}");

            let by_mean_key = model.with_config(|config| {
                config.attention = Some(BlockAttentionConfig { selector: Selector::MeanKey, ..attention.clone() });
            });
            let effect = difference(&found, &common::logits(&by_mean_key.unwrap(), &tokens));
            assert!(effect > 0.01, "{retrieval:?}: the selector changes nothing");
        }
    }
}
