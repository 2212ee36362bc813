//! Exporting: a converted model back to the Hugging Face checkpoint it was made of.

use std::collections::HashMap;
use std::path::Path;

use crate::ConvertError;
use crate::arch::architecture;
use crate::casts::RecordedCast;
use crate::checkpoint::RECORD;
use crate::convert::{COMPANIONS, Progress, SOURCE_CONFIG, SOURCE_INDEX};
use crate::converted::ConvertedModel;
use crate::files::INDEX;
use crate::gguf::{Held, SOURCE_GGUF, open_rest};
use crate::json::ConfigFile;
use crate::output::{Replaceable, Staging};
use crate::plan::Plan;
use crate::planning::plan_recorded;
use crate::problem::PlanProblem;
use crate::record::{ConversionRecord, IGNORED_PREFIX};
use crate::rules::Architecture;
use crate::scaled::{self, Part, Scaled};
use crate::tensors::{BAND, Dtype, FileFormat, Header, Recipe, TensorEntry, TensorFileWriter, TensorRef, row_runs};

/// What an export did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportReport {
    /// The weight files written.
    pub files: Vec<ExportedFile>,
}

impl ExportReport {
    /// Whether every file is the original one, byte for byte, or, where the original is of another format, holds its
    /// tensors bit for bit. Not so when weights were changed after converting.
    pub fn is_original(&self) -> bool {
        self.files.iter().all(|file| file.is_original)
    }
}

/// One weight file of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedFile {
    /// Name.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// SHA-256.
    pub sha256: String,
    /// Whether that is the hash of the file that was converted, or, where that one is of another format, of a file
    /// with exactly its tensors.
    pub is_original: bool,
    /// The file of another format whose tensors these are.
    pub instead_of: Option<String>,
    /// Whether that file was quantised: these are its numbers, but not its codes.
    pub decoded: bool,
}

