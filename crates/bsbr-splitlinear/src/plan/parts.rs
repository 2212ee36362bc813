//! Which linear layers are meant, which block each is in, and where its parts lie.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;

use super::{LinearShape, PlannedLinear, PlannedPart};
use crate::{Split, SplitConfig, SplitError, WeightType};

/// The layers that weight types match, and the names of those taken out by `exclude_layers`.
pub(super) fn planned_linears(
    config: &SplitConfig,
    shapes: &[LinearShape],
) -> Result<(Vec<PlannedLinear>, Vec<String>), SplitError> {
    let types = config
        .weight_types
        .iter()
        .map(|(name, kind)| {
            let pattern = compile(&format!("weight_types.{name}.pattern"), &kind.pattern)?;
            Ok((name, kind, pattern))
        })
        .collect::<Result<Vec<_>, SplitError>>()?;
    let block = block_pattern(config)?;

    let (mut planned, mut excluded) = (Vec::new(), Vec::new());
    let mut excludable = BTreeSet::new();
    let mut names = BTreeSet::new();
    let mut used: BTreeMap<(&str, usize), &str> = BTreeMap::new();
    let mut matched = BTreeSet::new();
    for shape in shapes {
        if !names.insert(shape.path.as_str()) {
            return Err(SplitError::SameName { module: shape.path.clone() });
        }
        let mut matching = types.iter().filter(|(_, _, pattern)| matches_start(pattern, &shape.path));
        let Some((name, kind, _)) = matching.next() else { continue };
        if let Some((second, ..)) = matching.next() {
            return Err(SplitError::TwoPatterns {
                module: shape.path.clone(),
                first: (*name).clone(),
                second: (*second).clone(),
            });
        }
        matched.insert(name.as_str());
        let layer = layer_of(&block, &shape.path)?;
        if let Some(first) = used.insert((name, layer), &shape.path) {
            return Err(SplitError::TwoModules {
                weight_type: (*name).clone(),
                layer,
                first: first.to_owned(),
                second: shape.path.clone(),
            });
        }
        if config.exclude_layers.contains(&layer) {
            excludable.insert(layer);
            excluded.push(shape.path.clone());
            continue;
        }
        let parts = parts_of(shape, name, kind)?;
        planned.push(PlannedLinear { shape: shape.clone(), weight_type: (*name).clone(), layer, parts });
    }

    if let Some((name, kind, _)) = types.iter().find(|(name, ..)| !matched.contains(name.as_str())) {
        return Err(SplitError::NoMatch {
            weight_type: (*name).clone(),
            pattern: kind.pattern.clone(),
            modules: shapes.len(),
            example: shapes.first().map_or_else(|| "none".to_owned(), |shape| shape.path.clone()),
        });
    }
    if let Some(layer) = config.exclude_layers.iter().find(|layer| !excludable.contains(layer)) {
        return Err(SplitError::setting(
            "exclude_layers",
            "layers that a weight type matches",
            format!("layer {layer}"),
        ));
    }
    Ok((planned, excluded))
}

/// Python's `re.match`: the pattern may end anywhere, but begins where the name does.
fn matches_start(pattern: &Regex, name: &str) -> bool {
    // The leftmost match begins at 0 if any does.
    pattern.find(name).is_some_and(|found| found.start() == 0)
}

fn compile(key: &str, pattern: &str) -> Result<Regex, SplitError> {
    Regex::new(pattern).map_err(|source| SplitError::Pattern {
        key: key.to_owned(),
        pattern: pattern.to_owned(),
        source: Box::new(source),
    })
}

fn block_pattern(config: &SplitConfig) -> Result<Regex, SplitError> {
    let expected = "a regular expression whose first group is the number of the layer, such as 'h\\.(\\d+)'";
    let Some(pattern) = &config.block_pattern else {
        return Err(SplitError::setting("block_pattern", expected, "nothing"));
    };
    let compiled = compile("block_pattern", pattern)?;
    if compiled.captures_len() < 2 {
        return Err(SplitError::setting("block_pattern", expected, format!("`{pattern}`, which has no group")));
    }
    Ok(compiled)
}

fn layer_of(block: &Regex, path: &str) -> Result<usize, SplitError> {
    let fail = |problem| SplitError::NoLayer { module: path.to_owned(), pattern: block.as_str().to_owned(), problem };
    let found = block.captures(path).ok_or_else(|| fail("it is nowhere in the name"))?;
    let number = found.get(1).ok_or_else(|| fail("its first group is not part of what it finds"))?;
    number.as_str().parse().map_err(|_| fail("its first group is not a number"))
}

