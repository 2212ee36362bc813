//! The evaluation over long texts: prompts, answers, controls.
#![cfg(feature = "text")]

mod common;

use std::path::Path;

use bsbr_attn::{BlockAttentionConfig, Far, Retrieval};
use bsbr_model::{
    DEPTHS, Decoder, DecoderConfig, LongConfig, LongTask, ModelError, Prompt, PromptMaker, Recall, RecallScores,
    RecallTask, TextTokenizer, TurnScores, check_long, controls, default_lengths, evaluate_long, recall,
};
use common::{argmax, gpt2_like, llama_like, logits, original};

const TASKS: [RecallTask; 4] = [RecallTask::Passkey, RecallTask::Needle, RecallTask::Queries, RecallTask::Chain];

/// A tokenizer that knows no special token, and a text.
fn tokenizer() -> (TextTokenizer, Vec<u32>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bsbr/builtin");
    let tokenizer = TextTokenizer::open(&dir.join("tokenizer.json")).expect("a tokenizer");
    let text = std::fs::read_to_string(dir.join("heldout.txt")).expect("a text");
    let tokens = tokenizer.encode(&text[..30_000]).expect("tokens");
    (tokenizer, tokens)
}

fn attention() -> BlockAttentionConfig {
    BlockAttentionConfig { chunk_size: 64, local_chunks: 0, max_keys: 20, exact_tokens: 0, ..Default::default() }
}

/// A random model that reads the tokens of the tokenizer.
fn model(decoder: DecoderConfig) -> Decoder {
    original(DecoderConfig { vocab_size: 4096, max_positions: 512, ..decoder })
}

fn digits(text: &str) -> String {
    text.chars().filter(char::is_ascii_digit).collect()
}

/// Everything in a prompt, answers included.
fn whole(prompt: &Prompt) -> Vec<u32> {
    let turns = prompt.turns.iter().flat_map(|turn| turn.question.iter().chain(&turn.answer));
    prompt.context.iter().chain(turns).copied().collect()
}

#[test]
fn a_prompt_is_as_long_as_asked_and_the_same_every_time() {
    let (tokenizer, text) = tokenizer();
    let maker = PromptMaker::new(&tokenizer, &text).expect("digits");
    for task in TASKS {
        for length in [600, 1024, 3001] {
            let prompts = maker.prompts(task, length, 7).expect("room");
            assert_eq!(prompts.len(), if task == RecallTask::Queries { 1 } else { 5 }, "{task:?}");
            for prompt in &prompts {
                assert_eq!((prompt.len(), whole(prompt).len()), (length, length), "{task:?}");
            }
            assert_eq!(prompts, maker.prompts(task, length, 7).expect("room"));
            assert_ne!(prompts, maker.prompts(task, length, 8).expect("room"));
        }
    }
}

#[test]
fn a_passkey_stands_once_in_its_prompt_at_the_depth_asked_for() {
    let (tokenizer, text) = tokenizer();
    let maker = PromptMaker::new(&tokenizer, &text).expect("digits");
    for sample in 0..3 {
        let prompts = maker.prompts(RecallTask::Passkey, 1500, sample).expect("room");
        for (depth, prompt) in prompts.iter().enumerate() {
            let turn = &prompt.turns[0];
            assert_eq!((turn.depth, turn.answer.len()), (depth, 5));
            let key = digits(&tokenizer.decode(&turn.answer).expect("text"));
            assert_eq!(key.len(), 5);
            let places: Vec<usize> =
                (0..prompt.context.len() - 4).filter(|&at| prompt.context[at..at + 5] == turn.answer[..]).collect();
            assert_eq!(places.len(), 1, "{key} in {:?}", tokenizer.decode(&prompt.context));
            let found = places[0] as f64 / 1500.0;
            assert!((found - DEPTHS[depth]).abs() < 0.05, "at {found} instead of {}", DEPTHS[depth]);
            let text = tokenizer.decode(&prompt.context[..places[0]]).expect("text");
            assert!(text.trim_end().ends_with("The pass key is"), "{text:?}");
        }
        // The same number at every depth.
        assert!(prompts.iter().all(|prompt| prompt.turns[0].answer == prompts[0].turns[0].answer));
    }
}

