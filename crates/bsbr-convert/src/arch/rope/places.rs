//! The objects a rotary setting may stand in, and what happens when two of them say different things.

use serde_json::{Map, Value};

use crate::ConvertError;
use crate::json::ConfigFile;

/// The places of the rotary settings of a model, or of one kind of its layers.
pub(super) struct Places<'a> {
    /// The whole configuration: settings beside the objects.
    pub(super) config: &'a ConfigFile,
    /// The object that is read.
    pub(super) inside: Option<ConfigFile>,
    /// An object that `inside` takes the place of.
    replaced: Option<ConfigFile>,
}

impl<'a> Places<'a> {
    /// One object for all layers: `rope_scaling`, else `rope_parameters`. An empty one counts as absent.
    pub(super) fn flat(config: &'a ConfigFile) -> Result<Self, ConvertError> {
        let object =
            |key: &str| Ok::<_, ConvertError>(config.object(key)?.filter(|object| !object.entries().is_empty()));
        let (scaling, parameters) = (object("rope_scaling")?, object("rope_parameters")?);
        for (key, object) in [("rope_scaling", &scaling), ("rope_parameters", &parameters)] {
            if object.as_ref().is_some_and(|object| object.entries().values().any(Value::is_object)) {
                let expected = "one object of numbers and texts: all layers of this architecture rotate alike";
                return Err(config.error(key, expected));
            }
        }
        let (inside, replaced) = match (scaling, parameters) {
            (Some(scaling), parameters) => (Some(scaling), parameters),
            (None, parameters) => (parameters, None),
        };
        Self { config, inside, replaced }.checked()
    }

