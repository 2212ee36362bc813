//! What both ways of asking for a text have in common.

use std::collections::BTreeMap;

use bsbr_model::SamplingConfig;
use serde::Deserialize;
use serde_json::Value;

use super::{error::ApiError, fields::Fields};
use crate::{Request, ScoreBias};

/// Most continuations of one prompt.
const MOST_CHOICES: usize = 128;
/// Most texts that end a continuation.
const MOST_STOPS: usize = 16;
/// Largest number added to a score, either way.
const MOST_BIAS: f32 = 100.0;
/// Largest penalty, either way.
const MOST_PENALTY: f32 = 2.0;

/// How continuations are made and sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parameters {
    pub(crate) max_new_tokens: Option<usize>,
    sampling: SamplingConfig,
    bias: ScoreBias,
    pub(crate) stops: Vec<String>,
    /// Continuations of each prompt.
    pub(crate) choices: usize,
    pub(crate) stream: bool,
    /// Whether a stream ends with what it took.
    pub(crate) usage: bool,
}

/// One text or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stops {
    One(String),
    Several(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: Option<bool>,
}

impl Parameters {
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let stops = match fields.take("stop")? {
            None => Vec::new(),
            Some(Stops::One(text)) => vec![text],
            Some(Stops::Several(texts)) => texts,
        };
        if stops.len() > MOST_STOPS {
            let message = format!("`stop` has {} texts, at most {MOST_STOPS} are allowed", stops.len());
            return Err(ApiError::invalid("stop", message));
        }
        let choices = fields.take("n")?.unwrap_or(1);
        if !(1..=MOST_CHOICES).contains(&choices) {
            return Err(ApiError::invalid("n", format!("`n` is {choices}, expected 1 to {MOST_CHOICES}")));
        }
        let penalty = |fields: &mut Fields, name| {
            let value = fields.take::<f32>(name)?.unwrap_or(0.0);
            if !(-MOST_PENALTY..=MOST_PENALTY).contains(&value) {
                let message = format!("`{name}` is {value}, expected -{MOST_PENALTY} to {MOST_PENALTY}");
                return Err(ApiError::invalid(name, message));
            }
            Ok(value)
        };
        let (presence, frequency) = (penalty(fields, "presence_penalty")?, penalty(fields, "frequency_penalty")?);
        let mut tokens = BTreeMap::new();
        for (token, bias) in fields.take::<BTreeMap<String, f32>>("logit_bias")?.unwrap_or_default() {
            let Ok(id) = token.parse::<u32>() else {
                let message = format!("`logit_bias` names `{token}`, expected the number of a token");
                return Err(ApiError::invalid("logit_bias", message));
            };
            if !(-MOST_BIAS..=MOST_BIAS).contains(&bias) {
                let message = format!("`logit_bias` of token {id} is {bias}, expected -{MOST_BIAS} to {MOST_BIAS}");
                return Err(ApiError::invalid("logit_bias", message));
            }
            tokens.insert(id, bias);
        }
        let default = SamplingConfig::default();
        let seed = fields.take::<i64>("seed")?.map(|seed| seed as u64).unwrap_or_else(rand::random);
        let sampling = SamplingConfig {
            temperature: fields.take("temperature")?.unwrap_or(1.0),
            top_p: fields.take("top_p")?,
            // 0 and -1 stand for all tokens elsewhere.
            top_k: fields.take::<i64>("top_k")?.and_then(|k| usize::try_from(k).ok()).filter(|&k| k > 0),
            min_p: fields.take("min_p")?,
            repeat_penalty: fields.take("repeat_penalty")?.unwrap_or(default.repeat_penalty),
            repeat_last: fields.take("repeat_last_n")?.unwrap_or(default.repeat_last),
            seed,
        };
        sampling.validate()?;
        let options: Option<StreamOptions> = fields.take("stream_options")?;
        let stream = fields.take("stream")?.unwrap_or(false);
        let usage = options.and_then(|options| options.include_usage).unwrap_or(false);
        fields.ignore(&["user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"]);
        Ok(Self {
            max_new_tokens: None,
            sampling,
            bias: ScoreBias { tokens, presence, frequency },
            stops,
            choices,
            stream,
            usage,
        })
    }

    /// One request for each continuation of a prompt; each has its own random numbers, the first those of the seed.
    pub(crate) fn requests(
        &self,
        prompt: &[u32],
        (stop_tokens, logprobs, score_prompt): (&[u32], Option<usize>, bool),
        max_new_tokens: usize,
    ) -> Vec<Request> {
        let of = |choice: usize| Request {
            prompt: prompt.to_vec(),
            max_new_tokens,
            stop_tokens: stop_tokens.to_vec(),
            sampling: SamplingConfig { seed: self.sampling.seed.wrapping_add(choice as u64), ..self.sampling.clone() },
            bias: self.bias.clone(),
            logprobs,
            score_prompt,
        };
        (0..self.choices).map(of).collect()
    }
}

/// The number of a field that counts something.
pub(crate) fn count(fields: &mut Fields, name: &str, most: usize) -> Result<Option<usize>, ApiError> {
    let Some(value) = fields.take::<usize>(name)? else { return Ok(None) };
    if value > most {
        return Err(ApiError::invalid(name, format!("`{name}` is {value}, at most {most} is allowed")));
    }
    Ok(Some(value))
}

/// Whether a value asks for nothing.
pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty() || text == "none",
        Value::Bool(asked) => !asked,
        _ => false,
    }
}
