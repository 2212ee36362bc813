//! Tokens that `tokenizer.json` does not name: the files beside it do.
//!
//! As in transformers 5: where `tokenizer_config.json` lists the added tokens, that list and the special tokens named in
//! the same file count; else `special_tokens_map.json` and `added_tokens.json` of older directories do. Those that the
//! tokenizer lacks are added in the order of their ids, special tokens without an id after them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use crate::ModelError;

const CONFIG: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// Keys of the special tokens that every tokenizer may have.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Keys of the others, under their names in several releases.
const EXTRA: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// What the files beside a tokenizer say.
#[derive(Debug, Default)]
pub(super) struct Companions {
    /// Tokens with their ids, and the file that says so.
    declared: BTreeMap<u32, AddedToken>,
    declared_in: PathBuf,
    /// Whether the tokenizer outweighs these files where both name a token.
    older: bool,
    /// Special tokens without an id.
    special: Vec<AddedToken>,
}

/// A token as these files write it.
#[derive(Deserialize)]
struct Written {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Written {
    fn token(self) -> AddedToken {
        let token = AddedToken::from(self.content, self.special);
        let normalized = self.normalized.unwrap_or(token.normalized);
        token.single_word(self.single_word).lstrip(self.lstrip).rstrip(self.rstrip).normalized(normalized)
    }
}

/// Reads the files beside the tokenizer `path`.
pub(super) fn read(path: &Path) -> Result<Companions, ModelError> {
    let beside = |name: &str| path.with_file_name(name);
    let config = object(&beside(CONFIG))?;
    if let Some(list) = config.get("added_tokens_decoder").filter(|list| !list.is_null()) {
        let file = beside(CONFIG);
        let tokens: BTreeMap<u32, Written> = parse(&file, "added_tokens_decoder", list)?;
        let declared = tokens.into_iter().map(|(id, token)| (id, token.token())).collect();
        return Ok(Companions { declared, special: special(&file, &config)?, declared_in: file, older: false });
    }
    // The older map has the last word on the names that both files hold.
    let map = object(&beside(SPECIAL))?;
    let mut tokens = special(&beside(SPECIAL), &map)?;
    let config: Map<String, Value> = config.into_iter().filter(|(key, _)| !map.contains_key(key)).collect();
    tokens.extend(special(&beside(CONFIG), &config)?);
    let file = beside(ADDED);
    let added: BTreeMap<String, u32> = parse(&file, "", &Value::Object(object(&file)?))?;
    let names: HashSet<&str> = tokens.iter().map(|token| token.content.as_str()).collect();
    let declared = added.into_iter().map(|(content, id)| {
        let special = names.contains(content.as_str());
        (id, AddedToken::from(content, special))
    });
    Ok(Companions { declared: declared.collect(), declared_in: file, special: tokens, older: true })
}

impl Companions {
    /// Adds what `tokenizer` lacks.
    pub(super) fn add_to(mut self, tokenizer: &mut Tokenizer) -> Result<(), ModelError> {
        let known = tokenizer.get_added_tokens_decoder();
        if self.older {
            let contents: HashSet<&str> = known.values().map(|token| token.content.as_str()).collect();
            self.declared.retain(|id, token| !known.contains_key(id) && !contents.contains(token.content.as_str()));
        }
        let known: HashSet<AddedToken> = known.into_values().collect();
        let names: HashSet<&str> = self.special.iter().map(|token| token.content.as_str()).collect();
        let mut added: Vec<AddedToken> =
            self.declared.values().filter(|token| !known.contains(token)).cloned().collect();
        for token in &mut added {
            token.special |= names.contains(token.content.as_str());
        }
        let mut contents: HashSet<&str> =
            known.iter().chain(self.declared.values()).map(|token| token.content.as_str()).collect();
        let special: Vec<AddedToken> =
            self.special.iter().filter(|token| contents.insert(&token.content)).cloned().collect();
        added.extend(special);
        tokenizer.add_tokens(added).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        for (id, AddedToken { content, .. }) in &self.declared {
            let found = tokenizer.token_to_id(content);
            if found != Some(*id) && !content.is_empty() {
                let found = found.map_or_else(|| "none".to_owned(), |found| found.to_string());
                return Err(problem(
                    &self.declared_in,
                    format!(
                        "the token `{content}` has the id {id} here and {found} beside the tokens of tokenizer.json: \
                         write both with `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` and see which one \
                         the model was trained with"
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// The special tokens that an object names.
fn special(file: &Path, object: &Map<String, Value>) -> Result<Vec<AddedToken>, ModelError> {
    let mut tokens = Vec::new();
    let named = NAMED.into_iter().filter_map(|key| Some((key, object.get(key)?)));
    let others = object.iter().filter(|(key, value)| {
        // Those of one kind of model, such as the token that stands for an image.
        key.ends_with("_token") && value.is_string() && !NAMED.contains(&key.as_str())
    });
    for (key, value) in named.chain(others.map(|(key, value)| (key.as_str(), value))) {
        tokens.extend(one(file, key, value)?);
    }
    for key in EXTRA {
        let values: Vec<&Value> = match object.get(key) {
            None | Some(Value::Null) => continue,
            Some(Value::Array(list)) => list.iter().collect(),
            Some(Value::Object(by_name)) => by_name.values().collect(),
            Some(other) => return Err(problem(file, format!("`{key}` must be a list of tokens, found {other}"))),
        };
        for value in values {
            tokens.extend(one(file, key, value)?);
        }
    }
    Ok(tokens)
}

/// A special token that is written as a text or as an object; none for null.
fn one(file: &Path, key: &str, value: &Value) -> Result<Option<AddedToken>, ModelError> {
    match value {
        Value::Null => Ok(None),
        Value::String(content) => Ok(Some(AddedToken::from(content.clone(), true))),
        other => {
            let mut token = parse::<Written>(file, key, other)?.token();
            token.special = true;
            Ok(Some(token))
        }
    }
}

/// The object in a file; empty where there is no file.
fn object(path: &Path) -> Result<Map<String, Value>, ModelError> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let bytes = std::fs::read(path).map_err(|error| problem(path, error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| problem(path, format!("not the JSON expected here: {error}")))
}

fn parse<T: for<'de> Deserialize<'de>>(file: &Path, key: &str, value: &Value) -> Result<T, ModelError> {
    T::deserialize(value).map_err(|error| {
        let place = if key.is_empty() { "the file".to_owned() } else { format!("`{key}`") };
        problem(file, format!("{place} does not hold tokens: {error}"))
    })
}

fn problem(file: &Path, problem: String) -> ModelError {
    ModelError::Tokenizer(format!("{}: {problem}", file.display()))
}
