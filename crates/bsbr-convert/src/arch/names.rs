//! Rules that several architectures share, and how a table is put together of them.

use crate::rules::Dim::{HeadDim, Heads, Intermediate, KvHeads, Mul, N};
use crate::rules::Op::{RopePermute, Split};
use crate::rules::Rule::{Ignore, Map, Tie};
use crate::rules::When::{Always, Flag};
use crate::rules::{Dim, Op, Rule, When};

/// One table out of several groups of rules.
macro_rules! table {
    ($($group:expr),+ $(,)?) => {{
        const GROUPS: &[&[$crate::rules::Rule]] = &[$($group),+];
        const RULES: [$crate::rules::Rule; $crate::arch::names::count(GROUPS)] = $crate::arch::names::join(GROUPS);
        &RULES
    }};
}
pub(super) use table;

pub(super) const fn count(groups: &[&[Rule]]) -> usize {
    let (mut total, mut group) = (0, 0);
    while group < groups.len() {
        total += groups[group].len();
        group += 1;
    }
    total
}

pub(super) const fn join<const N: usize>(groups: &[&[Rule]]) -> [Rule; N] {
    let mut rules = [Ignore { name: "", why: "" }; N];
    let (mut at, mut group) = (0, 0);
    while group < groups.len() {
        let mut rule = 0;
        while rule < groups[group].len() {
            rules[at] = groups[group][rule];
            at += 1;
            rule += 1;
        }
        group += 1;
    }
    rules
}

