//! What a compressed model says of itself: which outputs of which layers are made of which factors.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
};

use faer::{Accum, Mat, get_global_parallelism, linalg::matmul::matmul};
use serde::{Deserialize, Serialize};

use crate::{Form, GroupFactors, GroupSize, Plan, Share, SplitError, checked_pivots, pivots::others};

/// The compressed parts of a model, as its configuration keeps them.
///
/// The numbers are tensors beside the others of the model: `share.{group}.basis`, once for all its members, and
/// `share.{part}.coef` for each member. Both are stored as linear weights are, `[outputs, inputs]`: a shared input side as
/// a basis `[rank, inputs]` and coefficients `[outputs, rank]`, a shared output side as coefficients `[rank, inputs]` and
/// a basis `[outputs, rank]`. A pivoted basis is `[rank, inputs - rank]`, without the inputs that it passes on; which
/// they are is `share.{group}.pivots`, `[rank]` whole numbers (I32). Outputs stand in the order of the layers that [`SavedTarget`] names. What remains of a
/// weight is stored under its own name, outputs that no part takes in their order; nothing where all are taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSplit {
    /// Version of this format; see [`SavedSplit::FORMAT_VERSION`].
    pub format_version: u32,
    /// The share of the parameters that was asked for.
    pub keep: f64,
    /// SHA-256 over the weights of the model that was compressed.
    pub base: String,
    /// Id of the calibration; empty without.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub calibration: String,
    /// Every group of parts with one basis.
    pub groups: Vec<SavedGroup>,
}

/// Parts with one basis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedGroup {
    /// Name, as `attn_c_attn.q.g0`.
    pub name: String,
    /// The side that is shared.
    pub share: Share,
    /// How its factors are kept.
    #[serde(default, skip_serializing_if = "Form::is_two_factor")]
    pub form: Form,
    /// Numbers between basis and coefficient.
    pub rank: usize,
    /// Inputs of every member.
    pub inputs: usize,
    /// Outputs of every member.
    pub outputs: usize,
    /// Who shares the basis.
    pub members: Vec<SavedMember>,
}

/// One part of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMember {
    /// Name, as `transformer.h.0.attn.c_attn.q`.
    pub part: String,
    /// Where its outputs go, one after the other.
    pub targets: Vec<SavedTarget>,
}

/// Some outputs of a layer of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedTarget {
    /// The layer, as the model names it.
    pub linear: String,
    /// First output of the layer.
    pub start: usize,
    /// Number of outputs.
    pub width: usize,
}

impl SavedGroup {
    /// Name of the tensor of the basis.
    pub fn basis(&self) -> String {
        format!("share.{}.basis", self.name)
    }

    /// Name of the tensor of the pivots, where there are some.
    pub fn pivots(&self) -> Option<String> {
        (self.form == Form::Pivoted).then(|| format!("share.{}.pivots", self.name))
    }

    /// Its sizes.
    pub fn size(&self) -> GroupSize {
        let Self { form, share, inputs, outputs, ref members, .. } = *self;
        GroupSize { form, share, layers: members.len(), inputs, outputs }
    }

    /// Name and shape of every tensor: the basis, its pivots where there are some, the coefficients.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let passed_on = if self.form == Form::Pivoted { self.rank } else { 0 };
        let left = [self.rank, self.inputs.saturating_sub(passed_on)];
        let right = [self.outputs, self.rank];
        let (basis, coefficient) = if self.share == Share::Output { (right, left) } else { (left, right) };
        let pivots = self.pivots().map(|name| (name, vec![self.rank]));
        let coefficients = self.members.iter().map(|member| (member.coefficient(), coefficient.to_vec()));
        std::iter::once((self.basis(), basis.to_vec())).chain(pivots).chain(coefficients).collect()
    }

    /// Numbers in its tensors.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

/// The factors of a part as they are stored; see [`SavedSplit`].
#[derive(Debug, Clone, Copy)]
pub struct StoredFactors<'a> {
    /// `[outputs, rank]`.
    pub right: &'a [f32],
    /// `[rank, inputs]`, without the inputs that are pivots.
    pub left: &'a [f32],
    /// The input that each dimension passes on; none of two factors.
    pub pivots: Option<&'a [f32]>,
}

