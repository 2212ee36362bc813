//! What enters the first block: embeddings, and positions where they are learned.

use burn::{
    module::Param,
    tensor::{Int, Tensor, TensorData},
};

use crate::{
    Decoder, DecoderCache, PositionPolicy,
    ops::{self, Packing},
    rotary::{Rotation, temperatures},
    stored::Weight,
};

impl Decoder {
    /// What the first block reads of the next tokens of each text, `[tokens, hidden_size]`, their rotations, one entry for each
    /// way a layer rotates, and the factors on their queries.
    pub(crate) fn inputs(
        &self,
        tokens: &[Vec<u32>],
        cache: &DecoderCache,
        packing: Packing,
    ) -> (Tensor<2>, Vec<Rotation>, Option<Vec<f32>>) {
        let positions: Vec<(usize, usize)> = tokens
            .iter()
            .enumerate()
            .flat_map(|(text, new)| (0..new.len()).map(move |at| (text, at)))
            .map(|(text, at)| (text, cache.texts[text].position() + at))
            .collect();
        let x = self.embedded(tokens.iter().flatten().copied(), &positions, cache, packing);
        let sets = cache.texts.first().map_or(0, |text| text.frequencies.len());
        let rotations = (0..sets).map(|set| {
            let tokens = positions.iter().map(|&(text, position)| (position, &cache.texts[text].frequencies[set]));
            Rotation::new(tokens, &x.device(), x.dtype())
        });
        let rotations = rotations.collect();
        let temperature = temperatures(&self.config.decoder, positions.iter().map(|&(_, position)| position));
        (x, rotations, temperature)
    }

    /// What the first block reads of tokens that stand at `positions`, texts and places in them.
    pub(crate) fn embedded(
        &self,
        tokens: impl Iterator<Item = u32>,
        positions: &[(usize, usize)],
        cache: &DecoderCache,
        packing: Packing,
    ) -> Tensor<2> {
        let mut x = self.embed.rows(tokens, &self.device());
        if let Some(scale) = self.config.decoder.embedding.scale {
            x = x * scale;
        }
        if let Some(projection) = &self.project_in {
            let bias = projection.bias.as_ref().map(Param::val);
            x = ops::linear(x, Weight::Tensor(projection.weight.val()), bias, packing);
        }
        if let Some(table) = &self.position {
            x = x + self.positions(table.val(), positions, cache);
        }
        match &self.embed_norm {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }

    /// Rows of the position table, `[tokens, hidden_size]`.
    fn positions(&self, table: Tensor<2>, tokens: &[(usize, usize)], cache: &DecoderCache) -> Tensor<2> {
        let last = self.config.decoder.max_positions - 1;
        let device = table.device();
        let offset = self.config.decoder.embedding.position_offset as i32;
        let rows = |index: Vec<i32>| {
            let count = index.len();
            let index: Vec<i32> = index.into_iter().map(|row| row + offset).collect();
            table.clone().select(0, Tensor::<1, Int>::from_data(TensorData::new(index, [count]), &device))
        };
        // Where each token stands in the table, possibly between two rows.
        let place = |&(text, position): &(usize, usize)| {
            let expected = cache.texts[text].expected;
            match self.config.position_policy {
                PositionPolicy::Interpolate if expected > last + 1 => {
                    (position as f64 * last as f64 / (expected - 1) as f64).min(last as f64)
                }
                _ => position.min(last) as f64,
            }
        };
        let places: Vec<f64> = tokens.iter().map(place).collect();
        let below = rows(places.iter().map(|place| place.floor() as i32).collect());
        if places.iter().all(|place| place.fract() == 0.0) {
            return below;
        }
        let above = rows(places.iter().map(|place| (place.ceil() as i32).min(last as i32)).collect());
        let share: Vec<f32> = places.iter().map(|place| place.fract() as f32).collect();
        let count = share.len();
        let share = Tensor::<2>::from_data(TensorData::new(share, [count, 1]), &device);
        below.clone() + (above - below) * share
    }
}
