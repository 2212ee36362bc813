//! Whether the output head is the embedding table: the file decides first, the configuration second.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ConvertError;
use crate::checkpoint::Checkpoint;
use crate::hints;
use crate::rules::{Architecture, Prefix, Rule, SourceModel, expand};
use crate::tensors::{TensorBytes, TensorRef};

/// How a checkpoint stores its output head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadForm {
    /// Not at all: the head is the embedding table.
    Absent,
    /// As a copy of the embedding table, equal bit for bit. An export writes both.
    TiedCopy,
    /// As weights of its own.
    Own,
}

impl HeadForm {
    /// Whether the head is the embedding table.
    pub fn is_tied(self) -> bool {
        self != Self::Own
    }
}

/// Finds the form of the head; compares it with the embedding table where both are there.
///
/// # Errors
///
/// [`ConvertError::HeadMissing`] when there is no head and the configuration does not tie it.
pub(crate) fn head_form(
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    prefix: Prefix,
    model: &SourceModel,
) -> Result<HeadForm, ConvertError> {
    let tie = architecture.rules.iter().find_map(|rule| match *rule {
        Rule::Tie { head, embed, .. } => Some((expand(head, prefix, (0, 0), 0), expand(embed, prefix, (0, 0), 0))),
        _ => None,
    });
    // Without a tie rule the head is an ordinary weight, or there is no room for one.
    let Some((head, embed)) = tie else {
        return Ok(if model.decoder.tied_head { HeadForm::Absent } else { HeadForm::Own });
    };
    match (checkpoint.find(&head), checkpoint.find(&embed)) {
        (Some(head), Some(embed)) if equal(head, embed)? => Ok(HeadForm::TiedCopy),
        (Some(_), _) => Ok(HeadForm::Own),
        (None, _) if model.decoder.tied_head => Ok(HeadForm::Absent),
        (None, _) => {
            let declared = if model.tie_declared.is_some() {
                "\"tie_word_embeddings\": false in config.json"
            } else {
                "the default of this model type, as config.json has no `tie_word_embeddings`,"
            };
            let known = architecture.source_names(prefix, &model.decoder);
            let names = checkpoint.tensors().map(|(_, tensor)| tensor.name.as_str());
            let nearest = hints::nearest(&head, names.filter(|&name| !known.contains(name)));
            Err(ConvertError::HeadMissing { dir: checkpoint.dir().to_owned(), head, embed, declared, nearest })
        }
    }
}

fn equal(a: TensorRef<'_>, b: TensorRef<'_>) -> Result<bool, ConvertError> {
    if a.entry.dtype != b.entry.dtype || a.entry.shape != b.entry.shape {
        return Ok(false);
    }
    // Codes of the same bytes may have other scales.
    if [a, b].iter().any(|it| it.file.standing(&it.entry.name).is_some()) {
        return Ok(false);
    }
    let first = a.file.read(a.entry)?;
    if matches!(first, TensorBytes::Copied(_)) {
        // By digest, so that only one of the two is in memory: these are often the largest tensors there are.
        let digest = Sha256::digest(&*first);
        drop(first);
        return Ok(digest == Sha256::digest(&*b.file.read(b.entry)?));
    }
    Ok(*first == *b.file.read(b.entry)?)
}
