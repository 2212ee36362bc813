//! The supported architectures: one file each, holding a table of rules and a reader of `config.json`.
//!
//! Another architecture is another such file and a line in [`ARCHITECTURES`].

mod gpt2;
mod gpt_bigcode;
mod llama;
mod rope;

use bsbr_model::Activation;

use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Architecture;

/// Every architecture there are rules for.
pub const ARCHITECTURES: &[Architecture] = &[gpt2::GPT2, gpt_bigcode::GPT_BIGCODE, llama::LLAMA];

/// The architecture of a checkpoint, by the `model_type` of its configuration.
///
/// # Errors
///
/// [`ConvertError::UnknownModelType`] listing the supported types, [`ConvertError::ConfigKey`] when the key is
/// absent, [`ConvertError::Rejected`] for a variant the decoder does not compute.
pub fn architecture(config: &ConfigFile) -> Result<&'static Architecture, ConvertError> {
    let Some(found) = config.optional_str("model_type")? else {
        return Err(config.error("model_type", &format!("one of {}", supported())));
    };
    let known = ARCHITECTURES.iter().find(|arch| arch.model_types.contains(&found.as_str()));
    let Some(architecture) = known else {
        return Err(ConvertError::UnknownModelType { path: config.path().to_owned(), found, supported: supported() });
    };
    for reject in architecture.rejects {
        if config.bool_or(reject.key, false)? {
            return Err(ConvertError::Rejected {
                path: config.path().to_owned(),
                key: reject.key.to_owned(),
                value: "true".to_owned(),
                why: reject.why,
            });
        }
    }
    Ok(architecture)
}

fn supported() -> String {
    let types = ARCHITECTURES.iter().flat_map(|arch| arch.model_types);
    types.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// The activation under `key`, or `default`.
fn activation(config: &ConfigFile, key: &str, default: Activation) -> Result<Activation, ConvertError> {
    let Some(name) = config.optional_str(key)? else { return Ok(default) };
    // The tanh forms differ from the exact one by up to 5e-4 in the logits: mixing them up shows in no sample text.
    Ok(match name.as_str() {
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_python_tanh" => Activation::GeluTanh,
        "gelu" | "gelu_python" => Activation::GeluErf,
        "silu" | "swish" => Activation::Silu,
        "relu" => Activation::Relu,
        _ => {
            let expected = "one of gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, silu, swish, relu";
            return Err(config.error(key, expected));
        }
    })
}

/// `width / heads`, which must be whole. `key` is the key of the heads.
fn head_dim(config: &ConfigFile, key: &str, width: usize, heads: usize) -> Result<usize, ConvertError> {
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(config.error(key, &format!("a divisor of the hidden size {width}")));
    }
    Ok(width / heads)
}
