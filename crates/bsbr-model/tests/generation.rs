//! Continuing a text: the loop, its ends, its errors.

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval};
use bsbr_model::{
    Decoder, DecoderConfig, GenerateConfig, Generation, ModelConfig, ModelError, PREFILL_PIECE, PositionPolicy,
    Sampler, SamplingConfig, Step, generate, generate_behind,
};
use common::{VOCABULARY, argmax, devices, families, gpt2_like, llama_like, load, logits, original, retrieving, text};

fn settings(max_new_tokens: usize) -> GenerateConfig {
    GenerateConfig { max_new_tokens, stop_tokens: vec![] }
}

fn greedy() -> Sampler {
    Sampler::new(SamplingConfig::default()).unwrap()
}

fn continued(model: &Decoder, prompt: &[u32], config: &GenerateConfig) -> Generation {
    generate(model, prompt, config, &mut greedy(), |_| true).unwrap()
}

/// The best token after the whole text so far, again and again: no cache.
fn recomputed(model: &Decoder, prompt: &[u32], new: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..new {
        tokens.push(argmax(logits(model, &tokens).last().unwrap()));
    }
    tokens.split_off(prompt.len())
}

#[test]
fn greedy_takes_the_best_token_of_the_growing_text() {
    for device in devices() {
        for decoder in families() {
            let model = load(ModelConfig::original(decoder), &device);
            let prompt = text(7, 1);
            let found = continued(&model, &prompt, &settings(20));
            assert_eq!(found.tokens, recomputed(&model, &prompt, 20));
            assert!(!found.stopped);
        }
    }
}

#[test]
fn greedy_is_the_same_through_every_kind_of_retrieval() {
    for device in devices() {
        for retrieval in [Retrieval::None, Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
            let attention = BlockAttentionConfig {
                chunk_size: 64,
                block_size: 4,
                local_chunks: 0,
                max_keys: 5,
                retrieval,
                exact_tokens: 0,
                ..Default::default()
            };
            let model = retrieving(llama_like(), attention, &device);
            let prompt = text(119, 2);
            assert_eq!(continued(&model, &prompt, &settings(30)).tokens, recomputed(&model, &prompt, 30));
        }
    }
}

#[test]
fn a_stop_token_ends_the_text_and_is_left_out() {
    let model = original(llama_like());
    let free = continued(&model, &text(5, 1), &settings(20)).tokens;
    let stop = free[6];
    let end = free.iter().position(|&token| token == stop).unwrap();
    // A stop token that never comes does nothing.
    let never = (0..VOCABULARY as u32).find(|token| !free.contains(token)).unwrap();
    let found = continued(&model, &text(5, 1), &GenerateConfig { max_new_tokens: 20, stop_tokens: vec![never, stop] });
    assert_eq!(found.tokens, free[..end]);
    assert!(found.stopped);
    let found = continued(&model, &text(5, 1), &GenerateConfig { max_new_tokens: 20, stop_tokens: vec![never] });
    assert_eq!(found.tokens, free);
    assert!(!found.stopped);
}

#[test]
fn a_text_ends_after_so_many_new_tokens() {
    let model = original(gpt2_like());
    let long = continued(&model, &text(5, 1), &settings(9)).tokens;
    for new in [0, 1, 2, 9] {
        let found = continued(&model, &text(5, 1), &settings(new));
        assert_eq!(found.tokens, long[..new]);
        assert!(!found.stopped);
    }
}

#[test]
fn each_new_token_is_handed_out_until_the_caller_has_enough() {
    let model = original(llama_like());
    let all = continued(&model, &text(5, 1), &settings(12)).tokens;
    let mut heard = Vec::new();
    let found = generate(&model, &text(5, 1), &settings(12), &mut greedy(), |token| {
        heard.push(token);
        heard.len() < 5
    });
    let found = found.unwrap();
    assert_eq!(heard, all[..5]);
    assert_eq!(found.tokens, heard);
    assert!(!found.stopped);
}

