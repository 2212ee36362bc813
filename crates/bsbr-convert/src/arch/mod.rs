//! The supported architectures: one file each (or one family), holding a table of rules and a reader of `config.json`.
//!
//! Another architecture is another such file and a line in [`ARCHITECTURES`]. What several share is in `names` (rules) and
//! `keys` (reading).

mod apertus;
mod arcee;
mod bloom;
mod codegen;
mod cohere;
mod deepseek;
mod ernie;
mod exaone;
mod experts;
mod falcon;
mod gemma;
mod gemma4;
mod glm;
mod gpt2;
mod gpt_bigcode;
mod gpt_neo;
mod gpt_neox;
mod gpt_oss;
mod gptj;
mod granite;
mod helium;
mod hunyuan;
mod keys;
mod latent;
mod llama;
mod mistral;
mod mixtral;
mod mpt;
mod names;
mod nanochat;
mod nemotron;
mod olmo;
mod opt;
mod phi;
mod phi3;
mod phimoe;
mod qwen;
mod qwen3_5;
mod qwen_moe;
mod rope;
mod seed_oss;
mod smollm3;
mod stablelm;
mod starcoder2;
mod stop;
mod wrapper;

use crate::ConvertError;
use crate::json::ConfigFile;
use std::collections::HashSet;

use crate::plan::SourceTensor;
use crate::rules::{Architecture, Layout, Prefix, SourceModel, Wrapper, expand};

pub(crate) use stop::default_stop_token;
pub use wrapper::WRAPPERS;

/// Every architecture there are rules for.
pub const ARCHITECTURES: &[Architecture] = &[
    gpt2::GPT2,
    gpt_bigcode::GPT_BIGCODE,
    llama::LLAMA,
    mistral::MISTRAL,
    qwen::QWEN2,
    qwen::QWEN3,
    qwen::QWEN2_VL,
    qwen::QWEN3_VL,
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
    olmo::OLMO3,
    exaone::EXAONE4,
    glm::GLM,
    glm::GLM4,
    cohere::COHERE2,
    seed_oss::SEED_OSS,
    helium::HELIUM,
    ernie::ERNIE,
    gemma::VAULTGEMMA,
    codegen::CODEGEN,
    granite::GRANITE4,
    arcee::ARCEE,
    nemotron::NEMOTRON,
    nemotron::JAIS2,
    apertus::APERTUS,
    nanochat::NANOCHAT,
    hunyuan::HUNYUAN,
    mistral::MINISTRAL3,
    mixtral::MIXTRAL,
    qwen_moe::QWEN2_MOE,
    qwen_moe::QWEN3_MOE,
    qwen_moe::OLMOE,
    qwen_moe::QWEN3_VL_MOE,
    granite::GRANITE_MOE,
    phimoe::PHIMOE,
    ernie::ERNIE_MOE,
    deepseek::GLM4_MOE,
    deepseek::DOTS1,
    hunyuan::HUNYUAN_MOE,
    mixtral::MINIMAX_M2,
    gpt_oss::GPT_OSS,
    granite::GRANITE_SWA,
    gemma4::GEMMA4,
    latent::DEEPSEEK_V2,
    latent::DEEPSEEK_V3,
    latent::GLM4_MOE_LITE,
    latent::MISTRAL4,
    glm::GLM4V,
    qwen3_5::QWEN3_5,
    qwen3_5::QWEN3_5_MOE,
    qwen3_5::QWEN3_NEXT,
];

/// The rules for a checkpoint, and the settings they read.
#[derive(Debug)]
pub struct Found {
    /// Those of the decoder.
    pub architecture: &'static Architecture,
    /// The model around it, if there is one.
    pub wrapper: Option<&'static Wrapper>,
    /// The settings of the decoder.
    pub config: ConfigFile,
    tie_declared: Option<Option<bool>>,
}

