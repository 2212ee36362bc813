//! The weights of a converted model: what each is made of, and writing them band by band.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use bsbr_model::{DecoderConfig, ModelConfig, weight_specs};
use bsbr_weights::Format;

use crate::ConvertError;
use crate::casts::RecordedCast;
use crate::convert::{ConvertOptions, Progress};
use crate::derive;
use crate::planning::PlannedCheckpoint;
use crate::policy::WeightsPolicy;
use crate::record::IGNORED_PREFIX;
use crate::scaled::Scaled;
use crate::tensors::{Recipe, TensorDeclaration, TensorFileWriter, header_text, plain_format};

/// Where the numbers of a tensor of the output come from.
pub(crate) enum Origin<'a> {
    /// Moved, and cast or encoded if its declaration has another format.
    Moved(Recipe<'a>),
    /// The mean of two weights, in F32.
    Mean([Recipe<'a>; 2]),
    /// No weight, only waiting for an export.
    KeptAside(Recipe<'a>),
}

/// What [`write_weights`] did.
pub(crate) struct Written {
    /// Bytes of the file.
    pub(crate) bytes: u64,
    /// What was cast.
    pub(crate) casts: Vec<RecordedCast>,
    /// What there is of each number format.
    pub(crate) formats: BTreeMap<String, FormatTotal>,
    /// Names of tensors of the source that are kept as they stand there.
    pub(crate) aside: HashSet<String>,
}

/// What a file holds in one number format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FormatTotal {
    /// Tensors.
    pub tensors: usize,
    /// Numbers in them.
    pub numbers: u64,
    /// Bytes they take.
    pub bytes: u64,
}

impl FormatTotal {
    /// Adds a tensor.
    pub(crate) fn add(&mut self, numbers: usize, bytes: usize) {
        self.tensors += 1;
        self.numbers += numbers as u64;
        self.bytes += bytes as u64;
    }
}

/// What there is of each number format, tensors kept aside left out.
pub(crate) fn format_totals<'a>(tensors: impl Iterator<Item = &'a TensorDeclaration>) -> BTreeMap<String, FormatTotal> {
    let mut totals: BTreeMap<String, FormatTotal> = BTreeMap::new();
    for tensor in tensors.filter(|tensor| !tensor.name.starts_with(IGNORED_PREFIX)) {
        let numbers = tensor.numbers().iter().product();
        totals.entry(tensor.format()).or_default().add(numbers, tensor.bytes());
    }
    totals
}

/// Writes the weights to `path`.
pub(crate) fn write_weights(
    planned: &PlannedCheckpoint,
    config: &ModelConfig,
    options: &ConvertOptions,
    path: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Written, ConvertError> {
    let tensors = outputs(planned, config, options.weights)?;
    if let Some(name) = options.importance.keys().find(|name| !tensors.iter().any(|(tensor, _)| tensor.name == **name))
    {
        let dir = planned.checkpoint.dir().to_owned();
        return Err(ConvertError::NoSuchWeight { dir, tensor: name.clone(), shape: Vec::new() });
    }
    let declarations: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
    let total = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut done = 0;
    let mut casts = Vec::new();
    let mut writer = TensorFileWriter::create(path, &header_text(&declarations), false)?;
    for (tensor, origin) in &tensors {
        match origin {
            Origin::Moved(recipe) => {
                let own = recipe.format();
                let to = tensor.codes.or(plain_format(tensor.dtype));
                let loss = match (tensor.codes, own, to) {
                    (_, own, to) if own == to => {
                        recipe.for_each_checked_band(&mut |bytes| writer.write(bytes))?;
                        None
                    }
                    (Some(format), ..) => {
                        let importance = options.importance.get(&tensor.name).map(Vec::as_slice);
                        Some(recipe.for_each_encoded_band(format, importance, |bytes| writer.write(bytes))?)
                    }
                    (None, ..) => {
                        let loss = recipe.for_each_cast_band(tensor.dtype, |bytes| writer.write(bytes))?;
                        // Numbers that codes stand for are as good as the codes, unless they are rounded.
                        Some(loss).filter(|_| tensor.dtype != recipe.dtype)
                    }
                };
                if let (Some(loss), Some(from), Some(to)) = (loss, plain_format(recipe.dtype), to) {
                    casts.push(RecordedCast::new(&tensor.name, [from, to], loss));
                }
            }
            Origin::KeptAside(recipe) => recipe.for_each_band(|bytes| writer.write(bytes))?,
            Origin::Mean(recipes) => {
                derive::for_each_head(recipes, heads_of(&config.decoder, &tensor.shape), |rows| {
                    let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
                    writer.write(&bytes)
                })?
            }
        }
        done += tensor.bytes() as u64;
        progress(Progress { stage: "writing", item: &tensor.name, done, total });
    }
    let aside = declarations.iter().filter_map(|tensor| tensor.name.strip_prefix(IGNORED_PREFIX));
    let aside = aside.map(str::to_owned).collect();
    Ok(Written { bytes: writer.finish()?.0, casts, formats: format_totals(declarations.iter()), aside })
}

/// How many query heads there are, and the width of one where all of them together have this shape.
fn heads_of(decoder: &DecoderConfig, shape: &[usize]) -> (usize, usize) {
    (decoder.heads, shape.first().copied().unwrap_or_default() / decoder.heads)
}

/// The tensors of the output in the order in which they are written.
pub(crate) fn outputs<'a>(
    planned: &'a PlannedCheckpoint,
    config: &ModelConfig,
    policy: WeightsPolicy,
) -> Result<Vec<(TensorDeclaration, Origin<'a>)>, ConvertError> {
    let fail = |name: &str| ConvertError::Rules {
        rules: planned.plan.architecture.id,
        problem: format!("nothing gives `{name}`"),
    };
    let recipe = |name: &str| planned.recipe(name)?.ok_or_else(|| fail(name));
    let mut tensors = Vec::new();
    for spec in weight_specs(config) {
        let (format, origin) = match derive::sources(&spec.name, &config.decoder) {
            Some([a, b]) => (Format::F32, Origin::Mean([recipe(&a)?, recipe(&b)?])),
            None => {
                let recipe = recipe(&spec.name)?;
                let own = recipe.format().ok_or_else(|| fail(&spec.name))?;
                (policy.apply(&spec, own), Origin::Moved(recipe))
            }
        };
        tensors.push((TensorDeclaration::weight(spec.name, format, spec.shape), origin));
    }
    let codes: HashMap<String, Option<Format>> =
        tensors.iter().map(|(tensor, _): &(TensorDeclaration, _)| (tensor.name.clone(), tensor.codes)).collect();
    for name in kept_aside(planned, policy, &|name| codes.get(name).copied().flatten()) {
        let source = planned.checkpoint.standing(&name).ok_or_else(|| fail(&name))?;
        let declaration =
            TensorDeclaration::plain(format!("{IGNORED_PREFIX}{name}"), source.entry.dtype, source.entry.shape.clone());
        tensors.push((declaration, Origin::KeptAside(Recipe::whole(source))));
    }
    // Wider formats first, as other writers do: every tensor then starts at a multiple of the size of its numbers.
    tensors.sort_by_key(|(tensor, _)| Reverse(tensor.dtype.bitsize()));
    Ok(tensors)
}

/// Tensors of the checkpoint that a converted model keeps as they stand there, by their names: those that are no weights, and those of which
/// its weights do not hold every bit. `codes` says which weights are codes.
///
/// The codes of a source that get another format on request are not among them.
pub(crate) fn kept_aside(
    planned: &PlannedCheckpoint,
    policy: WeightsPolicy,
    codes: &dyn Fn(&str) -> Option<Format>,
) -> Vec<String> {
    let PlannedCheckpoint { checkpoint, plan, .. } = planned;
    let scaled: HashMap<&str, &Scaled> = checkpoint.scaled().iter().map(|it| (it.codes.as_str(), it)).collect();
    let with_scales = |name: &str| {
        let scales = scaled.get(name).map(|scaled| scaled.scales.clone());
        std::iter::once(name.to_owned()).chain(scales)
    };
    let mut kept: Vec<String> = plan.ignored.iter().flat_map(|ignored| with_scales(&ignored.tensor.name)).collect();
    let weights = checkpoint.tensors().filter(|(_, tensor)| plan.reading(&tensor.name).is_some());
    for (file, tensor) in weights.filter(|(file, tensor)| file.standing(&tensor.name).is_some()) {
        let Some((step, _)) = plan.reading(&tensor.name) else { continue };
        let held = match scaled.get(tensor.name.as_str()) {
            Some(_) if policy != WeightsPolicy::Keep => true,
            Some(scaled) => {
                let format = scaled.format();
                format.is_some() && step.targets.iter().all(|target| codes(&target.name) == format)
            }
            // Numbers of 64 bits.
            None => file.standing(&tensor.name).is_none(),
        };
        if !held {
            kept.extend(with_scales(&tensor.name));
        }
    }
    kept
}
