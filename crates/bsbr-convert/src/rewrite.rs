//! Changing a converted model: other settings, weights that were added or changed, files of measurements.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::Path;

use bsbr_model::{EXTRA_PREFIX, ModelConfig, parameter_counts, weight_specs};
use bsbr_weights::Format;
use safetensors::Dtype;

use crate::ConvertError;
use crate::card::{reversibility, with_section};
use crate::casts::RecordedCast;
use crate::checkpoint::RECORD;
use crate::convert::{COMPANIONS, Progress, SOURCE_CONFIG, SOURCE_INDEX, pretty};
use crate::converted::ConvertedModel;
use crate::files::WEIGHTS;
use crate::gguf::SOURCE_GGUF;
use crate::output::{Replaceable, Staging};
use crate::record::IGNORED_PREFIX;
use crate::tensors::{CastLoss, Recipe, TensorDeclaration, TensorFileWriter, header_text};

/// What becomes of a converted model.
#[derive(Debug, Clone)]
pub struct Rewrite {
    /// Its new configuration.
    pub config: ModelConfig,
    /// Weights with new numbers, by their names, to be written in F32.
    pub weights: Vec<(String, Vec<f32>)>,
    /// Heading and text of a section of the model card; it replaces one of the same heading.
    pub section: (String, String),
    /// More files, by name.
    pub files: Vec<(String, String)>,
    /// Replace an earlier model in the output directory.
    pub force: bool,
}

/// Writes the converted model in `input` to `output`, which may be `input` itself, with some weights replaced or added.
///
/// # Errors
///
/// [`ConvertError::NotConverted`]; [`ConvertError::NoSuchWeight`] for a weight that the configuration asks for and nobody
/// gives, or that is given and nobody asks for; [`ConvertError::NotFinite`]; errors of the output as in
/// [`crate::convert()`]. After an error nothing is left behind.
pub fn rewrite(
    input: &Path,
    output: &Path,
    change: &Rewrite,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), ConvertError> {
    let source = ConvertedModel::open(input)?;
    change.config.validate()?;
    let tensors = outputs(&source, &change.config, &change.weights, Replaced::Any)?;
    let force = change.force || same(input, output);
    let mut record = source.record().clone();
    let reversible = reversibility(&record);
    for (tensor, origin) in &tensors {
        if let Origin::New(_) = origin
            && !tensor.name.starts_with(EXTRA_PREFIX)
        {
            record.changed = true;
            let stored = source.recipe(&tensor.name).and_then(|recipe| recipe.format()).unwrap_or(Format::F32);
            record_cast(&mut record.casts, &tensor.name, stored);
        }
    }
    let (before, added) = parameter_counts(&change.config);
    record.settings.clone_from(&change.config.attention);
    record.parameters_before = before;
    record.parameters_after = before + added;

    let staging = Staging::begin(output, force, Replaceable::model())?;
    write_tensors(&staging, &tensors, progress)?;
    staging.write("config.json", &pretty(&change.config, output)?)?;
    staging.write(RECORD, &pretty(&record, output)?)?;
    staging.copy_present(input, &[SOURCE_CONFIG, SOURCE_INDEX])?;
    // Rows that were changed are no rows of the file any more.
    if !record.changed {
        staging.copy_present(input, &[SOURCE_GGUF])?;
    }
    staging.copy_present(input, &COMPANIONS)?;
    // The card may have been edited, and what was measured stands nowhere else.
    let card = std::fs::read_to_string(input.join("README.md")).unwrap_or_default();
    let card = card.replace(reversible, reversibility(&record));
    let (heading, text) = &change.section;
    staging.write("README.md", with_section(&card, heading, text).as_bytes())?;
    for (name, text) in &change.files {
        staging.write(name, text.as_bytes())?;
    }
    drop(tensors);
    drop(source);
    staging.publish()
}

/// Which weights may get new numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replaced {
    /// Those BSBR added.
    Added,
    /// All.
    Any,
}

