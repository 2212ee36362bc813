//! The architectures of GGUF that are read: what their tensors are called in a Hugging Face checkpoint, and in which
//! order their numbers lie.
//!
//! Another architecture is another entry here and a reader of its metadata in `config`; the rules by which the tensors
//! become weights are those of the Hugging Face checkpoint.

use super::config::{self, Reading};
use crate::ConvertError;

/// An architecture of GGUF.
pub(super) struct GgufArchitecture {
    /// Its `general.architecture`.
    pub(super) name: &'static str,
    /// `model_type` of the Hugging Face configuration.
    pub(super) model_type: &'static str,
    /// Class in transformers, for exports.
    pub(super) class: &'static str,
    /// Names without `.weight` and `.bias`; `{i}` is the layer.
    pub(super) tensors: &'static [&'static [Name]],
    /// Reads the metadata into the configuration.
    pub(super) read: fn(&mut Reading<'_>) -> Result<(), ConvertError>,
}

/// Name in GGUF, name in Hugging Face, what is different.
pub(super) type Name = (&'static str, &'static str, Difference);

/// What a tensor differs in; sizes are filled in later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Difference {
    None,
    /// Weights of two axes only.
    Transposed,
    Queries,
    Keys,
    OneMore,
}
use Difference::{Keys, None as Same, OneMore, Queries, Transposed};

/// Every architecture of GGUF that is read.
pub(super) const ARCHITECTURES: &[GgufArchitecture] = &[
    GgufArchitecture {
        name: "llama",
        model_type: "llama",
        class: "LlamaForCausalLM",
        tensors: &[OUTER, LAYER, ROTARY_PAIRS, GATED],
        read: config::llama,
    },
    GgufArchitecture {
        name: "gpt2",
        model_type: "gpt2",
        class: "GPT2LMHeadModel",
        tensors: &[GPT2],
        read: config::gpt2,
    },
    GgufArchitecture {
        name: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        tensors: &[OUTER, LAYER, ROTARY_HALVES, GATED],
        read: config::qwen,
    },
    GgufArchitecture {
        name: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        tensors: &[OUTER, LAYER, ROTARY_HALVES, HEAD_NORMS, GATED],
        read: config::qwen,
    },
    GgufArchitecture {
        name: "phi3",
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        tensors: &[OUTER, LAYER, FUSED],
        read: config::phi3,
    },
    GgufArchitecture {
        name: "starcoder2",
        model_type: "starcoder2",
        class: "Starcoder2ForCausalLM",
        tensors: &[OUTER, LAYER, ROTARY_HALVES, PLAIN],
        read: config::starcoder2,
    },
    GgufArchitecture {
        name: "gemma",
        model_type: "gemma",
        class: "GemmaForCausalLM",
        tensors: &[GEMMA_OUTER, GEMMA, ROTARY_HALVES, GATED],
        read: config::gemma,
    },
    GgufArchitecture {
        name: "gemma2",
        model_type: "gemma2",
        class: "Gemma2ForCausalLM",
        tensors: &[GEMMA_OUTER, SANDWICH, ROTARY_HALVES, GATED],
        read: config::gemma2,
    },
    GgufArchitecture {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        tensors: &[GEMMA_OUTER, SANDWICH, ROTARY_HALVES, LARGER_HEAD_NORMS, GATED],
        read: config::gemma3,
    },
];

const OUTER: &[Name] =
    &[("token_embd", "model.embed_tokens", Same), ("output_norm", "model.norm", Same), ("output", "lm_head", Same)];

const LAYER: &[Name] = &[
    ("blk.{i}.attn_norm", "model.layers.{i}.input_layernorm", Same),
    ("blk.{i}.attn_output", "model.layers.{i}.self_attn.o_proj", Same),
    ("blk.{i}.ffn_norm", "model.layers.{i}.post_attention_layernorm", Same),
];

const ROTARY_PAIRS: &[Name] = &[
    ("blk.{i}.attn_q", "model.layers.{i}.self_attn.q_proj", Queries),
    ("blk.{i}.attn_k", "model.layers.{i}.self_attn.k_proj", Keys),
    ("blk.{i}.attn_v", "model.layers.{i}.self_attn.v_proj", Same),
];

const ROTARY_HALVES: &[Name] = &[
    ("blk.{i}.attn_q", "model.layers.{i}.self_attn.q_proj", Same),
    ("blk.{i}.attn_k", "model.layers.{i}.self_attn.k_proj", Same),
    ("blk.{i}.attn_v", "model.layers.{i}.self_attn.v_proj", Same),
];