/// A tensor that is used as it is.
pub(super) const fn copy(source: &'static str, target: &'static [&'static str; 1]) -> Rule {
    copy_if(source, target, Always)
}

/// The same under a condition.
pub(super) const fn copy_if(source: &'static str, target: &'static [&'static str; 1], when: When) -> Rule {
    Map { source, targets: target, ops: &[], when }
}

/// A tensor that becomes one weight or several by `ops`.
pub(super) const fn map(source: &'static str, targets: &'static [&'static str], ops: &'static [Op]) -> Rule {
    map_if(source, targets, ops, Always)
}

/// The same under a condition.
pub(super) const fn map_if(
    source: &'static str,
    targets: &'static [&'static str],
    ops: &'static [Op],
    when: When,
) -> Rule {
    Map { source, targets, ops, when }
}

pub(super) const QKV_WEIGHT: &[&str] =
    &["layers.{i}.attention.query.weight", "layers.{i}.attention.key.weight", "layers.{i}.attention.value.weight"];
pub(super) const QKV_BIAS: &[&str] =
    &["layers.{i}.attention.query.bias", "layers.{i}.attention.key.bias", "layers.{i}.attention.value.bias"];

/// Rows of all queries, and of all keys or values.
const QUERIES: Dim = Mul(&Heads, &HeadDim);
const KEYS: Dim = Mul(&KvHeads, &HeadDim);

/// `[Q; K; V]`, one after the other.
pub(super) const QKV: Op = Split { groups: N(1), parts: &[QUERIES, KEYS, KEYS] };

/// For each KV head: the queries that read it, its key, its value. The shapes are those of [`QKV`], so that nothing but
/// the logits tells a wrong choice between the two.
pub(super) const QKV_PER_HEAD: Op =
    Split { groups: KvHeads, parts: &[Mul(&Dim::Div(&Heads, &KvHeads), &HeadDim), HeadDim, HeadDim] };

/// `[gate; up]`.
pub(super) const GATE_UP: Op = Split { groups: N(1), parts: &[Intermediate, Intermediate] };

/// Rotary positions that pair neighbours, in queries and in keys.
pub(super) const ROPE_QUERY: Op = RopePermute { heads: Heads, head_dim: HeadDim, rotary: Dim::Rotary };
pub(super) const ROPE_KEY: Op = RopePermute { heads: KvHeads, head_dim: HeadDim, rotary: Dim::Rotary };

pub(super) const LLAMA_EMBED: &[Rule] = &[copy("{p}embed_tokens.weight", &["embed.weight"])];

/// The head, and buffers of old files.
pub(super) const LLAMA_HEAD: &[Rule] = &[
    Tie { head: "{h}lm_head.weight", embed: "{p}embed_tokens.weight", target: "head.weight" },
    Ignore { name: "{p}layers.{i}.self_attn.rotary_emb.inv_freq", why: "rotary frequencies, computed anew" },
    Ignore { name: "{p}rotary_emb.inv_freq", why: "rotary frequencies, computed anew" },
];

pub(super) const LLAMA_QKV: &[Rule] = &[
    copy("{p}layers.{i}.self_attn.q_proj.weight", &["layers.{i}.attention.query.weight"]),
    copy("{p}layers.{i}.self_attn.k_proj.weight", &["layers.{i}.attention.key.weight"]),
    copy("{p}layers.{i}.self_attn.v_proj.weight", &["layers.{i}.attention.value.weight"]),
];

/// The biases of [`LLAMA_QKV`] under the flag `qkv_bias`.
pub(super) const LLAMA_QKV_BIASES: &[Rule] = &[
    copy_if("{p}layers.{i}.self_attn.q_proj.bias", &["layers.{i}.attention.query.bias"], Flag("qkv_bias")),
    copy_if("{p}layers.{i}.self_attn.k_proj.bias", &["layers.{i}.attention.key.bias"], Flag("qkv_bias")),
    copy_if("{p}layers.{i}.self_attn.v_proj.bias", &["layers.{i}.attention.value.bias"], Flag("qkv_bias")),
];

/// [`LLAMA_QKV`] where rotary positions pair neighbours.
pub(super) const NEIGHBOURS_QKV: &[Rule] = &[
    map("{p}layers.{i}.self_attn.q_proj.weight", &["layers.{i}.attention.query.weight"], &[ROPE_QUERY]),
    map("{p}layers.{i}.self_attn.k_proj.weight", &["layers.{i}.attention.key.weight"], &[ROPE_KEY]),
    copy("{p}layers.{i}.self_attn.v_proj.weight", &["layers.{i}.attention.value.weight"]),
];

/// Its biases under the flag `qkv_bias`.
pub(super) const NEIGHBOURS_QKV_BIASES: &[Rule] = &[
    map_if("{p}layers.{i}.self_attn.q_proj.bias", &["layers.{i}.attention.query.bias"], &[ROPE_QUERY], QKV_BIASED),
    map_if("{p}layers.{i}.self_attn.k_proj.bias", &["layers.{i}.attention.key.bias"], &[ROPE_KEY], QKV_BIASED),
    copy_if("{p}layers.{i}.self_attn.v_proj.bias", &["layers.{i}.attention.value.bias"], QKV_BIASED),
];
const QKV_BIASED: When = Flag("qkv_bias");

/// The bias of the output projection under the flag `output_bias`.
pub(super) const LLAMA_OUTPUT_BIAS: &[Rule] =
    &[copy_if("{p}layers.{i}.self_attn.o_proj.bias", &["layers.{i}.attention.output.bias"], Flag("output_bias"))];

/// `[gate; up]` in one tensor.
pub(super) const FUSED_MLP: &[Rule] = &[
    map(
        "{p}layers.{i}.mlp.gate_up_proj.weight",
        &["layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight"],
        &[GATE_UP],
    ),
    copy("{p}layers.{i}.mlp.down_proj.weight", &["layers.{i}.mlp.down.weight"]),
];

/// Norms after attention and after the MLP, none before.
pub(super) const NORMS_AFTER: &[Rule] = &[
    copy("{p}layers.{i}.post_attention_layernorm.weight", &["layers.{i}.attention_post_norm.weight"]),
    copy("{p}layers.{i}.post_feedforward_layernorm.weight", &["layers.{i}.mlp_post_norm.weight"]),
];

pub(super) const LLAMA_OUTPUT: &[Rule] =
    &[copy("{p}layers.{i}.self_attn.o_proj.weight", &["layers.{i}.attention.output.weight"])];

/// The biases of attention under the flag `attention_bias`.
pub(super) const LLAMA_ATTENTION_BIASES: &[Rule] = &[
    copy_if("{p}layers.{i}.self_attn.q_proj.bias", &["layers.{i}.attention.query.bias"], ATTENTION_BIAS),
    copy_if("{p}layers.{i}.self_attn.k_proj.bias", &["layers.{i}.attention.key.bias"], ATTENTION_BIAS),
    copy_if("{p}layers.{i}.self_attn.v_proj.bias", &["layers.{i}.attention.value.bias"], ATTENTION_BIAS),
    copy_if("{p}layers.{i}.self_attn.o_proj.bias", &["layers.{i}.attention.output.bias"], ATTENTION_BIAS),
];
const ATTENTION_BIAS: When = Flag("attention_bias");

/// What stands beside the keys in every softmax.
pub(super) const SINKS: &[Rule] = &[copy("{p}layers.{i}.self_attn.sinks", &["layers.{i}.attention.sink_logits"])];

pub(super) const LLAMA_MLP: &[Rule] = &[
    copy("{p}layers.{i}.mlp.gate_proj.weight", &["layers.{i}.mlp.gate.weight"]),
    copy("{p}layers.{i}.mlp.up_proj.weight", &["layers.{i}.mlp.up.weight"]),
    copy("{p}layers.{i}.mlp.down_proj.weight", &["layers.{i}.mlp.down.weight"]),
];

/// The biases of [`LLAMA_MLP`] under the flag `mlp_bias`.
pub(super) const LLAMA_MLP_BIASES: &[Rule] = &[
    copy_if("{p}layers.{i}.mlp.gate_proj.bias", &["layers.{i}.mlp.gate.bias"], Flag("mlp_bias")),
    copy_if("{p}layers.{i}.mlp.up_proj.bias", &["layers.{i}.mlp.up.bias"], Flag("mlp_bias")),
    copy_if("{p}layers.{i}.mlp.down_proj.bias", &["layers.{i}.mlp.down.bias"], Flag("mlp_bias")),
];

/// An MLP without a gate, its biases under the flag `mlp_bias`.
pub(super) const UNGATED_MLP: &[Rule] = &[
    copy("{p}layers.{i}.mlp.up_proj.weight", &["layers.{i}.mlp.up.weight"]),
    copy_if("{p}layers.{i}.mlp.up_proj.bias", &["layers.{i}.mlp.up.bias"], Flag("mlp_bias")),
    copy("{p}layers.{i}.mlp.down_proj.weight", &["layers.{i}.mlp.down.weight"]),
    copy_if("{p}layers.{i}.mlp.down_proj.bias", &["layers.{i}.mlp.down.bias"], Flag("mlp_bias")),
];

/// The biases of [`LLAMA_NORMS`] and [`LLAMA_FINAL_NORM`].
pub(super) const NORM_BIASES: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.bias", &["layers.{i}.attention_norm.bias"]),
    copy("{p}layers.{i}.post_attention_layernorm.bias", &["layers.{i}.mlp_norm.bias"]),
    copy("{p}norm.bias", &["final_norm.bias"]),
];

/// A norm before attention and one before the MLP: despite its name the second stands there.
pub(super) const LLAMA_NORMS: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
    copy("{p}layers.{i}.post_attention_layernorm.weight", &["layers.{i}.mlp_norm.weight"]),
];

pub(super) const LLAMA_HEAD_NORMS: &[Rule] = &[
    copy("{p}layers.{i}.self_attn.q_norm.weight", &["layers.{i}.attention.query_norm.weight"]),
    copy("{p}layers.{i}.self_attn.k_norm.weight", &["layers.{i}.attention.key_norm.weight"]),
];

pub(super) const LLAMA_FINAL_NORM: &[Rule] = &[copy("{p}norm.weight", &["final_norm.weight"])];