/// Writes the checkpoint that the converted model in `converted` was made of to `output`: the same files, names,
/// shards, headers and tensors, `config.json`, index and tokenizer. Weights that BSBR added stay behind.
///
/// No pickle is written: in place of a PyTorch file there is a safetensors file with the same tensors bit for bit, named
/// as transformers names it, and the index names those files. Tensors that shared their bytes are written once each. Nor
/// is a GGUF file written, which is what [`export_gguf`] does: its tensors come in one safetensors file, under the names and in the order
/// of Hugging Face, quantised ones as the numbers their codes stand for.
///
/// `force` replaces a directory that holds a converted model, or nothing but files an export writes.
///
/// # Errors
///
/// [`ConvertError::NotConverted`]; [`ConvertError::Version`] for a model made by other rules;
/// [`ConvertError::LossyCast`] for one whose weights were cast with loss: it holds no original; [`ConvertError::CodesGone`] for one made of
/// codes that has them no more; [`ConvertError::Plan`]
/// when the directory does not hold the tensors it should; errors of the output as in [`crate::convert()`]. After an
/// error nothing is left behind.
pub fn export(
    converted: &Path,
    output: &Path,
    force: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<ExportReport, ConvertError> {
    let model = ConvertedModel::open(converted)?;
    if model.config().split.is_some() {
        let what = "its linear layers are factors: fold it, or export the model it was made of";
        return Err(ConvertError::Compressed { dir: converted.to_owned(), what });
    }
    let record = model.record();
    let record_path = converted.join(RECORD);
    let format = |problem| ConvertError::Format { path: record_path.clone(), problem: Box::new(problem) };
    let headers: Result<Vec<Header>, _> = record.files.iter().map(|file| Header::parse(file.header.clone())).collect();
    let headers = headers.map_err(format)?;
    let config = ConfigFile::open(&converted.join(SOURCE_CONFIG))?;
    check_version(architecture(&config)?, record, &record_path)?;
    check_casts(converted, record)?;
    let plan = plan_recorded(converted, &config, &record.prefix, record.head, &headers)?;
    let entries: Vec<&TensorEntry> = headers.iter().flat_map(|header| &header.tensors).collect();
    let scaled = scaled::of_checkpoint(converted, &config, &entries)?;
    let parts: HashMap<&str, (&Scaled, Part)> = scaled
        .iter()
        .flat_map(|it| [(it.codes.as_str(), (it, Part::Codes)), (it.scales.as_str(), (it, Part::Scales))])
        .collect();
    check_names(record, &record_path)?;

    let staging = Staging::begin(output, force, replaceable(record))?;
    let total = headers.iter().map(|header| header.data_len as u64).sum();
    let mut done = 0;
    let mut files = Vec::new();
    for (file, header) in record.files.iter().zip(&headers) {
        let (name, expected) = file.exported();
        let mut writer = TensorFileWriter::create(&staging.path().join(name), &header.text, true)?;
        for tensor in &header.tensors {
            let recipe = match model.recipe(&format!("{IGNORED_PREFIX}{}", tensor.name)) {
                Some(aside) => aside,
                None => match parts.get(tensor.name.as_str()) {
                    Some(&(scaled, part)) => {
                        give_back(&model, &plan, (scaled, part), tensor.dtype, &mut |bytes| writer.write(bytes))?;
                        continue;
                    }
                    None => original(&model, &plan, tensor)?,
                },
            };
            if recipe.dtype == tensor.dtype {
                recipe.for_each_band(|bytes| writer.write(bytes))?;
            } else {
                recipe.for_each_cast_band(tensor.dtype, |bytes| writer.write(bytes))?;
            }
            done += tensor.bytes.len() as u64;
            progress(Progress { stage: "writing", item: &tensor.name, done, total });
        }
        let (bytes, sha256) = writer.finish()?;
        let (name, is_original) = (name.to_owned(), sha256 == expected);
        let instead_of = file.export.is_some().then(|| file.name.clone());
        let decoded = record.is_decoded(&file.name);
        files.push(ExportedFile { name, bytes, sha256, is_original, instead_of, decoded });
    }
    let read = |name: &str| {
        let path = converted.join(name);
        std::fs::read(&path).map_err(ConvertError::io("read", &path))
    };
    staging.write("config.json", &read(SOURCE_CONFIG)?)?;
    let index_path = converted.join(SOURCE_INDEX);
    if index_path.is_file() {
        staging.write(INDEX, &exported_index(read(SOURCE_INDEX)?, record, &index_path)?)?;
    }
    staging.copy_present(converted, &COMPANIONS)?;
    staging.publish()?;
    Ok(ExportReport { files })
}

/// Writes the GGUF file that the converted model in `converted` was made of to the directory `output`, byte for byte.
///
/// For that the conversion kept its numbers as they are ([`crate::WeightsPolicy::Keep`]) and no weight was changed since.
///
/// # Errors
///
/// [`ConvertError::NoGguf`] for a model that was made of something else or changed; [`ConvertError::Gguf`] where what was kept of the file
/// does not go with the weights, [`ConvertError::Plan`] where the two do not make up the file; others as [`export`].
pub fn export_gguf(
    converted: &Path,
    output: &Path,
    force: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<ExportReport, ConvertError> {
    let model = ConvertedModel::open(converted)?;
    let record = model.record();
    let refuse = |why: &'static str| ConvertError::NoGguf { dir: converted.to_owned(), why };
    let path = converted.join(SOURCE_GGUF);
    let [file] = &record.files[..] else { return Err(refuse("it was made of other files")) };
    if file.format != FileFormat::Gguf {
        return Err(refuse("it was made of another file"));
    }
    if record.changed || model.config().split.is_some() {
        return Err(refuse("its weights were changed"));
    }
    if !path.is_file() {
        return Err(refuse("its weights were given another number format, or an earlier version made it"));
    }
    let record_path = converted.join(RECORD);
    let format = |problem| ConvertError::Format { path: record_path.clone(), problem: Box::new(problem) };
    let headers = [Header::parse(file.header.clone()).map_err(format)?];
    let config = ConfigFile::open(&converted.join(SOURCE_CONFIG))?;
    check_version(architecture(&config)?, record, &record_path)?;
    check_casts(converted, record)?;
    check_names(record, &record_path)?;
    let plan = plan_recorded(converted, &config, &record.prefix, record.head, &headers)?;
    let weights = |name: &str| model.recipe(name).and_then(|recipe| recipe.format());
    let (rest, held) = open_rest(&path, file.bytes, &config, &plan, &weights)?;

    let staging = Staging::begin(output, force, replaceable(record))?;
    let mut writer = TensorFileWriter::bare(&staging.path().join(&file.name))?;
    let (mut at, mut taken) = (0, 0);
    for Held { bytes, row, rows } in &held {
        let before = bytes.start - at;
        writer.write(&rest[taken..taken + before])?;
        (at, taken) = (bytes.end, taken + before);
        let mut open = None;
        for (name, first, count) in rows {
            if open.as_ref().is_none_or(|(other, _)| *other != name) {
                let entry = model.file().header().find(name).ok_or_else(|| misfit(&model, missing(name)))?;
                open = Some((name, model.file().read(entry)?));
            }
            let Some((_, numbers)) = &open else { continue };
            writer.write(&numbers[first * row..(first + count) * row])?;
        }
        progress(Progress { stage: "writing", item: &file.name, done: bytes.end as u64, total: file.bytes });
    }
    writer.write(&rest[taken..])?;
    let (bytes, sha256) = writer.finish()?;
    let is_original = sha256 == file.sha256;
    staging.publish()?;
    let name = file.name.clone();
    Ok(ExportReport {
        files: vec![ExportedFile { name, bytes, sha256, is_original, instead_of: None, decoded: false }],
    })
}

/// Whether [`export_gguf`] gives back a file of the model in `converted`.
pub fn keeps_gguf(converted: &Path) -> bool {
    converted.join(RECORD).is_file() && converted.join(SOURCE_GGUF).is_file()
}

/// An earlier export of either form, and a converted model.
fn replaceable(record: &ConversionRecord) -> Replaceable {
    let exported = record.files.iter().map(|file| file.exported().0.to_owned());
    let gguf = record.files.iter().filter(|file| file.format == FileFormat::Gguf).map(|file| file.name.clone());
    Replaceable::checkpoint(exported.chain(gguf).collect(), true)
}

fn check_casts(dir: &Path, record: &ConversionRecord) -> Result<(), ConvertError> {
    let mut lossy = record.casts.iter().filter(|cast| cast.is_lossy());
    let Some(RecordedCast { tensor, from, to, .. }) = lossy.next().cloned() else { return Ok(()) };
    Err(ConvertError::LossyCast { dir: dir.to_owned(), count: 1 + lossy.count(), example: tensor, from, to })
}

pub(crate) fn check_version(
    architecture: &Architecture,
    record: &ConversionRecord,
    path: &Path,
) -> Result<(), ConvertError> {
    let rules = |id: &str, version: u32| format!("rules `{id}` version {version}");
    let made = rules(&record.rules, record.rules_version);
    let have = rules(architecture.id, architecture.version);
    if made != have {
        return Err(ConvertError::Version { path: path.to_owned(), made, have });
    }
    Ok(())
}

/// Recorded file names are joined to the output directory: none may lead out of it.
pub(crate) fn check_names(record: &ConversionRecord, path: &Path) -> Result<(), ConvertError> {
    let plain = |name: &str| Path::new(name).file_name() == Some(name.as_ref()) && !name.contains('\\');
    let names = record.files.iter().flat_map(|file| [file.name.as_str(), file.exported().0]);
    match names.into_iter().find(|name| !plain(name)) {
        None => Ok(()),
        Some(name) => Err(ConvertError::ConfigKey {
            path: path.to_owned(),
            key: "files.name".to_owned(),
            expected: "a plain file name".to_owned(),
            found: format!("`{name}`"),
        }),
    }
}

/// The index as it was, or, where files of another format are replaced, with the names of those that are written.
pub(crate) fn exported_index(source: Vec<u8>, record: &ConversionRecord, path: &Path) -> Result<Vec<u8>, ConvertError> {
    if record.files.iter().all(|file| file.export.is_none()) {
        return Ok(source);
    }
    let names: HashMap<&str, &str> = record.files.iter().map(|file| (file.name.as_str(), file.exported().0)).collect();
    let mut index: serde_json::Value = serde_json::from_slice(&source).map_err(ConvertError::json(path))?;
    let places = index.get_mut("weight_map").and_then(serde_json::Value::as_object_mut);
    for place in places.into_iter().flat_map(|places| places.values_mut()) {
        if let Some(name) = place.as_str().and_then(|name| names.get(name)) {
            *place = (*name).into();
        }
    }
    let mut text = serde_json::to_vec_pretty(&index).map_err(ConvertError::json(path))?;
    text.push(b'\n');
    Ok(text)
}

/// Writes one of two tensors of the original whose codes and scales are rows of weights.
fn give_back(
    model: &ConvertedModel,
    plan: &Plan,
    (scaled, part): (&Scaled, Part),
    dtype: Dtype,
    write: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let (step, _) = plan.reading(&scaled.codes).ok_or_else(|| misfit(model, missing(&scaled.codes)))?;
    // Where each row of the original is: in which weight, and which row of it.
    let mut places = vec![(0, 0); scaled.rows()];
    let mut weights = Vec::new();
    for (number, (target, blocks)) in step.targets.iter().zip(plan.blocks(step)?).enumerate() {
        let entry = model.file().header().tensors.get(model.place(&target.name).unwrap_or(usize::MAX));
        let entry = entry.ok_or_else(|| misfit(model, missing(&target.name)))?;
        let stored = model.file().stored(entry).and_then(|stored| stored.kind.format());
        let rows = row_runs(&blocks, scaled.width(), &[None]).filter(|_| stored.is_some() && stored == scaled.format());
        let Some(rows) = rows else {
            let (dir, tensor) = (model.dir().to_owned(), scaled.codes.clone());
            let found = stored.map_or_else(|| entry.dtype.to_string(), |format| format.to_string());
            return Err(ConvertError::CodesGone { dir, tensor, weight: target.name.clone(), found });
        };
        let mut at = 0;
        for run in rows {
            for (n, place) in places[run.row..run.row + run.count].iter_mut().enumerate() {
                *place = (number, at + n);
            }
            at += run.count;
        }
        weights.push(model.file().read(entry)?);
    }
    let row = scaled.format().and_then(|format| format.row_bytes(scaled.width())).unwrap_or(0);
    let mut out = Vec::new();
    for (number, (weight, at)) in places.into_iter().enumerate() {
        scaled.give_back(part, number, &weights[weight][at * row..(at + 1) * row], dtype, &mut out);
        if out.len() >= BAND {
            write(&out)?;
            out.clear();
        }
    }
    write(&out)
}

/// How the original tensor is made of tensors of the converted model, in the number format it has there.
fn original<'a>(model: &'a ConvertedModel, plan: &Plan, tensor: &TensorEntry) -> Result<Recipe<'a>, ConvertError> {
    let whole = |name: &str| {
        let recipe = model.recipe(name).ok_or_else(|| misfit(model, missing(name)))?;
        let cast = |cast: &RecordedCast| cast.tensor == name && cast.between(tensor.dtype, recipe.dtype);
        if recipe.dtype != tensor.dtype && !model.record().casts.iter().any(cast) {
            let (found, expected) = (recipe.dtype.to_string(), format!("{} as in the original", tensor.dtype));
            return Err(misfit(model, PlanProblem::Dtype { tensor: name.to_owned(), found, expected }));
        }
        Ok(recipe)
    };
    let recipe = assembled(&whole, plan, tensor);
    // Which of the joined weights has another format than the others.
    recipe.map_err(|error| match error {
        ConvertError::Plan { rules, sizes, problems, .. } => {
            ConvertError::Plan { dir: model.dir().to_owned(), rules, sizes, problems }
        }
        other => other,
    })
}