impl StoredFactors<'_> {
    /// The map that they make together, `[outputs, inputs]`, summed in f64.
    ///
    /// # Errors
    ///
    /// [`SplitError`] if they are of other sizes, or the pivots are not such.
    pub fn dense(&self, name: &str, [outputs, rank, inputs]: [usize; 3]) -> Result<Vec<f32>, SplitError> {
        let pivots = match self.pivots {
            Some(numbers) => checked_pivots(name, numbers, rank, inputs)?,
            None => Vec::new(),
        };
        let rest = others(inputs, pivots.iter().map(|&pivot| pivot as usize));
        for (factor, rows, columns) in [(self.right, outputs, rank), (self.left, rank, rest.len())] {
            if rows.checked_mul(columns) != Some(factor.len()) {
                let expected = format!("a factor of {rows} x {columns} numbers");
                return Err(SplitError::shape(name, expected, factor.len().to_string()));
            }
        }
        let matrix = |numbers: &[f32], rows: usize, columns: usize| {
            Mat::<f64>::from_fn(rows, columns, |row, column| f64::from(numbers[row * columns + column]))
        };
        let mut product = Mat::<f64>::zeros(outputs, rest.len());
        let (right, left) = (matrix(self.right, outputs, rank), matrix(self.left, rank, rest.len()));
        matmul(&mut product, Accum::Replace, &right, &left, 1.0, get_global_parallelism());
        let mut dense = vec![0.0; outputs * inputs];
        for (row, dense) in dense.chunks_exact_mut(inputs.max(1)).enumerate() {
            for (column, &input) in rest.iter().enumerate() {
                dense[input] = product[(row, column)] as f32;
            }
            for (dimension, &pivot) in pivots.iter().enumerate() {
                dense[pivot as usize] = right[(row, dimension)] as f32;
            }
        }
        Ok(dense)
    }
}

/// The tensors of a group as they are stored, in the order of [`SavedGroup::tensors`]; pivots as whole numbers.
///
/// # Errors
///
/// [`SplitError`] if the factors are not those of the group.
pub fn stored_tensors(group: &SavedGroup, factors: &GroupFactors) -> Result<Vec<(String, Vec<f32>)>, SplitError> {
    let pivots: Vec<f32> = factors.pivots.iter().map(|&pivot| pivot as f32).collect();
    let pivots = (group.form == Form::Pivoted).then_some(&pivots);
    let numbers = std::iter::once(&factors.basis).chain(pivots).chain(&factors.coefficients);
    let tensors = group.tensors();
    if group.members.len() != factors.coefficients.len() || factors.share != group.share {
        let expected = format!("{} coefficients with the {:?} side shared", group.members.len(), group.share);
        let found = format!("{} with {:?}", factors.coefficients.len(), factors.share);
        return Err(SplitError::shape(&group.name, expected, found));
    }
    let stored = tensors.into_iter().zip(numbers).map(|((name, shape), numbers)| {
        if numbers.len() != shape.iter().product::<usize>() {
            return Err(SplitError::shape(&name, format!("numbers of the shape {shape:?}"), numbers.len().to_string()));
        }
        let [rows, columns] = shape[..] else { return Ok((name, numbers.clone())) };
        // Factors are kept `[inputs, outputs]`.
        let turned = (0..rows).flat_map(|row| (0..columns).map(move |column| numbers[column * rows + row]));
        Ok((name, turned.collect()))
    });
    stored.collect()
}

impl SavedMember {
    /// Name of the tensor of the coefficient.
    pub fn coefficient(&self) -> String {
        format!("share.{}.coef", self.part)
    }
}

/// Outputs of one layer that a member of a group makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedPart<'a> {
    /// The group.
    pub group: &'a SavedGroup,
    /// The member.
    pub member: &'a SavedMember,
    /// Outputs of the layer.
    pub columns: Range<usize>,
    /// Which of the member's outputs they are.
    pub from: Range<usize>,
}

impl SavedSplit {
    /// The only version this code reads and writes.
    pub const FORMAT_VERSION: u32 = 1;

    /// The compressed groups of a plan. `targets` says for the path of a layer which layers of the model its outputs are,
    /// one after the other: names and widths.
    ///
    /// # Errors
    ///
    /// A text naming the layer that `targets` does not have in full.
    pub fn of_plan(plan: &Plan, targets: &BTreeMap<String, Vec<(String, usize)>>) -> Result<Vec<SavedGroup>, String> {
        let mut groups = Vec::new();
        for group in &plan.groups {
            let Some(rank) = group.rank else { continue };
            let members = group.members.iter().map(|&(linear, part)| {
                let linear = &plan.linears[linear];
                let part = &linear.parts[part];
                let path = &linear.shape.path;
                let layers = targets.get(path).ok_or_else(|| format!("the model has no layer `{path}`"))?;
                let targets = intersect(layers, &part.columns);
                if targets.iter().map(|target| target.width).sum::<usize>() != part.columns.len() {
                    return Err(format!("`{}` reaches past the outputs of `{path}`", part.name));
                }
                Ok(SavedMember { part: part.name.clone(), targets })
            });
            groups.push(SavedGroup {
                name: group.name.clone(),
                share: group.share,
                form: group.form,
                rank,
                inputs: group.inputs,
                outputs: group.outputs,
                members: members.collect::<Result<_, String>>()?,
            });
        }
        Ok(groups)
    }

