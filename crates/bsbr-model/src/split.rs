//! Linear layers of a decoder in parts, in memory.

use bsbr_splitlinear::{
    BlockModel, Factors, Form, GroupFactors, Pivots, SavedGroup, SavedSplit, See, Share, SplitError, Tap,
};
use burn::{
    module::Param,
    tensor::{Tensor, TensorData},
};

use crate::{Decoder, LinearPlace, ModelError, Projection};

impl Decoder {
    /// The same decoder with every layer of which `split` compresses some outputs divided into those parts and the rest.
    /// All of them still compute with the weights they had.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] if the parts do not fit the decoder.
    pub fn divided(&self, split: &SavedSplit) -> Result<Self, ModelError> {
        let shape = |name: &str| self.config.decoder.linear_shape(name.parse::<LinearPlace>().ok()?);
        split.validate(shape).map_err(|problem| ModelError::Config { setting: "split", problem })?;
        let (mut divided, device) = (self.clone(), self.device());
        for name in split.taken().into_keys() {
            let place: LinearPlace = name.parse()?;
            let (mut parts, mut end) = (Vec::new(), 0);
            for part in split.parts_of(name) {
                if part.columns.start > end {
                    parts.push((rest(name, end), end..part.columns.start));
                }
                end = part.columns.end;
                parts.push((part.member.part.clone(), part.columns));
            }
            let projection = divided.projection_mut(place).ok_or_else(|| no_layer(name))?;
            let Some(linear) = projection.dense_mut(&device).cloned() else {
                return Err(ModelError::Input(format!("`{name}` is in parts already: begin with the original model")));
            };
            let [_, outputs] = linear.weight.dims();
            if end < outputs {
                parts.push((rest(name, end), end..outputs));
            }
            *projection = Projection::Split(bsbr_splitlinear::SplitLinear::new(linear, parts)?);
        }
        Ok(divided)
    }

    /// The same decoder with what every layer in parts reads shown to `tap`.
    pub fn watched(&self, tap: Tap) -> Self {
        let mut watched = self.clone();
        for place in self.config.decoder.linear_places() {
            if let Some(projection) = watched.projection_mut(place)
                && let Projection::Split(split) = projection.clone()
            {
                *projection = Projection::Split(split.with_tap(Some(tap.clone())));
            }
        }
        watched
    }

    /// `numbers` `[rows, columns]` as a weight that the kernels read without a copy: transposed in memory.
    fn factor(&self, numbers: &[f32], rows: usize, columns: usize) -> Param<Tensor<2>> {
        let transposed: Vec<f32> =
            (0..columns).flat_map(|column| (0..rows).map(move |row| numbers[row * columns + column])).collect();
        let weight = Tensor::<2>::from_data(TensorData::new(transposed, [columns, rows]), &self.device());
        Param::from_tensor(weight.transpose())
    }
}

/// Name of the outputs from `start` that no part takes.
pub(crate) fn rest(linear: &str, start: usize) -> String {
    format!("{linear}.{start}")
}

fn no_layer(name: &str) -> ModelError {
    ModelError::Input(format!("the decoder has no linear layer `{name}`"))
}

impl BlockModel for Decoder {
    type Error = ModelError;

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn inputs(&self, block: usize) -> Vec<(String, usize)> {
        let decoder = &self.config.decoder;
        let mut inputs: Vec<(String, usize)> = Vec::new();
        for place in decoder.linear_places().into_iter().filter(|place| place.layer == block) {
            let name = place.input_name();
            if let Some([width, _]) = decoder.linear_shape(place)
                && inputs.iter().all(|(known, _)| *known != name)
            {
                inputs.push((name, width));
            }
        }
        inputs
    }

    fn input_of(&self, linear: &str) -> Option<(usize, String)> {
        let place: LinearPlace = linear.parse().ok()?;
        self.projection(place).map(|_| (place.layer, place.input_name()))
    }

    fn weight(&self, linear: &str) -> Result<Vec<f32>, ModelError> {
        let place: LinearPlace = linear.parse()?;
        let weight = self.projection(place).ok_or_else(|| no_layer(linear))?.dense_weight(&self.device());
        let failed = |error| ModelError::Input(format!("`{linear}` cannot be read back: {error:?}"));
        weight.try_into_vec_as::<f32>().map_err(failed)
    }

    fn first_states(&self, tokens: &[u32]) -> Result<Tensor<2>, ModelError> {
        Decoder::first_states(self, tokens)
    }

    fn run_block(
        &self,
        block: usize,
        states: Tensor<2>,
        see: &mut See<'_, ModelError>,
    ) -> Result<Tensor<2>, ModelError> {
        Decoder::run_block(self, block, states, &mut |role, x| see(&LinearPlace { layer: block, role }.input_name(), x))
    }

    fn logits(&self, states: Tensor<2>) -> Result<Tensor<2>, ModelError> {
        let states = self.stream(states);
        let states = match &self.final_norm {
            Some(norm) => norm.forward(states),
            None => states,
        };
        Ok(Decoder::logits(self, states))
    }

    fn install(&mut self, group: &SavedGroup, factors: &GroupFactors) -> Result<(), ModelError> {
        let GroupFactors { share, rank, inputs, outputs, pivots, basis, coefficients } = factors;
        let (shape, wanted) = ((*rank, *inputs, *outputs), (group.rank, group.inputs, group.outputs));
        let passed_on = if group.form == Form::Pivoted { *rank } else { 0 };
        if shape != wanted || pivots.len() != passed_on || coefficients.len() != group.members.len() {
            let expected = format!("rank, inputs and outputs {wanted:?} with {passed_on} pivots");
            let found = format!("{shape:?} with {}", pivots.len());
            return Err(SplitError::Shape { module: group.name.clone(), expected, found }.into());
        }
        let output = *share == Share::Output;
        let pivots = group.pivots().map(|name| Pivots::new(&name, pivots, *inputs, &self.device())).transpose()?;
        let left = |numbers: &[f32]| self.factor(numbers, *inputs - passed_on, *rank);
        let right = |numbers: &[f32]| self.factor(numbers, *rank, *outputs);
        let basis = if output { right(basis) } else { left(basis) };
        let coefficients: Vec<_> = coefficients.iter().map(|c| if output { left(c) } else { right(c) }).collect();
        for (member, coefficient) in group.members.iter().zip(coefficients) {
            let (left, right) = if output { (coefficient, basis.clone()) } else { (basis.clone(), coefficient) };
            let mut from = 0;
            for target in &member.targets {
                let place: LinearPlace = target.linear.parse()?;
                let projection = self.projection_mut(place).ok_or_else(|| no_layer(&target.linear))?;
                let columns = target.start..target.start + target.width;
                let Projection::Split(split) = projection.clone() else {
                    return Err(ModelError::Input(format!("`{}` is not in parts", target.linear)));
                };
                let part = split.parts.iter().position(|part| part.columns() == columns);
                let part = part.ok_or_else(|| {
                    ModelError::Input(format!("`{}` has no part of the outputs {columns:?}", target.linear))
                })?;
                let whole = target.width == *outputs;
                let right =
                    if whole { right.clone() } else { Param::from_tensor(right.val().narrow(1, from, target.width)) };
                let factors = Factors { left: left.clone(), right, pivots: pivots.clone(), share: *share };
                *projection = Projection::Split(split.compress(part, factors)?);
                from += target.width;
            }
        }
        Ok(())
    }
}
