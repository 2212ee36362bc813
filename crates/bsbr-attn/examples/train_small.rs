//! Trains a small model whose attention is that of this crate to copy a text: what follows the second marker is what followed the
//! first, dozens of tokens back.
//!
//! cargo run --release --example train_small
#![allow(clippy::print_stdout)]

use bsbr_attn::{BlockAttention, BlockAttentionLayer};
use burn::{
    module::Module,
    nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, loss::CrossEntropyLossConfig},
    optim::{AdamConfig, GradientsParams},
    tensor::{Device, Int, Tensor, activation::gelu},
};

const LETTERS: usize = 16;
const WIDTH: usize = 64;
/// Letters to copy; the text has twice as many and two markers.
const LENGTH: usize = 24;
const BATCH: usize = 16;

#[derive(Module, Debug)]
struct Block {
    norms: Vec<LayerNorm>,
    attention: BlockAttention,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Model {
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Linear,
}

impl Model {
    fn new(device: &Device) -> Self {
        let norm = || LayerNormConfig::new(WIDTH).init(device);
        let block = || Block {
            norms: vec![norm(), norm()],
            attention: BlockAttentionLayer::new(WIDTH, 4).init(device).expect("sizes that fit"),
            up: LinearConfig::new(WIDTH, 4 * WIDTH).init(device),
            down: LinearConfig::new(4 * WIDTH, WIDTH).init(device),
        };
        Self {
            embedding: EmbeddingConfig::new(LETTERS + 1, WIDTH).init(device),
            blocks: vec![block(), block()],
            head: LinearConfig::new(WIDTH, LETTERS + 1).init(device),
        }
    }

    /// Scores of the next token, `[batch, tokens, letters]`.
    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let mut x = self.embedding.forward(tokens);
        for block in &self.blocks {
            let read = block.attention.forward(block.norms[0].forward(x.clone())).expect("shapes that fit");
            x = x + read;
            x = x.clone() + block.down.forward(gelu(block.up.forward(block.norms[1].forward(x))));
        }
        self.head.forward(x)
    }
}

/// Texts `marker letters marker letters`, from a small generator of random numbers.
fn texts(seed: &mut u64) -> Vec<i32> {
    let mut letter = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((*seed >> 33) as usize % LETTERS) as i32
    };
    let text = |letter: &mut dyn FnMut() -> i32| {
        let letters: Vec<i32> = (0..LENGTH).map(|_| letter()).collect();
        let marker = LETTERS as i32;
        [vec![marker], letters.clone(), vec![marker], letters].concat()
    };
    (0..BATCH).flat_map(|_| text(&mut letter)).collect()
}

fn main() {
    let device = Device::flex().autodiff();
    let mut model = Model::new(&device);
    let mut optimiser = AdamConfig::new().init();
    let loss_of = CrossEntropyLossConfig::new().init(&device);
    let (mut seed, mut first, mut last) = (7, f32::NAN, f32::NAN);
    for step in 0..150 {
        let tokens = 2 * LENGTH + 2;
        let batch = Tensor::<1, Int>::from_ints(texts(&mut seed).as_slice(), &device).reshape([BATCH, tokens]);
        let scores = model.forward(batch.clone().narrow(1, 0, tokens - 1));
        // Only the copy can be known.
        let scores = scores.narrow(1, LENGTH + 1, LENGTH).reshape([BATCH * LENGTH, LETTERS + 1]);
        let targets = batch.narrow(1, LENGTH + 2, LENGTH).reshape([BATCH * LENGTH]);
        let loss = loss_of.forward(scores, targets);
        last = loss.clone().try_into_vec_as::<f32>().expect("one number")[0];
        if step == 0 {
            first = last;
        }
        if step % 25 == 0 {
            println!("step {step:3}: {last:.3} nats a letter");
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimiser.step(3e-3, model, gradients);
    }
    println!("last: {last:.3} nats a letter; {:.3} by guessing", (LETTERS as f32).ln());
    assert!(last < 0.8 * first, "nothing was learned: {first} to {last}");
}
