//! Log-probabilities from scores.

use rayon::prelude::*;

use super::request::TokenScore;

/// The token with its log-probability, and the `best` best with theirs, from scores `[vocab_size]`.
pub(super) fn scored(scores: &[f32], token: u32, best: usize) -> TokenScore {
    let log_sum = log_sum(scores);
    let of = |token: u32| scores.get(token as usize).map_or(f64::NEG_INFINITY, |&score| f64::from(score) - log_sum);
    let best = best_of(scores, best).into_iter().map(|token| (token, of(token))).collect();
    TokenScore { token, logprob: of(token), best }
}

/// The same for each row of `[tokens, vocab_size]` and the token that follows it.
pub(super) fn scored_rows(scores: &[f32], following: &[u32], best: usize) -> Vec<TokenScore> {
    let width = scores.len() / following.len().max(1);
    let rows = scores.par_chunks_exact(width.max(1)).zip(following);
    rows.map(|(scores, &token)| scored(scores, token, best)).collect()
}

fn log_sum(scores: &[f32]) -> f64 {
    let highest = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    highest + scores.iter().map(|&score| (f64::from(score) - highest).exp()).sum::<f64>().ln()
}

/// The best tokens, best first; equal scores go to the lower token.
fn best_of(scores: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = Vec::with_capacity(count + 1);
    for (token, &score) in scores.iter().enumerate() {
        let worst = order.last().filter(|_| order.len() == count).map(|&last| scores[last as usize]);
        if count == 0 || worst.is_some_and(|worst| score <= worst) {
            continue;
        }
        let at = order.partition_point(|&other| scores[other as usize] >= score);
        order.insert(at, token as u32);
        order.truncate(count);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_a_softmax() {
        let scores = [0.5f32, -1.0, 3.0, 3.0, 2.0];
        let sum: f64 = scores.iter().map(|&score| f64::from(score).exp()).sum();
        let found = scored(&scores, 1, 3);
        assert!((found.logprob - ((-1.0f64).exp() / sum).ln()).abs() < 1e-12);
        assert_eq!(found.best.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [2, 3, 4]);
        assert!((found.best[2].1 - (2.0f64.exp() / sum).ln()).abs() < 1e-12);
        assert!(scored(&scores, 0, 0).best.is_empty());
        let rows = scored_rows(&[scores, scores].concat(), &[1, 0], 1);
        assert_eq!((rows[0].logprob, rows[1].token), (found.logprob, 0));
    }
}
