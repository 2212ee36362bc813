//! Texts of different lengths, decoded together step by step.

mod common;

use bsbr_attn::{BlockAttentionConfig, Kernel, Retrieval, Selector};
use bsbr_model::{Decoder, DecoderConfig, ModelConfig};
use burn::tensor::Device;
use common::{devices, gemma_like, llama_like, load, logits, multi_query, retrieving, rows, same, text};

/// Tokens of each text before the first step: within a chunk, at the end of one, of several, and with sections far back.
const PROMPTS: [usize; 6] = [1, 7, 64, 31, 125, 150];

/// Tokens decoded behind them: more than two blocks.
const STEPS: usize = 37;

/// Chunks and blocks as small as they can be, so that a few tokens cross borders of all of them.
fn attention(retrieval: Retrieval, selector: Selector) -> BlockAttentionConfig {
    let settings = BlockAttentionConfig {
        chunk_size: 8,
        block_size: 2,
        meta_blocks: 3,
        max_keys: 20,
        fine_tokens: 0,
        max_sections: 1,
        exact_tokens: 0,
        retrieval,
        selector,
        ..Default::default()
    };
    if settings.uses_index() {
        return BlockAttentionConfig { chunk_size: 64, local_chunks: 0, ..settings };
    }
    settings
}

fn texts() -> Vec<Vec<u32>> {
    let texts = PROMPTS.iter().zip(0..);
    texts.map(|(prompt, seed)| text(prompt + STEPS, seed)).collect()
}

/// Logits of every token of [`texts`], read together: the prompts at once, then a token of each in every step. A text in
/// `pausing` has none in every third.
fn together(model: &Decoder, pausing: &[usize]) -> Vec<Vec<Vec<f32>>> {
    let texts = texts();
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let mut cache = model.new_cache(&lengths).unwrap();
    let mut found = vec![Vec::new(); texts.len()];
    let mut step = 0;
    while found.iter().zip(&texts).any(|(found, text)| found.len() < text.len()) {
        let count = |at: usize| match step {
            0 => PROMPTS[at],
            step if step % 3 == 0 && step < STEPS && pausing.contains(&at) => 0,
            _ => usize::from(found[at].len() < texts[at].len()),
        };
        let new: Vec<Vec<u32>> =
            (0..texts.len()).map(|at| texts[at][found[at].len()..][..count(at)].to_vec()).collect();
        let mut packed = rows(model.logits(model.hidden(&new, &mut cache).unwrap())).into_iter();
        new.iter().zip(&mut found).for_each(|(new, found)| found.extend(packed.by_ref().take(new.len())));
        assert!(packed.next().is_none());
        step += 1;
    }
    found
}

/// Every kind of attention there is code for.
fn models(device: &Device) -> Vec<(String, Decoder)> {
    let original = |decoder: DecoderConfig| ("original".to_owned(), load(ModelConfig::original(decoder), device));
    let mut models = vec![original(llama_like()), original(gemma_like())];
    for (retrieval, selector) in [
        (Retrieval::None, Selector::Index),
        (Retrieval::Blocks, Selector::Index),
        (Retrieval::Blocks, Selector::Meta),
        (Retrieval::State, Selector::Index),
    ] {
        let decoder = if selector == Selector::Meta { multi_query() } else { llama_like() };
        let model = retrieving(decoder, attention(retrieval, selector), device);
        models.push((format!("{retrieval:?}, {selector:?}"), model));
    }
    let plain = retrieving(llama_like(), attention(Retrieval::Blocks, Selector::Index), device);
    models.push(("plain".to_owned(), plain.with_kernel(Kernel::Plain)));
    models
}

#[test]
fn texts_decoded_together_have_the_logits_of_each_alone() {
    for device in devices() {
        for (name, model) in models(&device) {
            let alone: Vec<_> = texts().iter().map(|text| logits(&model, text)).collect();
            for pausing in [&[][..], &[0, 3, 5]] {
                for (at, (found, alone)) in together(&model, pausing).iter().zip(&alone).enumerate() {
                    if let Err(how) = same(found, alone, model.config().attention.as_ref()) {
                        panic!("{name}: text {at}, {pausing:?} pausing: {how}");
                    }
                }
            }
        }
    }
}

#[cfg(feature = "flex")]
#[test]
fn the_number_of_threads_changes_no_bit_of_a_batch() {
    let bits = |found: Vec<Vec<Vec<f32>>>| -> Vec<u32> {
        found.iter().flatten().flatten().map(|logit| logit.to_bits()).collect()
    };
    for (name, model) in models(&Device::flex()) {
        let [one, many] = [1, 5].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            bits(pool.install(|| together(&model, &[1, 4])))
        });
        assert!(one == many, "{name}: other bits with more threads");
    }
}
