//! Models around a decoder that read images besides texts: which object of `config.json` describes the decoder, which names
//! its tensors have, and what the other tensors are.

use serde_json::Value;

use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::IgnorePart;
use crate::rules::{Prefix, Rule, TieFlag, Wrapper};

/// Every wrapper there are rules for.
pub const WRAPPERS: &[Wrapper] =
    &[GEMMA3, MISTRAL3, INTERNVL, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, GEMMA4, GLM4V, QWEN3_5, QWEN3_5_MOE];

/// In files before version 5 and on the hub, then as version 5 has them in memory.
const LANGUAGE_MODEL: &[Prefix] = &[
    Prefix { body: "language_model.model.", head: "language_model." },
    Prefix { body: "model.language_model.", head: "" },
];

const TOWER_AND_PROJECTOR: &[Rule] = &[
    IgnorePart { start: "vision_tower.", why: VISION },
    IgnorePart { start: "model.vision_tower.", why: VISION },
    IgnorePart { start: "multi_modal_projector.", why: PROJECTOR },
    IgnorePart { start: "model.multi_modal_projector.", why: PROJECTOR },
];
const VISION: &str = "the part that reads images";
const PROJECTOR: &str = "the way from images to the decoder";

const GEMMA3: Wrapper = Wrapper {
    model_types: &["gemma3"],
    text_type: "gemma3_text",
    flat: false,
    tie: TieFlag::Outer { default: true },
    unread: &["final_logit_softcapping"],
    prefixes: LANGUAGE_MODEL,
    aside: TOWER_AND_PROJECTOR,
};

const MISTRAL3: Wrapper = Wrapper { model_types: &["mistral3"], text_type: "mistral", unread: &[], ..GEMMA3 };

const INTERNVL: Wrapper = Wrapper { model_types: &["internvl"], text_type: "qwen2", ..MISTRAL3 };

const QWEN2_VL: Wrapper = Wrapper {
    model_types: &["qwen2_vl"],
    text_type: "qwen2_vl_text",
    flat: true,
    tie: TieFlag::Either,
    unread: &[],
    prefixes: &[Prefix::of_body("model.language_model."), Prefix::of_body("model.")],
    aside: VISUAL,
};

const QWEN2_5_VL: Wrapper = Wrapper { model_types: &["qwen2_5_vl"], text_type: "qwen2_5_vl_text", ..QWEN2_VL };

const QWEN3_VL: Wrapper = Wrapper {
    model_types: &["qwen3_vl"],
    text_type: "qwen3_vl_text",
    flat: false,
    tie: TieFlag::Outer { default: false },
    ..QWEN2_VL
};

const QWEN3_VL_MOE: Wrapper = Wrapper { model_types: &["qwen3_vl_moe"], text_type: "qwen3_vl_moe_text", ..QWEN3_VL };

const GLM4V: Wrapper = Wrapper { model_types: &["glm4v"], text_type: "glm4v_text", flat: false, ..QWEN2_VL };

const QWEN3_5: Wrapper = Wrapper { model_types: &["qwen3_5"], text_type: "qwen3_5_text", ..QWEN3_VL };

const QWEN3_5_MOE: Wrapper = Wrapper { model_types: &["qwen3_5_moe"], text_type: "qwen3_5_moe_text", ..QWEN3_5 };

const GEMMA4: Wrapper = Wrapper {
    model_types: &["gemma4"],
    text_type: "gemma4_text",
    flat: false,
    tie: TieFlag::Outer { default: true },
    unread: &[],
    prefixes: &[Prefix { body: "model.language_model.", head: "" }],
    aside: &[
        IgnorePart { start: "model.vision_tower.", why: VISION },
        IgnorePart { start: "model.embed_vision.", why: "the way from images to the decoder" },
        IgnorePart { start: "model.audio_tower.", why: "the part that reads sound" },
        IgnorePart { start: "model.embed_audio.", why: "the way from sound to the decoder" },
    ],
};

const VISUAL: &[Rule] =
    &[IgnorePart { start: "visual.", why: VISION }, IgnorePart { start: "model.visual.", why: VISION }];

const TEXT: &str = "text_config";
const TIE: &str = "tie_word_embeddings";

impl Wrapper {
    /// The settings of the decoder, as it would have them by itself.
    pub(super) fn text_part(&self, config: &ConfigFile) -> Result<ConfigFile, ConvertError> {
        let text = match config.object(TEXT)? {
            Some(text) => text,
            None if self.flat => config.without("model_type"),
            None => return Err(config.error(TEXT, "an object: it describes the decoder")),
        };
        let text = match text.optional_str("model_type")? {
            // A whole that is its own part: first files of these models.
            Some(name) if self.model_types.contains(&name.as_str()) => text.without("model_type"),
            _ => text,
        };
        let text = match text.get("model_type") {
            Some(_) => text,
            None => text.with("model_type", Value::from(self.text_type)),
        };
        let text = self.unread.iter().fold(text, |text, key| text.without(key));
        let outer = config.optional_bool(TIE)?;
        let tied = match self.tie {
            TieFlag::Outer { default } => outer.unwrap_or(default),
            TieFlag::Either => outer == Some(true) || text.bool_or(TIE, false)?,
        };
        Ok(text.with(TIE, Value::Bool(tied)))
    }

    /// What the flag that counts says; `None` where it is absent.
    pub(super) fn tie_declared(&self, config: &ConfigFile, text: &ConfigFile) -> Result<Option<bool>, ConvertError> {
        let stated = match (self.tie, config.object(TEXT)?) {
            (TieFlag::Either, Some(inner)) => config.get(TIE).is_some() || inner.get(TIE).is_some(),
            _ => config.get(TIE).is_some(),
        };
        Ok(text.optional_bool(TIE)?.filter(|_| stated))
    }
}