#[test]
fn the_bytes_of_the_cache_are_those_of_the_tokens_read() {
    let model = original(llama_like());
    let found = continued(&model, &text(5, 1), &settings(40));
    let mut cache = model.new_cache(&[44]).unwrap();
    model.hidden(&[text(5, 1)], &mut cache).unwrap();
    for &token in &found.tokens[..39] {
        model.hidden(&[vec![token]], &mut cache).unwrap(); // all but the last, which nothing follows
    }
    assert_eq!(found.cache_bytes, cache.bytes());
    assert_eq!(cache.length(0), 44);
}

#[test]
fn a_seed_decides_the_whole_text() {
    let model = original(gpt2_like());
    let with = |seed| {
        let config = SamplingConfig { temperature: 1.0, seed, ..Default::default() };
        generate(&model, &text(5, 1), &settings(24), &mut Sampler::new(config).unwrap(), |_| true).unwrap().tokens
    };
    assert_eq!(with(1), with(1));
    assert_ne!(with(1), with(2));
    assert_ne!(with(1), continued(&model, &text(5, 1), &settings(24)).tokens);
}

#[test]
fn a_text_past_the_learned_positions_is_refused_before_anything_runs() {
    let model = original(DecoderConfig { max_positions: 16, ..gpt2_like() });
    // 10 + 8 tokens, of which the last is never read: 17 positions.
    let result = generate(&model, &text(10, 1), &settings(8), &mut greedy(), |_| panic!("a token came"));
    assert!(matches!(result, Err(ModelError::TooLong { length: 17, max_positions: 16 })), "{result:?}");
    assert_eq!(continued(&model, &text(10, 1), &settings(7)).tokens.len(), 7);
    assert!(matches!(model.forward(&text(17, 1)), Err(ModelError::TooLong { length: 17, max_positions: 16 })));
    assert!(model.forward(&text(16, 1)).is_ok());
}

#[test]
fn position_policies_continue_past_the_learned_positions() {
    let decoder = DecoderConfig { max_positions: 16, ..gpt2_like() };
    for position_policy in [PositionPolicy::Clamp, PositionPolicy::Interpolate] {
        let config = ModelConfig { position_policy, ..ModelConfig::original(decoder.clone()) };
        let found = continued(&load(config, &devices()[0]), &text(10, 1), &settings(30));
        assert_eq!(found.tokens.len(), 30, "{position_policy:?}");
    }
}

#[test]
fn rotary_positions_have_no_end() {
    let model = original(DecoderConfig { max_positions: 16, ..llama_like() });
    assert_eq!(continued(&model, &text(10, 1), &settings(30)).tokens.len(), 30);
}

#[test]
fn a_token_outside_the_vocabulary_is_named_with_its_place() {
    let model = original(llama_like());
    let result = generate(&model, &[1, 2, 40], &settings(3), &mut greedy(), |_| true);
    let expected = "token 40 at position 2 is not in the vocabulary of 40 tokens";
    assert_eq!(result.unwrap_err().to_string(), expected);
}

#[test]
fn an_empty_text_cannot_be_continued() {
    let model = original(llama_like());
    let result = generate(&model, &[], &settings(3), &mut greedy(), |_| true);
    assert!(matches!(result, Err(ModelError::EmptyInput)), "{result:?}");
}

#[test]
fn a_refused_input_leaves_the_cache_as_it_was() {
    let model = original(DecoderConfig { max_positions: 16, ..gpt2_like() });
    let mut cache = model.new_cache(&[16, 16]).unwrap();
    model.hidden(&[text(3, 1), text(5, 2)], &mut cache).unwrap();
    let bytes = cache.bytes();
    let refused: [&[Vec<u32>]; 4] = [&[vec![], vec![]], &[vec![1]], &[vec![1], vec![2, 40]], &[vec![1], text(12, 3)]];
    for tokens in refused {
        assert!(model.hidden(tokens, &mut cache).is_err());
        assert_eq!((cache.length(0), cache.length(1), cache.bytes()), (3, 5, bytes));
    }
    let alone = logits(&model, &[&text(5, 2)[..], &[7]].concat());
    let hidden = model.hidden(&[vec![], vec![7]], &mut cache).unwrap();
    let error = common::difference(&common::rows(model.logits(hidden)), &alone[5..]);
    assert!(error <= 1e-4, "differs by {error}");
}