/// Where the numbers of a tensor come from.
pub(crate) enum Origin<'a> {
    /// The model there is.
    Kept(Recipe<'a>),
    /// Whoever changes it.
    New(&'a [f32]),
}

/// The tensors of a converted model with the configuration `config` and new numbers for some weights, in the order in which
/// they are written. New numbers are stored in F32.
pub(crate) fn outputs<'a>(
    source: &'a ConvertedModel,
    config: &ModelConfig,
    weights: &'a [(String, Vec<f32>)],
    replaced: Replaced,
) -> Result<Vec<(TensorDeclaration, Origin<'a>)>, ConvertError> {
    let missing = |tensor: &str, shape: &[usize]| ConvertError::NoSuchWeight {
        dir: source.dir().to_owned(),
        tensor: tensor.to_owned(),
        shape: shape.to_vec(),
    };
    let specs = weight_specs(config);
    let mut new: BTreeMap<&str, &[f32]> =
        weights.iter().map(|(name, numbers)| (name.as_str(), numbers.as_slice())).collect();
    let mut tensors = Vec::with_capacity(specs.len());
    for spec in specs {
        let allowed = spec.extra || replaced == Replaced::Any;
        let count = spec.shape.iter().product::<usize>();
        let origin = match new.remove(spec.name.as_str()) {
            Some(numbers) if !allowed || numbers.len() != count => return Err(missing(&spec.name, &[numbers.len()])),
            Some(numbers) => {
                if let Some(element) = numbers.iter().position(|number| !number.is_finite()) {
                    let (path, value) = (source.dir().to_owned(), numbers[element]);
                    return Err(ConvertError::NotFinite { path, tensor: spec.name, element, value });
                }
                Origin::New(numbers)
            }
            None => {
                let recipe = source.recipe(&spec.name).filter(|recipe| recipe.shape == spec.shape);
                Origin::Kept(recipe.ok_or_else(|| missing(&spec.name, &spec.shape))?)
            }
        };
        let declaration = match &origin {
            Origin::Kept(recipe) => recipe.declared(spec.name),
            Origin::New(_) => TensorDeclaration::plain(spec.name, Dtype::F32, spec.shape),
        };
        tensors.push((declaration, origin));
    }
    if let Some((name, numbers)) = new.into_iter().next() {
        return Err(missing(name, &[numbers.len()]));
    }
    for entry in source.file().header().tensors.iter().filter(|entry| entry.name.starts_with(IGNORED_PREFIX)) {
        if let Some(recipe) = source.recipe(&entry.name) {
            tensors.push((recipe.declared(entry.name.clone()), Origin::Kept(recipe)));
        }
    }
    // As a conversion orders them.
    tensors.sort_by_key(|(tensor, _)| Reverse(tensor.dtype.bitsize()));
    Ok(tensors)
}

/// Writes the file of weights.
pub(crate) fn write_tensors(
    staging: &Staging,
    tensors: &[(TensorDeclaration, Origin<'_>)],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), ConvertError> {
    let declarations: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
    let total = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut writer = TensorFileWriter::create(&staging.path().join(WEIGHTS), &header_text(&declarations), false)?;
    let mut done = 0;
    for (tensor, origin) in tensors {
        match origin {
            Origin::Kept(recipe) => recipe.for_each_stored_band(&mut |bytes| writer.write(bytes))?,
            Origin::New(numbers) => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                writer.write(&bytes)?;
            }
        }
        done += tensor.bytes() as u64;
        progress(Progress { stage: "writing", item: &tensor.name, done, total });
    }
    writer.finish()?;
    Ok(())
}

/// Whether two paths are one directory.
pub(crate) fn same(a: &Path, b: &Path) -> bool {
    match (std::fs::canonicalize(a), std::fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// Notes that a weight stored as `stored` is F32 from now on, which an export has to undo.
fn record_cast(casts: &mut Vec<RecordedCast>, name: &str, stored: Format) {
    let to = Format::F32.to_string();
    match casts.iter().position(|cast| cast.tensor == name) {
        Some(at) if casts[at].from == to => drop(casts.remove(at)),
        Some(at) => casts[at].to = to,
        // Codes of the source are F32 already where an export wants their numbers.
        None if stored != Format::F32 && !stored.is_quantised() => {
            casts.push(RecordedCast::new(name, [stored, Format::F32], CastLoss::default()));
        }
        None => {}
    }
}
