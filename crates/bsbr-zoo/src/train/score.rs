//! What a trained model answers, by size and by distance, and the same over several seeds.

use serde::{Deserialize, Serialize};

use crate::tasks::Question;

/// Answers to the questions of one size whose answers lie `from_chunk` to `to_chunk` chunks back, both included.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// [`Question::size`].
    pub size: usize,
    /// Least distance in whole chunks.
    pub from_chunk: usize,
    /// Greatest distance in whole chunks.
    pub to_chunk: usize,
    /// Questions asked.
    pub questions: usize,
    /// Questions whose likeliest token was the right one.
    pub right: usize,
    /// Mean cross-entropy of the right token in nats.
    pub nats: f64,
}

impl Score {
    /// Share of right answers.
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.questions.max(1) as f64
    }
}

/// The distances that are counted together: 0 to 1 chunks, then 2 to 3, 4 to 7 and so on.
pub fn distance_range(distance: usize, chunk_size: usize) -> (usize, usize) {
    match distance / chunk_size.max(1) {
        0 | 1 => (0, 1),
        chunks => {
            let from = 1 << chunks.ilog2();
            (from, 2 * from - 1)
        }
    }
}

/// Collects answers.
#[derive(Debug, Default)]
pub(super) struct Scores(Vec<Score>);

impl Scores {
    pub(super) fn add(&mut self, question: &Question, chunk_size: usize, right: bool, nats: f64) {
        let (from_chunk, to_chunk) = distance_range(question.distance, chunk_size);
        let key = (question.size, from_chunk);
        let at = match self.0.binary_search_by_key(&key, |score| (score.size, score.from_chunk)) {
            Ok(at) => at,
            Err(at) => {
                let size = question.size;
                self.0.insert(at, Score { size, from_chunk, to_chunk, questions: 0, right: 0, nats: 0.0 });
                at
            }
        };
        let score = &mut self.0[at];
        score.questions += 1;
        score.right += usize::from(right);
        score.nats += nats;
    }

    /// In order of sizes and distances.
    pub(super) fn finish(mut self) -> Vec<Score> {
        for score in &mut self.0 {
            score.nats /= score.questions as f64;
        }
        self.0
    }
}

/// All scores of `keep`, as one: `None` if none is kept. Sizes and distances are the least and the greatest.
pub fn merged(scores: &[Score], keep: impl Fn(&Score) -> bool) -> Option<Score> {
    let mut kept = scores.iter().filter(|score| keep(score)).copied();
    let mut sum = kept.next()?;
    for score in kept {
        let questions = sum.questions + score.questions;
        sum.nats = (sum.nats * sum.questions as f64 + score.nats * score.questions as f64) / questions as f64;
        sum.questions = questions;
        sum.right += score.right;
        sum.size = sum.size.max(score.size);
        sum.from_chunk = sum.from_chunk.min(score.from_chunk);
        sum.to_chunk = sum.to_chunk.max(score.to_chunk);
    }
    Some(sum)
}

/// A number over several seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OverSeeds {
    /// Mean.
    pub mean: f64,
    /// Least.
    pub least: f64,
    /// Greatest.
    pub greatest: f64,
    /// How many.
    pub seeds: usize,
}

impl OverSeeds {
    /// Of at least one number.
    pub fn of(numbers: &[f64]) -> Option<Self> {
        let seeds = numbers.len();
        let (least, greatest) =
            numbers.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, g), &n| (l.min(n), g.max(n)));
        (seeds > 0).then(|| Self { mean: numbers.iter().sum::<f64>() / seeds as f64, least, greatest, seeds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_counted_by_powers_of_two_of_chunks() {
        let of = |distance| distance_range(distance, 16);
        assert_eq!([of(0), of(31)], [(0, 1); 2]);
        assert_eq!([of(32), of(63)], [(2, 3); 2]);
        assert_eq!([of(64), of(127)], [(4, 7); 2]);
        assert_eq!([of(128), of(255)], [(8, 15); 2]);
    }

    #[test]
    fn answers_are_counted_where_they_belong() {
        let question = |size, distance| Question { row: 0, position: 0, answer: 0, size, distance };
        let mut scores = Scores::default();
        scores.add(&question(8, 40), 16, true, 1.0);
        scores.add(&question(4, 40), 16, false, 2.0);
        scores.add(&question(8, 63), 16, false, 4.0);
        scores.add(&question(8, 0), 16, true, 0.5);
        let scores = scores.finish();
        let score = |size, (from_chunk, to_chunk), (questions, right), nats| Score {
            size,
            from_chunk,
            to_chunk,
            questions,
            right,
            nats,
        };
        let expected = [score(4, (2, 3), (1, 0), 2.0), score(8, (0, 1), (1, 1), 0.5), score(8, (2, 3), (2, 1), 2.5)];
        assert_eq!(scores, expected);
        let eight = merged(&scores, |score| score.size == 8).expect("scores");
        assert_eq!(eight, score(8, (0, 3), (3, 2), 5.5 / 3.0));
        assert_eq!(merged(&scores, |score| score.size == 5), None);
    }

    #[test]
    fn seeds_are_summed_up_by_mean_and_range() {
        assert_eq!(OverSeeds::of(&[]), None);
        let over = OverSeeds::of(&[0.5, 0.25, 0.75]).expect("numbers");
        assert_eq!(over, OverSeeds { mean: 0.5, least: 0.25, greatest: 0.75, seeds: 3 });
    }
}
