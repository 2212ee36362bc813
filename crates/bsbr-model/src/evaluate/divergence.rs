//! How far a variant is from the original, and nothing else: what a search over settings asks again and again.

use burn::tensor::Tensor;

use super::windows::{SLAB, read, said};
use crate::{Decoder, ModelError, Reads};

/// Windows of a text and what the original makes of them.
pub(crate) struct Reference<'a> {
    original: &'a Decoder,
    windows: Vec<(&'a [u32], Tensor<2>)>,
    skip: usize,
    /// One run of positions in so many is compared.
    every: usize,
}

/// The distance of a variant, and what its tokens read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Divergence {
    /// Mean Kullback-Leibler divergence from the original after the first tokens of each window, in nats.
    pub(crate) kl: f64,
    pub(crate) reads: Reads,
}

impl<'a> Reference<'a> {
    /// Reads `windows` with the original. The first `skip` tokens of each do not count, as in
    /// [`evaluate`](super::evaluate()); of the others one run of positions in `every` does, as the head costs more than a
    /// search has time for.
    pub(crate) fn new(
        original: &'a Decoder,
        windows: impl Iterator<Item = &'a [u32]>,
        (skip, every): (usize, usize),
    ) -> Result<Self, ModelError> {
        let windows = windows.map(|window| Ok((window, read(original, window)?.0)));
        Ok(Self { original, windows: windows.collect::<Result<_, ModelError>>()?, skip, every: every.max(1) })
    }

    /// How far `variant` is from it.
    pub(crate) fn divergence(&self, variant: &Decoder) -> Result<Divergence, ModelError> {
        let (mut kl, mut count, mut reads) = (0.0, 0, Reads::default());
        for (window, states) in &self.windows {
            let (found, cache) = read(variant, window)?;
            reads += cache.reads();
            drop(cache);
            // As in the evaluation, the last token predicts nothing that is there.
            let last = window.len() - 1;
            for from in (self.skip.min(last)..last).step_by(SLAB * self.every) {
                let rows = SLAB.min(last - from);
                let models = [(self.original, states), (variant, &found)];
                let models = models.map(|(decoder, states)| (decoder, states.clone().narrow(0, from, rows)));
                let [original, variant] = &said(&models, &window[from + 1..=from + rows])?[..] else { continue };
                kl += original
                    .rows
                    .iter()
                    .zip(&variant.rows)
                    .map(|(row, variant)| row.compare(0, variant).kl)
                    .sum::<f64>();
                count += rows;
            }
        }
        Ok(Divergence { kl: kl / f64::from(count.max(1) as u32), reads })
    }
}
