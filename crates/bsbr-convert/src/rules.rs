//! The rule language: how the tensors of one architecture become the weights of the decoder, as data.
//!
//! Rules name tensors by full-name templates, never by patterns, so that both directions are plain lists:
//! `{p}` stands for the prefix of the checkpoint, `{h}` for that of its output head, `{i}` for the layer, `{e}` for the expert
//! and `{j}` for the parts of an [`Op::Stack`]. Only whole parts of a file that belong to no decoder are named by how they begin.
//! No rule computes with weights: every op moves numbers without changing them, and so has an exact inverse. What
//! would need arithmetic (a scale, an offset) is a setting of the decoder instead.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use bsbr_model::{DecoderConfig, LayerKeys, Positions};

use crate::ConvertError;
use crate::json::ConfigFile;

/// Everything the converter knows about one architecture.
#[derive(Debug, Clone, Copy)]
pub struct Architecture {
    /// Name of the rules, recorded in converted models.
    pub id: &'static str,
    /// Raised when the rules change their meaning; converted models record it.
    pub version: u32,
    /// Values of `model_type` in `config.json` these rules serve.
    pub model_types: &'static [&'static str],
    /// What may stand for `{p}`, tried in order.
    pub prefixes: &'static [&'static str],
    /// A tensor every checkpoint has: the first prefix under which it exists is taken.
    pub anchor: &'static str,
    /// Boolean keys of `config.json` that rules depend on, for hints about settings that would fit.
    pub alternatives: &'static [&'static str],
    /// What tells files of one layout from those of another.
    pub layouts: &'static [Layout],
    /// Variants the decoder does not compute.
    pub rejects: &'static [Reject],
    /// The rules.
    pub rules: &'static [Rule],
    /// Reads `config.json`.
    pub read_config: fn(&ConfigFile) -> Result<SourceModel, ConvertError>,
}

impl Architecture {
    /// Every name under which a rule reads a weight of `decoder` in a checkpoint, whatever the conditions. Of a stack only the
    /// first part.
    pub(crate) fn source_names(&self, prefix: Prefix, decoder: &DecoderConfig) -> HashSet<String> {
        let sources = self.rules.iter().filter_map(|rule| match *rule {
            Rule::Map { source, .. } => Some(source),
            _ => None,
        });
        sources
            .flat_map(|source| {
                places(source, decoder).map(move |(layer, expert)| expand(source, prefix, (layer, expert), 0))
            })
            .collect()
    }
}

/// A flag that is set where a tensor is there in any layer: one architecture in files of two layouts.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// The flag.
    pub flag: &'static str,
    /// Template of the name of the tensor.
    pub tensor: &'static str,
    /// Its shape, where the layouts share its name.
    pub shape: Option<&'static [Dim]>,
}

/// What stands before the names of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// For `{p}`: before the embedding table, the layers and the last norm.
    pub body: &'static str,
    /// For `{h}`: before the output head.
    pub head: &'static str,
}

impl Prefix {
    /// With a head that has none.
    pub const fn of_body(body: &'static str) -> Self {
        Self { body, head: "" }
    }
}

/// A model around a decoder that reads more than texts: the decoder is the part that one object of `config.json` describes,
/// the tensors of all other parts are kept aside.
#[derive(Debug, Clone, Copy)]
pub struct Wrapper {
    /// Values of `model_type` in `config.json`.
    pub model_types: &'static [&'static str],
    /// `model_type` of the decoder where its object does not say it, or where its settings stand beside those of the others.
    pub text_type: &'static str,
    /// Whether older files have the settings of the decoder beside those of the other parts.
    pub flat: bool,
    /// Which flag ties the output head.
    pub tie: TieFlag,
    /// Keys of the decoder's object that this model does not read, although the decoder alone does.
    pub unread: &'static [&'static str],
    /// What may stand for `{p}` and `{h}`, tried in order.
    pub prefixes: &'static [Prefix],
    /// What is kept aside.
    pub aside: &'static [Rule],
}

/// The `tie_word_embeddings` that counts where there are two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TieFlag {
    /// That of the whole, with its default; the one inside is not read.
    Outer {
        /// Where the key is absent.
        default: bool,
    },
    /// Either.
    Either,
}

/// A key of `config.json` that must not be `true`.
#[derive(Debug, Clone, Copy)]
pub struct Reject {
    /// The key.
    pub key: &'static str,
    /// What the decoder lacks.
    pub why: &'static str,
}

