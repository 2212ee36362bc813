//! The engine by itself: what texts give, what is not read again, what is refused.

mod common;

use std::time::Duration;

use bsbr_model::{PREFILL_PIECE, SamplingConfig};
use bsbr_serve::{Ended, Ending, Engine, EngineConfig, Event, Refusal, Request, ScoreBias, ServeError};
use common::{generated, heldout, model, recurrent};
use tokio::sync::mpsc::UnboundedReceiver;

fn asked(prompt: Vec<u32>, new: usize, sampling: SamplingConfig) -> Request {
    let (bias, stop_tokens) = (ScoreBias::default(), vec![0]);
    Request { prompt, max_new_tokens: new, stop_tokens, sampling, bias, logprobs: None, score_prompt: false }
}

fn sampled(seed: u64) -> SamplingConfig {
    SamplingConfig { temperature: 0.9, top_p: Some(0.95), repeat_penalty: 1.1, seed, ..Default::default() }
}

/// The new tokens and the end of a text.
fn end(mut events: UnboundedReceiver<Event>) -> (Vec<u32>, Ended) {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().expect("an end") {
            Event::Token(score) => tokens.push(score.token),
            Event::Ended(ended) => return (tokens, ended),
            Event::Begun { .. } | Event::Prompt(_) => {}
            Event::Failed(problem) => panic!("{problem}"),
        }
    }
}

fn only(engine: &Engine, request: Request) -> UnboundedReceiver<Event> {
    engine.submit(vec![request]).unwrap().remove(0)
}

/// Prompts of many lengths, some with a common beginning: shorter than a strip, than a piece, and of several pieces.
fn prompts() -> Vec<Vec<u32>> {
    let (_, tokenizer) = model();
    let tokens = tokenizer.encode(&heldout()).unwrap();
    let lengths = [1, 3, 8, 9, 40, 200, 511, 512, 513, 700, 1025, 1500, 2, 90, 600, 1200];
    lengths
        .iter()
        .enumerate()
        .map(|(at, &length)| tokens[if at % 2 == 0 { 0 } else { 37 * at }..][..length].to_vec())
        .collect()
}

#[test]
fn a_text_has_the_tokens_of_generate_alone_and_beside_fifteen_others() {
    let (decoder, _) = model();
    let prompts = prompts();
    assert_eq!(prompts.len(), 16);
    let of = |at: usize| asked(prompts[at].clone(), 30, sampled(at as u64));
    let expected: Vec<Vec<u32>> = (0..16).map(|at| generated(&decoder, &prompts[at], 30, sampled(at as u64))).collect();
    let engine = Engine::start(decoder, EngineConfig::default()).unwrap();
    let together: Vec<_> = engine.submit((0..16).map(of).collect()).unwrap();
    for (at, events) in together.into_iter().enumerate() {
        assert_eq!(end(events).0, expected[at], "text {at} beside the others");
    }
    for (at, expected) in expected.iter().enumerate() {
        // Behind what the others have left.
        assert_eq!(end(only(&engine, of(at))).0, *expected, "text {at} alone");
    }
    let counts = engine.counts();
    assert_eq!((counts.ended, counts.cancelled, counts.failed, counts.running, counts.waiting), (32, 0, 0, 0, 0));
    assert!(counts.keys_read > 0 && counts.keys_read < counts.keys_all, "{counts:?}");
}

#[test]
fn a_known_beginning_is_not_read_again() {
    let (decoder, tokenizer) = model();
    let tokens = tokenizer.encode(&heldout()).unwrap();
    let first = tokens[..2 * PREFILL_PIECE + 100].to_vec();
    let second = [&first[..2 * PREFILL_PIECE], &tokens[1300..1400]].concat();
    let expected = generated(&decoder, &second, 20, sampled(1));
    let engine = Engine::start(decoder, EngineConfig::default()).unwrap();
    let known = |request| end(only(&engine, request)).1.known;
    assert_eq!(known(asked(first.clone(), 3, sampled(1))), 0);
    let (found, ended) = end(only(&engine, asked(second.clone(), 20, sampled(1))));
    assert_eq!((found, ended.known), (expected.clone(), 2 * PREFILL_PIECE));
    assert_eq!(ended.ending, if expected.len() == 20 { Ending::Length } else { Ending::StopToken });
    let read = engine.counts().read_tokens;
    assert_eq!(read as usize, first.len() + second.len() - 2 * PREFILL_PIECE);
    // Its scores are only had by reading it.
    let scored = Request { logprobs: Some(0), score_prompt: true, ..asked(first.clone(), 0, sampled(1)) };
    assert_eq!(known(scored), 0);
    // Of a text that still runs, too.
    let slow = only(&engine, asked([&tokens[2000..2000 + PREFILL_PIECE], &[5]].concat(), 1000, sampled(2)));
    while engine.counts().new_tokens < 60 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(known(asked([&tokens[2000..2000 + PREFILL_PIECE], &[6]].concat(), 2, sampled(3))), PREFILL_PIECE);
    drop(slow);
    let counts = engine.counts();
    assert!(counts.known_bytes > 0 && counts.known_texts >= 2, "{counts:?}");
}

