//! The words a configuration may use.

use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Into what the outputs of a linear layer are cut.
///
/// `false` is read as `none`, as older configurations write it; `true` is an error, because it does not say which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// One part.
    #[default]
    None,
    /// Queries, keys and values.
    Qkv,
    /// Each head of the queries, of the keys and of the values.
    Heads,
}

/// The side of a weight whose basis the layers of a group share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Share {
    /// The inputs: `y = (x basis) c_i`. For layers that read the residual stream.
    #[default]
    Input,
    /// The outputs: `y = (x c_i) basis`. For layers that write the residual stream.
    Output,
    /// Nothing: every layer has a basis of its own, laid out as for [`Share::Input`].
    None,
}

/// How the factors of a group are kept. What they compute is the same; a rank costs less where it is pivoted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Two matrices, all of whose numbers are kept: `y = (x basis) coefficients`.
    #[default]
    TwoFactor,
    /// The basis passes some inputs on as they are, one for each of its dimensions (an interpolative decomposition): a
    /// product of rank `r` has `r^2` numbers fewer than its two factors, and these it does not keep. Not for a shared
    /// output side.
    Pivoted,
}

impl Form {
    /// For files, which do not say so.
    pub(crate) fn is_two_factor(&self) -> bool {
        *self == Self::TwoFactor
    }
}

/// What the error is measured on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// The outputs of the layer on calibration text.
    #[default]
    Activations,
    /// The weights themselves: plain truncated SVD, for comparison.
    Weights,
}

/// What is added to the diagonal of the second moments of a layer's inputs, as a fraction of their mean.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Ridge {
    /// 0.01 with fewer than 4 tokens for each input, 0.001 with more.
    #[default]
    Auto,
    /// This fraction; 0 for none.
    Relative(f64),
}

/// The inputs a layer is fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CalibrationMode {
    /// Those it has in the original model.
    #[default]
    Independent,
    /// Those the compressed layers before it give; its outputs are drawn to what the original model has there.
    #[serde(alias = "sequential_anchored")]
    SequentialAnchored,
}

/// Whether coefficients are fitted to their own layer once the shared basis is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refit {
    /// No.
    Off,
    /// Yes, and kept where the error on held-out text is smaller for it.
    #[default]
    Guarded,
}

/// How parameters are given to groups. The sum over all groups is the same for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RankAllocation {
    /// The same fraction to each.
    #[default]
    Uniform,
    /// More to groups whose spectrum is flatter, by its effective rank (D-Rank).
    #[serde(alias = "drank")]
    DRank,
    /// Parameter by parameter to the group whose error shrinks most for it.
    #[serde(alias = "waterfill", alias = "marginal_loss")]
    MarginalLoss,
    /// The same with the errors in units of what they do to what the model predicts: measured on a little of the
    /// calibration text with each group compressed by itself, and kept where held-out text is served better for it.
    Sensitivity,
}

/// What the error of a layer counts beside that of other layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// Squared errors are summed as they are: loud layers count more.
    #[default]
    Sum,
    /// Each is divided by the energy of the layer's outputs.
    Relative,
}

impl<'de> Deserialize<'de> for Split {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = Split;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("`none`, `qkv` or `heads`")
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Split, E> {
                if value {
                    return Err(E::custom("`split: true` does not say into what: write `none`, `qkv` or `heads`"));
                }
                Ok(Split::None)
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Split, E> {
                match value {
                    "none" => Ok(Split::None),
                    "qkv" => Ok(Split::Qkv),
                    "heads" => Ok(Split::Heads),
                    _ => Err(E::invalid_value(de::Unexpected::Str(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(Words)
    }
}

impl Serialize for Ridge {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Relative(value) => serializer.serialize_f64(*value),
        }
    }
}

impl<'de> Deserialize<'de> for Ridge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = Ridge;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("`auto` or a number")
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Ridge, E> {
                Ok(Ridge::Relative(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Ridge, E> {
                Ok(Ridge::Relative(value as f64))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Ridge, E> {
                Ok(Ridge::Relative(value as f64))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Ridge, E> {
                if value == "auto" { Ok(Ridge::Auto) } else { Err(E::invalid_value(de::Unexpected::Str(value), &self)) }
            }
        }
        deserializer.deserialize_any(Words)
    }
}
