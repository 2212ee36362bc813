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
    layer_attention::attend,
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
        }
    }
}

impl Decoder {
    /// What the first block reads of a whole text, `[tokens, hidden_size]`.
    ///
    /// # Errors
    ///
    /// As [`Decoder::hidden`].
    pub fn first_states(&self, tokens: &[u32]) -> Result<Tensor<2>, ModelError> {
        let cache = self.new_cache(&[tokens.len()])?;
        self.check(&[tokens.to_vec()], &cache)?;
        let positions: Vec<(usize, usize)> = (0..tokens.len()).map(|at| (0, at)).collect();
        Ok(self.embedded(tokens.iter().copied(), &positions, &cache, Packing::ByNumber))
    }

    /// What block `layer` makes of the states of a whole text, `[tokens, hidden_size]` to the same. `see` is shown what
    /// its linear layers read, `[tokens, inputs]`, under one of those that read it.
    ///
    /// # Errors
    ///
    /// [`ModelError::EmptyInput`], and [`ModelError::Input`] for a block that is not there.
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
        let length = states.dims()[0];
        let device = self.device();
        let mut cache = self.new_cache(&[length])?;
        let rotation = rotary_set(&self.config.decoder, layer).and_then(|set| {
            let frequencies = cache.texts[0].frequencies.get(set)?;
            Some(Rotation::new((0..length).map(|position| (position, frequencies)), &device, states.dtype()))
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
        let states = ops::run(&device, || {
            block.forward(states, |projections, norm, x| {
                let pieces = [(0, 0..length)];
                Ok::<_, ModelError>(attend(projections, norm, x, places, &pieces, layer, &mut cache)?.1)
            })
        })?;
        let seen = mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        seen.into_iter().try_for_each(|(role, x)| see(role, x))?;
        Ok(states)
    }
}
