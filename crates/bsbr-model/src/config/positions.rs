//! Where a token is, as data.

use serde::{Deserialize, Serialize};

/// How rotary frequencies are stretched beyond the trained length.
///
/// Formulas as in Hugging Face transformers' `modeling_rope_utils`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, tag = "kind")]
pub enum RotaryScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// How many times longer.
        factor: f64,
    },
    /// NTK-aware: the base grows with the text once it is longer than `original_max_positions`.
    Dynamic {
        /// How many times longer.
        factor: f64,
        /// Length up to which the frequencies are unchanged.
        original_max_positions: usize,
    },
    /// YaRN: low frequencies interpolated, high ones kept, a ramp between, and a temperature.
    Yarn {
        /// How many times longer.
        factor: f64,
        /// Trained length.
        original_max_positions: usize,
        /// Rotations above which a frequency is kept (default 32).
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated (default 1).
        beta_slow: f64,
        /// Factor on cos and sin; `0.1 ln(factor) + 1` unless the checkpoint says otherwise.
        attention_factor: f64,
        /// Whether the ends of the ramp are rounded to whole dimensions (default true).
        truncate: bool,
    },
    /// Llama 3: three bands of wavelengths, smoothed between.
    Llama3 {
        /// How many times longer.
        factor: f64,
        /// Lower end of the smoothed band, in trained lengths per wavelength.
        low_freq_factor: f64,
        /// Upper end of the smoothed band.
        high_freq_factor: f64,
        /// Trained length.
        original_max_positions: usize,
    },
    /// LongRoPE: one divisor per dimension, another set once the text is longer than trained.
    Longrope {
        /// Divisors for texts up to `original_max_positions`, `[rotary_dim / 2]`.
        short_factor: Vec<f64>,
        /// Divisors beyond, `[rotary_dim / 2]`.
        long_factor: Vec<f64>,
        /// Trained length.
        original_max_positions: usize,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// The same beyond `original_max_positions`, where it is another.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        long_attention_factor: Option<f64>,
    },
    /// Only the fastest pairs rotate, by the frequencies they have among all of them.
    Proportional {
        /// Dimensions that rotate, two to a pair; even.
        rotating: usize,
        /// Every frequency is divided by it.
        factor: f64,
    },
}

impl RotaryScaling {
    /// Every number that must be positive, with its name.
    pub(super) fn positive_numbers(&self) -> Vec<(&'static str, f64)> {
        let each = |name, factors: &[f64]| factors.iter().map(|&factor| (name, factor)).collect::<Vec<_>>();
        let factor = |factor: f64| ("positions.scaling.factor", factor);
        let original = |positions: usize| ("positions.scaling.original_max_positions", positions as f64);
        let attention = |factor: f64| ("positions.scaling.attention_factor", factor);
        match self {
            Self::Linear { factor: f } | Self::Proportional { factor: f, .. } => vec![factor(*f)],
            Self::Dynamic { factor: f, original_max_positions } => vec![factor(*f), original(*original_max_positions)],
            Self::Yarn { factor: f, original_max_positions, beta_fast, beta_slow, attention_factor, .. } => vec![
                factor(*f),
                original(*original_max_positions),
                ("positions.scaling.beta_fast", *beta_fast),
                ("positions.scaling.beta_slow", *beta_slow),
                attention(*attention_factor),
            ],
            Self::Llama3 { factor: f, low_freq_factor, high_freq_factor, original_max_positions } => vec![
                factor(*f),
                original(*original_max_positions),
                ("positions.scaling.low_freq_factor", *low_freq_factor),
                // The smoothed band must not be empty.
                ("positions.scaling.high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor),
            ],
            Self::Longrope {
                short_factor,
                long_factor,
                original_max_positions,
                attention_factor,
                long_attention_factor,
            } => {
                let mut numbers = vec![original(*original_max_positions), attention(*attention_factor)];
                numbers.extend(long_attention_factor.map(attention));
                numbers.extend(each("positions.scaling.short_factor", short_factor));
                numbers.extend(each("positions.scaling.long_factor", long_factor));
                numbers
            }
        }
    }
}

/// Where a token is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, tag = "kind")]
pub enum Positions {
    /// One learned vector per position, added to the embedding.
    Learned,
    /// Queries and keys rotated by their position, the two halves of `rotary_dim` paired.
    Rotary {
        /// Base of the frequencies.
        theta: f64,
        /// Dimensions of a head that rotate; even, at most `head_dim`.
        rotary_dim: usize,
        /// Stretching beyond the trained length.
        scaling: Option<RotaryScaling>,
    },
    /// ALiBi: scores fall linearly with the distance, each head with its own slope. Computed relative to the token in
    /// f32, whatever roundings an implementation of the original had at long distances.
    Alibi {
        /// Factor on the usual slopes, [`bsbr_attn::AttentionOptions::alibi_slopes`].
        factor: f64,
    },
}

/// What a layer does with rotary positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, tag = "kind")]
pub enum LayerRotary {
    /// Rotates as [`Positions::Rotary`] says.
    Global,
    /// Rotates with another base, without scaling.
    Local {
        /// Base of the frequencies.
        theta: f64,
    },
    /// Rotates whole heads, whatever their width, with another base, without scaling.
    Whole {
        /// Base of the frequencies.
        theta: f64,
    },
    /// Does not rotate: the layer knows no positions.
    Off,
}

/// Queries grow slowly with their position: that of token `t`, counted from 0, is multiplied by
/// `1 + beta ln(1 + floor(t / length))`, which is 1 up to `length`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryTemperature {
    /// How fast.
    pub beta: f64,
    /// Tokens that are read as they are.
    pub length: usize,
}

impl QueryTemperature {
    /// The factor on the query at `position`.
    pub fn at(&self, position: usize) -> f64 {
        1.0 + self.beta * ((position / self.length.max(1)) as f64).ln_1p()
    }
}

/// What happens past the last learned position.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PositionPolicy {
    /// A text longer than the learned positions is an error.
    #[default]
    Error,
    /// Every later token takes the last position.
    Clamp,
    /// The positions are stretched over the expected length of the text, in between interpolated linearly.
    Interpolate,
    /// When the positions are used up, the last half of the tokens is read again from the first position on, as a text of its
    /// own, and what lies before is forgotten: every token reads what the model was trained to read, and at least half as far
    /// back, for up to twice the work.
    Slide,
    /// Rotary positions only: a token past the trained length reads what lies before its local region at positions the model
    /// was trained on; see [`bsbr_attn::FarPositions`].
    Grouped,
}
