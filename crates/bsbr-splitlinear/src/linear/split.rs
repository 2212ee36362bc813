//! A layer of parts.

use std::ops::Range;

use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    tensor::Tensor,
};

use super::{Factors, Pivots, ShareLinear, ShareState, Tap};
use crate::SplitError;

/// Tokens from which joining the left factors of a layer costs less than one product for each.
const JOIN_TOKENS: usize = 32;

/// A linear layer `x W + b` whose outputs are made by parts.
///
/// The columns of all parts that are original are one tensor, so that a layer of which every part is original computes
/// as the layer it replaced, with the very same tensors.
#[derive(Module, Debug)]
pub struct SplitLinear {
    /// `[inputs, outputs of the original parts]`, part after part.
    pub original: Option<Param<Tensor<2>>>,
    /// The parts, which cover the outputs without gaps, first to last.
    pub parts: Vec<ShareLinear>,
    /// `[outputs]`.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    inputs: usize,
    #[module(skip)]
    tap: Option<Tap>,
}

impl SplitLinear {
    /// Divides a layer; `parts` are names and columns. Its tensors are taken as they are.
    ///
    /// # Errors
    ///
    /// [`SplitError`] if the parts leave a gap, overlap or do not end with the outputs.
    pub fn new(layer: Linear, parts: Vec<(String, Range<usize>)>) -> Result<Self, SplitError> {
        let [inputs, _] = layer.weight.dims();
        let parts = parts.into_iter().map(|(name, columns)| ShareLinear::original(name, columns)).collect();
        Self::of_parts(inputs, Some(layer.weight), parts, layer.bias)
    }

    /// A layer of `parts`, some of which may be compressed; `original` are the columns of all others, `None` where there
    /// are none.
    ///
    /// # Errors
    ///
    /// [`SplitError`] as [`SplitLinear::new`], and if factors, weight or bias are of another size than the parts.
    pub fn of_parts(
        inputs: usize,
        original: Option<Param<Tensor<2>>>,
        parts: Vec<ShareLinear>,
        bias: Option<Param<Tensor<1>>>,
    ) -> Result<Self, SplitError> {
        let (mut end, mut kept) = (0, 0);
        for part in &parts {
            let columns = part.columns();
            if columns.start != end || columns.is_empty() {
                return Err(SplitError::shape(part.name(), format!("outputs from {end}"), format!("{columns:?}")));
            }
            end = columns.end;
            match &part.factors {
                None => kept += columns.len(),
                Some(factors) => {
                    let (left, right) = (factors.left.dims(), factors.right.dims());
                    let pivots = factors.pivots.as_ref().map(|pivots| [pivots.rank(), pivots.order().len()]);
                    let passed_on = pivots.map_or(0, |[rank, _]| rank);
                    let expected = ([inputs.saturating_sub(passed_on), right[0]], [left[1], columns.len()]);
                    if (left, right) != expected || pivots.is_some_and(|pivots| pivots != [left[1], inputs]) {
                        let (expected, found) = (format!("factors {expected:?}"), format!("{left:?} and {right:?}"));
                        return Err(SplitError::shape(part.name(), expected, found));
                    }
                }
            }
        }
        if end == 0 {
            return Err(SplitError::shape("a layer in parts", "at least one part", "none"));
        }
        let name = || parts.first().map_or("a layer", ShareLinear::name);
        let found = original.as_ref().map(|weight| weight.dims());
        let expected = (kept > 0).then_some([inputs, kept]);
        if found != expected {
            return Err(SplitError::shape(name(), format!("an original weight {expected:?}"), format!("{found:?}")));
        }
        if let Some([width]) = bias.as_ref().map(|bias| bias.dims())
            && width != end
        {
            return Err(SplitError::shape(name(), format!("{end} biases"), width.to_string()));
        }
        Ok(Self { original, parts, bias, inputs, tap: None })
    }

