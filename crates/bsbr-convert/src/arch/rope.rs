//! Rotary settings of `config.json`, in every form transformers has written, with its defaults.
//!
//! Until version 4 the keys were `rope_theta` and `rope_scaling` with `type` or `rope_type`; from version 5 on there
//! is one object, `rope_parameters`. A file may hold both, and each of them the base and the part of a head that rotates:
//! version 5 takes `rope_scaling` in place of `rope_parameters`, and what stands inside before what stands beside. That is
//! followed. Where it would drop a setting that says something else, both are named in an error instead.

mod places;
mod scaling;

use bsbr_model::Positions;

use self::places::Places;
use crate::ConvertError;
use crate::json::ConfigFile;

/// Where an architecture keeps its rotary settings, and the defaults of its class.
#[derive(Clone, Copy)]
pub(super) struct RopeKeys {
    /// Key of the base beside the object of rotary settings, and the default.
    pub(super) theta: (&'static str, f64),
    /// Whether the base must be stated, since releases of transformers differ in its default.
    pub(super) theta_is_needed: bool,
    /// Key of the part of a head that rotates, likewise; `None` where heads rotate whole.
    pub(super) part: Option<(&'static str, f64)>,
    /// Whether the base and the part are also written beside under their usual names, where nothing reads them.
    pub(super) repeated: bool,
    /// Trained length of long factors where no key beside them says it: it is then read nowhere else.
    pub(super) trained: Option<usize>,
    /// The first files of Phi-3 call `longrope` `yarn`.
    pub(super) yarn_is_longrope: bool,
    /// `mrope` is a kind: positions of images in several dimensions, which are equal in a text.
    pub(super) mrope: bool,
    /// `dynamic` with `alpha` does not grow with the text: the base is `theta alpha^(d / (d - 2))` for heads of width `d`.
    pub(super) alpha: bool,
    /// Short and long factors come with a factor on cosines and sines each.
    pub(super) temperatures: bool,
    /// `proportional` is a kind: of the pairs of a whole head only the fastest rotate.
    pub(super) proportional: bool,
}

impl RopeKeys {
    pub(super) const LLAMA: Self = Self {
        theta: ("rope_theta", 10_000.0),
        theta_is_needed: false,
        part: None,
        repeated: false,
        trained: None,
        yarn_is_longrope: false,
        mrope: false,
        alpha: false,
        temperatures: false,
        proportional: false,
    };
}

/// Rotary positions for heads of width `head_dim`.
pub(super) fn read(
    config: &ConfigFile,
    keys: &RopeKeys,
    head_dim: usize,
    max_positions: usize,
) -> Result<Positions, ConvertError> {
    let places = Places::flat(config)?;
    positions(&places, keys, head_dim, max_positions)
}

/// Rotary positions of the layers without a window, and the base of those with one, which rotate without scaling.
pub(super) fn read_two_kinds(
    config: &ConfigFile,
    [full, sliding]: [&RopeKeys; 2],
    head_dim: usize,
    max_positions: usize,
) -> Result<(Positions, f64), ConvertError> {
    let [full_places, sliding_places] = Places::by_kind_of_layer(config)?;
    let positions_of_full = positions(&full_places, full, head_dim, max_positions)?;
    match positions(&sliding_places, sliding, head_dim, max_positions)? {
        Positions::Rotary { theta, scaling: None, .. } => Ok((positions_of_full, theta)),
        _ => {
            let why = "layers with a window rotate without scaling";
            Err(super::keys::rejected(config, "rope_parameters", why))
        }
    }
}

fn positions(
    places: &Places<'_>,
    keys: &RopeKeys,
    head_dim: usize,
    max_positions: usize,
) -> Result<Positions, ConvertError> {
    let (outside, default) = keys.theta;
    let theta = places.number("rope_theta", outside, default)?;
    if theta.is_none() && keys.theta_is_needed {
        return Err(places.config.error(outside, "a number, as releases of transformers differ in its default"));
    }
    let theta = theta.unwrap_or(default);
    if let Some(scaling) = scaling::proportional(places, keys, head_dim)? {
        return Ok(Positions::Rotary { theta, rotary_dim: head_dim, scaling: Some(scaling) });
    }
    let rotary_dim = match keys.part {
        Some((outside, default)) => {
            let part = places.number("partial_rotary_factor", outside, default)?.unwrap_or(default);
            let rotary_dim = (head_dim as f64 * part) as usize;
            if !(0.0..=1.0).contains(&part) {
                return Err(places.error("partial_rotary_factor", outside, "a number from 0 to 1"));
            }
            if rotary_dim % 2 == 1 {
                let expected = format!("a share of the {head_dim} numbers of a head that comes to an even number");
                return Err(places.error("partial_rotary_factor", outside, &expected));
            }
            if keys.repeated {
                places.agrees("partial_rotary_factor", outside, part)?;
            }
            rotary_dim
        }
        None => {
            // Whole heads rotate; another value would be read by nothing.
            places.only("partial_rotary_factor", 1.0, "1 or absent for this architecture")?;
            head_dim
        }
    };
    if keys.repeated {
        places.agrees("rope_theta", outside, theta)?;
    }
    if let Some(alpha) = scaling::alpha(places, keys)? {
        let width = head_dim as f64;
        let theta = theta * alpha.powf(width / (width - 2.0));
        return Ok(Positions::Rotary { theta, rotary_dim, scaling: None });
    }
    let scaling = scaling::read(places, keys, max_positions)?;
    Ok(Positions::Rotary { theta, rotary_dim, scaling })
}