#[test]
fn recurrent_layers_share_a_beginning_up_to_where_their_states_were_kept() {
    let decoder = recurrent();
    // Any tokens: no text is needed.
    let tokens: Vec<u32> = (0..3000u32).map(|at| at.wrapping_mul(2_654_435_761) % 29 + 2).collect();
    let first = tokens[..PREFILL_PIECE + 100].to_vec();
    let longer = [&first[..], &tokens[2000..2700]].concat();
    let third = [&first[..PREFILL_PIECE], &tokens[1500..1550]].concat();
    let apart = [&tokens[..200], &tokens[1000..1700]].concat();
    let expected = |prompt: &[u32]| generated(&decoder, prompt, 15, sampled(1));
    let expected = [&first, &longer, &third, &longer, &apart].map(|prompt| expected(prompt));
    let config = EngineConfig { max_tokens: Some(4000), ..Default::default() };
    let engine = Engine::start(decoder, config).unwrap();
    let ask = |prompt: &[u32]| {
        let (found, ended) = end(only(&engine, asked(prompt.to_vec(), 15, sampled(1))));
        (found, ended.known)
    };
    assert_eq!(ask(&first), (expected[0].clone(), 0));
    // Behind the whole pieces of the first, and kept beside it.
    assert_eq!(ask(&longer), (expected[1].clone(), PREFILL_PIECE));
    assert_eq!(ask(&third), (expected[2].clone(), PREFILL_PIECE));
    assert_eq!(ask(&longer), (expected[3].clone(), 2 * PREFILL_PIECE));
    assert_eq!(ask(&apart), (expected[4].clone(), 0));
    // A text that still runs has its states at the end of its whole pieces too.
    let endless = asked([&tokens[2000..2000 + PREFILL_PIECE], &[5]].concat(), 3000, sampled(2));
    let before = engine.counts().new_tokens;
    let slow = only(&engine, Request { stop_tokens: vec![], ..endless });
    while engine.counts().new_tokens < before + 20 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(ask(&[&tokens[2000..2000 + PREFILL_PIECE], &[6]].concat()).1, PREFILL_PIECE);
    drop(slow);
}

#[test]
fn a_cache_without_room_forgets_what_is_known_and_lets_texts_wait() {
    let (decoder, tokenizer) = model();
    let tokens = tokenizer.encode(&heldout()).unwrap();
    let one = decoder.expected_cache_bytes(1100).unwrap();
    let expected = generated(&decoder, &tokens[..1090], 10, sampled(0));
    let engine = Engine::start(decoder, EngineConfig { cache_bytes: 2 * one, ..Default::default() }).unwrap();
    let all = engine.submit((0..6).map(|at| asked(tokens[..1090].to_vec(), 10, sampled(at))).collect()).unwrap();
    for (at, events) in all.into_iter().enumerate() {
        let found = end(events).0;
        assert!(at > 0 || found == expected);
        let counts = engine.counts();
        assert!(counts.running <= 2 && counts.cache_bytes + counts.known_bytes <= 2 * one + one / 2, "{counts:?}");
    }
    assert!(matches!(
        engine.submit(vec![asked(tokens[..1500].to_vec(), 500, sampled(0))]).map(|_| ()),
        Ok(()) | Err(Refusal::TooMuchMemory { .. })
    ));
}

