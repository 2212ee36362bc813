//! A Hugging Face checkpoint: a directory with `config.json` and one or more files of weights.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::ConvertError;
use crate::files::WeightFiles;
use crate::gguf::{GgufExtras, GgufModel, gguf_file};
use crate::json::ConfigFile;
use crate::placeholder::check_file;
use crate::quantised;
use crate::scaled::{self, Scaled};
use crate::tensors::{TensorEntry, TensorFile, TensorRef, present};

/// The file that makes a directory a converted model.
pub(crate) const RECORD: &str = "conversion.json";

/// An open checkpoint. Opening reads `config.json`, the index and the headers; weights are read tensor by tensor.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ConfigFile,
    weights: WeightFiles,
    gguf: Option<GgufExtras>,
    /// Weights of two tensors each.
    scaled: Vec<Scaled>,
    places: HashMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`, which may be a GGUF file, or a directory that holds one and no `config.json`.
    ///
    /// The weights are `model.safetensors`, or `pytorch_model.bin` where there are no safetensors. Where there is an
    /// index it is the authority: its files, all of them, with the tensors it lists, no more and no fewer.
    ///
    /// # Errors
    ///
    /// A named error for a directory without `config.json` or weights, for an adapter, a quantised or an already
    /// converted model, for an index and files that disagree, and for every damaged file.
    pub fn open(dir: &Path) -> Result<Self, ConvertError> {
        let config_path = dir.join("config.json");
        for path in [dir, &config_path] {
            check_file(path)?;
        }
        if dir.join("adapter_config.json").is_file() {
            let evidence = "it holds `adapter_config.json`".to_owned();
            return Err(ConvertError::Adapter { dir: dir.to_owned(), evidence });
        }
        if let Some(file) = gguf_file(dir)? {
            let GgufModel { file, config, extras } = GgufModel::open(&file)?;
            let weights = WeightFiles { files: vec![TensorFile::Gguf(file)], index: None, unread: None };
            return Self::new(dir, config, weights, Some(extras));
        }
        if !config_path.is_file() {
            return Err(ConvertError::NoConfig { dir: dir.to_owned() });
        }
        if dir.join(RECORD).is_file() {
            return Err(ConvertError::AlreadyConverted { dir: dir.to_owned() });
        }
        let config = ConfigFile::open(&config_path)?;
        if let Some(evidence) = quantised::in_config(&config)? {
            return Err(ConvertError::Quantised { dir: dir.to_owned(), evidence });
        }
        let mut weights = WeightFiles::open(dir)?;
        let entries: Vec<&TensorEntry> = weights.files.iter().flat_map(|file| &file.header().tensors).collect();
        let scaled = scaled::of_checkpoint(dir, &config, &entries)?;
        weights.files = present(weights.files, &scaled)?;
        Ok(Self { scaled, ..Self::new(dir, config, weights, None)? })
    }

    fn new(
        dir: &Path,
        config: ConfigFile,
        weights: WeightFiles,
        gguf: Option<GgufExtras>,
    ) -> Result<Self, ConvertError> {
        let files = &weights.files;
        let mut places = HashMap::new();
        for (n, file) in files.iter().enumerate() {
            for (m, tensor) in file.header().tensors.iter().enumerate() {
                if let Some((first, _)) = places.insert(tensor.name.clone(), (n, m)) {
                    let (first, second): (&TensorFile, _) = (&files[first], file.name());
                    let problem = format!(
                        "tensor `{}` is in both `{}` and `{second}`: every tensor must be in one file",
                        tensor.name,
                        first.name()
                    );
                    let index = dir.join(weights.index.unwrap_or_default());
                    return Err(ConvertError::Index { index, problem });
                }
            }
        }
        let checkpoint = Self { dir: dir.to_owned(), config, weights, gguf, scaled: Vec::new(), places };
        checkpoint.refuse_special_names()?;
        Ok(checkpoint)
    }

    /// The directory, or the GGUF file.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`, or what stands for it in a GGUF file.
    pub fn config(&self) -> &ConfigFile {
        &self.config
    }

    /// The files of weights, in the order of their names.
    pub(crate) fn files(&self) -> &[TensorFile] {
        &self.weights.files
    }

    /// The index that names the files, of a checkpoint in several pieces.
    pub(crate) fn index(&self) -> Option<&'static str> {
        self.weights.index
    }

    /// What a GGUF file says besides; none for a directory.
    pub(crate) fn gguf(&self) -> Option<&GgufExtras> {
        self.gguf.as_ref()
    }

    /// A file of weights in another format that was left alone.
    pub(crate) fn unread(&self) -> Option<&'static str> {
        self.weights.unread
    }

    /// Every tensor with its file, file by file in the order of the bytes.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&TensorFile, &TensorEntry)> {
        self.weights.files.iter().flat_map(|file| file.header().tensors.iter().map(move |tensor| (file, tensor)))
    }

    /// The tensor called `name`.
    pub(crate) fn find(&self, name: &str) -> Option<TensorRef<'_>> {
        let &(file, tensor) = self.places.get(name)?;
        let file = &self.weights.files[file];
        Some(TensorRef { file, entry: &file.header().tensors[tensor] })
    }

    /// The tensor called `name` as it stands in its file.
    pub(crate) fn standing(&self, name: &str) -> Option<TensorRef<'_>> {
        self.weights.files.iter().find_map(|file| file.standing(name)).or_else(|| self.find(name))
    }

    /// Weights of two tensors each.
    pub(crate) fn scaled(&self) -> &[Scaled] {
        &self.scaled
    }

    /// Adapters, quantised weights and objects around the model give themselves away by their names.
    fn refuse_special_names(&self) -> Result<(), ConvertError> {
        const WRAPPERS: [(&str, &str); 5] = [
            ("_orig_mod.", "torch.compile"),
            ("_fsdp_wrapped_module.", "FullyShardedDataParallel"),
            ("_checkpoint_wrapped_module.", "activation checkpointing"),
            ("_forward_module.", "a trainer"),
            ("module.", "DataParallel"),
        ];
        for (_, tensor) in self.tensors() {
            let name = &tensor.name;
            let evidence = format!("tensor `{name}`");
            if name.starts_with("base_model.model.") {
                return Err(ConvertError::Adapter { dir: self.dir.clone(), evidence });
            }
            // The last is a common word: only in front it is no name of a part.
            let inside = |wrapper: &str| wrapper.starts_with('_') && name.contains(&format!(".{wrapper}"));
            if let Some((wrapper, left_by)) =
                WRAPPERS.into_iter().find(|(wrapper, _)| name.starts_with(wrapper) || inside(wrapper))
            {
                let (dir, example) = (self.dir.clone(), name.clone());
                return Err(ConvertError::Wrapped { dir, wrapper, left_by, example });
            }
            if quantised::is_name_of_codes(name) {
                return Err(ConvertError::Quantised { dir: self.dir.clone(), evidence });
            }
        }
        Ok(())
    }
}
