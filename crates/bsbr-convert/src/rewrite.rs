//! Changing a converted model: other settings, weights that were added or changed, files of measurements.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::Path;

use bsbr_model::{ModelConfig, parameter_counts, weight_specs};
use safetensors::Dtype;

use crate::ConvertError;
use crate::card::reversibility;
use crate::checkpoint::RECORD;
use crate::convert::{COMPANIONS, Progress, SOURCE_CONFIG, SOURCE_INDEX, pretty};
use crate::converted::ConvertedModel;
use crate::dtype::RecordedCast;
use crate::files::WEIGHTS;
use crate::output::{Staging, check_output};
use crate::record::IGNORED_PREFIX;
use crate::tensors::{CastLoss, TensorDeclaration, TensorFileWriter, header_text};

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

/// Writes the converted model in `input` to `output` with some weights replaced or added.
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
    let model = ConvertedModel::open(input)?;
    change.config.validate()?;
    check_output(output, change.force, |names| names.iter().any(|name| name == RECORD))?;
    let mut given: BTreeMap<&str, &[f32]> =
        change.weights.iter().map(|(name, numbers)| (name.as_str(), numbers.as_slice())).collect();
    let mut record = model.record().clone();
    let reversible = reversibility(&record);
    let mut tensors = Vec::new();
    for spec in weight_specs(&change.config) {
        let numbers = given.remove(spec.name.as_str());
        let recipe = model.recipe(&spec.name);
        let fits = match (numbers, &recipe) {
            (Some(numbers), _) => numbers.len() == spec.shape.iter().product::<usize>(),
            (None, recipe) => recipe.as_ref().is_some_and(|recipe| recipe.shape == spec.shape),
        };
        if !fits {
            return Err(ConvertError::NoSuchWeight { dir: input.to_owned(), tensor: spec.name, shape: spec.shape });
        }
        if let Some(bad) = numbers.and_then(|numbers| numbers.iter().position(|number| !number.is_finite())) {
            let value = numbers.map_or(f32::NAN, |numbers| numbers[bad]);
            return Err(ConvertError::NotFinite { path: output.to_owned(), tensor: spec.name, element: bad, value });
        }
        let stored = recipe.as_ref().map_or(Dtype::F32, |recipe| recipe.dtype);
        let dtype = if numbers.is_some() { Dtype::F32 } else { stored };
        if numbers.is_some() && !spec.extra {
            record.changed = true;
            record_cast(&mut record.casts, &spec.name, stored);
        }
        tensors.push((TensorDeclaration { name: spec.name, dtype, shape: spec.shape }, numbers, recipe));
    }
    if let Some((name, numbers)) = given.into_iter().next() {
        let (tensor, shape) = (name.to_owned(), vec![numbers.len()]);
        return Err(ConvertError::NoSuchWeight { dir: input.to_owned(), tensor, shape });
    }
    for entry in &model.file().header().tensors {
        if entry.name.starts_with(IGNORED_PREFIX) {
            let (name, dtype, shape) = (entry.name.clone(), entry.dtype, entry.shape.clone());
            tensors.push((TensorDeclaration { name, dtype, shape }, None, model.recipe(&entry.name)));
        }
    }
    tensors.sort_by_key(|(tensor, ..)| Reverse(tensor.dtype.bitsize()));

    let staging = Staging::new(output)?;
    let declarations: Vec<_> = tensors.iter().map(|(tensor, ..)| tensor.clone()).collect();
    let total = declarations.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut writer = TensorFileWriter::create(&staging.path().join(WEIGHTS), &header_text(&declarations), false)?;
    let mut done = 0;
    for (tensor, numbers, recipe) in &tensors {
        match (numbers, recipe) {
            (Some(numbers), _) => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                writer.write(&bytes)?;
            }
            (None, Some(recipe)) => recipe.for_each_band(|bytes| writer.write(bytes))?,
            (None, None) => unreachable!("checked above"),
        }
        done += tensor.bytes() as u64;
        progress(Progress { stage: "writing", item: &tensor.name, done, total });
    }
    writer.finish()?;

    let (before, added) = parameter_counts(&change.config);
    record.settings.clone_from(&change.config.attention);
    record.parameters_after = before + added;
    staging.write("config.json", &pretty(&change.config, output)?)?;
    staging.write(RECORD, &pretty(&record, output)?)?;
    staging.copy_present(input, &[SOURCE_CONFIG, SOURCE_INDEX])?;
    staging.copy_present(input, &COMPANIONS)?;
    let card_path = input.join("README.md");
    let card = if card_path.is_file() {
        std::fs::read_to_string(&card_path).map_err(ConvertError::io("read", &card_path))?
    } else {
        String::new()
    };
    let card = card.replace(reversible, reversibility(&record));
    staging.write("README.md", with_section(&card, &change.section).as_bytes())?;
    for (name, text) in &change.files {
        staging.write(name, text.as_bytes())?;
    }
    staging.publish()
}

/// Notes that a weight stored as `stored` is F32 from now on, which an export has to undo.
fn record_cast(casts: &mut Vec<RecordedCast>, name: &str, stored: Dtype) {
    let to = Dtype::F32.to_string();
    match casts.iter().position(|cast| cast.tensor == name) {
        Some(at) if casts[at].from == to => drop(casts.remove(at)),
        Some(at) => casts[at].to = to,
        None if stored != Dtype::F32 => {
            let loss = CastLoss { changed: 0, underflowed: 0, largest_relative_error: 0.0 };
            casts.push(RecordedCast::new(name, [stored, Dtype::F32], loss));
        }
        None => {}
    }
}

/// A text with a section at its end, in place of an earlier one of the same heading.
fn with_section(card: &str, (heading, text): &(String, String)) -> String {
    let start = format!("\n## {heading}\n");
    let kept = match card.split_once(&start) {
        Some((before, after)) => match after.find("\n## ") {
            Some(next) => format!("{before}{}", &after[next..]),
            None => before.to_owned(),
        },
        None => card.to_owned(),
    };
    format!("{kept}{start}\n{text}\n")
}
