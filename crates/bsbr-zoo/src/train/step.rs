//! One run: steps of AdamW, then questions.

use std::time::Instant;

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData, activation::log_softmax},
};

use super::{LossPoint, Run, RunSpec, TrainError, evaluate, schedule::learning_rate};
use crate::{
    SmallDecoder,
    tasks::{Batch, Corpus, Generator},
};

/// Points at which a run tells its loss.
const POINTS: usize = 20;

/// Trains and asks one model. `corpus` is the text of [`Task::Text`](crate::tasks::Task::Text).
///
/// # Errors
///
/// [`TrainError`] if a setting makes no sense, or the device fails. A loss that is no number is no error but ends the
/// training, see [`Run::diverged`].
pub fn train(spec: &RunSpec, corpus: Option<&Corpus>, device: &Device) -> Result<Run, TrainError> {
    spec.train.validate()?;
    let generator = Generator::new(spec.task, spec.train.length, corpus)?;
    if generator.vocabulary() > spec.decoder.vocabulary {
        let value = spec.decoder.vocabulary.to_string();
        return Err(TrainError::Setting { setting: "vocabulary", value, expected: "as many tokens as the task has" });
    }
    let started = Instant::now();
    let tracked = device.clone().autodiff();
    let mut decoder = SmallDecoder::new(&spec.decoder, spec.seed, &tracked)?;
    let parameters = decoder.parameters();
    let mut optimizer = AdamWConfig::new()
        .with_beta_2(0.98)
        .with_epsilon(1e-8)
        .with_weight_decay(spec.train.weight_decay as f32)
        .init();
    let (mut losses, mut diverged) = (Vec::new(), None);
    let (mut sum, mut since) = (0.0, 0);
    let lengths = [4, 2, 1].map(|part| spec.train.length / part);
    let generators = lengths.map(|length| generator.shortened(length).unwrap_or_else(|_| generator.clone()));
    for step in 0..spec.train.steps {
        let length = spec.train.length_at(step);
        let stage = lengths.iter().position(|&other| other == length).unwrap_or(2);
        let batch = generators[stage].training(spec.seed, step, spec.train.batch);
        let loss = loss(&decoder, &batch, &tracked)?;
        let value = number(loss.clone())?;
        if !value.is_finite() {
            diverged = Some(step);
            break;
        }
        let mut gradients = loss.backward();
        let gradients = GradientsParams::from_module(&mut gradients, &decoder);
        let gradients = clipped(&decoder, gradients, spec.train.clip)?;
        decoder = optimizer.step(learning_rate(&spec.train, step), decoder, gradients);
        (sum, since) = (sum + value, since + 1);
        if (step + 1) * POINTS / spec.train.steps > step * POINTS / spec.train.steps {
            losses.push(LossPoint { step: step + 1, loss: sum / f64::from(since) });
            (sum, since) = (0.0, 0);
        }
    }
    let decoder = decoder.valid();
    let state_bytes = evaluate::state_bytes(&decoder, spec.train.length, device)?;
    let scores =
        if diverged.is_some() { Vec::new() } else { evaluate::scores(&decoder, &generator, &spec.train, device)? };
    let seconds = started.elapsed().as_secs_f64();
    Ok(Run { spec: spec.clone(), parameters, state_bytes, losses, diverged, scores, seconds })
}

/// Log-probabilities `[questions, vocabulary]` of what comes where it is asked.
pub(super) fn predicted(decoder: &SmallDecoder, batch: &Batch, device: &Device) -> Result<Tensor<2>, TrainError> {
    let tokens: Vec<i64> = batch.tokens.iter().map(|&token| i64::from(token)).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [batch.rows(), batch.length]), device);
    let places = batch.questions.iter().map(|question| (question.row * batch.length + question.position) as i64);
    let places: Vec<i64> = places.collect();
    let count = places.len();
    let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), device);
    Ok(log_softmax(decoder.logits_at(tokens, places)?, 1))
}

/// Mean cross-entropy of the answers.
fn loss(decoder: &SmallDecoder, batch: &Batch, device: &Device) -> Result<Tensor<1>, TrainError> {
    let answers: Vec<i64> = batch.questions.iter().map(|question| i64::from(question.answer)).collect();
    let count = answers.len();
    let answers = Tensor::<2, Int>::from_data(TensorData::new(answers, [count, 1]), device);
    Ok(predicted(decoder, batch, device)?.gather(1, answers).mean().neg())
}

fn number(tensor: Tensor<1>) -> Result<f64, TrainError> {
    let data = tensor.into_data();
    data.iter::<f64>().next().ok_or_else(|| TrainError::Device("an empty tensor".into()))
}

