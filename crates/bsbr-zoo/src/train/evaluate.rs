//! Asking a trained model.

use burn::tensor::{Device, Int, Tensor};

use super::{Score, TrainConfig, TrainError, score::Scores, step::predicted};
use crate::{
    SmallDecoder,
    tasks::{Batch, Generator},
};

/// Sequences read at once.
const ROWS: usize = 16;

/// Asks for every size.
pub(super) fn scores(
    decoder: &SmallDecoder,
    generator: &Generator,
    config: &TrainConfig,
    device: &Device,
) -> Result<Vec<Score>, TrainError> {
    let mut scores = Scores::default();
    for &size in generator.sizes() {
        let whole = generator.evaluation(size, config.evaluation_rows);
        for first in (0..whole.rows()).step_by(ROWS) {
            let batch = part(&whole, first, ROWS.min(whole.rows() - first));
            let predicted = predicted(decoder, &batch, device)?;
            let vocabulary = predicted.dims()[1];
            let numbers: Vec<f32> = predicted.into_data().iter::<f32>().collect();
            for (question, row) in batch.questions.iter().zip(numbers.chunks_exact(vocabulary)) {
                let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let answer = row[question.answer as usize];
                scores.add(question, config.chunk_size, answer >= best, -f64::from(answer));
            }
        }
    }
    Ok(scores.finish())
}

/// `count` sequences of a batch from `first` on.
fn part(batch: &Batch, first: usize, count: usize) -> Batch {
    let rows = first..first + count;
    let asked = batch.questions.iter().filter(|question| rows.contains(&question.row));
    Batch {
        tokens: batch.tokens[rows.start * batch.length..rows.end * batch.length].to_vec(),
        length: batch.length,
        questions: asked.map(|&question| crate::tasks::Question { row: question.row - first, ..question }).collect(),
    }
}

/// Bytes that are kept of one sequence of `length` tokens.
pub(super) fn state_bytes(decoder: &SmallDecoder, length: usize, device: &Device) -> Result<u64, TrainError> {
    let mut state = decoder.start(1)?;
    decoder.step(Tensor::<2, Int>::zeros([1, length], device), &mut state)?;
    Ok(state.bytes() as u64)
}