    /// Checks it against the layers of a model: `shape` gives inputs and outputs of the layer of a name.
    ///
    /// # Errors
    ///
    /// A text naming the group and what is wrong with it.
    pub fn validate(&self, shape: impl Fn(&str) -> Option<[usize; 2]>) -> Result<(), String> {
        if self.format_version != Self::FORMAT_VERSION {
            return Err(format!("has format {}, this version reads {}", self.format_version, Self::FORMAT_VERSION));
        }
        if !(self.keep.is_finite() && self.keep > 0.0) {
            return Err(format!("keeps {}, expected a positive share", self.keep));
        }
        let mut names = HashSet::new();
        let mut taken: BTreeMap<&str, Vec<Range<usize>>> = BTreeMap::new();
        for group in &self.groups {
            let name = &group.name;
            let most = match (group.share, group.form) {
                (Share::Output, Form::Pivoted) => {
                    return Err(format!("group `{name}` is pivoted with a shared output side: pivots are inputs"));
                }
                (Share::Output, Form::TwoFactor) => group.inputs.saturating_mul(group.members.len()).min(group.outputs),
                (_, form) => {
                    let most = group.inputs.min(group.outputs.saturating_mul(group.members.len()));
                    if form == Form::Pivoted { most.min(group.inputs.saturating_sub(1)) } else { most }
                }
            };
            if group.rank == 0 || group.rank > most {
                return Err(format!("group `{name}` has rank {}, expected 1 to {most}", group.rank));
            }
            for (tensor, _) in group.tensors() {
                if !names.insert(tensor.clone()) {
                    return Err(format!("group `{name}` names the tensor `{tensor}` a second time"));
                }
            }
            for member in &group.members {
                let part = &member.part;
                let mut outputs = 0usize;
                for SavedTarget { linear, start, width } in &member.targets {
                    let Some([inputs, total]) = shape(linear) else {
                        return Err(format!("part `{part}` names the layer `{linear}`, the model has none"));
                    };
                    let end = start.checked_add(*width).filter(|&end| *width > 0 && end <= total);
                    let Some(end) = end else {
                        return Err(format!(
                            "part `{part}` takes {width} outputs of `{linear}` from {start}, it has {total}"
                        ));
                    };
                    if inputs != group.inputs {
                        return Err(format!("part `{part}` has {} inputs, `{linear}` has {inputs}", group.inputs));
                    }
                    let ranges = taken.entry(linear).or_default();
                    if ranges.iter().any(|range| *start < range.end && range.start < end) {
                        return Err(format!("part `{part}` takes outputs of `{linear}` that another part has"));
                    }
                    ranges.push(*start..end);
                    outputs += width;
                }
                if outputs != group.outputs {
                    return Err(format!("part `{part}` has {outputs} outputs, its group {}", group.outputs));
                }
            }
        }
        Ok(())
    }

    /// The compressed parts of the layer `linear`, in the order of its outputs.
    pub fn parts_of(&self, linear: &str) -> Vec<SavedPart<'_>> {
        let mut parts = Vec::new();
        for group in &self.groups {
            for member in &group.members {
                let mut from = 0;
                for target in &member.targets {
                    if target.linear == linear {
                        let columns = target.start..target.start + target.width;
                        parts.push(SavedPart { group, member, columns, from: from..from + target.width });
                    }
                    from += target.width;
                }
            }
        }
        parts.sort_by_key(|part| part.columns.start);
        parts
    }

    /// How many outputs every layer of which some are compressed has given away.
    pub fn taken(&self) -> BTreeMap<&str, usize> {
        let mut taken = BTreeMap::new();
        let targets = self.groups.iter().flat_map(|group| &group.members).flat_map(|member| &member.targets);
        for target in targets {
            *taken.entry(target.linear.as_str()).or_default() += target.width;
        }
        taken
    }

    /// Name and shape of every tensor of the groups.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.groups.iter().flat_map(SavedGroup::tensors).collect()
    }
}

/// The outputs `columns` of layers that stand one after the other.
fn intersect(layers: &[(String, usize)], columns: &Range<usize>) -> Vec<SavedTarget> {
    let mut at = 0;
    let mut targets = Vec::new();
    for (linear, width) in layers {
        let (start, end) = (columns.start.max(at), columns.end.min(at + width));
        if start < end {
            targets.push(SavedTarget { linear: linear.clone(), start: start - at, width: end - start });
        }
        at += width;
    }
    targets
}
