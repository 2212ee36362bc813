//! Checks on a rule table that need no checkpoint.

use std::collections::HashSet;

use crate::rules::{Architecture, Op, Prefix, Rule, When, expand, is_of_part};

const BARE: Prefix = Prefix::of_body("");

/// Everything that is wrong with a rule table: an empty list for a sound one.
///
/// Checked are the placeholders (sources and targets must name the same ones), the arity and order of ops, targets
/// and sources used twice under conditions that can hold together, ignore rules that shadow a source, and an anchor
/// that no rule reads.
pub fn lint(architecture: &Architecture) -> Vec<String> {
    let mut problems = Vec::new();
    let mut sources: Vec<(String, When)> = Vec::new();
    let mut targets: Vec<(&str, When)> = Vec::new();
    for rule in architecture.rules {
        match *rule {
            Rule::Map { source, targets: to, ops, when } => {
                problems.extend(check_map(source, to, ops));
                sources.push((source.to_owned(), when));
                targets.extend(to.iter().map(|&target| (target, when)));
            }
            Rule::Tie { head, target, .. } => {
                sources.push((head.to_owned(), When::Always));
                targets.push((target, When::Always));
            }
            Rule::IgnoreIn { name, when, .. } => sources.push((name.to_owned(), when)),
            Rule::Ignore { .. } | Rule::IgnorePart { .. } => {}
        }
    }
    for (what, uses) in [("target", &targets), ("source", &sources.iter().map(|(s, w)| (s.as_str(), *w)).collect())] {
        for (n, (name, when)) in uses.iter().enumerate() {
            if uses[..n].iter().any(|(other, other_when)| other == name && !exclusive(*when, *other_when)) {
                problems.push(format!("{what} `{name}` is used by two rules that can apply together"));
            }
        }
    }
    // Concrete names, so that an ignore rule with another placeholder in the same place is seen too.
    let concrete: HashSet<String> = sources.iter().map(|(source, _)| expand(source, BARE, (0, 0), 0)).collect();
    let mut anchored = false;
    for rule in architecture.rules {
        if let Rule::Ignore { name, .. } = rule
            && concrete.contains(&expand(name, BARE, (0, 0), 0))
        {
            problems.push(format!("ignoring `{name}` shadows a source of another rule"));
        }
        if let Rule::IgnorePart { start, .. } = rule
            && concrete.iter().any(|source| is_of_part(source, start, BARE, 1..2))
        {
            problems.push(format!("ignoring what begins with `{start}` shadows a source of another rule"));
        }
        anchored |= matches!(rule, Rule::Map { source, .. } if *source == architecture.anchor);
        if let Rule::Tie { embed, .. } = rule
            && !sources.iter().any(|(source, _)| source == embed)
        {
            problems.push(format!("the head may be tied to `{embed}`, which no rule reads"));
        }
    }
    if !anchored {
        problems.push(format!("no rule reads the anchor `{}`", architecture.anchor));
    }
    problems
}

fn exclusive(a: When, b: When) -> bool {
    match (a, b) {
        (When::Flag(x), When::Not(y)) | (When::Not(x), When::Flag(y)) => x == y,
        (When::Experts, When::Dense) | (When::Dense, When::Experts) => true,
        (When::Attention, When::Recurrent) | (When::Recurrent, When::Attention) => true,
        (When::OwnKeys | When::OwnValues, When::SharedKeys) | (When::SharedKeys, When::OwnKeys | When::OwnValues) => {
            true
        }
        (When::All(parts), other) | (other, When::All(parts)) => parts.iter().any(|&part| exclusive(part, other)),
        _ => false,
    }
}

fn check_map(source: &str, targets: &[&str], ops: &[Op]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut outputs = 1;
    let stacks = ops.iter().filter(|op| matches!(op, Op::Stack { .. })).count();
    for (n, op) in ops.iter().enumerate() {
        match op {
            Op::Unstack { .. } if outputs > 1 => problems.push(format!("`{source}`: unstack cannot follow split")),
            Op::Transpose if n > 0 => problems.push(format!("`{source}`: transpose must be the first op")),
            Op::Stack { .. } if outputs > 1 => problems.push(format!("`{source}`: stack cannot follow split")),
            Op::Split { .. } | Op::RopePermute { .. } | Op::SwapHalves { .. } if outputs > 1 => {
                problems.push(format!("`{source}`: nothing can follow split"));
            }
            Op::Split { parts, .. } => outputs = parts.len(),
            Op::Each(lists) => {
                if lists.len() != outputs {
                    problems.push(format!("`{source}`: ops for each of {} tensors, there are {outputs}", lists.len()));
                }
                let several = |op: &Op| !matches!(op, Op::RopePermute { .. } | Op::SwapHalves { .. });
                if lists.iter().copied().flatten().any(several) {
                    problems.push(format!("`{source}`: only a permutation can follow split"));
                }
            }
            _ => {}
        }
    }
    if outputs != targets.len() {
        problems.push(format!("`{source}`: the ops give {outputs} tensors, the rule names {}", targets.len()));
    }
    if stacks > 1 || (stacks == 1) != source.contains("{j}") {
        problems.push(format!("`{source}`: `{{j}}` and one stack op must come together"));
    }
    let unstacked = ops.iter().any(|op| matches!(op, Op::Unstack { count: crate::rules::Dim::Experts }));
    for target in targets {
        if target.contains("{e}") != (source.contains("{e}") || unstacked) {
            problems.push(format!("`{source}` and `{target}`: `{{e}}` must be in both, or the experts unstacked"));
        }
        if source.contains("{i}") != target.contains("{i}") {
            problems.push(format!("`{source}` and `{target}` must both name `{{i}}` or neither"));
        }
        if ["{p}", "{h}", "{j}"].iter().any(|part| target.contains(part)) {
            problems.push(format!("`{target}` must not name `{{p}}`, `{{h}}` or `{{j}}`"));
        }
    }
    problems
}