    /// `rope_parameters` with an object for the layers without a window, which `rope_scaling` is laid over, and one for
    /// those with a window.
    pub(super) fn by_kind_of_layer(config: &'a ConfigFile) -> Result<[Self; 2], ConvertError> {
        const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];
        let parameters = config.object("rope_parameters")?;
        let known = |key: &String| KINDS.contains(&key.as_str());
        if parameters.as_ref().is_some_and(|parameters| !parameters.entries().keys().all(known)) {
            let expected = "an object with `full_attention` and `sliding_attention`, as layers rotate in two ways";
            return Err(config.error("rope_parameters", expected));
        }
        let of = |kind: &str| parameters.as_ref().map(|p| p.object(kind)).transpose().map(Option::flatten);
        let (full, sliding) = (of(KINDS[0])?, of(KINDS[1])?);
        let (inside, replaced) = match (config.object("rope_scaling")?, full) {
            (Some(scaling), Some(full)) => (Some(full.overlaid(&scaling)), Some(full)),
            (Some(scaling), None) if scaling.get("rope_type").is_none() && scaling.get("type").is_some() => {
                // Version 5 lays this over `rope_type` = default, and then reads that.
                return Err(scaling.error("rope_type", "stated, as releases of transformers differ in reading `type`"));
            }
            (scaling, full) => (scaling.or(full), None),
        };
        let full = Self { config, inside, replaced }.checked()?;
        Ok([full, Self { config, inside: sliding, replaced: None }])
    }

    /// A scaling that another one takes the place of would be dropped without a word.
    fn checked(self) -> Result<Self, ConvertError> {
        let (Some(inside), Some(replaced)) = (&self.inside, &self.replaced) else { return Ok(self) };
        let (new, old) = (scaling_of(inside), scaling_of(replaced));
        let unscaled = old.get("rope_type").is_none_or(|kind| kind == "default");
        if unscaled || new == old {
            return Ok(self);
        }
        let shown = |object: &Map<String, Value>| Value::Object(object.clone()).to_string();
        Err(ConvertError::Contradiction {
            path: self.config.path().to_owned(),
            first: format!("`rope_scaling` = {}", shown(&new)),
            second: format!("`rope_parameters` = {}", shown(&old)),
            advice: "transformers takes the first: remove one of them".to_owned(),
        })
    }

    /// The number `inside` the object or `outside` under another name; `None` where both are absent.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Contradiction`] where two places say different things, or where the object that is replaced says
    /// something else than holds without it.
    pub(super) fn number(&self, inside: &str, outside: &str, default: f64) -> Result<Option<f64>, ConvertError> {
        let within = self.inside.as_ref().map(|o| o.optional_f64(inside)).transpose()?.flatten();
        let beside = self.config.optional_f64(outside)?;
        let inner_name = || self.inside.as_ref().map_or_else(String::new, |o| o.full_key(inside));
        if let (Some(within), Some(beside)) = (within, beside)
            && within != beside
        {
            return Err(self.contradiction((&inner_name(), within), (outside, beside)));
        }
        let taken = within.or(beside);
        let Some(replaced) = &self.replaced else { return Ok(taken) };
        let Some(lost) = replaced.optional_f64(inside)? else { return Ok(taken) };
        if lost == taken.unwrap_or(default) {
            return Ok(Some(lost));
        }
        let lost = (replaced.full_key(inside), lost);
        Err(match taken {
            Some(taken) => {
                let name = if within.is_some() { format!("rope_scaling.{inside}") } else { outside.to_owned() };
                self.contradiction((&name, taken), (&lost.0, lost.1))
            }
            None => ConvertError::Contradiction {
                path: self.config.path().to_owned(),
                first: format!("`rope_scaling` without `{inside}`"),
                second: format!("`{}` = {}", lost.0, lost.1),
                advice: format!(
                    "transformers takes the first in place of the second, and so its default {default}: write \
                     `{inside}` into `rope_scaling`"
                ),
            },
        })
    }

    /// Fails if the configuration repeats a setting that is read elsewhere with another value.
    pub(super) fn agrees(&self, repeated: &str, read: &str, taken: f64) -> Result<(), ConvertError> {
        match self.config.optional_f64(repeated)? {
            Some(found) if found != taken => Err(self.contradiction((read, taken), (repeated, found))),
            _ => Ok(()),
        }
    }

    /// Fails if any place gives `key` another value than `value`.
    pub(super) fn only(&self, key: &str, value: f64, expected: &str) -> Result<(), ConvertError> {
        let objects = [Some(self.config), self.inside.as_ref(), self.replaced.as_ref()];
        for object in objects.into_iter().flatten() {
            if object.optional_f64(key)?.is_some_and(|found| found != value) {
                return Err(object.error(key, expected));
            }
        }
        Ok(())
    }

    /// The error for a setting, at the place it is read from.
    pub(super) fn error(&self, inside: &str, outside: &str, expected: &str) -> ConvertError {
        match &self.inside {
            Some(object) if object.get(inside).is_some() => object.error(inside, expected),
            _ => self.config.error(outside, expected),
        }
    }

    /// Two names of one setting with different values; the first is the one transformers reads.
    pub(super) fn contradiction(
        &self,
        (first, taken): (&str, impl std::fmt::Display),
        (second, left): (&str, impl std::fmt::Display),
    ) -> ConvertError {
        ConvertError::Contradiction {
            path: self.config.path().to_owned(),
            first: format!("`{first}` = {taken}"),
            second: format!("`{second}` = {left}"),
            advice: "they are one setting and transformers reads the first: keep the one that is meant".to_owned(),
        }
    }
}

/// What an object says about scaling, in a form that can be compared.
fn scaling_of(object: &ConfigFile) -> Map<String, Value> {
    let mut scaling = Map::new();
    let number = |value: &Value| value.as_f64().map_or_else(|| value.clone(), Value::from);
    for (key, value) in object.entries() {
        if value.is_null() || ["rope_theta", "partial_rotary_factor"].contains(&key.as_str()) {
            continue;
        }
        let value = match value {
            Value::Array(list) => list.iter().map(number).collect(),
            value => number(value),
        };
        // The newer name wins, as it does when the kind is read.
        if key != "type" {
            scaling.insert(key.clone(), value);
        } else if object.get("rope_type").is_none() {
            scaling.insert("rope_type".to_owned(), value);
        }
    }
    scaling
}
