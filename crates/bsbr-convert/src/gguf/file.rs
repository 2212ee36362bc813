//! A GGUF file as the Hugging Face checkpoint it was made of: configuration, names, shapes and order of the numbers.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::config::{self, FREQUENCIES, LONG_FACTORS, SHORT_FACTORS};
use super::header::{GgufHeader, GgufTensor};
use super::kind::GgufKind;
use super::metadata::Metadata;
use super::names::{ARCHITECTURES, Difference, GgufArchitecture};
use super::problem::GgufProblem;
use super::stored::{Order, Stored, StoredBytes};
use super::tokenizer;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::placeholder::check_file;
use crate::tensors::{
    Header, Mapping, SharedPart, TensorBytes, TensorDeclaration, TensorEntry, WholeFile, exported_header,
};

/// An open GGUF file. Opening reads the header, and the few tensors that are settings.
#[derive(Debug)]
pub(crate) struct GgufFile {
    path: PathBuf,
    file: File,
    len: u64,
    header: Header,
    stored: HashMap<String, Stored>,
    whole: WholeFile,
}

/// What a GGUF file says about its model besides the weights.
#[derive(Debug)]
pub(crate) struct GgufModel {
    pub(crate) file: GgufFile,
    /// As `config.json` would say it.
    pub(crate) config: ConfigFile,
    pub(crate) extras: GgufExtras,
}

/// The same without weights and configuration.
#[derive(Debug)]
pub(crate) struct GgufExtras {
    /// Files that a checkpoint directory would hold beside the weights.
    pub(crate) companions: Vec<(&'static str, Vec<u8>)>,
    /// Why there is no tokenizer among them.
    pub(crate) no_tokenizer: Option<String>,
    /// What is worth telling.
    pub(crate) notes: Vec<String>,
}

/// Whether the file `path` is a GGUF file, by its first bytes: a store of models may name it without an ending.
pub fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    // Anything else, such as a pipe, would be read empty.
    let file = path.is_file().then(|| File::open(path).ok()).flatten();
    file.is_some_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == *b"GGUF"
}

