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

/// What the blocks get of some tokens besides caches.
pub(crate) struct Inputs {
    /// What the first block reads, `[tokens, hidden_size]`.
    pub(crate) x: Tensor<2>,
    /// One entry for each way a layer rotates.
    pub(crate) rotations: Vec<Rotation>,
    /// Factors on queries.
    pub(crate) temperature: Option<Vec<f32>>,
    /// Inputs of all layers, one after the other, `[tokens, layers * width]`.
    pub(crate) per_layer: Option<Tensor<2>>,
}

impl Decoder {
    /// What the blocks read of the next tokens of each text.
    pub(crate) fn inputs(&self, tokens: &[Vec<u32>], cache: &DecoderCache, packing: Packing) -> Inputs {
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
        let per_layer = self.per_layer(tokens.iter().flatten().copied(), &x, packing);
        Inputs { x, rotations, temperature, per_layer }
    }

    /// The inputs of all layers, `[tokens, layers * width]`, where layers have some; `x` is what enters the first block.
    pub(crate) fn per_layer(
        &self,
        tokens: impl Iterator<Item = u32>,
        x: &Tensor<2>,
        packing: Packing,
    ) -> Option<Tensor<2>> {
        let (settings, inputs) = (self.config.decoder.embedding.per_layer?, self.per_layer_inputs.as_ref()?);
        let [count, hidden] = x.dims();
        let (width, layers) = (settings.width, self.config.decoder.layers);
        let of_token = inputs.embed.rows(tokens, &self.device()) * (width as f64).sqrt();
        let (weight, bias) = inputs.project.as_weight();
        let of_stream = ops::linear(x.clone(), weight, bias, packing) / (hidden as f64).sqrt();
        let of_stream =
            inputs.norm.forward(of_stream.reshape([count * layers, width])).reshape([count, layers * width]);
        Some((of_token + of_stream) / std::f64::consts::SQRT_2)
    }

    /// The inputs of one layer, `[tokens, width]`, out of those of all.
    pub(crate) fn inputs_of(&self, layer: usize, all: &Tensor<2>) -> Tensor<2> {
        let width = all.dims()[1] / self.config.decoder.layers;
        all.clone().narrow(1, layer * width, width)
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