/// How a tensor of the checkpoint is made of weights, which `whole` gives by name.
pub(crate) fn assembled<'a>(
    whole: &dyn Fn(&str) -> Result<Recipe<'a>, ConvertError>,
    plan: &Plan,
    tensor: &TensorEntry,
) -> Result<Recipe<'a>, ConvertError> {
    let name = match &plan.tied_copy {
        Some((copy, embed)) if copy.name == tensor.name => embed,
        _ => &tensor.name,
    };
    let Some((step, source)) = plan.reading(name) else {
        return whole(&format!("{IGNORED_PREFIX}{}", tensor.name));
    };
    let mut sources: Vec<TensorRef<'a>> = Vec::new();
    let mut blocks = Vec::new();
    let dtype = whole(&step.targets[0].name)?.dtype;
    for (n, (target, moved)) in step.targets.iter().zip(plan.blocks(step)?).enumerate() {
        let part = whole(&target.name)?;
        if part.dtype != dtype {
            let (found, expected) = (part.dtype.to_string(), format!("{dtype} as `{}`", step.targets[0].name));
            let problems = vec![PlanProblem::Dtype { tensor: target.name.clone(), found, expected }];
            let rules = "its conversion.json".to_owned();
            return Err(ConvertError::Plan { dir: Path::new("").to_owned(), rules, sizes: String::new(), problems });
        }
        sources.extend(part.sources);
        blocks.extend(moved.iter().filter(|block| block.source == source).map(|block| block.inverse(n)));
    }
    Ok(Recipe { sources, blocks, dtype, shape: tensor.shape.clone() })
}

fn missing(name: &str) -> PlanProblem {
    PlanProblem::MissingSource { tensor: name.to_owned(), targets: Vec::new(), nearest: None, hint: None }
}

fn misfit(model: &ConvertedModel, problem: PlanProblem) -> ConvertError {
    let rules = "its conversion.json".to_owned();
    ConvertError::Plan { dir: model.dir().to_owned(), rules, sizes: String::new(), problems: vec![problem] }
}