/// Cuts the outputs of a layer.
fn parts_of(shape: &LinearShape, name: &str, kind: &WeightType) -> Result<Vec<PlannedPart>, SplitError> {
    if shape.inputs == 0 || shape.outputs == 0 {
        let found = format!("{} x {}", shape.inputs, shape.outputs);
        return Err(SplitError::shape(&shape.path, "a weight with at least one input and one output", found));
    }
    let fused_width: usize = shape.fused.iter().map(|(_, width)| width).sum();
    if !shape.fused.is_empty() && fused_width != shape.outputs {
        let expected = format!("what is fused to be {} wide together", shape.outputs);
        return Err(SplitError::shape(&shape.path, expected, fused_width.to_string()));
    }
    let mut cut = Cut { path: &shape.path, start: 0, parts: Vec::new() };
    match kind.split {
        Split::None => cut.push(String::new(), shape.outputs),
        Split::Qkv => widths(shape, name, kind)?.into_iter().for_each(|(part, width)| cut.push(part.into(), width)),
        Split::Heads => {
            for (part, width) in widths(shape, name, kind)? {
                let heads = heads_of(part, name, kind)?;
                if width % heads != 0 {
                    let expected = format!("a width of {part} that `weight_types.{name}` cuts into {heads} heads");
                    return Err(SplitError::shape(&shape.path, expected, width.to_string()));
                }
                (0..heads).for_each(|head| cut.push(format!("{part}.{head}"), width / heads));
            }
        }
    }
    Ok(cut.parts)
}

struct Cut<'a> {
    path: &'a str,
    start: usize,
    parts: Vec<PlannedPart>,
}

impl Cut<'_> {
    fn push(&mut self, label: String, width: usize) {
        let name = if label.is_empty() { self.path.to_owned() } else { format!("{}.{label}", self.path) };
        self.parts.push(PlannedPart { name, label, columns: self.start..self.start + width });
        self.start += width;
    }
}

fn heads_of(part: char, name: &str, kind: &WeightType) -> Result<usize, SplitError> {
    let heads = if part == 'q' { kind.n_head } else { kind.n_kv_head.or(kind.n_head) };
    heads.ok_or_else(|| SplitError::setting(format!("weight_types.{name}.n_head"), "the number of heads", "nothing"))
}

/// What lies along the outputs and how wide each is.
fn widths(shape: &LinearShape, name: &str, kind: &WeightType) -> Result<Vec<(char, usize)>, SplitError> {
    let order = kind.order(name)?;
    if shape.fused.is_empty() {
        return configured_widths(shape, name, kind, order);
    }
    let stored: String = shape.fused.iter().map(|(part, _)| *part).collect();
    let single =
        shape.fused.len() == 1 && kind.split == Split::Heads && order.iter().any(|part| stored.contains(*part));
    if single {
        return Ok(shape.fused.clone());
    }
    let wanted: String = order.iter().collect();
    if stored != wanted {
        let expected = format!("{wanted} along the outputs, as `weight_types.{name}` says");
        return Err(SplitError::shape(&shape.path, expected, stored));
    }
    let (Some(heads), [(_, first), ..]) = (kind.n_head, &shape.fused[..]) else { return Ok(shape.fused.clone()) };
    let head = shape.fused.iter().find(|(part, _)| *part == 'q').map_or(*first, |(_, width)| *width) / heads;
    for &(part, width) in &shape.fused {
        let heads = heads_of(part, name, kind)?;
        if width != heads * head {
            let expected = format!("{heads} heads of {head} for {part}, as `weight_types.{name}` says");
            return Err(SplitError::shape(&shape.path, expected, width.to_string()));
        }
    }
    Ok(shape.fused.clone())
}

/// The widths that the configuration implies: thirds, unless it says that keys and values have fewer heads.
fn configured_widths(
    shape: &LinearShape,
    name: &str,
    kind: &WeightType,
    order: [char; 3],
) -> Result<Vec<(char, usize)>, SplitError> {
    let heads = kind.n_head.unwrap_or(1);
    let kv_heads = kind.n_kv_head.unwrap_or(heads);
    let all = heads + 2 * kv_heads;
    if !shape.outputs.is_multiple_of(all) {
        let expected = match kind.n_head {
            None => format!("outputs that `weight_types.{name}` cuts into q, k and v of equal width"),
            Some(_) => format!("outputs that `weight_types.{name}` cuts into {heads} + {kv_heads} + {kv_heads} heads"),
        };
        return Err(SplitError::shape(&shape.path, expected, shape.outputs.to_string()));
    }
    let head = shape.outputs / all;
    Ok(order.map(|part| (part, head * if part == 'q' { heads } else { kv_heads })).to_vec())
}