#[test]
fn every_number_that_is_asked_for_follows_its_name() {
    let (tokenizer, text) = tokenizer();
    let maker = PromptMaker::new(&tokenizer, &text).expect("digits");
    let needles = maker.prompts(RecallTask::Needle, 1500, 1).expect("room");
    let queries = maker.prompts(RecallTask::Queries, 1500, 1).expect("room").remove(0);
    let mut asked: Vec<usize> = queries.turns.iter().map(|turn| turn.depth).collect();
    asked.sort_unstable();
    assert_eq!(asked, [0, 1, 2, 3, 4]);
    for prompt in needles.iter().chain([&queries]) {
        let context = tokenizer.decode(&prompt.context).expect("text");
        for turn in &prompt.turns {
            let question = tokenizer.decode(&turn.question).expect("text");
            let (_, after) = context.split_once(question.trim()).expect("the words of the question");
            let key = digits(&tokenizer.decode(&turn.answer).expect("text"));
            assert!(digits(after).starts_with(&key), "{question:?} {key}");
            assert_eq!(context.matches(question.trim()).count(), 1, "{question:?}");
            let place = context.find(question.trim()).expect("it stands there") as f64 / context.len() as f64;
            assert!((place - DEPTHS[turn.depth]).abs() < 0.08, "{place} instead of {}", DEPTHS[turn.depth]);
        }
    }
    let common = needles[0].context.iter().zip(&queries.context).take_while(|(a, b)| a == b).count();
    assert!(common > 1300, "one text for all of them, {common} tokens alike");
}

#[test]
fn a_chain_leads_from_the_question_to_its_number() {
    let (tokenizer, text) = tokenizer();
    let maker = PromptMaker::new(&tokenizer, &text).expect("digits");
    for (depth, prompt) in maker.prompts(RecallTask::Chain, 1500, 2).expect("room").iter().enumerate() {
        let context = tokenizer.decode(&prompt.context).expect("text");
        let turn = &prompt.turns[0];
        assert_eq!(turn.depth, depth);
        let question = tokenizer.decode(&turn.question).expect("text");
        let mut words = question.trim().to_owned();
        for _ in 0..2 {
            let (_, after) = context.split_once(&words).expect("a step");
            let (_, other) = after.split_once("the same as the number of ").expect("another name");
            let (name, _) = other.split_once('.').expect("an end");
            words = format!("The number of {name} is");
        }
        let (_, after) = context.split_once(&words).expect("the number");
        assert!(digits(after).starts_with(&digits(&tokenizer.decode(&turn.answer).expect("text"))));
    }
}

#[test]
fn prompts_that_do_not_fit_say_what_to_change() {
    let (tokenizer, text) = tokenizer();
    let maker = PromptMaker::new(&tokenizer, &text).expect("digits");
    let message = |result: Result<Vec<Prompt>, ModelError>| result.expect_err("no room").to_string();
    let short = message(maker.prompts(RecallTask::Needle, 60, 0));
    assert!(short.contains("60 tokens") && short.contains("longer --seq-len"), "{short}");
    let long = message(maker.prompts(RecallTask::Passkey, text.len() + 1, 0));
    assert!(long.contains("longer text") && long.contains(&text.len().to_string()), "{long}");

    let config = |lengths: &[usize], samples, tasks: &[LongTask]| LongConfig {
        lengths: lengths.to_vec(),
        windows: 1,
        samples,
        tasks: tasks.to_vec(),
    };
    let model = model(gpt2_like());
    let all = LongTask::ALL;
    assert!(check_long(&model, 600, &config(&[512], 1, &all)).is_ok());
    assert!(check_long(&model, 600, &config(&[512], 0, &all[..1])).is_ok());
    for (length, config) in [
        (600, config(&[], 1, &all)),
        (600, config(&[512], 1, &[])),
        (600, config(&[512], 0, &all)),
        (500, config(&[512], 1, &all)),
    ] {
        let result = check_long(&model, length, &config);
        assert!(matches!(result, Err(ModelError::Input(_))), "{length} {config:?}: {result:?}");
    }
    let past = check_long(&model, 600, &config(&[256, 513], 1, &all));
    assert!(matches!(past, Err(ModelError::TooLong { length: 513, max_positions: 512 })), "{past:?}");
}

