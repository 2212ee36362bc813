//! How the next token is chosen, and what ends a text: flags of the commands that write texts.

use anyhow::Result;
use bsbr_model::{Sampler, SamplingConfig};

use crate::output;

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Choosing tokens")]
pub(crate) struct SamplingArgs {
    /// Divides the scores; 0 takes the best token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Choose among the best K tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the best tokens whose probabilities reach P
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Choose among tokens at least P times as probable as the best one
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Makes tokens that were there lately less likely: positive scores are divided by it, negative ones multiplied
    /// [default: 1, none]
    #[arg(long, value_name = "X")]
    repeat_penalty: Option<f64>,
    /// Newest tokens that count for --repeat-penalty [default: 64]
    #[arg(long, value_name = "N")]
    repeat_last_n: Option<usize>,
    /// Start of the random numbers [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Text that ends the answer and is not shown; may be given several times; \n is a line end
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
}

impl SamplingArgs {
    /// The settings.
    pub(crate) fn config(&self) -> SamplingConfig {
        let default = SamplingConfig::default();
        SamplingConfig {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty.unwrap_or(default.repeat_penalty),
            repeat_last: self.repeat_last_n.unwrap_or(default.repeat_last),
            seed: self.seed.unwrap_or(default.seed),
        }
    }

    /// The sampler; a note where a flag does nothing.
    pub(crate) fn sampler(&self) -> Result<Sampler> {
        let sampler = Sampler::new(self.config())?;
        let chance = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
            ("--seed", self.seed.is_some()),
        ];
        let idle: Vec<&str> = chance.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect();
        if self.temperature == 0.0 && !idle.is_empty() {
            let (names, verb) = (idle.join(", "), if idle.len() == 1 { "has" } else { "have" });
            output::note(&format!("note: {names} {verb} no effect without --temperature: the best token is taken"));
        }
        if self.repeat_last_n.is_some() && self.repeat_penalty.is_none_or(|penalty| penalty == 1.0) {
            output::note("note: --repeat-last-n has no effect without --repeat-penalty");
        }
        Ok(sampler)
    }

    /// Texts that end an answer.
    pub(crate) fn stops(&self) -> Vec<String> {
        self.stop.iter().map(|text| unescaped(text)).collect()
    }
}

/// A text with `\n`, `\t` and `\\` as what they stand for; anything else behind a backslash stays.
fn unescaped(text: &str) -> String {
    let (mut result, mut characters) = (String::with_capacity(text.len()), text.chars());
    while let Some(character) = characters.next() {
        if character != '\\' {
            result.push(character);
            continue;
        }
        match characters.next() {
            Some('n') => result.push('\n'),
            Some('t') => result.push('\t'),
            Some('\\') => result.push('\\'),
            Some(other) => result.extend(['\\', other]),
            None => result.push('\\'),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_can_have_line_ends() {
        assert_eq!(unescaped(r"a\nb\tc\\n\d\"), "a\nb\tc\\n\\d\\");
    }
}
