//! Rotary settings of `config.json`, in both forms transformers has written, with its defaults.
//!
//! Until version 4 the keys were `rope_theta` and `rope_scaling` with `type` or `rope_type`; from version 5 on there
//! is one object, `rope_parameters`.

use bsbr_model::{Positions, RotaryScaling};

use crate::ConvertError;
use crate::json::ConfigFile;

/// Where an architecture keeps its rotary settings, and the defaults of its class.
#[derive(Clone, Copy)]
pub(super) struct RopeKeys {
    /// Key of the base, outside `rope_parameters`; `None` for no default.
    pub(super) theta: (&'static str, Option<f64>),
    /// Key of the part of a head that rotates, outside `rope_parameters`; `None` where heads rotate whole.
    pub(super) part: Option<(&'static str, f64)>,
    /// The first files of Phi-3 call `longrope` `yarn`.
    pub(super) yarn_is_longrope: bool,
}

impl RopeKeys {
    pub(super) const LLAMA: Self = Self { theta: ("rope_theta", Some(10_000.0)), part: None, yarn_is_longrope: false };
}

/// Rotary positions for heads of width `head_dim`.
pub(super) fn read(
    config: &ConfigFile,
    keys: &RopeKeys,
    head_dim: usize,
    max_positions: usize,
) -> Result<Positions, ConvertError> {
    let parameters = config.object("rope_parameters")?;
    read_from(config, parameters, keys, head_dim, max_positions)
}

/// The same with the object that newer files keep the settings in.
pub(super) fn read_from(
    config: &ConfigFile,
    parameters: Option<ConfigFile>,
    keys: &RopeKeys,
    head_dim: usize,
    max_positions: usize,
) -> Result<Positions, ConvertError> {
    let scaling = match &parameters {
        Some(parameters) => Some(parameters.clone()),
        None => config.object("rope_scaling")?,
    };
    let inner = |key: &str| parameters.as_ref().map(|p| p.optional_f64(key)).transpose().map(Option::flatten);
    let theta = match (inner("rope_theta")?, config.optional_f64(keys.theta.0)?, keys.theta.1) {
        (Some(theta), _, _) | (None, Some(theta), _) | (None, None, Some(theta)) => theta,
        (None, None, None) => {
            return Err(config.error(keys.theta.0, "a number, as releases of transformers differ in its default"));
        }
    };
    let rotary_dim = match keys.part {
        Some((key, default)) => {
            let part = match inner("partial_rotary_factor")? {
                Some(part) => part,
                None => config.optional_f64(key)?.unwrap_or(default),
            };
            if !(0.0..=1.0).contains(&part) {
                return Err(config.error(key, "a number from 0 to 1"));
            }
            (head_dim as f64 * part) as usize
        }
        None => {
            for place in std::iter::once(config).chain(&scaling) {
                // Whole heads rotate; another value would be read by nothing.
                if place.optional_f64("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
                    return Err(place.error("partial_rotary_factor", "1 or absent for this architecture"));
                }
            }
            head_dim
        }
    };
    let scaling = match scaling {
        Some(scaling) => read_scaling(config, &scaling, keys, max_positions)?,
        None => None,
    };
    Ok(Positions::Rotary { theta, rotary_dim, scaling })
}

fn read_scaling(
    config: &ConfigFile,
    scaling: &ConfigFile,
    keys: &RopeKeys,
    max_positions: usize,
) -> Result<Option<RotaryScaling>, ConvertError> {
    let key = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = scaling.optional_str(key)?.unwrap_or_else(|| "default".to_owned());
    let outer = config.optional_usize("original_max_position_embeddings")?;
    let original = match scaling.optional_usize("original_max_position_embeddings")? {
        None => outer,
        inner => inner,
    };
    Ok(Some(match kind.as_str() {
        "yarn" if keys.yarn_is_longrope => longrope(scaling, None, original, max_positions)?,
        "default" => return Ok(None),
        "linear" => RotaryScaling::Linear { factor: factor(scaling)? },
        // The trained length of this kind is the model's maximum: the base grows only beyond it.
        "dynamic" => RotaryScaling::Dynamic { factor: factor(scaling)?, original_max_positions: max_positions },
        "llama3" => RotaryScaling::Llama3 {
            factor: factor(scaling)?,
            low_freq_factor: scaling.f64("low_freq_factor")?,
            high_freq_factor: scaling.f64("high_freq_factor")?,
            original_max_positions: scaling.usize("original_max_position_embeddings")?,
        },
        "yarn" => yarn(scaling, original, max_positions)?,
        "longrope" | "su" => {
            // A trained length beside the scaling, not inside it, outweighs a stated factor.
            let stated = if outer.is_some() { None } else { scaling.optional_f64("factor")? };
            longrope(scaling, stated, original, max_positions)?
        }
        _ => return Err(scaling.error(key, "one of default, linear, dynamic, yarn, llama3, longrope")),
    }))
}

fn yarn(scaling: &ConfigFile, original: Option<usize>, max_positions: usize) -> Result<RotaryScaling, ConvertError> {
    let original_max_positions = original.unwrap_or(max_positions);
    let factor = match scaling.optional_f64("factor")? {
        Some(_) => factor(scaling)?,
        None if original.is_some() => max_positions as f64 / original_max_positions as f64,
        None => return Err(scaling.error("factor", "a number, 1 or more")),
    };
    let temperature = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    let mscale = scaling.optional_f64("mscale")?.filter(|&m| m != 0.0);
    let mscale_all_dim = scaling.optional_f64("mscale_all_dim")?.filter(|&m| m != 0.0);
    let attention_factor = match (scaling.optional_f64("attention_factor")?, mscale, mscale_all_dim) {
        (Some(given), _, _) => given,
        (None, Some(one), Some(all)) => temperature(one) / temperature(all),
        (None, _, _) => temperature(1.0),
    };
    Ok(RotaryScaling::Yarn {
        factor,
        original_max_positions,
        beta_fast: scaling.optional_f64("beta_fast")?.unwrap_or(32.0),
        beta_slow: scaling.optional_f64("beta_slow")?.unwrap_or(1.0),
        attention_factor,
        truncate: scaling.bool_or("truncate", true)?,
    })
}

fn longrope(
    scaling: &ConfigFile,
    stated: Option<f64>,
    original: Option<usize>,
    max_positions: usize,
) -> Result<RotaryScaling, ConvertError> {
    let original_max_positions = original.unwrap_or(max_positions);
    let ratio = max_positions as f64 / original_max_positions.max(1) as f64;
    let factor = stated.unwrap_or(ratio);
    let attention_factor = match scaling.optional_f64("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original_max_positions as f64).ln()).sqrt(),
    };
    Ok(RotaryScaling::Longrope {
        short_factor: scaling.f64_list("short_factor")?,
        long_factor: scaling.f64_list("long_factor")?,
        original_max_positions,
        attention_factor,
    })
}

fn factor(scaling: &ConfigFile) -> Result<f64, ConvertError> {
    let factor = scaling.f64("factor")?;
    if factor >= 1.0 { Ok(factor) } else { Err(scaling.error("factor", "a number, 1 or more")) }
}
