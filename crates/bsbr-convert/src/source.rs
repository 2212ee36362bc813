//! Weights for running a model, from a Hugging Face checkpoint or a converted model alike.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bsbr_attn::BlockAttentionConfig;
use bsbr_model::{ModelConfig, WeightSource, WeightSpec, parameter_counts, weight_specs};
use bsbr_weights::{Format, StoredMatrix};
use safetensors::Dtype;

use crate::ConvertError;
use crate::card::CHANGED;
use crate::casts::CastSummary;
use crate::checkpoint::RECORD;
use crate::converted::ConvertedModel;
use crate::derive;
use crate::gguf::GgufKind;
use crate::output::refuse_unfinished;
use crate::placeholder::check_file;
use crate::planning::{PlannedCheckpoint, plan_checkpoint};
use crate::tensors::{Recipe, TensorFile};

/// A model on disk that can be run.
///
/// Nothing but headers is in memory; [`WeightSource::read`] brings one weight at a time.
///
/// A Hugging Face checkpoint has its original attention until [`ModelSource::with_attention`] gives it settings;
/// a converted model has the settings it was converted with.
#[derive(Debug)]
pub struct ModelSource {
    dir: PathBuf,
    name: Option<String>,
    config: ModelConfig,
    weights: Weights,
    widened: bool,
}

#[derive(Debug)]
enum Weights {
    Planned(Box<PlannedCheckpoint>),
    Converted(Box<ConvertedModel>),
}

/// A tensor as `inspect` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorListing {
    /// Name in the file.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Number format in a GGUF file, and of codes in a converted model; `dtype` is then that of the numbers once read.
    pub stored: Option<GgufKind>,
    /// Shape.
    pub shape: Vec<usize>,
    /// Name of the file.
    pub file: String,
    /// Bytes in the file.
    pub bytes: usize,
}

impl TensorListing {
    /// Name of the number format in the file.
    pub fn format(&self) -> String {
        self.stored.map_or_else(|| self.dtype.to_string(), |kind| kind.to_string())
    }
}

impl ModelSource {
    /// Opens the checkpoint or converted model in `dir`, or the GGUF file `dir`, and checks every name, shape and dtype.
    ///
    /// # Errors
    ///
    /// As [`plan_checkpoint`] for a checkpoint. For a converted model [`ConvertError::Plan`] when the file does not
    /// hold exactly the weights its configuration asks for.
    pub fn open(dir: &Path) -> Result<Self, ConvertError> {
        refuse_unfinished(dir)?;
        let (config, weights) = if dir.join(RECORD).is_file() {
            let model = ConvertedModel::open(dir)?;
            (model.config().clone(), Weights::Converted(Box::new(model)))
        } else {
            let planned = plan_checkpoint(dir)?;
            (planned.config.clone(), Weights::Planned(Box::new(planned)))
        };
        Ok(Self { dir: dir.to_owned(), name: None, config, weights, widened: false })
    }

    /// The same model under another name than that of its directory.
    pub fn with_name(mut self, name: String) -> Self {
        self.name = Some(name);
        self
    }

    /// The same model with every weight handed out in f32, so that a decoder can change or train it.
    pub fn widened(mut self) -> Self {
        self.widened = true;
        self
    }

    /// The same weights under other attention settings; `None` is the original attention.
    ///
    /// Meta projections the files do not hold take their start values.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Model`] when the settings are impossible.
    pub fn with_attention(mut self, attention: Option<BlockAttentionConfig>) -> Result<Self, ConvertError> {
        self.config.attention = attention;
        self.config.validate()?;
        Ok(self)
    }

    /// The decoder and its attention.
    pub fn model_config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether this is a converted model rather than a Hugging Face checkpoint.
    pub fn is_converted(&self) -> bool {
        matches!(self.weights, Weights::Converted(_))
    }

    /// Where the model comes from, in words.
    pub fn description(&self) -> String {
        // A directory that stands for the GGUF file in it gives way to the name of that file.
        let gguf = match &self.weights {
            Weights::Planned(planned) => planned.checkpoint.gguf().and(planned.checkpoint.files().first()),
            Weights::Converted(_) => None,
        };
        let path = gguf.map_or(self.dir.as_path(), TensorFile::path);
        let directory = || path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = self.name.clone().unwrap_or_else(directory);
        match &self.weights {
            Weights::Planned(planned) => {
                let what = if planned.checkpoint.gguf().is_some() { "GGUF file" } else { "Hugging Face checkpoint" };
                format!("{what} `{name}` ({})", planned.plan.architecture.id)
            }
            Weights::Converted(model) => {
                let record = model.record();
                format!("converted model `{name}`, made of `{}` ({})", record.source, record.rules)
            }
        }
    }