/// Continues text by text in one cache, as a conversation does; all tokens of the whole.
fn in_turns(model: &Decoder, turns: &[Vec<u32>], new: usize) -> Vec<u32> {
    let mut cache = model.new_cache(&[0]).unwrap();
    let (mut whole, mut unread) = (Vec::new(), Vec::new());
    for turn in turns {
        let prompt = [unread, turn.clone()].concat();
        let held = cache.length(0);
        let found = generate_behind(model, &mut cache, &prompt, &settings(new), &mut greedy(), |_| true).unwrap();
        // Nothing is read twice.
        assert_eq!(cache.length(0), held + prompt.len() + found.tokens.len() - found.unread.len());
        whole.extend(turn);
        whole.extend(&found.tokens);
        unread = found.unread;
    }
    whole
}

#[test]
fn a_text_goes_on_in_its_cache_as_if_it_were_read_anew() {
    for device in devices() {
        for retrieval in [Retrieval::None, Retrieval::Blocks, Retrieval::State] {
            let attention = BlockAttentionConfig {
                chunk_size: 64,
                block_size: 4,
                local_chunks: 0,
                max_keys: 5,
                retrieval,
                exact_tokens: 0,
                ..Default::default()
            };
            let model = retrieving(llama_like(), attention, &device);
            let turns = [text(70, 1), text(3, 2), text(1, 3), text(90, 4)];
            let found = in_turns(&model, &turns, 7);
            let mut expected: Vec<u32> = Vec::new();
            for turn in &turns {
                expected.extend(turn);
                let more = continued(&model, &expected, &settings(7)).tokens;
                expected.extend(more);
            }
            assert_eq!(found, expected);
        }
    }
}

#[test]
fn what_was_not_read_is_told() {
    let model = original(llama_like());
    let prompt = text(PREFILL_PIECE + 5, 1);
    let run = |most: usize, stop: &[u32], end: &dyn Fn(Step) -> bool| {
        let mut cache = model.new_cache(&[0]).unwrap();
        let config = GenerateConfig { max_new_tokens: most, stop_tokens: stop.to_vec() };
        let found = generate_behind(&model, &mut cache, &prompt, &config, &mut greedy(), |step| !end(step)).unwrap();
        (found, cache.length(0))
    };
    let (whole, held) = run(4, &[], &|_| false);
    assert_eq!((whole.unread.as_slice(), held), (&whole.tokens[3..], prompt.len() + 3));
    // A stop token belongs to no text, so that nothing is left.
    let stop = whole.tokens[3];
    if !whole.tokens[..3].contains(&stop) {
        let (stopped, held) = run(9, &[stop], &|_| false);
        assert_eq!((stopped.unread.len(), held, stopped.stopped), (0, prompt.len() + 3, true));
    }
    let (early, held) = run(4, &[], &|step| step == Step::Token(whole.tokens[0]));
    assert_eq!((early.tokens.as_slice(), early.unread.as_slice()), (&whole.tokens[..1], &whole.tokens[..1]));
    assert_eq!(held, prompt.len());
    let (reading, held) = run(4, &[], &|step| step == Step::Read(PREFILL_PIECE, prompt.len()));
    assert_eq!((reading.tokens.len(), reading.unread.as_slice()), (0, &prompt[PREFILL_PIECE..]));
    assert_eq!(held, PREFILL_PIECE);
}

#[test]
fn a_cache_of_several_texts_is_not_continued() {
    let model = original(llama_like());
    let mut cache = model.new_cache(&[0, 0]).unwrap();
    let result = generate_behind(&model, &mut cache, &text(3, 1), &settings(1), &mut greedy(), |_| true);
    assert!(matches!(result, Err(ModelError::Input(_))), "{result:?}");
    let mut cache = model.new_cache(&[0]).unwrap();
    let result = generate_behind(&model, &mut cache, &[], &settings(1), &mut greedy(), |_| true);
    assert!(matches!(result, Err(ModelError::EmptyInput)), "{result:?}");
}