#[test]
fn answers_are_judged_as_whole_forward_passes_judge_them() {
    let (tokenizer, text) = tokenizer();
    let maker = PromptMaker::new(&tokenizer, &text).expect("digits");
    let model = model(llama_like()).with_config(|config| config.attention = Some(attention())).expect("settings");
    let mut prompts: Vec<Prompt> = TASKS.iter().flat_map(|&task| maker.prompts(task, 420, 3).expect("room")).collect();
    // One whose digits the model would say itself, the first at least.
    let scores = logits(&model, &[prompts[0].context.as_slice(), &prompts[0].turns[0].question].concat());
    prompts[0].turns[0].answer[0] = argmax(scores.last().expect("a token"));
    let Recall { scores: found, cache_bytes: bytes, reads } = recall(&model, &prompts).expect("answers");
    let mut cache = model.new_cache(&[420]).expect("a cache");
    model.hidden(&[prompts[0].context.clone()], &mut cache).expect("read");
    assert!(bytes >= cache.bytes() && bytes < 2 * cache.bytes(), "{bytes} of {}", cache.bytes());
    assert!(reads.keys < reads.all && reads.capped > 0 && reads.capped <= reads.choices, "{reads:?}");

    let mut found = found.into_iter();
    for prompt in &prompts {
        let tokens = whole(prompt);
        let scores = logits(&model, &tokens);
        let mut at = prompt.context.len();
        for turn in &prompt.turns {
            at += turn.question.len();
            let (mut right, mut nll) = (0, 0.0);
            for &digit in &turn.answer {
                let row = &scores[at - 1];
                right += usize::from(argmax(row) == digit);
                let total: f64 = row.iter().map(|&score| f64::from(score).exp()).sum();
                nll += total.ln() - f64::from(row[digit as usize]);
                at += 1;
            }
            let found = found.next().expect("a score for every turn");
            assert_eq!((found.task, found.depth, found.digits, found.right), (prompt.task, turn.depth, 5, right));
            assert!((found.nll - nll).abs() < 1e-3 * nll, "{:?}: {} instead of {nll}", prompt.task, found.nll);
        }
    }
    assert!(found.next().is_none());
}

#[test]
fn scores_are_shares_of_digits_and_of_whole_answers() {
    let turn = |depth, right, nll| TurnScores { task: RecallTask::Needle, depth, digits: 5, right, nll };
    let turns = [turn(0, 5, 1.0), turn(0, 4, 2.0), turn(3, 0, 7.0)];
    let scores = RecallScores::of(RecallTask::Needle, &turns).expect("turns");
    assert_eq!((scores.questions, scores.digits, scores.exact), (3, 9.0 / 15.0, 1.0 / 3.0));
    assert!((scores.nll - 10.0 / 15.0).abs() < 1e-12);
    let depths: Vec<_> = scores.by_depth.iter().map(|depth| (depth.depth, depth.digits, depth.exact)).collect();
    assert_eq!(depths, [(DEPTHS[0], 0.9, 0.5), (DEPTHS[3], 0.0, 0.0)]);
    assert!(RecallScores::of(RecallTask::Chain, &turns).is_none());
}

