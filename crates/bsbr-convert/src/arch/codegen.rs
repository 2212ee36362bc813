//! CodeGen: GPT-J with queries, values and keys in one tensor, in four groups, a quarter of the heads each.

use super::gptj::{GPTJ, read_config};
use super::names::{QKV_WEIGHT, ROPE_KEY, ROPE_QUERY, copy, map, table};
use crate::rules::Dim::{Div, Hidden, N};
use crate::rules::Op::{Each, Split};
use crate::rules::Rule::Ignore;
use crate::rules::{Architecture, Dim, Op, Rule};

pub(super) const CODEGEN: Architecture = Architecture {
    id: "codegen",
    model_types: &["codegen"],
    rules: table![super::gptj::EMBED, ATTENTION, super::gptj::REST],
    read_config,
    ..GPTJ
};

const ATTENTION: &[Rule] = &[
    map("{p}h.{i}.attn.qkv_proj.weight", QUERY_VALUE_KEY, &[FOUR_GROUPS, PERMUTED]),
    copy("{p}h.{i}.attn.out_proj.weight", &["layers.{i}.attention.output.weight"]),
    Ignore { name: "{p}h.{i}.attn.causal_mask", why: "the causal mask" },
];

const QUERY_VALUE_KEY: &[&str] = &[QKV_WEIGHT[0], QKV_WEIGHT[2], QKV_WEIGHT[1]];

/// Four devices held a quarter each.
const FOUR_GROUPS: Op = Split { groups: N(4), parts: &[QUARTER, QUARTER, QUARTER] };
const QUARTER: Dim = Div(&Hidden, &N(4));

const PERMUTED: Op = Each(&[&[ROPE_QUERY], &[], &[ROPE_KEY]]);