/// The gradients, shorter where their norm together exceeds `most`.
fn clipped(decoder: &SmallDecoder, gradients: GradientsParams, most: f64) -> Result<GradientsParams, TrainError> {
    struct Squares<'a>(&'a GradientsParams, Option<Tensor<1>>);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get::<D>(param.id) {
                let squares = gradient.square().sum();
                self.1 = Some(match self.1.take() {
                    Some(sum) => sum + squares,
                    None => squares,
                });
            }
        }
    }
    struct Scaled(GradientsParams, f64);
    impl ModuleVisitor for Scaled {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.remove::<D>(param.id) {
                self.0.register(param.id, gradient.mul_scalar(self.1));
            }
        }
    }
    let mut squares = Squares(&gradients, None);
    decoder.visit(&mut squares);
    let Some(sum) = squares.1 else { return Ok(gradients) };
    let norm = number(sum)?.sqrt();
    if norm <= most {
        return Ok(gradients);
    }
    let mut scaled = Scaled(gradients, most / norm);
    decoder.visit(&mut scaled);
    Ok(scaled.0)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::{DecoderConfig, tasks::Task, train::TrainConfig};

    fn decoder(device: &Device) -> (SmallDecoder, Batch) {
        let generator = Generator::new(Task::Recall, 24, None).expect("a task");
        let vocabulary = generator.vocabulary();
        let config = DecoderConfig { vocabulary, width: 8, heads: 2, layers: 1, ..DecoderConfig::default() };
        (SmallDecoder::new(&config, 3, device).expect("a decoder"), generator.training(0, 0, 3))
    }

    #[test]
    fn the_loss_is_the_mean_negative_log_probability_of_the_answers() {
        let device = Device::flex();
        let (decoder, batch) = decoder(&device);
        let tokens: Vec<i64> = batch.tokens.iter().map(|&token| i64::from(token)).collect();
        let logits = decoder.forward(Tensor::from_data(TensorData::new(tokens, [3, 24]), &device)).expect("logits");
        let vocabulary = logits.dims()[2];
        let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
        let surprise = |question: &crate::tasks::Question| {
            let at = (question.row * 24 + question.position) * vocabulary;
            let row = &logits[at..at + vocabulary];
            row.iter().map(|logit| logit.exp()).sum::<f64>().ln() - row[question.answer as usize]
        };
        let expected = batch.questions.iter().map(surprise).sum::<f64>() / batch.questions.len() as f64;
        let found = number(loss(&decoder, &batch, &device).expect("a loss")).expect("a number");
        assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
    }

    #[test]
    fn long_gradients_keep_their_direction_and_short_ones_their_length() {
        struct Numbers<'a>(&'a GradientsParams, Vec<f64>);
        impl ModuleVisitor for Numbers<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let gradient = self.0.get::<D>(param.id).expect("a gradient of every parameter");
                self.1.extend(gradient.into_data().iter::<f64>());
            }
        }
        let device = Device::flex().autodiff();
        let (decoder, batch) = decoder(&device);
        let numbers = |gradients: &GradientsParams| {
            let mut numbers = Numbers(gradients, Vec::new());
            decoder.visit(&mut numbers);
            numbers.1
        };
        let gradients = || {
            let mut all = loss(&decoder, &batch, &device).expect("a loss").backward();
            GradientsParams::from_module(&mut all, &decoder)
        };
        let before = numbers(&gradients());
        assert_eq!(before.len(), decoder.parameters());
        let norm = before.iter().map(|number| number * number).sum::<f64>().sqrt();
        let after = numbers(&clipped(&decoder, gradients(), norm / 4.0).expect("gradients"));
        assert!(before.iter().zip(&after).all(|(before, after)| (before / 4.0 - after).abs() < 1e-6 * norm));
        assert_eq!(numbers(&clipped(&decoder, gradients(), 2.0 * norm).expect("gradients")), before);
    }

    #[test]
    fn a_loss_that_is_no_number_ends_the_training_and_is_told() {
        let generator = Generator::new(Task::Copy, 32, None).expect("a task");
        let decoder = DecoderConfig {
            vocabulary: generator.vocabulary(),
            width: 8,
            heads: 2,
            layers: 1,
            ..DecoderConfig::default()
        };
        let train = TrainConfig {
            length: 32,
            batch: 2,
            steps: 40,
            warmup: 0,
            learning_rate: 1e30,
            evaluation_rows: 1,
            ..TrainConfig::default()
        };
        let run =
            super::train(&RunSpec { task: Task::Copy, seed: 0, decoder, train, text: None }, None, &Device::flex());
        let run = run.expect("a run");
        assert!(run.diverged.is_some_and(|step| step > 0) && run.scores.is_empty(), "{run:?}");
    }
}
