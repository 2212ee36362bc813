//! The tables in the README of this crate are those of the code.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use bsbr_convert::rules::{Rule, When};
use bsbr_convert::{ARCHITECTURES, WRAPPERS};

/// Whether a condition is of layers with experts.
fn of_experts(when: When) -> bool {
    match when {
        When::Experts => true,
        When::All(parts) => parts.iter().any(|&part| of_experts(part)),
        _ => false,
    }
}

/// What the rules of an architecture can do, by the weights they fill.
fn traits(rules: &[Rule]) -> String {
    let targets: BTreeSet<&str> = rules
        .iter()
        .filter_map(|rule| match rule {
            Rule::Map { targets, .. } => Some(targets.iter().copied()),
            _ => None,
        })
        .flatten()
        .collect();
    let has = |part: &str| targets.iter().any(|target| target.contains(part));
    let experts = rules.iter().any(|rule| matches!(rule, Rule::Map { when, .. } if of_experts(*when)));
    let permuted = rules.iter().any(|rule| match rule {
        Rule::Map { ops, .. } => ops.iter().any(|op| op.to_string().contains("rope-permute")),
        _ => false,
    });
    let gated = rules.iter().any(|rule| match rule {
        Rule::Map { targets, .. } => {
            ["query", "gate"].iter().all(|part| targets.contains(&&*format!("layers.{{i}}.attention.{part}.weight")))
        }
        _ => false,
    });
    let known = [
        ("experts", experts),
        ("a shared expert", has("mlp.shared.")),
        ("sinks", has("sink_logits")),
        ("normed heads", has("query_norm")),
        ("norms after branches", has("attention_post_norm")),
        ("no gate in the MLP", !has("mlp.gate.weight") && !has("gate.weight")),
        ("learned positions", has("position.weight")),
        ("paired neighbours", permuted),
        ("latent attention", has("attention.latent.")),
        ("a gate on attention", gated),
        ("recurrent layers", has("attention.decay.")),
        (
            "keys shared by layers",
            rules.iter().any(|rule| matches!(rule, Rule::IgnoreIn { when: When::SharedKeys, .. })),
        ),
        ("inputs for each layer", has("per_layer.")),
    ];
    known.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect::<Vec<_>>().join(", ")
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn tables() -> String {
    let mut text = String::from("| rules | `model_type` | besides a plain decoder |\n|---|---|---|\n");
    for architecture in ARCHITECTURES {
        let (types, what) = (quoted(architecture.model_types), traits(architecture.rules));
        let _ = writeln!(text, "| `{}` | {types} | {what} |", architecture.id);
    }
    text.push_str("\nModels around a decoder, of which that is taken and everything else kept aside:\n\n");
    text.push_str("| `model_type` | decoder, unless it says another | kept aside |\n|---|---|---|\n");
    for wrapper in WRAPPERS {
        let aside = wrapper.aside.iter().filter_map(|rule| match rule {
            Rule::IgnorePart { start, .. } => Some(format!("`{start}*`")),
            _ => None,
        });
        let aside = aside.collect::<Vec<_>>().join(", ");
        let _ = writeln!(text, "| {} | `{}` | {aside} |", quoted(wrapper.model_types), wrapper.text_type);
    }
    text
}

#[test]
fn the_tables_of_architectures_are_those_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(path).expect("a README");
    let (_, rest) = readme.split_once("<!-- architectures -->\n").expect("the beginning of the tables");
    let (found, _) = rest.split_once("<!-- end of architectures -->").expect("the end of the tables");
    let expected = tables();
    assert!(found == expected, "the tables should be:\n{expected}");
}