const HEAD_NORMS: &[Name] = &[
    ("blk.{i}.attn_q_norm", "model.layers.{i}.self_attn.q_norm", Same),
    ("blk.{i}.attn_k_norm", "model.layers.{i}.self_attn.k_norm", Same),
];

const GATED: &[Name] = &[
    ("blk.{i}.ffn_gate", "model.layers.{i}.mlp.gate_proj", Same),
    ("blk.{i}.ffn_up", "model.layers.{i}.mlp.up_proj", Same),
    ("blk.{i}.ffn_down", "model.layers.{i}.mlp.down_proj", Same),
];

const PLAIN: &[Name] =
    &[("blk.{i}.ffn_up", "model.layers.{i}.mlp.c_fc", Same), ("blk.{i}.ffn_down", "model.layers.{i}.mlp.c_proj", Same)];

const FUSED: &[Name] = &[
    ("blk.{i}.attn_qkv", "model.layers.{i}.self_attn.qkv_proj", Same),
    ("blk.{i}.ffn_up", "model.layers.{i}.mlp.gate_up_proj", Same),
    ("blk.{i}.ffn_down", "model.layers.{i}.mlp.down_proj", Same),
];

const GEMMA_OUTER: &[Name] = &[
    ("token_embd", "model.embed_tokens", Same),
    ("output_norm", "model.norm", OneMore),
    ("output", "lm_head", Same),
    ("blk.{i}.attn_norm", "model.layers.{i}.input_layernorm", OneMore),
    ("blk.{i}.attn_output", "model.layers.{i}.self_attn.o_proj", Same),
];

const GEMMA: &[Name] = &[("blk.{i}.ffn_norm", "model.layers.{i}.post_attention_layernorm", OneMore)];

const SANDWICH: &[Name] = &[
    ("blk.{i}.post_attention_norm", "model.layers.{i}.post_attention_layernorm", OneMore),
    ("blk.{i}.ffn_norm", "model.layers.{i}.pre_feedforward_layernorm", OneMore),
    ("blk.{i}.post_ffw_norm", "model.layers.{i}.post_feedforward_layernorm", OneMore),
];

const LARGER_HEAD_NORMS: &[Name] = &[
    ("blk.{i}.attn_q_norm", "model.layers.{i}.self_attn.q_norm", OneMore),
    ("blk.{i}.attn_k_norm", "model.layers.{i}.self_attn.k_norm", OneMore),
];

const GPT2: &[Name] = &[
    ("token_embd", "transformer.wte", Same),
    ("position_embd", "transformer.wpe", Same),
    ("output_norm", "transformer.ln_f", Same),
    ("output", "lm_head", Same),
    ("blk.{i}.attn_norm", "transformer.h.{i}.ln_1", Same),
    ("blk.{i}.attn_qkv", "transformer.h.{i}.attn.c_attn", Transposed),
    ("blk.{i}.attn_output", "transformer.h.{i}.attn.c_proj", Transposed),
    ("blk.{i}.ffn_norm", "transformer.h.{i}.ln_2", Same),
    ("blk.{i}.ffn_up", "transformer.h.{i}.mlp.c_fc", Transposed),
    ("blk.{i}.ffn_down", "transformer.h.{i}.mlp.c_proj", Transposed),
];

impl GgufArchitecture {
    /// The Hugging Face name of a tensor, and what is different about it. `None` for a name no table has.
    pub(super) fn translate(&self, name: &str) -> Option<(String, Difference)> {
        let (stem, leaf) = name.rsplit_once('.').filter(|(_, leaf)| matches!(*leaf, "weight" | "bias"))?;
        let layer = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(layer, _)| layer);
        // Only as it would be written: `blk.01` is another name.
        let layer = layer.filter(|layer| layer.parse::<u32>().is_ok_and(|number| number.to_string() == *layer));
        let fill = |template: &str| match layer {
            Some(layer) => template.replace("{i}", layer),
            None => template.to_owned(),
        };
        let known = self.tensors.iter().copied().flatten();
        let (_, theirs, difference) = known.into_iter().find(|(ours, ..)| fill(ours) == stem)?;
        let difference = if *difference == Transposed && leaf == "bias" { Same } else { *difference };
        Some((format!("{}.{leaf}", fill(theirs)), difference))
    }
}