    /// `tokenizer.json`, if the directory has one.
    pub fn tokenizer(&self) -> Option<PathBuf> {
        Some(self.dir.join("tokenizer.json")).filter(|path| path.is_file())
    }

    /// The `tokenizer.json` that a GGUF file stands for; `None` for directories, and for a tokenizer that is not
    /// converted: [`ModelSource::notes`] then say why.
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        match &self.weights {
            Weights::Planned(planned) => planned.checkpoint.gguf()?.tokenizer(),
            Weights::Converted(_) => None,
        }
    }

    /// Why a GGUF file has no tokenizer that can be used.
    pub fn no_tokenizer(&self) -> Option<&str> {
        match &self.weights {
            Weights::Planned(planned) => planned.checkpoint.gguf()?.no_tokenizer.as_deref(),
            Weights::Converted(_) => None,
        }
    }

    /// A file that belongs to the tokenizer or to generation, such as `tokenizer_config.json`, or what a GGUF file holds in its
    /// place; `None` if there is neither.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Io`], and what stands for a file that was not fetched.
    pub fn companion(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
        let held = match &self.weights {
            Weights::Planned(planned) => planned.checkpoint.gguf().and_then(|extras| extras.companion(name)),
            Weights::Converted(_) => None,
        };
        if let Some(content) = held {
            return Ok(Some(content.to_vec()));
        }
        let path = self.dir.join(name);
        check_file(&path)?;
        if !path.is_file() {
            return Ok(None);
        }
        std::fs::read(&path).map(Some).map_err(ConvertError::io("read", &path))
    }

    /// The plan of a Hugging Face checkpoint: its `Display` is the mapping table.
    pub fn plan(&self) -> Option<&crate::plan::Plan> {
        match &self.weights {
            Weights::Planned(planned) => Some(&planned.plan),
            Weights::Converted(_) => None,
        }
    }

    /// The directory, or the GGUF file.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// SHA-256 over `config.json`, where there is one, and every file of weights: whatever runs on them is the same.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Io`].
    pub fn sha256(&self) -> Result<String, ConvertError> {
        let config = Some(self.dir.join("config.json")).filter(|path| path.is_file());
        crate::hashing::sha256_of(config.as_deref().into_iter().chain(self.files().iter().map(TensorFile::path)))
    }

    /// What is worth telling a reader about the checkpoint or the converted model.
    pub fn notes(&self) -> Vec<String> {
        match &self.weights {
            Weights::Planned(planned) => planned.notes(),
            Weights::Converted(model) => {
                let casts = &model.record().casts;
                if model.record().changed {
                    vec![CHANGED.to_owned()]
                } else if casts.is_empty() {
                    Vec::new()
                } else {
                    vec![CastSummary(casts).to_string()]
                }
            }
        }
    }

    /// Numbers in the weights of the original model, and numbers BSBR adds.
    pub fn parameter_counts(&self) -> (usize, usize) {
        parameter_counts(&self.config)
    }

    /// Bytes of the weight files.
    pub fn total_bytes(&self) -> u64 {
        self.files().iter().map(TensorFile::len).sum()
    }

    /// Every tensor in the files.
    pub fn tensors(&self) -> Vec<TensorListing> {
        let all = self.files().iter().flat_map(|file| file.header().tensors.iter().map(move |tensor| (file, tensor)));
        all.map(|(file, tensor)| TensorListing {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            stored: file.kind(tensor),
            shape: tensor.shape.clone(),
            file: file.name(),
            bytes: file.kind(tensor).map_or(tensor.bytes.len(), |kind| kind.bytes_of(tensor.elements())),
        })
        .collect()
    }

    /// Tensors and bytes of each number format.
    pub fn dtype_totals(&self) -> BTreeMap<String, (usize, usize)> {
        let mut totals = BTreeMap::new();
        for tensor in self.tensors() {
            let (count, bytes): &mut (usize, usize) = totals.entry(tensor.format()).or_default();
            *count += 1;
            *bytes += tensor.bytes;
        }
        totals
    }

    /// Bytes the key and value cache of the original attention takes for each token, in f32.
    pub fn cache_bytes_per_token(&self) -> usize {
        let decoder = &self.config.decoder;
        decoder.kv_width() * size_of::<f32>()
    }

    /// Reads one weight as f32.
    ///
    /// # Errors
    ///
    /// [`ConvertError::NoSuchWeight`] when the model has none of this name and shape, [`ConvertError::NotFinite`] when
    /// it holds a NaN or an infinity, [`ConvertError::Io`].
    pub fn read_weight(&self, spec: &WeightSpec) -> Result<Vec<f32>, ConvertError> {
        if let Some(recipe) = self.recipe(&spec.name)? {
            if recipe.shape != spec.shape {
                return Err(self.no_such_weight(spec));
            }
            return recipe.open()?.read(0..recipe.shape.iter().product());
        }
        let wanted = weight_specs(&self.config).contains(spec);
        let sources = derive::sources(&spec.name, &self.config.decoder)
            .filter(|_| wanted)
            .ok_or_else(|| self.no_such_weight(spec))?;
        let [Some(a), Some(b)] = [self.recipe(&sources[0])?, self.recipe(&sources[1])?] else {
            return Err(self.no_such_weight(spec));
        };
        let mut values = Vec::with_capacity(spec.shape.iter().product());
        let heads = self.config.decoder.heads;
        derive::for_each_head(&[a, b], (heads, spec.shape[0] / heads), |rows| {
            values.extend_from_slice(rows);
            Ok(())
        })?;
        Ok(values)
    }

    /// One weight as it is stored: in the mapped file where its rows lie there one after the other, else a copy of them in their own number
    /// format. Codes that do not lie along its rows are decoded.
    ///
    /// None for a weight that is no matrix, and for one that no file holds: [`ModelSource::read_weight`] has both.
    ///
    /// # Errors
    ///
    /// As [`ModelSource::read_weight`]. To find numbers that are not finite, all bytes of the weight are read once, of codes the scales.
    pub fn stored_weight(&self, spec: &WeightSpec) -> Result<Option<StoredMatrix>, ConvertError> {
        let Some(recipe) = self.recipe(&spec.name)? else { return Ok(None) };
        if recipe.shape != spec.shape {
            return Err(self.no_such_weight(spec));
        }
        recipe.matrix()
    }

    /// Bytes of a matrix as it is stored, and whether they are in a mapped file; none for what [`ModelSource::stored_weight`] does not give.
    pub(crate) fn stored_bytes(&self, spec: &WeightSpec) -> Result<Option<(u64, bool)>, ConvertError> {
        let recipe = self.recipe(&spec.name)?.filter(|recipe| recipe.shape.len() == 2 && recipe.format().is_some());
        let recipe = recipe.filter(|_| !self.widened);
        Ok(recipe.map(|recipe| (recipe.declared(String::new()).bytes() as u64, recipe.is_in_place())))
    }

    /// The format in which a weight can be had without changing a number; F32 for one that no file holds.
    pub(crate) fn own_format(&self, spec: &WeightSpec) -> Result<Option<Format>, ConvertError> {
        Ok(self.recipe(&spec.name)?.map_or(Some(Format::F32), |recipe| recipe.format()))
    }

    /// Bits that a number of the original model takes in the files, on the average; the scales of codes are shared among their numbers.
    pub fn bits_per_weight(&self) -> Result<f64, ConvertError> {
        let (mut bits, mut count) = (0.0, 0);
        for spec in weight_specs(&self.config).into_iter().filter(|spec| !spec.extra) {
            let Some(recipe) = self.recipe(&spec.name)? else { continue };
            let numbers = spec.shape.iter().product::<usize>();
            let source = recipe.sources.first();
            let stored = source.and_then(|source| source.file.kind(source.entry));
            let each = stored.map_or(recipe.dtype.bitsize() as f64, |kind| 8.0 * kind.bytes as f64 / kind.block as f64);
            bits += each * numbers as f64;
            count += numbers;
        }
        Ok(bits / count.max(1) as f64)
    }

    fn recipe(&self, name: &str) -> Result<Option<Recipe<'_>>, ConvertError> {
        match &self.weights {
            Weights::Planned(planned) => planned.recipe(name),
            Weights::Converted(model) => Ok(model.recipe(name)),
        }
    }

    fn no_such_weight(&self, spec: &WeightSpec) -> ConvertError {
        ConvertError::NoSuchWeight { dir: self.dir.clone(), tensor: spec.name.clone(), shape: spec.shape.clone() }
    }

    fn files(&self) -> &[TensorFile] {
        match &self.weights {
            Weights::Planned(planned) => planned.checkpoint.files(),
            Weights::Converted(model) => std::slice::from_ref(model.file()),
        }
    }
}

impl WeightSource for ModelSource {
    fn read(&mut self, spec: &WeightSpec) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.read_weight(spec)?)
    }

    fn stored(&mut self, spec: &WeightSpec) -> Result<Option<StoredMatrix>, Box<dyn std::error::Error + Send + Sync>> {
        if self.widened { Ok(None) } else { Ok(self.stored_weight(spec)?) }
    }
}
