//! The kinds of rotary scaling and their numbers.

use bsbr_model::RotaryScaling;

use super::RopeKeys;
use super::places::Places;
use crate::ConvertError;
use crate::json::ConfigFile;

const TRAINED: &str = "original_max_position_embeddings";

pub(super) fn read(
    places: &Places<'_>,
    keys: &RopeKeys,
    max_positions: usize,
) -> Result<Option<RotaryScaling>, ConvertError> {
    let Some(scaling) = &places.inside else { return Ok(None) };
    let (key, kind) = kind(places, scaling, keys)?;
    if keys.yarn_is_longrope && !["default", "longrope"].contains(&kind.as_str()) {
        return Err(scaling.error(key, "default or longrope for this architecture"));
    }
    Ok(Some(match kind.as_str() {
        "default" => return Ok(None),
        "linear" => RotaryScaling::Linear { factor: factor(scaling)? },
        // The trained length of this kind is the model's maximum: the base grows only beyond it.
        "dynamic" => RotaryScaling::Dynamic { factor: factor(scaling)?, original_max_positions: max_positions },
        "llama3" => RotaryScaling::Llama3 {
            factor: factor(scaling)?,
            low_freq_factor: scaling.f64("low_freq_factor")?,
            high_freq_factor: scaling.f64("high_freq_factor")?,
            original_max_positions: trained(places, scaling, keys)?.unwrap_or(max_positions),
        },
        "yarn" => yarn(scaling, trained(places, scaling, keys)?, max_positions)?,
        "longrope" if keys.temperatures => tempered(scaling, trained(places, scaling, keys)?, max_positions)?,
        "longrope" => longrope(places, scaling, trained(places, scaling, keys)?, max_positions)?,
        _ => return Err(scaling.error(key, "one of default, linear, dynamic, yarn, llama3, longrope")),
    }))
}

/// The form of Gemma 4: some of the pairs of a head rotate, by the frequencies they have among all.
pub(super) fn proportional(
    places: &Places<'_>,
    keys: &RopeKeys,
    head_dim: usize,
) -> Result<Option<RotaryScaling>, ConvertError> {
    let Some(scaling) = places.inside.as_ref().filter(|_| keys.proportional) else { return Ok(None) };
    if kind(places, scaling, keys)?.1 != "proportional" {
        return Ok(None);
    }
    const PART: &str = "partial_rotary_factor";
    let part = places.number(PART, PART, 1.0)?.unwrap_or(1.0);
    if !(0.0..=1.0).contains(&part) {
        return Err(places.error(PART, PART, "a number from 0 to 1"));
    }
    let pairs = (part * head_dim as f64 / 2.0) as usize;
    let factor = if scaling.get("factor").is_some() { factor(scaling)? } else { 1.0 };
    Ok(Some(RotaryScaling::Proportional { rotating: 2 * pairs, factor }))
}

/// What raises the base once and for all, where an architecture has that.
pub(super) fn alpha(places: &Places<'_>, keys: &RopeKeys) -> Result<Option<f64>, ConvertError> {
    let Some(scaling) = places.inside.as_ref().filter(|_| keys.alpha) else { return Ok(None) };
    let alpha = scaling.optional_f64("alpha")?.filter(|&alpha| alpha != 0.0);
    match alpha {
        Some(alpha) if alpha < 0.0 => Err(scaling.error("alpha", "a number above 0")),
        Some(alpha) if kind(places, scaling, keys)?.1 == "dynamic" => Ok(Some(alpha)),
        _ => Ok(None),
    }
}

/// The kind under its present name, and the key it stands under: `rope_type`, or `type` in older files.
fn kind(places: &Places<'_>, scaling: &ConfigFile, keys: &RopeKeys) -> Result<(&'static str, String), ConvertError> {
    let present = |name: String| match name.as_str() {
        "su" => "longrope".to_owned(),
        "yarn" if keys.yarn_is_longrope => "longrope".to_owned(),
        "mrope" if keys.mrope => "default".to_owned(),
        _ => name,
    };
    let (new, old) = (scaling.optional_str("rope_type")?.map(present), scaling.optional_str("type")?.map(present));
    match (new, old) {
        (Some(new), Some(old)) if new != old => {
            let [new_key, old_key] = ["rope_type", "type"].map(|key| scaling.full_key(key));
            Err(places.contradiction((&new_key, new), (&old_key, old)))
        }
        (Some(new), _) => Ok(("rope_type", new)),
        (None, Some(old)) => Ok(("type", old)),
        (None, None) => Ok(("rope_type", "default".to_owned())),
    }
}

/// The trained length, which stands inside or beside; beside it outweighs.
fn trained(places: &Places<'_>, scaling: &ConfigFile, keys: &RopeKeys) -> Result<Option<usize>, ConvertError> {
    let (inside, beside) = (scaling.optional_usize(TRAINED)?, places.config.optional_usize(TRAINED)?);
    match (inside, beside, keys.trained) {
        (Some(inside), Some(beside), _) if inside != beside => {
            Err(places.contradiction((TRAINED, beside), (&scaling.full_key(TRAINED), inside)))
        }
        (Some(inside), None, Some(default)) if inside != default => Err(ConvertError::Contradiction {
            path: places.config.path().to_owned(),
            first: format!("no `{TRAINED}`, which means {default} for this model type,"),
            second: format!("`{}` = {inside}", scaling.full_key(TRAINED)),
            advice: "transformers reads the first: write the second beside the object it is in".to_owned(),
        }),
        (inside, beside, default) => Ok(beside.or(inside).or(default)),
    }
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
    places: &Places<'_>,
    scaling: &ConfigFile,
    original: Option<usize>,
    max_positions: usize,
) -> Result<RotaryScaling, ConvertError> {
    let original_max_positions = original.unwrap_or(max_positions);
    let ratio = max_positions as f64 / original_max_positions.max(1) as f64;
    let stated = scaling.optional_f64("factor")?;
    let attention_factor = match (scaling.optional_f64("attention_factor")?, stated) {
        (Some(given), _) => given,
        (None, Some(stated)) if stated != ratio && places.config.get(TRAINED).is_some() => {
            // Version 4 took the ratio.
            let ratio_name = format!("max_position_embeddings` / `{TRAINED}");
            return Err(places.contradiction((&scaling.full_key("factor"), stated), (&ratio_name, ratio)));
        }
        (None, stated) => match stated.unwrap_or(ratio) {
            factor if factor <= 1.0 => 1.0,
            factor => (1.0 + factor.ln() / (original_max_positions as f64).ln()).sqrt(),
        },
    };
    Ok(RotaryScaling::Longrope {
        short_factor: scaling.f64_list("short_factor")?,
        long_factor: scaling.f64_list("long_factor")?,
        original_max_positions,
        attention_factor,
        long_attention_factor: None,
    })
}

/// The form of Phi-3.5-MoE.
fn tempered(
    scaling: &ConfigFile,
    original: Option<usize>,
    max_positions: usize,
) -> Result<RotaryScaling, ConvertError> {
    Ok(RotaryScaling::Longrope {
        short_factor: scaling.f64_list("short_factor")?,
        long_factor: scaling.f64_list("long_factor")?,
        original_max_positions: original.unwrap_or(max_positions),
        attention_factor: scaling.f64("short_mscale")?,
        long_attention_factor: Some(scaling.f64("long_mscale")?),
    })
}

fn factor(scaling: &ConfigFile) -> Result<f64, ConvertError> {
    let factor = scaling.f64("factor")?;
    if factor >= 1.0 { Ok(factor) } else { Err(scaling.error("factor", "a number, 1 or more")) }
}
