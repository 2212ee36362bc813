//! The supported architectures: one file each (or one family), holding a table of rules and a reader of `config.json`.
//!
//! Another architecture is another such file and a line in [`ARCHITECTURES`]. What several share is in `names` (rules) and
//! `keys` (reading).

mod bloom;
mod cohere;
mod falcon;
mod gemma;
mod gpt2;
mod gpt_bigcode;
mod gpt_neo;
mod gpt_neox;
mod gptj;
mod granite;
mod keys;
mod llama;
mod mistral;
mod mpt;
mod names;
mod olmo;
mod opt;
mod phi;
mod phi3;
mod qwen;
mod rope;
mod smollm3;
mod stablelm;
mod starcoder2;
mod stop;

use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Architecture;

pub(crate) use stop::default_stop_token;

/// Every architecture there are rules for.
pub const ARCHITECTURES: &[Architecture] = &[
    gpt2::GPT2,
    gpt_bigcode::GPT_BIGCODE,
    llama::LLAMA,
    mistral::MISTRAL,
    qwen::QWEN2,
    qwen::QWEN3,
    phi3::PHI3,
    gpt_neox::GPT_NEOX,
    starcoder2::STARCODER2,
    gemma::GEMMA,
    gemma::GEMMA2,
    gemma::GEMMA3,
    smollm3::SMOLLM3,
    olmo::OLMO2,
    olmo::OLMO,
    granite::GRANITE,
    phi::PHI,
    stablelm::STABLELM,
    cohere::COHERE,
    gptj::GPTJ,
    gpt_neo::GPT_NEO,
    falcon::FALCON,
    opt::OPT,
    bloom::BLOOM,
    mpt::MPT,
];

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

/// The architecture whose rules are called `name`, or that serves the `model_type` of this name.
///
/// # Errors
///
/// [`ConvertError::UnknownRules`] listing every name there is, and the nearest.
pub fn architecture_by_name(name: &str) -> Result<&'static Architecture, ConvertError> {
    let named = |arch: &&Architecture| arch.id == name || arch.model_types.contains(&name);
    ARCHITECTURES.iter().find(named).ok_or_else(|| {
        let ids = || ARCHITECTURES.iter().map(|arch| arch.id);
        let nearest =
            crate::hints::nearest(name, ids().chain(ARCHITECTURES.iter().flat_map(|a| a.model_types).copied()));
        let known = ids().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", ");
        ConvertError::UnknownRules { found: name.to_owned(), nearest, known }
    })
}

fn supported() -> String {
    let types = ARCHITECTURES.iter().flat_map(|arch| arch.model_types);
    types.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
