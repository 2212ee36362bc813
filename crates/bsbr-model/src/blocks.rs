//! A decoder one block at a time, for work that looks at what the linear layers read.

use std::{
    collections::HashSet,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use bsbr_splitlinear::Tap;
use burn::tensor::Tensor;

use crate::{
    BlockInput, Decoder, LinearPlace, LinearRole, ModelError, Projection,
    layer_attention::{Pass, SharedRows},
    ops::{self, Packing},
    rotary::{Places, Rotation, rotary_set, temperatures},
};

impl LinearPlace {
    /// Name of what the layer reads: the same for all layers that read it, as `layers.3.attention.input`.
    pub fn input_name(self) -> String {
        let layer = self.layer;
        match self.role.input() {
            BlockInput::Attention => format!("layers.{layer}.attention.input"),
            BlockInput::Output => format!("layers.{layer}.attention.read"),
            BlockInput::Mlp => format!("layers.{layer}.mlp.input"),
            BlockInput::Down => format!("layers.{layer}.mlp.inner"),
            BlockInput::Expert(expert) => format!("layers.{layer}.mlp.experts.{expert}.input"),
            BlockInput::ExpertDown(expert) => format!("layers.{layer}.mlp.experts.{expert}.inner"),
            BlockInput::SharedDown => format!("layers.{layer}.mlp.shared.inner"),
            BlockInput::QueryLatent => format!("layers.{layer}.attention.query_latent.inner"),
            BlockInput::Latent => format!("layers.{layer}.attention.latent.inner"),
            BlockInput::PerLayer => format!("layers.{layer}.per_layer.input"),
            BlockInput::PerLayerDown => format!("layers.{layer}.per_layer.inner"),
        }
    }
}

impl Decoder {
    /// What the first block reads of a whole text, `[tokens, hidden_size]`, or wider: behind the stream stand numbers that later
    /// blocks need besides, [`Decoder::stream`] is the stream alone.
    ///
    /// # Errors
    ///
    /// As [`Decoder::hidden`].
    pub fn first_states(&self, tokens: &[u32]) -> Result<Tensor<2>, ModelError> {
        let cache = self.new_cache(&[tokens.len()])?;
        self.check(&[tokens.to_vec()], &cache)?;
        let positions: Vec<(usize, usize)> = (0..tokens.len()).map(|at| (0, at)).collect();
        let x = self.embedded(tokens.iter().copied(), &positions, &cache, Packing::ByNumber);
        let per_layer = self.per_layer(tokens.iter().copied(), &x, Packing::ByNumber);
        Ok(self.carried(x, per_layer, &SharedRows::of(&self.config.decoder)))
    }

    /// The stream, `[tokens, hidden_size]`, of what goes from block to block.
    pub fn stream(&self, states: Tensor<2>) -> Tensor<2> {
        let hidden = self.config.decoder.hidden_size;
        if states.dims()[1] == hidden { states } else { states.narrow(1, 0, hidden) }
    }

    /// What goes from block to block: the stream, the inputs of all layers, and keys and values of the layers that others read,
    /// zeros as long as they have not run.
    fn carried(&self, x: Tensor<2>, per_layer: Option<Tensor<2>>, shared: &SharedRows) -> Tensor<2> {
        let tokens = x.dims()[0];
        let (device, dtype) = (x.device(), x.dtype());
        let mut parts = vec![x];
        parts.extend(per_layer);
        for owner in shared.owners() {
            let shape = self.config.decoder.shape(owner);
            let width = shape.kv_heads * shape.head_dim;
            match shared.get(owner) {
                Some(rows) => {
                    parts.extend(rows.iter().map(|rows| rows.clone().swap_dims(1, 2).reshape([tokens, width])));
                }
                None => parts.push(Tensor::zeros([tokens, 2 * width], (&device, dtype))),
            }
        }
        if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 1) }
    }

    fn carried_width(&self) -> usize {
        let decoder = &self.config.decoder;
        let shared = SharedRows::of(decoder);
        let shapes = shared.owners().map(|owner| decoder.shape(owner));
        let rows: usize = shapes.map(|shape| 2 * shape.kv_heads * shape.head_dim).sum();
        decoder.hidden_size + decoder.embedding.per_layer.map_or(0, |inputs| decoder.layers * inputs.width) + rows
    }

    /// The inverse of [`Decoder::carried`].
    fn carried_parts(&self, states: Tensor<2>) -> (Tensor<2>, Option<Tensor<2>>, SharedRows) {
        let decoder = &self.config.decoder;
        let tokens = states.dims()[0];
        let mut at = 0;
        let mut next = |width: usize| {
            at += width;
            states.clone().narrow(1, at - width, width)
        };
        let x = next(decoder.hidden_size);
        let per_layer = decoder.embedding.per_layer.map(|inputs| next(decoder.layers * inputs.width));
        let mut shared = SharedRows::of(decoder);
        for owner in shared.owners().collect::<Vec<_>>() {
            let shape = decoder.shape(owner);
            let rows = [(); 2].map(|()| {
                let rows = next(shape.kv_heads * shape.head_dim);
                rows.reshape([1, tokens, shape.kv_heads, shape.head_dim]).swap_dims(1, 2)
            });
            shared.keep(owner, &rows);
        }
        (x, per_layer, shared)
    }

    /// What block `layer` makes of the states of a whole text, `[tokens, width]` as [`Decoder::first_states`] gives them to the
    /// same. `see` is shown what
    /// its linear layers read, `[tokens, inputs]`, under one of those that read it.
    ///
    /// # Errors
    ///
    /// [`ModelError::EmptyInput`], and [`ModelError::Input`] for a block that is not there or states of another width.
    pub fn run_block(
        &self,
        layer: usize,
        states: Tensor<2>,
        see: &mut dyn FnMut(LinearRole, Tensor<2>) -> Result<(), ModelError>,
    ) -> Result<Tensor<2>, ModelError> {
        let Some(block) = self.blocks.get(layer) else {
            let problem = format!("there is no block {layer}, the model has {}", self.blocks.len());
            return Err(ModelError::Input(problem));
        };
        let [length, width] = states.dims();
        let expected = self.carried_width();
        if width != expected {
            let problem = format!("states are {width} numbers wide, expected {expected} as first_states gives them");
            return Err(ModelError::Input(problem));
        }
        let (x, per_layer, shared) = self.carried_parts(states);
        let device = self.device();
        let mut cache = self.new_cache(&[length])?;
        let rotation = rotary_set(&self.config.decoder, layer).and_then(|set| {
            let frequencies = cache.texts[0].frequencies.get(set)?;
            Some(Rotation::new((0..length).map(|position| (position, frequencies)), &device, x.dtype()))
        });
        let temperature = temperatures(&self.config.decoder, 0..length);
        let places =
            Places { rotation: rotation.as_ref(), temperature: temperature.as_deref(), packing: Packing::ByNumber };
        let seen: Arc<Mutex<Vec<(LinearRole, Tensor<2>)>>> = Arc::default();
        let mut block = block.clone();
        // One stands for all that read its input.
        let mut inputs = HashSet::new();
        let mut roles = self.config.decoder.linear_roles(layer);
        roles.retain(|role| inputs.insert(role.input()));
        for role in roles {
            let Some(projection) = block.projection_mut(role) else { continue };
            let seen = Arc::clone(&seen);
            let tap = Tap::new(move |x| {
                seen.lock().unwrap_or_else(PoisonError::into_inner).push((role, x));
            });
            let split = projection.clone().into_split(&LinearPlace { layer, role }.to_string(), &device)?;
            *projection = Projection::Split(split.with_tap(Some(tap)));
        }
        let inputs = per_layer.as_ref().map(|all| self.inputs_of(layer, all));
        let pieces = [(0, 0..length)];
        let mut pass = Pass { config: &self.config, pieces: &pieces, cache: &mut cache, shared, alone: true };
        let x = ops::run(&device, || {
            block.forward(x, inputs, |projections, norm, x| {
                Ok::<_, ModelError>(pass.attend(layer, (projections, norm), x, places)?.1)
            })
        })?;
        let states = self.carried(x, per_layer, &pass.shared);
        let seen = mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        seen.into_iter().try_for_each(|(role, x)| see(role, x))?;
        Ok(states)
    }
}
