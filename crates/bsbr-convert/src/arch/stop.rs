//! The token that ends a text where no file of a checkpoint names one: the default of its class in transformers.

/// The token for a `model_type`; `None` where the class has none either.
pub(crate) fn default_stop_token(model_type: &str) -> Option<u32> {
    Some(match model_type {
        "bloom" | "gpt_neox" | "granite" | "llama" | "mistral" | "opt" | "phi" => 2,
        "cohere" => 255_001,
        "falcon" => 11,
        "gemma" | "gemma2" | "gemma3_text" => 1,
        "gpt2" | "gpt_bigcode" | "gpt_neo" | "gptj" | "starcoder2" => 50_256,
        "olmo" | "olmo2" => 50_279,
        "phi3" => 32_000,
        "smollm3" => 128_001,
        "stablelm" => 0,
        _ => return None,
    })
}
