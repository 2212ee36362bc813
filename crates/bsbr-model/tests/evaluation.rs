//! What a change of attention costs, against the same numbers computed here from whole forward passes.

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval};
use bsbr_model::{Decoder, DecoderConfig, EvaluateConfig, ModelError, check_windows, compare_logits, evaluate};
use common::{VOCABULARY, argmax, devices, gpt2_like, llama_like, logits, original, retrieving, rows, text};

const WINDOW: usize = 200; // more than is scored at once
const SKIP: usize = 9;
/// 50 of the 199 predictions.
const LAST_QUARTER: usize = 149;

/// A model and two variants of it.
fn models(decoder: DecoderConfig) -> (Decoder, Decoder, Decoder) {
    let kind = |retrieval| BlockAttentionConfig {
        chunk_size: 64,
        local_chunks: 0,
        max_keys: 2,
        retrieval,
        exact_tokens: 0,
        ..Default::default()
    };
    let near = retrieving(decoder, kind(Retrieval::Blocks), &devices()[0]);
    let far = near.with_config(|config| config.attention = Some(kind(Retrieval::None))).unwrap();
    (near.with_config(|config| config.attention = None).unwrap(), near, far)
}

fn log_softmax(scores: &[f32]) -> Vec<f64> {
    let total: f64 = scores.iter().map(|&score| f64::from(score).exp()).sum();
    scores.iter().map(|&score| f64::from(score) - total.ln()).collect()
}

/// The `k` best tokens.
fn top(scores: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap());
    order.truncate(k);
    order
}

/// Negative log-likelihood of each token but the first, of each window.
fn losses(model: &Decoder, windows: &[&[u32]]) -> Vec<Vec<f64>> {
    let loss = |window: &&[u32]| {
        let scores = logits(model, window);
        window[1..].iter().zip(scores).map(|(&token, scores)| -log_softmax(&scores)[token as usize]).collect()
    };
    windows.iter().map(loss).collect()
}

fn perplexity(losses: &[Vec<f64>], positions: std::ops::Range<usize>) -> f64 {
    let these: Vec<f64> = losses.iter().flat_map(|losses| losses[positions.clone()].to_vec()).collect();
    (these.iter().sum::<f64>() / these.len() as f64).exp()
}

/// Means over the positions from `from` on: agreement of the 1, 5 and 10 best, divergence, cosine.
fn agreement(original: &Decoder, variant: &Decoder, windows: &[&[u32]], from: usize) -> [f64; 5] {
    let hidden = |model: &Decoder, window: &[u32]| {
        rows(model.hidden(&[window.to_vec()], &mut model.new_cache(&[WINDOW]).unwrap()).unwrap())
    };
    let (mut sums, mut count) = ([0.0; 5], 0.0);
    for window in windows {
        let scores = (logits(original, window), logits(variant, window));
        let states = (hidden(original, window), hidden(variant, window));
        for at in from..WINDOW - 1 {
            let (a, b) = (&scores.0[at], &scores.1[at]);
            for (sum, k) in sums.iter_mut().zip([1, 5, 10]) {
                let (a, b) = (top(a, k), top(b, k));
                *sum += a.iter().filter(|token| b.contains(token)).count() as f64 / a.len() as f64;
            }
            let (p, q) = (log_softmax(a), log_softmax(b));
            sums[3] += p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
            let (a, b) = (&states.0[at], &states.1[at]);
            sums[4] += dot(a, b) / dot(a, a).sqrt() / dot(b, b).sqrt();
            count += 1.0;
        }
    }
    sums.map(|sum| sum / count)
}

fn assert_close(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{what}: {found} instead of {expected}");
}

#[test]
fn the_report_is_what_whole_forward_passes_give() {
    // Three whole windows and a rest, of which two windows are read; a vocabulary of less than ten tokens as well.
    for vocab_size in [VOCABULARY, 7] {
        for decoder in [gpt2_like(), llama_like()] {
            let (model, near, far) = models(DecoderConfig { vocab_size, ..decoder });
            let tokens: Vec<u32> =
                text(3 * WINDOW + 20, 4).into_iter().map(|token| token % vocab_size as u32).collect();
            let windows: Vec<&[u32]> = tokens.chunks(WINDOW).take(2).collect();
            let variants = [("near", &near), ("far", &far)];
            let mut heard = Vec::new();
            let config = EvaluateConfig { window: WINDOW, windows: 2, skip: SKIP };
            let report = evaluate(&model, &variants, &tokens, config, |done, of| heard.push((done, of))).unwrap();

            assert_eq!(heard, [(1, 2), (2, 2)]);
            assert_eq!((report.windows, report.window, report.skip), (2, WINDOW, SKIP));
            let perplexities = std::iter::once(&report.original).chain(report.variants.iter().map(|v| &v.perplexity));
            for (found, model) in perplexities.zip([&model, &near, &far]) {
                let losses = losses(model, &windows);
                assert_close(found.all, perplexity(&losses, 0..WINDOW - 1), "perplexity");
                assert_close(found.later, perplexity(&losses, SKIP..WINDOW - 1), "later perplexity");
                let last = perplexity(&losses, LAST_QUARTER..WINDOW - 1);
                assert_close(found.last_quarter, last, "perplexity of the last quarter");
                let mut next = 0;
                for bucket in &found.by_position {
                    assert_eq!(bucket.start, next, "buckets follow each other");
                    assert_close(bucket.perplexity, perplexity(&losses, bucket.start..bucket.end), "bucket");
                    next = bucket.end;
                }
                assert_eq!((found.by_position.len(), next), (8, WINDOW - 1));
            }
            let keys = [&report.original, &report.variants[0].perplexity, &report.variants[1].perplexity];
            let [all, near_keys, far_keys] = keys.map(|found| found.keys_share);
            assert!(all == 1.0 && near_keys < all && far_keys < near_keys, "{all} {near_keys} {far_keys}");
            // Up to two keys beside the sinks for the tokens that choose, which are all behind the first chunk.
            let chosen = (near_keys - far_keys) * (WINDOW * (WINDOW + 1) / 2) as f64 / (WINDOW - 64) as f64;
            assert!(chosen > 0.5 && chosen <= 2.0, "{chosen} keys chosen by a token");
            assert!(report.variants[0].perplexity.capped_share > 0.9);
            for (found, (name, variant)) in report.variants.iter().zip(variants) {
                assert_eq!(found.name, name);
                for (from, found) in [(SKIP, &found.agreement), (LAST_QUARTER, &found.last_quarter)] {
                    let expected = agreement(&model, variant, &windows, from);
                    let found = [found.top1, found.top5, found.top10, found.kl, found.cosine];
                    for (what, (found, expected)) in
                        ["top 1", "top 5", "top 10", "divergence", "cosine"].iter().zip(found.into_iter().zip(expected))
                    {
                        assert_close(found, expected, &format!("{what} of {name} from {from}"));
                    }
                    assert!(expected[0] < 1.0 && expected[3] > 1e-4, "{name} differs from the original");
                }
            }
        }
    }
}

