//! What else a misfit could mean: names that are close, settings under which a tensor would fit. Never applied.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use bsbr_model::{ModelConfig, weight_specs};
use serde_json::Value;

use crate::json::ConfigFile;
use crate::ops;
use crate::rules::{Architecture, Prefix, Rule, SourceModel, expand, places, target_names};

/// The shapes a checkpoint would need under other settings.
#[derive(Debug)]
pub(crate) struct Hints<'a> {
    architecture: &'a Architecture,
    prefix: Prefix,
    alternatives: Vec<Alternative>,
}

/// A setting the other way.
#[derive(Debug)]
struct Alternative {
    /// `key=value`.
    setting: String,
    model: SourceModel,
    /// What the rules ask for then, made when the first misfit asks: there may be thousands of them.
    expected: OnceCell<BTreeMap<String, Vec<usize>>>,
}

impl<'a> Hints<'a> {
    /// Reads the configuration again with each alternative key set the other way.
    pub(crate) fn new(
        architecture: &'a Architecture,
        prefix: Prefix,
        config: &ConfigFile,
        model: &SourceModel,
    ) -> Self {
        let alternatives = architecture.alternatives.iter().filter_map(|key| {
            let value = !model.flag(key)?;
            let mut other = (architecture.read_config)(&config.with(key, Value::Bool(value))).ok()?;
            let layouts = architecture.layouts.iter().filter_map(|it| Some((it.flag, model.flag(it.flag)?)));
            other.flags.extend(layouts);
            Some(Alternative { setting: format!("{key}={value}"), model: other, expected: OnceCell::new() })
        });
        Self { architecture, prefix, alternatives: alternatives.collect() }
    }

    /// A setting under which `name` has the shape `found`.
    pub(crate) fn fitting_shape(&self, name: &str, found: &[usize]) -> Option<String> {
        let fits = |it: &&Alternative| self.expected(it).get(name).is_some_and(|shape| shape == found);
        let Alternative { setting, .. } = self.alternatives.iter().find(fits)?;
        Some(format!("{found:?} fits {setting}"))
    }

    /// A setting under which `name` is read.
    pub(crate) fn using(&self, name: &str, found: &[usize]) -> Option<String> {
        let fits = |it: &&Alternative| self.expected(it).get(name).is_some_and(|shape| shape == found);
        let Alternative { setting, .. } = self.alternatives.iter().find(fits)?;
        Some(format!("it is used with {setting}"))
    }

    /// A setting under which `name` is not needed.
    pub(crate) fn not_needed(&self, name: &str) -> Option<String> {
        let Alternative { setting, .. } = self.alternatives.iter().find(|it| !self.expected(it).contains_key(name))?;
        Some(format!("it is not needed with {setting}"))
    }

    fn expected<'b>(&self, alternative: &'b Alternative) -> &'b BTreeMap<String, Vec<usize>> {
        alternative.expected.get_or_init(|| self.asked_for(&alternative.model))
    }

    /// Names and shapes the rules ask for, for `model`.
    fn asked_for(&self, model: &SourceModel) -> BTreeMap<String, Vec<usize>> {
        let specs = weight_specs(&ModelConfig::original(model.decoder.clone()));
        let shapes: BTreeMap<_, _> = specs.into_iter().map(|spec| (spec.name, spec.shape)).collect();
        let mut expected = BTreeMap::new();
        for rule in self.architecture.rules {
            let Rule::Map { source, targets, ops, when } = *rule else { continue };
            if when.holds(model) != Some(true) {
                continue;
            }
            let Ok(ops) = ops::resolve(ops, &model.decoder) else { continue };
            for place in places(source, &model.decoder).filter(|place| when.holds_in(&model.decoder, place.0)) {
                let targets = target_names(source, targets, &model.decoder, place);
                let targets = targets.iter().map(|target| shapes.get(target).cloned());
                let Some(targets) = targets.collect::<Option<Vec<_>>>() else { continue };
                let Ok(sources) = ops::source_shapes(&ops, &targets) else { continue };
                for (part, shape) in sources.into_iter().enumerate() {
                    expected.insert(expand(source, self.prefix, place, part), shape);
                }
            }
        }
        expected
    }
}

/// The name most like `name`, if one is close.
pub(crate) fn nearest<'a>(name: &str, others: impl Iterator<Item = &'a str>) -> Option<String> {
    let limit = name.len() / 3 + 1;
    let scored = others.map(|other| (distance(name.as_bytes(), other.as_bytes()), other));
    scored.min().filter(|&(distance, _)| distance <= limit).map(|(_, other)| other.to_owned())
}

/// Single-byte edits from `a` to `b`.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_the_one_with_the_fewest_edits_and_none_when_all_are_far() {
        let names = ["h.3.attn.c_attn.weight", "h.3.attn.c_proj.weight", "completely.different"];
        let near = nearest("transformer.h.3.attn.c_attn.weight", names.into_iter());
        assert_eq!(near.as_deref(), Some("h.3.attn.c_attn.weight"));
        assert_eq!(nearest("wte", ["lm_head.weight"].into_iter()), None);
        assert_eq!(distance(b"kitten", b"sitting"), 3);
    }
}
