//! Which layers share a basis.

use std::collections::{BTreeMap, BTreeSet};

use super::{GroupSize, PlannedGroup, PlannedLinear};
use crate::{Share, SplitConfig, SplitError, WeightType};

/// Layers of a group where nothing says otherwise: larger groups were worse in every published comparison.
const DEFAULT_GROUP_SIZE: usize = 2;

/// The groups of every weight type, by part and then by layer.
pub(super) fn planned_groups(config: &SplitConfig, linears: &[PlannedLinear]) -> Result<Vec<PlannedGroup>, SplitError> {
    let mut groups = Vec::new();
    let mut layers_in_use = BTreeSet::new();
    for (name, kind) in &config.weight_types {
        let by_layer: BTreeMap<usize, usize> = linears
            .iter()
            .enumerate()
            .filter(|(_, linear)| linear.weight_type == *name)
            .map(|(index, linear)| (linear.layer, index))
            .collect();
        layers_in_use.extend(by_layer.keys().copied());
        let runs = runs_of(config, name, kind, &by_layer)?;
        let mut of_type = by_layer.values().filter_map(|&index| linears.get(index));
        let Some(first) = of_type.next() else { continue };
        let labels = |linear: &PlannedLinear| linear.parts.iter().map(|part| part.label.clone()).collect::<Vec<_>>();
        if let Some(other) = of_type.find(|linear| labels(linear) != labels(first)) {
            let expected = format!("the parts of `{}`, as all layers of `{name}` must have them", first.shape.path);
            return Err(SplitError::shape(&other.shape.path, expected, format!("{:?}", labels(other))));
        }
        for (part, labelled) in first.parts.iter().enumerate() {
            for (number, run) in runs.iter().enumerate() {
                let group_name = match labelled.label.as_str() {
                    "" => format!("{name}.g{number}"),
                    label => format!("{name}.{label}.g{number}"),
                };
                let members: Vec<(usize, usize)> = run.iter().map(|&index| (index, part)).collect();
                groups.push(planned_group(config, kind, group_name, &members, linears)?);
            }
        }
    }
    // A group of all types may name layers that only some types have, but not layers that no type has.
    let named = config.groups.iter().flatten().flatten();
    if let Some(layer) = named.into_iter().find(|layer| !layers_in_use.contains(layer)) {
        return Err(SplitError::setting("groups", "layers that a weight type matches", format!("layer {layer}")));
    }
    Ok(groups)
}

/// The layers of each group, as indices of linear layers.
fn runs_of(
    config: &SplitConfig,
    name: &str,
    kind: &WeightType,
    by_layer: &BTreeMap<usize, usize>,
) -> Result<Vec<Vec<usize>>, SplitError> {
    let indices: Vec<usize> = by_layer.values().copied().collect();
    if kind.share == Share::None {
        return Ok(indices.into_iter().map(|index| vec![index]).collect());
    }
    let own = kind.groups.as_ref();
    let inherited = if kind.group_size.is_none() { config.groups.as_ref() } else { None };
    let Some(given) = own.or(inherited) else {
        let size = kind.group_size.or(config.group_size).unwrap_or(DEFAULT_GROUP_SIZE);
        return Ok(indices.chunks(size).map(<[usize]>::to_vec).collect());
    };
    let key = if own.is_some() { format!("weight_types.{name}.groups") } else { "groups".to_owned() };
    let mut left = by_layer.clone();
    let mut runs = Vec::new();
    for group in given {
        let mut layers = group.clone();
        layers.sort_unstable();
        let run: Vec<usize> = layers.iter().filter_map(|layer| left.remove(layer)).collect();
        if own.is_some() && run.len() < layers.len() {
            let missing = layers.iter().find(|layer| !by_layer.contains_key(layer)).copied().unwrap_or_default();
            let expected = format!("layers that `{name}` matches and `exclude_layers` does not name");
            return Err(SplitError::setting(key, expected, format!("layer {missing}")));
        }
        if !run.is_empty() {
            runs.push(run);
        }
    }
    match left.keys().next() {
        Some(layer) => {
            let expected = format!("every layer that `{name}` matches, or that layer in `exclude_layers`");
            Err(SplitError::setting(key, expected, format!("no group with layer {layer}")))
        }
        None => Ok(runs),
    }
}

fn planned_group(
    config: &SplitConfig,
    kind: &WeightType,
    name: String,
    members: &[(usize, usize)],
    linears: &[PlannedLinear],
) -> Result<PlannedGroup, SplitError> {
    let shape_of = |&(index, part): &(usize, usize)| {
        let linear = linears.get(index)?;
        Some((&linear.shape.path, linear.shape.inputs, linear.parts.get(part)?.columns.len()))
    };
    let mut shapes = members.iter().filter_map(shape_of);
    let (inputs, outputs) = match shapes.next() {
        Some((first, inputs, outputs)) => match shapes.find(|(_, i, o)| (*i, *o) != (inputs, outputs)) {
            Some((path, other_inputs, other_outputs)) => {
                let expected = format!(
                    "{inputs} x {outputs}, the shape of `{first}`, with which it would share a basis; give such layers \
                     groups of their own"
                );
                return Err(SplitError::shape(path, expected, format!("{other_inputs} x {other_outputs}")));
            }
            None => (inputs, outputs),
        },
        None => (0, 0),
    };
    let keep = kind.keep.unwrap_or(config.keep);
    let (form, share) = (config.form, kind.share);
    let rank = GroupSize { form, share, layers: members.len(), inputs, outputs }.rank_for(keep);
    if rank == 0 {
        let expected = format!("enough to leave `{name}` ({} of {inputs} x {outputs}) a rank of 1", members.len());
        return Err(SplitError::setting("keep", expected, keep));
    }
    let members = members.to_vec();
    let weight_type = name.split('.').next().unwrap_or_default().to_owned();
    let mut group = PlannedGroup { name, weight_type, share, form, members, inputs, outputs, keep, rank: None };
    group.set_rank(rank);
    Ok(group)
}