/// The GGUF file that `path` stands for: itself, or the only one of a directory without `config.json`.
///
/// # Errors
///
/// [`ConvertError::SeveralGguf`] where it is not clear which is meant.
pub(crate) fn gguf_file(path: &Path) -> Result<Option<PathBuf>, ConvertError> {
    if path.is_file() {
        return Ok(Some(path.to_owned()));
    }
    if path.join("config.json").is_file() {
        return Ok(None);
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    // One that is called so and is none gets its own error further on.
    let called = |path: &Path| path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    let found = entries.map(|entry| entry.path()).filter(|path| called(path) || is_gguf(path));
    let mut names: Vec<String> =
        found.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect();
    names.sort();
    match &names[..] {
        [] => Ok(None),
        [name] => Ok(Some(path.join(name))),
        _ => Err(ConvertError::SeveralGguf { dir: path.to_owned(), names }),
    }
}

impl GgufExtras {
    /// `tokenizer.json`.
    pub(crate) fn tokenizer(&self) -> Option<&[u8]> {
        self.companion("tokenizer.json")
    }

    /// What stands for the file `name` of a Hugging Face directory.
    pub(crate) fn companion(&self, name: &str) -> Option<&[u8]> {
        let found = self.companions.iter().find(|(companion, _)| *companion == name);
        found.map(|(_, content)| content.as_slice())
    }
}

impl GgufModel {
    /// Opens `path`.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Gguf`] for a damaged file or a number format that is not read;
    /// [`ConvertError::UnknownModelType`] for an architecture that is not read; [`ConvertError::ConfigKey`] and
    /// [`ConvertError::Rejected`] for metadata that are missing, wrong or ask for what the decoder does not compute.
    pub(crate) fn open(path: &Path) -> Result<Self, ConvertError> {
        check_file(path)?;
        let file = File::open(path).map_err(ConvertError::io("open", path))?;
        let len = file.metadata().map_err(ConvertError::io("read", path))?.len();
        let GgufHeader { metadata, tensors } = {
            // Dropped at the end of this block, so that only the pages of the header were ever touched.
            let mapping = Mapping::new(&file, 0..len).map_err(ConvertError::io("map", path))?;
            GgufHeader::parse(&mapping).map_err(fault(path))?
        };
        if let Some(tensor) = tensors.iter().find(|tensor| !tensor.kind.is_read()) {
            let (tensor, found) = (tensor.name.clone(), tensor.kind.name);
            return Err(fault(path)(GgufProblem::UnreadKind { tensor, found, read: GgufKind::all_read() }));
        }
        let metadata = Metadata::new(path, metadata);
        let architecture = architecture(&metadata)?;
        let names: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let Some(embedding) = tensors.iter().find(|tensor| tensor.name == "token_embd.weight") else {
            return Err(fault(path)(GgufProblem::NoEmbedding));
        };
        let factors = |name: &str| {
            let tensor = tensors.iter().find(|tensor| tensor.name == name);
            tensor.map(|tensor| numbers(&file, path, tensor)).transpose()
        };
        let vocab_size = embedding.shape[0];
        let read = config::read(&metadata, architecture, names, vocab_size, &factors)?;
        let tokenizer = tokenizer::read(&metadata)?;
        let (config, mut notes) = (read.config, read.notes);
        let (header, stored) = present(path, architecture, &config, &tensors)?;
        notes.extend(quantised_note(&stored));
        let (mut companions, mut no_tokenizer) = (Vec::new(), None);
        match tokenizer {
            Ok(json) => {
                companions.push(("tokenizer.json", json));
                companions.push(("tokenizer_config.json", tokenizer_config(&metadata)?));
            }
            Err(reason) => no_tokenizer = Some(reason),
        }
        if let Some(template) = metadata.optional_str("tokenizer.chat_template")? {
            companions.push(("chat_template.jinja", template.as_bytes().to_vec()));
        }
        let file = GgufFile { path: path.to_owned(), file, len, header, stored, whole: WholeFile::default() };
        let config = ConfigFile::of(path, config);
        Ok(Self { file, config, extras: GgufExtras { companions, no_tokenizer, notes } })
    }
}

impl GgufFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The safetensors header of the Hugging Face checkpoint.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// How a tensor lies in the file.
    pub(crate) fn stored(&self, tensor: &TensorEntry) -> Option<&Stored> {
        self.stored.get(&tensor.name)
    }

    /// The whole file, mapped for as long as anything holds it, and where in it a tensor is.
    pub(crate) fn shared(&self, tensor: &TensorEntry) -> Result<Option<SharedPart>, ConvertError> {
        let Some(stored) = self.stored(tensor) else { return Ok(None) };
        Ok(Some((self.whole()?, stored.bytes.clone())))
    }

    /// How the tensors lie in the file, by the names that a checkpoint has for them.
    pub(crate) fn all_stored(&self) -> &HashMap<String, Stored> {
        &self.stored
    }

    /// The whole file, mapped likewise.
    pub(crate) fn whole(&self) -> Result<Arc<Mapping>, ConvertError> {
        self.whole.get(&self.file, self.len).map_err(ConvertError::io("map", &self.path))
    }

    /// Maps the bytes of one tensor of this file.
    pub(crate) fn map(&self, tensor: &TensorEntry) -> Result<TensorBytes, ConvertError> {
        let Some(stored) = self.stored.get(&tensor.name) else {
            let (dir, shape) = (self.path.clone(), tensor.shape.clone());
            return Err(ConvertError::NoSuchWeight { dir, tensor: tensor.name.clone(), shape });
        };
        let mapping = Mapping::new(&self.file, stored.bytes.clone()).map_err(ConvertError::io("map", &self.path))?;
        if stored.order == Order::Same && !stored.kind.is_quantised() {
            return Ok(TensorBytes::Mapped(mapping));
        }
        Ok(TensorBytes::Stored(StoredBytes { stored: stored.clone(), mapping }))
    }
}

fn fault(path: &Path) -> impl FnOnce(GgufProblem) -> ConvertError {
    let path = path.to_owned();
    move |problem| ConvertError::Gguf { path, problem: Box::new(problem) }
}

pub(super) fn architecture(metadata: &Metadata) -> Result<&'static GgufArchitecture, ConvertError> {
    if let Some(parts) = metadata.optional_usize("split.count")?.filter(|&parts| parts > 1) {
        return Err(fault(metadata.path())(GgufProblem::Split { parts }));
    }
    let found = metadata.str("general.architecture")?;
    ARCHITECTURES.iter().find(|known| known.name == found).ok_or_else(|| ConvertError::UnknownModelType {
        path: metadata.path().to_owned(),
        found: found.to_owned(),
        supported: ARCHITECTURES.iter().map(|known| format!("`{}`", known.name)).collect::<Vec<_>>().join(", "),
    })
}

