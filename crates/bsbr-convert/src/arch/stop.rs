//! The token that ends a text where no file of a checkpoint names one: the default of its class in transformers.

/// The token for a `model_type`; `None` where the class has none either.
pub(crate) fn default_stop_token(model_type: &str) -> Option<u32> {
    Some(match model_type {
        "apertus" | "bloom" | "ernie4_5" | "ernie4_5_moe" | "exaone4" | "gpt_neox" | "granite" | "granitemoe"
        | "granitemoehybrid" | "granitemoeshared" | "helium" | "hunyuan_v1_dense" | "hunyuan_v1_moe" | "llama"
        | "ministral3" | "mixtral" | "phimoe" | "mistral" | "opt" | "phi" | "seed_oss" => 2,
        "arcee" => 128_001,
        "cohere" | "cohere2" => 255_001,
        "falcon" => 11,
        "granite_swa" => 100_257,
        "gemma" | "gemma2" | "gemma3_text" | "gemma4_text" | "nanochat" | "vaultgemma" => 1,
        "codegen" | "gpt2" | "gpt_bigcode" | "gpt_neo" | "gptj" | "starcoder2" => 50_256,
        "jais2" => 150_024,
        "minimax_m2" => 200_020,
        "nemotron" => 3,
        "olmo" | "olmo2" | "olmo3" | "olmoe" => 50_279,
        "phi3" => 32_000,
        "qwen2_vl_text" | "qwen2_5_vl_text" => 151_645,
        "smollm3" => 128_001,
        "stablelm" => 0,
        _ => return None,
    })
}