#[test]
fn a_variant_like_the_original_agrees_entirely() {
    let model = original(llama_like());
    let config = EvaluateConfig { window: 60, windows: 9, skip: 5 };
    let report = evaluate(&model, &[("same", &model)], &text(150, 1), config, |_, _| ()).unwrap();
    assert_eq!(report.windows, 2, "no more windows than the text has");
    let same = &report.variants[0];
    assert_eq!([same.agreement.top1, same.agreement.top5, same.agreement.top10], [1.0; 3]);
    assert!(same.agreement.kl.abs() < 1e-9, "{}", same.agreement.kl);
    assert!((same.agreement.cosine - 1.0).abs() < 1e-9, "{}", same.agreement.cosine);
    assert_eq!(same.perplexity.all, report.original.all);
    assert_eq!(same.perplexity.later, report.original.later);
}

#[test]
fn a_text_or_window_too_short_to_measure_is_an_error() {
    let model = original(llama_like());
    let run = |tokens: usize, window, windows, skip| {
        evaluate(&model, &[], &text(tokens, 1), EvaluateConfig { window, windows, skip }, |_, _| ())
    };
    for (tokens, window, windows, skip) in
        [(59, 60, 1, 0), (0, 60, 1, 0), (60, 2, 1, 0), (60, 0, 1, 0), (60, 20, 1, 19), (60, 20, 1, 50), (60, 60, 0, 0)]
    {
        let result = run(tokens, window, windows, skip);
        assert!(matches!(result, Err(ModelError::Input(_))), "{tokens}, {window}, {windows}, {skip}: {result:?}");
    }
    assert!(run(60, 60, 1, 58).is_ok());
    assert!(run(3, 3, 1, 0).is_ok());
}

#[test]
fn a_window_past_the_learned_positions_of_any_model_is_refused_before_anything_runs() {
    let (long, short) = (original(gpt2_like()), original(DecoderConfig { max_positions: 16, ..gpt2_like() }));
    let config = EvaluateConfig { window: 20, windows: 1, skip: 0 };
    for (model, variant) in [(&short, &long), (&long, &short)] {
        let result = evaluate(model, &[("variant", variant)], &text(40, 1), config, |_, _| panic!("a window was read"));
        assert!(matches!(result, Err(ModelError::TooLong { length: 20, max_positions: 16 })), "{result:?}");
    }
    assert!(check_windows(&long, 40, config).is_ok());
}

#[test]
fn compared_logits_differ_where_a_difference_was_planted() {
    let model = original(gpt2_like());
    let texts = [text(5, 1), text(8, 2)];
    let right: Vec<Vec<f32>> = texts.iter().map(|text| logits(&model, text).concat()).collect();
    let same = compare_logits(&model, &texts, &right).unwrap();
    assert_eq!((same.max, same.mean, same.top1, same.tokens), (0.0, 0.0, 1.0, 13));

    // The best token of the third token of the second text becomes the worst.
    let mut wrong = right.clone();
    let row = 2 * VOCABULARY..3 * VOCABULARY;
    let best = argmax(&right[1][row.clone()]) as usize;
    wrong[1][row.start + best] -= 50.0;
    let found = compare_logits(&model, &texts, &wrong).unwrap();
    assert_close(found.max, 50.0, "largest difference");
    assert_close(found.mean, 50.0 / (13 * VOCABULARY) as f64, "mean difference");
    assert_close(found.top1, 12.0 / 13.0, "top 1");

    wrong[0][3] = f32::NAN;
    let found = compare_logits(&model, &texts, &wrong).unwrap();
    assert!(found.max.is_nan() && found.mean.is_nan(), "{found:?}");
}

#[test]
fn logits_that_do_not_fit_the_texts_are_errors() {
    let model = original(gpt2_like());
    let expected = logits(&model, &text(5, 1)).concat();
    let short = expected[..5 * (VOCABULARY - 1)].to_vec();
    let error = compare_logits(&model, &[text(5, 1)], &[short]).unwrap_err();
    assert_eq!(error.to_string(), "the expected logits are 39 to a token, the vocabulary has 40 tokens");
    let result = compare_logits(&model, &[text(5, 1), text(5, 2)], &[expected]);
    assert!(matches!(result, Err(ModelError::Input(_))), "a text without logits: {result:?}");
}