/// The numbers of a small tensor that is a setting.
fn numbers(file: &File, path: &Path, tensor: &GgufTensor) -> Result<Vec<f64>, ConvertError> {
    const MOST: usize = 1 << 16;
    let count = tensor.shape.iter().product::<usize>();
    if count > MOST {
        let (path, key, found) = (path.to_owned(), tensor.name.clone(), format!("{count} numbers"));
        return Err(ConvertError::ConfigKey { path, key, expected: format!("at most {MOST} numbers"), found });
    }
    let range = tensor.bytes.start as u64..tensor.bytes.end as u64;
    let mapping = Mapping::new(file, range).map_err(ConvertError::io("map", path))?;
    let number = |at| tensor.kind.number(&mapping, at);
    // Written as they would be in a configuration.
    Ok((0..count).map(|at| number(at).to_string().parse().unwrap_or(f64::NAN)).collect())
}

/// The tensors as a Hugging Face checkpoint names and orders them. One that no table knows keeps its name: the plan
/// then reports it among what no rule reads.
pub(super) fn present(
    path: &Path,
    architecture: &GgufArchitecture,
    config: &Map<String, Value>,
    tensors: &[GgufTensor],
) -> Result<(Header, HashMap<String, Stored>), ConvertError> {
    let size = |key: &str| config.get(key).and_then(Value::as_u64).and_then(|size| usize::try_from(size).ok());
    let (mut declarations, mut stored) = (Vec::new(), HashMap::new());
    let settings = [FREQUENCIES, LONG_FACTORS, SHORT_FACTORS];
    for tensor in tensors.iter().filter(|tensor| !settings.contains(&tensor.name.as_str())) {
        let (name, difference) =
            architecture.translate(&tensor.name).unwrap_or((tensor.name.clone(), Difference::None));
        let rows = tensor.shape[0];
        let per_head = |heads: Option<usize>| {
            let head_dim = heads.filter(|&heads| heads > 0 && rows % heads == 0).map(|heads| rows / heads);
            // Rows that do not divide have another shape than the configuration says, which the plan reports.
            head_dim
                .filter(|&dim| dim > 0 && dim % 2 == 0)
                .map_or(Order::Same, |head_dim| Order::RotaryPairs { head_dim })
        };
        let order = match difference {
            Difference::None => Order::Same,
            Difference::OneMore => Order::OneMore,
            Difference::Queries => per_head(size("num_attention_heads")),
            Difference::Keys => per_head(size("num_key_value_heads")),
            Difference::Transposed if tensor.shape.len() == 2 => Order::Transposed,
            Difference::Transposed => Order::Same,
        };
        let mut shape = tensor.shape.clone();
        if order == Order::Transposed {
            shape.reverse();
        }
        let (rows, width) = (shape[0], shape[1..].iter().product());
        let bytes = tensor.bytes.start as u64..tensor.bytes.end as u64;
        let place = Stored { kind: tensor.kind, order, width, rows, bytes };
        declarations.push(TensorDeclaration::plain(name.clone(), place.dtype(), shape));
        if stored.insert(name.clone(), place).is_some() {
            return Err(fault(path)(GgufProblem::Duplicate { tensor: name }));
        }
    }
    let format = |problem| ConvertError::Format { path: path.to_owned(), problem: Box::new(problem) };
    Ok((Header::parse(exported_header(&declarations)).map_err(format)?, stored))
}

fn quantised_note(stored: &HashMap<String, Stored>) -> Option<String> {
    let quantised = stored.values().filter(|stored| stored.kind.is_quantised());
    let names: BTreeSet<&str> = quantised.clone().map(|stored| stored.kind.name).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let count = quantised.count();
    (count > 0).then(|| format!("{count} tensors are quantised ({})", names.join(", ")))
}

/// What transformers needs to load the tokenizer of an export.
fn tokenizer_config(metadata: &Metadata) -> Result<Vec<u8>, ConvertError> {
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let mut config = Map::new();
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    for (key, id) in tokenizer::NAMED {
        let id = metadata.optional_usize(id)?;
        if let Some(token) = id.and_then(|id| tokens.get(id)) {
            config.insert(key.to_owned(), json!(token));
        }
    }
    Ok(Value::Object(config).to_string().into_bytes())
}
