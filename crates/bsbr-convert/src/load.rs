//! A model and its tokenizer, ready to run.

use std::path::Path;

use bsbr_model::{Decoder, Device, TextTokenizer};

use crate::{ConvertError, ModelSource, placeholder::check_file};

/// Loads what is in `path`, a Hugging Face directory, a GGUF file or a converted model: the decoder with its weights on `device`, and
/// the tokenizer beside them. A checkpoint has its original attention; [`ModelSource::with_attention`] gives it another.
///
/// # Errors
///
/// As [`ModelSource::open`], [`ModelSource::text_tokenizer`] and [`Decoder::load`].
pub fn load(path: &Path, device: &Device) -> Result<(Decoder, TextTokenizer), ConvertError> {
    let mut source = ModelSource::open(path)?;
    let tokenizer = source.text_tokenizer()?;
    let config = source.model_config().clone();
    Ok((Decoder::load(config, &mut source, device)?, tokenizer))
}

impl ModelSource {
    /// The tokenizer beside the weights, or in the GGUF file.
    ///
    /// # Errors
    ///
    /// [`ConvertError::NoTokenizer`] for a GGUF file whose tokenizer is of a kind that is not converted;
    /// [`ConvertError::Model`] for one that cannot be read or is not there.
    pub fn text_tokenizer(&self) -> Result<TextTokenizer, ConvertError> {
        if let Some(json) = self.tokenizer_json() {
            return Ok(TextTokenizer::from_bytes(json, &format!("the tokenizer of {}", self.dir().display()))?);
        }
        if let Some(reason) = self.no_tokenizer()
            && self.tokenizer().is_none()
        {
            return Err(ConvertError::NoTokenizer { path: self.dir().to_owned(), reason: reason.to_owned() });
        }
        let path = self.tokenizer().unwrap_or_else(|| self.dir().join("tokenizer.json"));
        for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"] {
            check_file(&path.with_file_name(name))?;
        }
        Ok(TextTokenizer::open(&path)?)
    }
}