/// What `config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceModel {
    /// The decoder. `tied_head` is what the configuration declares; the file has the last word.
    pub decoder: DecoderConfig,
    /// Conditions that rules ask for.
    pub flags: BTreeMap<&'static str, bool>,
    /// What `tie_word_embeddings` in the file says.
    pub tie_declared: Option<bool>,
    /// Layers after the last that predict further tokens, in files that hold them.
    pub next_token_layers: usize,
}

impl SourceModel {
    /// The numbers of the layers after the last.
    pub(crate) fn layers_beyond(&self) -> Range<usize> {
        self.decoder.layers..self.decoder.layers.saturating_add(self.next_token_layers)
    }

    /// Whether a condition holds; `None` for a flag nobody sets.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.flags.get(name).copied()
    }
}

/// One rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// A tensor (or several, under [`Op::Stack`]) becomes one weight or several.
    Map {
        /// Template of the source.
        source: &'static str,
        /// Templates of the weights.
        targets: &'static [&'static str],
        /// What happens to the numbers, in order.
        ops: &'static [Op],
        /// When the rule applies.
        when: When,
    },
    /// An output head that may be a copy of the embedding table, or be left out for it.
    Tie {
        /// Template of the head.
        head: &'static str,
        /// Template of the embedding table.
        embed: &'static str,
        /// The weight an own head becomes.
        target: &'static str,
    },
    /// A tensor that is no weight. It is kept aside so that an export gives it back.
    Ignore {
        /// Template of its full name.
        name: &'static str,
        /// What it is.
        why: &'static str,
    },
    /// The same in some layers.
    IgnoreIn {
        /// Template of its full name.
        name: &'static str,
        /// In which.
        when: When,
        /// What it is.
        why: &'static str,
    },
    /// A part that is none of the decoder: every tensor whose name begins so. Kept aside likewise.
    IgnorePart {
        /// Template of the beginning; with `{i}` it stands for the [`SourceModel::next_token_layers`] after the last.
        start: &'static str,
        /// What it is.
        why: &'static str,
    },
}

/// When a rule applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// If the flag is set.
    Flag(&'static str),
    /// If the flag is not set.
    Not(&'static str),
    /// In layers with experts.
    Experts,
    /// In layers with one MLP.
    Dense,
    /// In layers with keys of their own.
    OwnKeys,
    /// In layers with values of their own.
    OwnValues,
    /// In layers that read the keys and values of another.
    SharedKeys,
    /// In layers with attention.
    Attention,
    /// In layers that keep a state in place of keys and values.
    Recurrent,
    /// If all of these hold.
    All(&'static [When]),
}

impl When {
    /// Whether the rule applies to `model`, in some layer at least; `None` for a flag nobody sets.
    pub fn holds(self, model: &SourceModel) -> Option<bool> {
        match self {
            Self::Always
            | Self::Dense
            | Self::OwnKeys
            | Self::OwnValues
            | Self::SharedKeys
            | Self::Attention
            | Self::Recurrent => Some(true),
            Self::Experts => Some(model.decoder.experts.is_some()),
            Self::Flag(name) => model.flag(name),
            Self::Not(name) => model.flag(name).map(|set| !set),
            Self::All(parts) => parts.iter().try_fold(true, |all, part| Some(part.holds(model)? && all)),
        }
    }

    /// Whether a rule that applies to a model of `decoder` does so in layer `layer`.
    pub(crate) fn holds_in(self, decoder: &DecoderConfig, layer: usize) -> bool {
        match self {
            Self::Experts => decoder.layer_experts(layer).is_some(),
            Self::Dense => decoder.layer_experts(layer).is_none(),
            Self::OwnKeys => decoder.key_owner(layer).is_none(),
            Self::OwnValues => decoder.shape(layer).keys == LayerKeys::Own,
            Self::SharedKeys => decoder.key_owner(layer).is_some(),
            Self::Attention => decoder.layer_recurrent(layer).is_none(),
            Self::Recurrent => decoder.layer_recurrent(layer).is_some(),
            Self::All(parts) => parts.iter().all(|part| part.holds_in(decoder, layer)),
            Self::Always | Self::Flag(_) | Self::Not(_) => true,
        }
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always => f.write_str("always"),
            Self::Experts => f.write_str("layers with experts"),
            Self::Dense => f.write_str("layers without experts"),
            Self::OwnKeys => f.write_str("layers with own keys"),
            Self::OwnValues => f.write_str("layers with own values"),
            Self::SharedKeys => f.write_str("layers with shared keys"),
            Self::Attention => f.write_str("layers with attention"),
            Self::Recurrent => f.write_str("recurrent layers"),
            Self::Flag(name) => f.write_str(name),
            Self::Not(name) => write!(f, "not {name}"),
            Self::All(parts) => f.write_str(&parts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")),
        }
    }
}

/// What happens to the numbers of a tensor. Every op is a bijection on them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Op {
    /// The last two axes `[a, b]` to `[b, a]`; only as the first op. GPT-2 stores linear weights as `[in, out]`.
    Transpose,
    /// One tensor to as many as its first axis has entries, which are the experts; the ops after it are done to each.
    Unstack {
        /// How many.
        count: Dim,
    },
    /// One tensor to as many as there are parts: axis 0 is `groups` times the parts one after the other, and each
    /// part collects its rows of every group.
    Split {
        /// Times the parts repeat: 1 for `[Q; K; V]`, the KV heads for a layout interleaved per head.
        groups: Dim,
        /// Rows of each part within a group.
        parts: &'static [Dim],
    },
    /// Rows `[x0, y0, x1, y1, ...]` of each head to `[x0, x1, ..., y0, y1, ...]`: from rotary positions that pair
    /// neighbours to the decoder's, which pair halves. Rows beyond `rotary` stay.
    RopePermute {
        /// Heads in axis 0.
        heads: Dim,
        /// Rows of a head.
        head_dim: Dim,
        /// Rows of a head that rotate.
        rotary: Dim,
    },
    /// Rows `[x, y]` of each head, halves of its width, to `[y, x]`: from rotary positions that turn backwards to the decoder's.
    SwapHalves {
        /// Heads in axis 0.
        heads: Dim,
        /// Rows of a head.
        head_dim: Dim,
    },
    /// What happens to each of several tensors by itself, one list of ops for each; only after [`Op::Split`].
    Each(&'static [&'static [Op]]),
    /// `count` tensors, named by `{j}`, to one with a new first axis.
    Stack {
        /// How many.
        count: Dim,
    },
}

