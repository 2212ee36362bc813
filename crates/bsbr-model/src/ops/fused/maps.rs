//! The linear layers of a block as the kernels read them, whole or in parts.

use std::sync::Arc;

use bsbr_kernels::layer::{self, Panels};
use bsbr_splitlinear::{Run, SplitLinear};
use burn::{
    module::{Param, ParamId},
    tensor::Tensor,
};

use super::Map;
use crate::Projection;

/// A linear layer and what keeps its numbers.
pub(super) enum Layer {
    Dense(Box<Map>),
    Split(Parts),
}

/// Parts of a layer, in the order of its outputs.
pub(super) struct Parts {
    /// The first factors, each once.
    lefts: Vec<Left>,
    parts: Vec<Part>,
}

/// A first factor.
struct Left {
    id: ParamId,
    map: Map,
    /// The order of the inputs, where some are passed on as they are.
    order: Option<Arc<[u32]>>,
}

/// Outputs from the input itself, or from what the first factor of this number makes of it.
struct Part {
    left: Option<ParamId>,
    map: Map,
}

impl Layer {
    pub(super) fn of(projection: &Projection) -> Option<Self> {
        let dense = |weight: &Param<Tensor<2>>, bias: &Option<Param<Tensor<1>>>| {
            Map::new(&weight.val(), bias.as_ref().map(Param::val).as_ref()).map(|map| Self::Dense(Box::new(map)))
        };
        match projection {
            Projection::Dense(linear) => dense(&linear.weight, &linear.bias),
            Projection::Stored(linear) => {
                let bias = linear.bias.as_ref().map(Param::val);
                Map::stored(&linear.weight, linear.arithmetic, bias.as_ref()).map(|map| Self::Dense(Box::new(map)))
            }
            Projection::Split(split) => match &split.original {
                Some(weight) if split.is_original() => dense(weight, &split.bias),
                _ => Parts::of(split).map(Self::Split),
            },
        }
    }

    /// The map, if the layer is one.
    pub(super) fn dense(&self) -> Option<&Map> {
        match self {
            Self::Dense(map) => Some(map),
            Self::Split(_) => None,
        }
    }
}

impl Parts {
    fn of(split: &SplitLinear) -> Option<Self> {
        let bias = split.bias.as_ref().map(Param::val);
        let bias = |start: usize, width: usize| bias.as_ref().map(|bias| bias.clone().narrow(0, start, width));
        let (mut lefts, mut parts): (Vec<Left>, Vec<Part>) = (Vec::new(), Vec::new());
        for run in split.runs() {
            let part = match run {
                Run::Original { columns, kept } => {
                    let weight = split.original.as_ref()?.val().narrow(1, kept.start, kept.len());
                    Part { left: None, map: Map::new(&weight, bias(columns.start, columns.len()).as_ref())? }
                }
                Run::Compressed(part) => {
                    let (columns, factors) = (split.parts[part].columns(), split.parts[part].factors.as_ref()?);
                    let id = factors.left.id;
                    if lefts.iter().all(|left| left.id != id) {
                        let order = factors.pivots.as_ref().map(|pivots| Arc::clone(pivots.order()));
                        lefts.push(Left { id, map: Map::new(&factors.left.val(), None)?, order });
                    }
                    let map = Map::new(&factors.right.val(), bias(columns.start, columns.len()).as_ref())?;
                    Part { left: Some(id), map }
                }
            };
            parts.push(part);
        }
        Some(Self { lefts, parts })
    }
}

/// What each of `layers` makes of the same input. A first factor that several have is multiplied with once.
pub(super) fn project(x: &Panels, layers: &[&Layer]) -> Vec<Panels> {
    let dense: Option<Vec<_>> = layers.iter().map(|layer| layer.dense().map(Map::view)).collect();
    if let Some(maps) = dense {
        return layer::project(x, &maps);
    }
    let mut lefts: Vec<&Left> = Vec::new();
    for layer in layers {
        if let Layer::Split(parts) = layer {
            let new = parts.lefts.iter().filter(|left| lefts.iter().all(|known| known.id != left.id));
            let new: Vec<_> = new.collect();
            lefts.extend(new);
        }
    }
    let maps: Vec<_> = lefts.iter().map(|left| (left.map.view(), left.order.as_deref())).collect();
    let reduced = layer::project_passing(x, &maps);
    let input = |left: &Option<ParamId>| {
        let at = left.and_then(|id| lefts.iter().position(|known| known.id == id));
        at.map_or(x, |at| &reduced[at])
    };
    let joined: Vec<Vec<_>> = layers
        .iter()
        .map(|layer| match layer {
            Layer::Dense(map) => vec![(x, map.view())],
            Layer::Split(parts) => parts.parts.iter().map(|part| (input(&part.left), part.map.view())).collect(),
        })
        .collect();
    layer::project_joined(&joined)
}