    /// Numbers of an input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Numbers of an output.
    pub fn outputs(&self) -> usize {
        self.parts.last().map_or(0, |part| part.columns().end)
    }

    /// Numbers in its weight and factors, pivots among them, those that other layers hold as well included; without the bias.
    pub fn parameters(&self) -> usize {
        let size = |weight: &Param<Tensor<2>>| weight.dims().iter().product::<usize>();
        let factors = self.parts.iter().filter_map(|part| part.factors.as_ref());
        let pivots = |factors: &Factors| factors.pivots.as_ref().map_or(0, Pivots::rank);
        let factors =
            factors.map(|factors| size(&factors.left) + size(&factors.right) + pivots(factors)).sum::<usize>();
        factors + self.original.as_ref().map_or(0, size)
    }

    /// What part `part` computes with.
    pub fn state(&self, part: usize) -> ShareState {
        match (&self.parts[part].factors, &self.tap) {
            (Some(_), _) => ShareState::Compressed,
            (None, Some(_)) => ShareState::Calibrating,
            (None, None) => ShareState::Original,
        }
    }

    /// The layer with its inputs shown to `tap`, or to no one. What it computes stays as it is.
    pub fn with_tap(self, tap: Option<Tap>) -> Self {
        Self { tap, ..self }
    }

    /// Who sees the inputs.
    pub fn tap(&self) -> Option<&Tap> {
        self.tap.as_ref()
    }

    /// Whether no part is compressed.
    pub fn is_original(&self) -> bool {
        self.parts.iter().all(|part| part.factors.is_none())
    }

    /// Puts factors in the place of the weight of part `part`, or in the place of other factors.
    ///
    /// # Errors
    ///
    /// [`SplitError`] if they are of another size than the part.
    pub fn compress(self, part: usize, factors: Factors) -> Result<Self, SplitError> {
        let Self { original, mut parts, bias, inputs, tap } = self;
        let Some(old) = parts.get(part) else {
            return Err(SplitError::shape(
                "a layer",
                format!("a part number {part}"),
                format!("{} parts", parts.len()),
            ));
        };
        let original = match (&old.factors, original) {
            (None, Some(weight)) => {
                let before: usize =
                    parts[..part].iter().filter(|p| p.factors.is_none()).map(|p| p.columns().len()).sum();
                let (width, after) = (old.columns().len(), weight.dims()[1]);
                let weight = weight.val();
                let kept = [0..before, before + width..after].into_iter().filter(|columns| !columns.is_empty());
                // As loaded weights are: the numbers of one output side by side.
                let kept: Vec<Tensor<2>> =
                    kept.map(|columns| weight.clone().transpose().narrow(0, columns.start, columns.len())).collect();
                (!kept.is_empty()).then(|| Param::from_tensor(Tensor::cat(kept, 0).transpose()))
            }
            (_, original) => original,
        };
        parts[part] = ShareLinear::compressed(old.name(), old.columns(), factors);
        Ok(Self::of_parts(inputs, original, parts, bias)?.with_tap(tap))
    }

    /// The weight `[inputs, outputs]` that all parts make together.
    pub fn dense_weight(&self) -> Tensor<2> {
        if let (Some(weight), true) = (&self.original, self.is_original()) {
            return weight.val();
        }
        Tensor::cat(self.pieces(|factors| factors.product(), |original, _| original), 1)
    }