/// A size, computed from the decoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Dim {
    /// A fixed number.
    N(usize),
    /// Width of the residual stream.
    Hidden,
    /// Query heads.
    Heads,
    /// KV heads.
    KvHeads,
    /// Width of a head.
    HeadDim,
    /// Rotating dimensions of a head; 0 without rotary positions.
    Rotary,
    /// Dimensions of a head that do not rotate, of latent attention.
    Still,
    /// Width of a value of latent attention.
    ValueDim,
    /// Width of the vector that its keys and values are made of.
    LatentRank,
    /// Inner width of the MLP.
    Intermediate,
    /// Experts.
    Experts,
    /// Inner width of an expert.
    ExpertSize,
    /// Inner width of the expert that every token goes through.
    SharedSize,
    /// Width of the queries, and of the keys, of a recurrent layer.
    RecurrentKeys,
    /// Width of its values.
    RecurrentValues,
    /// Its heads of queries and keys.
    RecurrentKeyHeads,
    /// Its heads of values.
    RecurrentValueHeads,
    /// Product.
    Mul(&'static Dim, &'static Dim),
    /// Quotient; must be exact.
    Div(&'static Dim, &'static Dim),
    /// Sum.
    Add(&'static Dim, &'static Dim),
}

impl Dim {
    /// The number for `decoder`; `None` when a division leaves a rest or a result overflows.
    pub fn resolve(&self, decoder: &DecoderConfig) -> Option<usize> {
        let of = |dim: &Dim| dim.resolve(decoder);
        Some(match self {
            Self::N(n) => *n,
            Self::Hidden => decoder.hidden_size,
            Self::Heads => decoder.heads,
            Self::KvHeads => decoder.kv_heads,
            Self::HeadDim => decoder.head_dim,
            Self::Rotary => match decoder.positions {
                Positions::Rotary { rotary_dim, .. } => rotary_dim,
                _ => 0,
            },
            Self::Still => decoder.latent_parts()?.1,
            Self::ValueDim => decoder.latent?.value_dim,
            Self::LatentRank => decoder.latent?.rank,
            Self::Intermediate => decoder.intermediate_size,
            Self::Experts => decoder.experts.as_ref()?.count,
            Self::ExpertSize => decoder.experts.as_ref()?.intermediate_size,
            Self::SharedSize => decoder.experts.as_ref()?.shared?.intermediate_size,
            Self::RecurrentKeys => decoder.recurrent.as_ref()?.keys_width(),
            Self::RecurrentValues => decoder.recurrent.as_ref()?.values_width(),
            Self::RecurrentKeyHeads => decoder.recurrent.as_ref()?.key_heads,
            Self::RecurrentValueHeads => decoder.recurrent.as_ref()?.value_heads,
            Self::Mul(a, b) => of(a)?.checked_mul(of(b)?)?,
            Self::Add(a, b) => of(a)?.checked_add(of(b)?)?,
            Self::Div(a, b) => {
                let (a, b) = (of(a)?, of(b)?);
                (b != 0 && a % b == 0).then(|| a / b)?
            }
        })
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::N(n) => write!(f, "{n}"),
            Self::Hidden => f.write_str("hidden"),
            Self::Heads => f.write_str("heads"),
            Self::KvHeads => f.write_str("kv_heads"),
            Self::HeadDim => f.write_str("head_dim"),
            Self::Rotary => f.write_str("rotary"),
            Self::Still => f.write_str("still"),
            Self::ValueDim => f.write_str("value_dim"),
            Self::LatentRank => f.write_str("latent_rank"),
            Self::Intermediate => f.write_str("intermediate"),
            Self::Experts => f.write_str("experts"),
            Self::ExpertSize => f.write_str("expert_size"),
            Self::SharedSize => f.write_str("shared_size"),
            Self::RecurrentKeys => f.write_str("recurrent_keys"),
            Self::RecurrentValues => f.write_str("recurrent_values"),
            Self::RecurrentKeyHeads => f.write_str("recurrent_key_heads"),
            Self::RecurrentValueHeads => f.write_str("recurrent_value_heads"),
            Self::Mul(a, b) => write!(f, "{a}*{b}"),
            Self::Div(a, b) => write!(f, "({a}/{b})"),
            Self::Add(a, b) => write!(f, "({a}+{b})"),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transpose => f.write_str("transpose"),
            Self::Unstack { count } => write!(f, "unstack {count}"),
            Self::Split { groups, parts } => {
                let parts: Vec<_> = parts.iter().map(ToString::to_string).collect();
                write!(f, "split {groups} x [{}]", parts.join(", "))
            }
            Self::RopePermute { heads, head_dim, rotary } => write!(f, "rope-permute {heads} x {head_dim} ({rotary})"),
            Self::SwapHalves { heads, head_dim } => write!(f, "swap-halves {heads} x {head_dim}"),
            Self::Each(lists) => {
                let lists = lists.iter().map(|ops| ops.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
                write!(f, "each [{}]", lists.collect::<Vec<_>>().join(" | "))
            }
            Self::Stack { count } => write!(f, "stack {count}"),
        }
    }
}