#[test]
fn what_cannot_run_is_refused_and_says_why() {
    let (decoder, _) = model();
    let config = EngineConfig {
        max_texts: 1,
        max_waiting: 2,
        max_tokens: Some(900),
        cache_bytes: decoder.expected_cache_bytes(600).unwrap(),
        ..Default::default()
    };
    let engine = Engine::start(decoder, config).unwrap();
    let refused = |request: Request| engine.submit(vec![request]).unwrap_err();
    let some = || asked(vec![5; 10], 500, sampled(0));
    assert!(matches!(
        refused(asked(vec![5; 10], 891, sampled(0))),
        Refusal::TooLong { prompt: 10, new: 891, most: 900 }
    ));
    assert!(matches!(refused(asked(vec![5; 10], 890, sampled(0))), Refusal::TooMuchMemory { tokens: 900, .. }));
    assert!(matches!(refused(asked(vec![], 1, sampled(0))), Refusal::Input(_)));
    assert!(refused(asked(vec![5, 99_999], 1, sampled(0))).to_string().contains("99999"));
    assert!(matches!(
        refused(Request { sampling: SamplingConfig { top_p: Some(2.0), ..sampled(0) }, ..some() }),
        Refusal::Input(_)
    ));
    assert!(matches!(engine.submit(vec![some(); 3]).unwrap_err(), Refusal::TooMany { texts: 3, most: 2 }));
    let first = engine.submit(vec![some()]).unwrap();
    while engine.counts().running == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let waiting = engine.submit(vec![some(), some()]).unwrap();
    assert!(matches!(refused(some()), Refusal::Busy { waiting: 2, most: 2 }));
    // Those that went away need no place, and leave theirs at once.
    drop(waiting);
    let next = engine.submit(vec![asked(vec![7; 4], 2, sampled(0))]).unwrap().remove(0);
    drop(first);
    assert_eq!(end(next).0.len(), 2);
    assert!(engine.counts().cancelled >= 1);
    engine.stop();
    assert!(matches!(refused(some()), Refusal::Stopping));
    for setting in ["max_texts", "max_waiting", "cache_bytes"] {
        let (decoder, _) = model();
        let mut config = EngineConfig::default();
        match setting {
            "max_texts" => config.max_texts = 0,
            "max_waiting" => config.max_waiting = 0,
            _ => config.cache_bytes = 0,
        }
        let error = Engine::start(decoder, config).unwrap_err();
        assert!(matches!(error, ServeError::Config { setting: found, .. } if found == setting), "{error}");
    }
}

#[test]
fn scores_are_log_probabilities_and_biases_change_what_is_chosen() {
    let (decoder, tokenizer) = model();
    let prompt = tokenizer.encode(&heldout()[..900]).unwrap();
    let logits =
        decoder.logits(decoder.hidden(std::slice::from_ref(&prompt), &mut decoder.new_cache(&[400]).unwrap()).unwrap());
    let logits = logits.try_into_vec_as::<f32>().unwrap();
    let width = logits.len() / prompt.len();
    let logprob = |row: usize, token: u32| {
        let row = &logits[row * width..][..width];
        let sum: f64 = row.iter().map(|&score| f64::from(score).exp()).sum();
        f64::from(row[token as usize]) - sum.ln()
    };
    let engine = Engine::start(decoder, EngineConfig::default()).unwrap();
    let greedy = SamplingConfig::default();
    let request = Request { logprobs: Some(3), score_prompt: true, ..asked(prompt.clone(), 1, greedy.clone()) };
    let mut events = only(&engine, request.clone());
    let mut scores = Vec::new();
    let new = loop {
        match events.blocking_recv().unwrap() {
            Event::Prompt(more) => scores.extend(more),
            Event::Token(score) => break score,
            _ => {}
        }
    };
    assert_eq!(scores.len(), prompt.len() - 1);
    for (row, score) in scores.iter().enumerate() {
        assert_eq!((score.token, score.best.len()), (prompt[row + 1], 3));
        assert!((score.logprob - logprob(row, score.token)).abs() < 1e-4, "{row}");
        assert!(score.best.is_sorted_by(|a, b| a.1 >= b.1) && score.best[0].1 >= score.logprob);
    }
    assert_eq!(new.token, new.best[0].0);
    assert!((new.logprob - logprob(prompt.len() - 1, new.token)).abs() < 1e-4);
    // What may not be chosen is not, and its probability is told all the same.
    let bias = ScoreBias { tokens: [(new.token, -100.0)].into(), ..Default::default() };
    let other = end(only(&engine, Request { bias, ..request.clone() })).0;
    assert_eq!(other, [new.best[1].0]);
    let bias = ScoreBias { presence: 2.0, frequency: 2.0, ..Default::default() };
    let long = |bias| end(only(&engine, Request { bias, ..asked(prompt.clone(), 60, greedy.clone()) })).0;
    let repeats = |tokens: &[u32]| tokens.len() - tokens.iter().collect::<std::collections::BTreeSet<_>>().len();
    assert!(repeats(&long(bias)) < repeats(&long(ScoreBias::default())));
}