    /// `[.., inputs]` to `[.., outputs]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut shape = x.dims();
        let width = shape[D - 1];
        let tokens = shape.iter().product::<usize>() / width.max(1);
        if let Some(tap) = &self.tap {
            tap.show(x.clone().reshape([tokens, width]));
        }
        if let (Some(weight), true) = (&self.original, self.is_original()) {
            return Linear { weight: weight.clone(), bias: self.bias.clone() }.forward(x);
        }
        shape[D - 1] = self.outputs();
        let mut reduced = Vec::new();
        self.forward_parts(x.reshape([tokens, width]), &mut reduced).reshape(shape)
    }

    /// [`SplitLinear::forward`] of `[tokens, inputs]` without the tap. `reduced` are the products of this input with
    /// left factors so far: another layer with the same input and basis finds its own there.
    pub fn forward_parts(&self, x: Tensor<2>, reduced: &mut Vec<(ParamId, Tensor<2>)>) -> Tensor<2> {
        self.reduce(&x, reduced);
        let reduced_by = |factors: &Factors| {
            let found = reduced.iter().find(|(id, _)| *id == factors.left.id);
            found.map_or_else(|| factors.reduce(&x), |(_, z)| z.clone())
        };
        let pieces = self
            .pieces(|factors| reduced_by(factors).matmul(factors.right.val()), |weight, _| x.clone().matmul(weight));
        let y = if pieces.len() == 1 { pieces.into_iter().next() } else { Some(Tensor::cat(pieces, 1)) };
        let y = y.unwrap_or_else(|| unreachable!("a layer has a part"));
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }

    /// Multiplies with the left factors that were not met before, all of them at once for many tokens.
    fn reduce(&self, x: &Tensor<2>, reduced: &mut Vec<(ParamId, Tensor<2>)>) {
        let mut lefts: Vec<&Factors> = Vec::new();
        for factors in self.parts.iter().filter_map(|part| part.factors.as_ref()) {
            let known = reduced.iter().any(|(id, _)| *id == factors.left.id);
            if !known && lefts.iter().all(|known| known.left.id != factors.left.id) {
                lefts.push(factors);
            }
        }
        // Pivoted ones read other inputs each.
        let (joined, single): (Vec<_>, Vec<_>) = lefts.into_iter().partition(|factors| factors.pivots.is_none());
        reduced.extend(single.into_iter().map(|factors| (factors.left.id, factors.reduce(x))));
        if joined.len() > 1 && x.dims()[0] >= JOIN_TOKENS {
            let all = x.clone().matmul(Tensor::cat(joined.iter().map(|factors| factors.left.val()).collect(), 1));
            let mut start = 0;
            for factors in joined {
                reduced.push((factors.left.id, all.clone().narrow(1, start, factors.rank())));
                start += factors.rank();
            }
        } else {
            reduced.extend(joined.into_iter().map(|factors| (factors.left.id, factors.reduce(x))));
        }
    }

    /// One tensor for each compressed part and for each run of original ones, in the order of the outputs.
    fn pieces(
        &self,
        compressed: impl Fn(&Factors) -> Tensor<2>,
        original: impl Fn(Tensor<2>, Range<usize>) -> Tensor<2>,
    ) -> Vec<Tensor<2>> {
        self.runs()
            .into_iter()
            .filter_map(|run| match run {
                Run::Compressed(part) => self.parts[part].factors.as_ref().map(&compressed),
                Run::Original { columns, kept } => {
                    let weight = self.original.as_ref()?.val().narrow(1, kept.start, kept.len());
                    Some(original(weight, columns))
                }
            })
            .collect()
    }

    /// The outputs first to last: compressed parts, and original ones as far as they stand side by side.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut at = 0;
        for (number, part) in self.parts.iter().enumerate() {
            if part.factors.is_some() {
                runs.push(Run::Compressed(number));
                continue;
            }
            let width = part.columns().len();
            match runs.last_mut() {
                Some(Run::Original { columns, kept }) => {
                    columns.end += width;
                    kept.end += width;
                }
                _ => runs.push(Run::Original { columns: part.columns(), kept: at..at + width }),
            }
            at += width;
        }
        runs
    }
}

/// Outputs that are computed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// Those of this part.
    Compressed(usize),
    /// Those of original parts side by side.
    Original {
        /// Which outputs of the layer.
        columns: Range<usize>,
        /// Which columns of [`SplitLinear::original`].
        kept: Range<usize>,
    },
}