/// Fills a template. Indices that the template does not name are not used.
pub(crate) fn expand(template: &str, prefix: Prefix, (layer, expert): (usize, usize), part: usize) -> String {
    let name = template.replace("{i}", &layer.to_string()).replace("{j}", &part.to_string());
    let name = name.replace("{e}", &expert.to_string());
    name.replace("{p}", prefix.body).replace("{h}", prefix.head)
}

/// Whether `name` belongs to the part that begins with `start`: with `{i}`, to one of `layers`.
pub(crate) fn is_of_part(name: &str, start: &str, prefix: Prefix, layers: Range<usize>) -> bool {
    let start = start.replace("{p}", prefix.body).replace("{h}", prefix.head);
    let Some((before, after)) = start.split_once("{i}") else { return name.starts_with(&start) };
    let layer = || {
        let (digits, rest) = name.strip_prefix(before)?.split_at_checked(name[before.len()..].find(after)?)?;
        rest.starts_with(after).then_some(digits.parse::<usize>().ok()?)
    };
    layer().is_some_and(|layer| layers.contains(&layer))
}

/// The layers and experts that a template stands for.
pub(crate) fn places(template: &str, decoder: &DecoderConfig) -> impl Iterator<Item = (usize, usize)> + use<> {
    let layers = if template.contains("{i}") { decoder.layers } else { 1 };
    let each = template.contains("{e}");
    let experts = if each { decoder.experts.as_ref().map_or(0, |experts| experts.count) } else { 1 };
    (0..layers).flat_map(move |layer| (0..experts).map(move |expert| (layer, expert)))
}

/// The weights that a rule with this source fills at one of its [`places`]: of all experts where only the targets name them.
pub(crate) fn target_names(
    source: &str,
    targets: &[&str],
    decoder: &DecoderConfig,
    (layer, expert): (usize, usize),
) -> Vec<String> {
    let bare = Prefix::of_body("");
    let unstacked = !source.contains("{e}") && targets.iter().any(|target| target.contains("{e}"));
    let experts =
        if unstacked { 0..decoder.experts.as_ref().map_or(0, |experts| experts.count) } else { expert..expert + 1 };
    let of = |expert| targets.iter().map(move |target| expand(target, bare, (layer, expert), 0));
    experts.flat_map(of).collect()
}