impl Found {
    /// What the settings of the decoder say.
    ///
    /// # Errors
    ///
    /// Those of the reader: a key that is missing, of another kind, or of a variant the decoder does not compute.
    pub fn read(&self) -> Result<SourceModel, ConvertError> {
        let mut model = (self.architecture.read_config)(&self.config)?;
        if let Some(declared) = self.tie_declared {
            model.tie_declared = declared;
        }
        // Which of them hold only the names of the tensors say.
        model.flags.extend(self.architecture.layouts.iter().map(|layout| (layout.flag, false)));
        Ok(model)
    }

    /// Sets the flags of the layout that the tensors have.
    pub(crate) fn set_layouts(&self, prefix: Prefix, model: &mut SourceModel, tensors: &[SourceTensor]) {
        for Layout { flag, tensor, shape } in self.architecture.layouts {
            let decoder = &model.decoder;
            let names: HashSet<String> =
                (0..decoder.layers).map(|layer| expand(tensor, prefix, (layer, 0), 0)).collect();
            let shape = shape.map(|shape| shape.iter().map(|dim| dim.resolve(decoder)).collect::<Option<Vec<_>>>());
            let fits = |tensor: &SourceTensor| shape.as_ref().is_none_or(|shape| shape.as_ref() == Some(&tensor.shape));
            let there = tensors.iter().any(|tensor| names.contains(&tensor.name) && fits(tensor));
            model.flags.insert(flag, there);
        }
    }

    /// What may stand before the names of the tensors, tried in order.
    pub(crate) fn prefixes(&self) -> Vec<Prefix> {
        match self.wrapper {
            Some(wrapper) => wrapper.prefixes.to_vec(),
            None => self.architecture.prefixes.iter().copied().map(Prefix::of_body).collect(),
        }
    }
}

/// The rules for a checkpoint, by the `model_type` of its configuration and, where that is a model around a decoder, by that
/// of the decoder.
///
/// # Errors
///
/// [`ConvertError::UnknownModelType`] listing the supported types, [`ConvertError::ConfigKey`] when the key is
/// absent, [`ConvertError::Rejected`] for a variant the decoder does not compute.
pub fn find_rules(config: &ConfigFile) -> Result<Found, ConvertError> {
    let found = model_type(config)?;
    let wrapper = wrapper_by_name(&found);
    let text = wrapper.map_or_else(|| Ok(config.clone()), |wrapper| wrapper.text_part(config))?;
    let architecture = bare_architecture(&text)?;
    let tie_declared = wrapper.map(|wrapper| wrapper.tie_declared(config, &text)).transpose()?;
    Ok(Found { architecture, wrapper, config: text, tie_declared })
}

/// The architecture of the decoder of a checkpoint; see [`find_rules`].
///
/// # Errors
///
/// As [`find_rules`].
pub fn architecture(config: &ConfigFile) -> Result<&'static Architecture, ConvertError> {
    Ok(find_rules(config)?.architecture)
}

fn model_type(config: &ConfigFile) -> Result<String, ConvertError> {
    config.optional_str("model_type")?.ok_or_else(|| config.error("model_type", &format!("one of {}", supported())))
}

fn bare_architecture(config: &ConfigFile) -> Result<&'static Architecture, ConvertError> {
    let found = model_type(config)?;
    let known = ARCHITECTURES.iter().find(|arch| arch.model_types.contains(&found.as_str()));
    let Some(architecture) = known else {
        return Err(ConvertError::UnknownModelType { path: config.path().to_owned(), found, supported: supported() });
    };
    for reject in architecture.rejects {
        if config.bool_or(reject.key, false)? {
            return Err(ConvertError::Rejected {
                path: config.path().to_owned(),
                key: config.full_key(reject.key),
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

/// The model around a decoder that serves the `model_type` of this name.
pub fn wrapper_by_name(name: &str) -> Option<&'static Wrapper> {
    WRAPPERS.iter().find(|wrapper| wrapper.model_types.contains(&name))
}

fn supported() -> String {
    let types =
        ARCHITECTURES.iter().map(|arch| arch.model_types).chain(WRAPPERS.iter().map(|it| it.model_types)).flatten();
    types.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
