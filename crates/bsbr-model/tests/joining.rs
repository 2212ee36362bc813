//! Texts that join a batch and leave it again, and texts that begin with what another has read: bit for bit as each alone.
#![cfg(feature = "flex")]

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector};
use bsbr_model::{Decoder, DecoderCache, ModelConfig, PREFILL_PIECE, PositionPolicy, next_piece};
use burn::tensor::{DType, Device, Tensor};
use common::{
    Numbers, families, gpt2_like, latent, llama_like, load, multi_query, original, recurrent, retrieving, sharing, text,
};

/// New tokens of each text in each of its steps: prompts at once and in pieces, single tokens, and a few at a time.
const STEPS: [&[usize]; 6] = [
    &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    &[7, 1, 1, 1, 1, 3, 1],
    &[64, 64, 22, 1, 1, 1, 1, 1, 1],
    &[31, 1, 1, 1, 40, 1, 1],
    &[128, 1, 1, 1],
    &[100, 9, 41, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
];

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

fn models() -> Vec<(String, Decoder)> {
    let device = Device::flex();
    let mut models: Vec<(String, Decoder)> =
        families().into_iter().enumerate().map(|(at, family)| (format!("family {at}"), original(family))).collect();
    for (retrieval, selector) in [
        (Retrieval::None, Selector::Index),
        (Retrieval::Blocks, Selector::Index),
        (Retrieval::Blocks, Selector::Meta),
        (Retrieval::State, Selector::Index),
    ] {
        let decoder = if selector == Selector::Meta { multi_query() } else { llama_like() };
        models.push((
            format!("{retrieval:?}, {selector:?}"),
            retrieving(decoder, attention(retrieval, selector), &device),
        ));
    }
    models.push(("index in f16".to_owned(), index().with_cache_type(DType::F16)));
    models.push(("latent".to_owned(), original(latent())));
    // Layers that read the index of another.
    let indexed = attention(Retrieval::Blocks, Selector::Index);
    models.push(("index of another layer".to_owned(), retrieving(sharing(), indexed, &device)));
    models
}

/// A decoder that chooses keys by an index.
fn index() -> Decoder {
    retrieving(llama_like(), attention(Retrieval::Blocks, Selector::Index), &Device::flex())
}

fn bits(tensor: Tensor<2>) -> Vec<u32> {
    tensor.try_into_vec_as::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// States of every token, and scores behind the last token of each step.
#[derive(Debug, Default, PartialEq)]
struct Made {
    states: Vec<u32>,
    scores: Vec<u32>,
}

/// A text on its way through its steps.
struct Running {
    number: usize,
    tokens: Vec<u32>,
    steps: &'static [usize],
    done: usize,
    made: Made,
}

impl Running {
    fn new(number: usize) -> Self {
        let steps = STEPS[number % STEPS.len()];
        let tokens = text(steps.iter().sum(), number as u64);
        Self { number, tokens, steps, done: 0, made: Made::default() }
    }

    fn next(&self) -> Vec<u32> {
        let before: usize = self.steps[..self.done].iter().sum();
        self.tokens[before..][..self.steps[self.done]].to_vec()
    }

    fn ended(&self) -> bool {
        self.done == self.steps.len()
    }
}

/// Reads the next tokens of some of the texts and keeps what they give.
fn step(model: &Decoder, running: &mut [Running], cache: &mut DecoderCache, takes_part: impl Fn(usize) -> bool) {
    let new: Vec<Vec<u32>> =
        (0..running.len()).map(|at| if takes_part(at) { running[at].next() } else { Vec::new() }).collect();
    if new.iter().all(Vec::is_empty) {
        return;
    }
    let hidden = model.hidden(&new, cache).unwrap();
    let mut ends = Vec::new();
    let mut at = 0;
    for new in new.iter().filter(|new| !new.is_empty()) {
        at += new.len();
        ends.push(hidden.clone().narrow(0, at - 1, 1));
    }
    let width = model.config().decoder.vocab_size;
    let scores = bits(model.logits_each(Tensor::cat(ends, 0)));
    let states = bits(hidden);
    let hidden_size = states.len() / at;
    let (mut states, mut scores) = (states.chunks_exact(hidden_size), scores.chunks_exact(width));
    for (text, new) in running.iter_mut().zip(&new).filter(|(_, new)| !new.is_empty()) {
        text.made.states.extend(states.by_ref().take(new.len()).flatten());
        text.made.scores.extend(scores.next().unwrap());
        text.done += 1;
    }
}

fn alone(model: &Decoder, number: usize) -> Made {
    let mut running = [Running::new(number)];
    let mut cache = model.new_cache(&[running[0].tokens.len()]).unwrap();
    while !running[0].ended() {
        step(model, &mut running, &mut cache, |_| true);
    }
    let [text] = running;
    text.made
}

#[test]
fn a_text_gets_the_same_bits_whichever_others_come_and_go() {
    for (name, model) in models() {
        let expected: Vec<Made> = (0..2 * STEPS.len()).map(|number| alone(&model, number)).collect();
        let mut random = Numbers::new(5);
        let mut waiting: Vec<Running> = (0..2 * STEPS.len()).rev().map(Running::new).collect();
        let (mut running, mut cache): (Vec<Running>, _) = (Vec::new(), model.new_cache(&[]).unwrap());
        let mut most = 0;
        while !(waiting.is_empty() && running.is_empty()) {
            for _ in 0..random.bits() % 3 {
                if let Some(text) = waiting.pop() {
                    cache.join(model.new_cache(&[text.tokens.len()]).unwrap());
                    running.push(text);
                }
            }
            most = most.max(running.len());
            let pausing = random.bits();
            step(&model, &mut running, &mut cache, |at| pausing >> (2 * at) & 3 != 0);
            for at in (0..running.len()).rev().filter(|&at| running[at].ended()).collect::<Vec<_>>() {
                let (text, left) = (running.remove(at), cache.leave(at));
                assert_eq!((left.batch(), left.length(0)), (1, text.tokens.len()));
                assert!(text.made == expected[text.number], "{name}: text {} is another among others", text.number);
            }
            assert_eq!(cache.batch(), running.len());
        }
        assert!(most > 4, "{name}: {most} texts at once");
    }
}

/// States of the rest of a text behind what the cache holds.
fn rest(model: &Decoder, tokens: &[u32], cache: &mut DecoderCache) -> Vec<u32> {
    let mut made = Vec::new();
    while cache.length(0) < tokens.len() {
        let held = cache.length(0);
        let piece = tokens[held..][..next_piece(held, tokens.len() - held)].to_vec();
        made.extend(bits(model.hidden(&[piece], cache).unwrap()));
    }
    made
}

#[test]
fn what_another_text_has_read_is_not_read_again_and_gives_the_same_bits() {
    let attention =
        || BlockAttentionConfig { chunk_size: 128, exact_tokens: 256, ..attention(Retrieval::Blocks, Selector::Index) };
    let device = Device::flex();
    let models = [
        ("original", load(ModelConfig::original(llama_like()), &device)),
        ("index", retrieving(llama_like(), attention(), &device)),
        ("index in bf16", retrieving(llama_like(), attention(), &device).with_cache_type(DType::BF16)),
    ];
    for (name, model) in models {
        let shared = 2 * PREFILL_PIECE;
        let longest = shared + 900;
        let first = text(longest, 1);
        let mut cache = model.new_cache(&[longest]).unwrap();
        rest(&model, &first, &mut cache);
        let second = [&first[..shared], &text(700, 2)].concat();
        let mut anew = model.new_cache(&[second.len()]).unwrap();
        let expected = rest(&model, &second, &mut anew);
        let hidden_size = model.config().decoder.hidden_size;
        for _ in 0..2 {
            let mut begun = model.begin_with(&cache, 0, shared, second.len()).unwrap();
            assert_eq!(begun.length(0), shared);
            let found = rest(&model, &second, &mut begun);
            assert!(found == expected[shared * hidden_size..], "{name}");
        }
        // The one it was taken from has not changed.
        let more = text(3, 3);
        let behind = bits(model.hidden(std::slice::from_ref(&more), &mut cache).unwrap());
        let mut again = model.new_cache(&[longest]).unwrap();
        rest(&model, &first, &mut again);
        assert!(behind == bits(model.hidden(&[more], &mut again).unwrap()), "{name}");
    }
}

#[test]
fn a_cache_that_cannot_go_back_says_so() {
    let begun = |model: &Decoder, held: usize, tokens: usize, expected: usize| {
        let mut cache = model.new_cache(&[held]).unwrap();
        rest(model, &text(held, 1), &mut cache);
        model.begin_with(&cache, 0, tokens, expected).map(|cache| cache.length(0))
    };
    let device = Device::flex();
    let of = |retrieval| retrieving(llama_like(), attention(retrieval, Selector::Index), &device);
    assert_eq!(begun(&of(Retrieval::State), 100, 64, 100), None);
    assert_eq!(begun(&of(Retrieval::State), 100, 100, 100), Some(100));
    assert_eq!(begun(&of(Retrieval::None), 100, 64, 100), None);
    // The index is founded on the first 64 tokens.
    assert_eq!(begun(&of(Retrieval::Blocks), 200, 63, 200), None);
    assert_eq!(begun(&of(Retrieval::Blocks), 200, 64, 200), Some(64));
    assert_eq!(begun(&of(Retrieval::Blocks), 200, 201, 300), None);
    let learned = |policy| original(gpt2_like()).with_config(|config| config.position_policy = policy).unwrap();
    assert_eq!(begun(&learned(PositionPolicy::Slide), 100, 100, 100), None);
    assert_eq!(begun(&learned(PositionPolicy::Interpolate), 100, 50, 400), None);
    assert_eq!(begun(&learned(PositionPolicy::Interpolate), 100, 50, 100), Some(50));
    assert_eq!(begun(&learned(PositionPolicy::Error), 100, 50, 400), Some(50));
    // States are those behind the last token.
    assert_eq!(begun(&original(recurrent()), 100, 50, 400), None);
    assert_eq!(begun(&original(recurrent()), 100, 100, 400), Some(100));
}

#[test]
fn recurrent_layers_go_back_to_where_their_states_were_marked() {
    let model = original(recurrent());
    let (first, shared) = (text(900, 1), PREFILL_PIECE);
    let mut cache = model.new_cache(&[first.len()]).unwrap();
    rest(&model, &first[..shared], &mut cache);
    let before = cache.bytes();
    cache.mark(0);
    let states = cache.bytes() - before;
    assert_eq!(states, 4 * model.config().decoder.state_width());
    rest(&model, &first, &mut cache);
    assert!(model.begin_with(&cache, 0, shared - 1, 2000).is_none());
    let second = [&first[..shared], &text(100, 2)].concat();
    let mut begun = model.begin_with(&cache, 0, shared, second.len()).unwrap();
    let found = rest(&model, &second, &mut begun);
    let mut anew = model.new_cache(&[second.len()]).unwrap();
    let expected = rest(&model, &second, &mut anew);
    assert!(found == expected[shared * model.config().decoder.hidden_size..]);
}

#[test]
fn bytes_of_the_texts_add_up_and_are_known_before() {
    for (name, model) in
        [("original", original(llama_like())), ("index", index()), ("recurrent", original(recurrent()))]
    {
        let mut cache = model.new_cache(&[300, 100]).unwrap();
        model.hidden(&[text(300, 1), text(100, 2)], &mut cache).unwrap();
        assert_eq!(cache.bytes(), cache.bytes_of(0) + cache.bytes_of(1), "{name}");
        let expected = model.expected_cache_bytes(300).unwrap();
        let found = cache.bytes_of(0);
        assert!(found.abs_diff(expected) * 20 <= found, "{name}: {found} bytes, {expected} expected");
    }
}