#[test]
fn where_everything_is_read_the_conversion_is_the_original() {
    let (tokenizer, text) = tokenizer();
    let model = model(gpt2_like());
    let all = BlockAttentionConfig { threshold: 0.0, max_keys: 1000, ..attention() };
    let config = LongConfig { lengths: vec![300, 420], windows: 2, samples: 1, tasks: LongTask::ALL.to_vec() };
    let mut steps = Vec::new();
    let report = evaluate_long(&model, &all, &tokenizer, &text, config.clone(), |done, of| steps.push((done, of)))
        .expect("a report");
    assert_eq!(report.config, config);
    // Two windows, and one sample for each of four variants, of two lengths.
    assert_eq!(steps, (1..=12).map(|step| (step, 12)).collect::<Vec<_>>());
    for length in &report.lengths {
        let names: Vec<&str> = length.variants.iter().map(|variant| variant.name.as_str()).collect();
        assert_eq!(names, ["original", "converted", "control: far = none", "control: none"]);
        let [original, converted, _, none] = &length.variants[..] else { panic!("four variants") };
        // Every key is found by the index, and each is read once.
        assert_eq!((original.keys_share, converted.keys_share, original.summaries_share), (1.0, 1.0, 0.0));
        assert!(converted.summaries_share > 0.0 && converted.capped_share == 0.0, "{converted:?}");
        assert!(none.keys_share < 0.5 && none.cache_share < 1.0, "{none:?}");
        let (found, expected) = (converted.perplexity.as_ref().unwrap(), original.perplexity.as_ref().unwrap());
        assert!(expected.agreement.is_none() && expected.agreement_last_quarter.is_none());
        for agreement in [&found.agreement, &found.agreement_last_quarter] {
            let agreement = agreement.as_ref().expect("against the original");
            assert_eq!([agreement.top1, agreement.top5, agreement.top10], [1.0; 3]);
            assert!(agreement.kl.abs() < 1e-6, "{}", agreement.kl);
        }
        assert!((found.all / expected.all - 1.0).abs() < 1e-5);
        assert_eq!(converted.recall.len(), 4);
        for (found, expected) in converted.recall.iter().zip(&original.recall) {
            assert_eq!((found.digits, found.exact), (expected.digits, expected.exact));
            assert!((found.nll / expected.nll - 1.0).abs() < 1e-4);
        }
        let lost = none.perplexity.as_ref().unwrap().agreement.as_ref().unwrap();
        assert!(lost.top1 < 1.0 && lost.kl > 1e-3, "{lost:?}");
    }
}

#[test]
fn controls_that_would_repeat_another_are_left_out() {
    let names = |retrieval, far| {
        let all = controls(&BlockAttentionConfig { retrieval, far, ..attention() });
        all.iter().map(|(name, _)| *name).collect::<Vec<_>>()
    };
    let all = ["original", "converted", "control: far = none", "control: none"];
    assert_eq!(names(Retrieval::Blocks, Far::Mean), all);
    assert_eq!(names(Retrieval::Blocks, Far::None), ["original", "converted", "control: none"]);
    assert_eq!(names(Retrieval::State, Far::Mean), ["original", "converted", "control: none"]);
    assert_eq!(names(Retrieval::None, Far::Mean), ["original", "converted"]);
    let bounded = BlockAttentionConfig {
        retrieval: Retrieval::State,
        kept_tokens: 9,
        max_chunks: Some(4),
        calibrated_states: true,
        head_gates: true,
        ..attention()
    };
    assert!(controls(&bounded).iter().flat_map(|(_, attention)| attention).all(|a| a.validate().is_ok()));
}

#[test]
fn lengths_double_up_to_what_model_and_text_have() {
    let lengths =
        |max_positions, text| default_lengths(&original(DecoderConfig { max_positions, ..llama_like() }), text);
    assert_eq!(lengths(8192, 1 << 20), [1024, 2048, 4096, 8192]);
    assert_eq!(lengths(131_072, 1 << 20), [1024, 2048, 4096, 8192]);
    assert_eq!(lengths(2048, 1 << 20), [1024, 2048]);
    assert_eq!(lengths(8192, 3000), [1024, 2048]);
    assert_eq!(lengths(512, 3000), [512]);
}
