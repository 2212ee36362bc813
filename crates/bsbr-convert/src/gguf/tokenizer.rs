//! The tokenizer of a GGUF file as the `tokenizer.json` that Hugging Face tokenizers read.
//!
//! Two kinds are known: byte-level BPE (`gpt2`), for the ways of splitting a text that are listed in [`split`], and the
//! SentencePiece BPE of Llama (`llama`). Everything else is told as a reason why there is none: weights do not need it.

use std::collections::HashMap;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use crate::ConvertError;

/// Token types of GGUF.
const NORMAL: f64 = 1.0;
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// Longest token whose merges are worked out, in characters: the work grows with the square.
const LONGEST: usize = 1024;
/// Most merges of a vocabulary without merges of its own, for each of its tokens; real ones have two or three.
const MERGES_PER_TOKEN: usize = 32;

/// Special tokens as tokenizer_config.json names them, and the metadata that hold their ids.
pub(super) const NAMED: [(&str, &str); 4] = [
    ("bos_token", "tokenizer.ggml.bos_token_id"),
    ("eos_token", "tokenizer.ggml.eos_token_id"),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
    ("pad_token", "tokenizer.ggml.padding_token_id"),
];

/// `tokenizer.json`, or why there is none.
///
/// # Errors
///
/// [`ConvertError::ConfigKey`] for metadata that contradict themselves or lack a part.
pub(super) fn read(metadata: &Metadata) -> Result<Result<Vec<u8>, String>, ConvertError> {
    let Some(model) = metadata.optional_str("tokenizer.ggml.model")? else {
        return Ok(Err("the file holds no tokenizer".to_owned()));
    };
    let parts = match model {
        "gpt2" => byte_level(metadata)?,
        "llama" => sentencepiece(metadata)?,
        other => Err(format!("tokenizers of the kind `{other}` are not converted")),
    };
    let Parts { normalizer, pre_tokenizer, decoder, model, begins } = match parts {
        Ok(parts) => parts,
        Err(reason) => return Ok(Err(reason)),
    };
    let tokenizer = Tokenizer {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: added_tokens(metadata)?,
        normalizer,
        pre_tokenizer,
        post_processor: post_processor(metadata, begins)?,
        decoder,
        model,
    };
    Ok(serde_json::to_vec(&tokenizer).map_err(|error| format!("its tokenizer is no JSON: {error}")))
}

/// The content of the file.
#[derive(Serialize)]
struct Tokenizer<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

/// The model with its vocabulary. It is written from where its texts are: as a tree of JSON values a vocabulary of 262,144 tokens
/// takes more memory than the weights of a small model.
#[derive(Serialize)]
#[serde(tag = "type", rename = "BPE")]
struct Bpe<'a> {
    dropout: (),
    unk_token: Option<&'a str>,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    #[serde(serialize_with = "with_ids")]
    vocab: &'a [String],
    merges: Merges<'a>,
}

/// Two tokens each: apart, or with a space between them.
#[derive(Serialize)]
#[serde(untagged)]
enum Merges<'a> {
    Pairs(Vec<[&'a str; 2]>),
    Lines(&'a [String]),
}

/// Tokens with their places in the list.
fn with_ids<S: Serializer>(tokens: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(tokens.iter().zip(0_usize..))
}

struct Parts<'a> {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Bpe<'a>,
    /// Whether texts begin with a token of their own unless the file says otherwise.
    begins: bool,
}

/// How a kind of byte-level BPE cuts a text before it merges.
struct Split {
    normalizer: Value,
    pre_tokenizer: Value,
    /// Whether a piece that is a token is taken as it is.
    whole_tokens: bool,
    begins: bool,
}

/// The ways of splitting that are known, by `tokenizer.ggml.pre`.
fn split(pre: &str) -> Option<Split> {
    let byte_level = |own_pattern: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": own_pattern});
    let sequence =
        |first: Value, own_pattern| json!({"type": "Sequence", "pretokenizers": [first, byte_level(own_pattern)]});
    let pattern = |digits: &str| {
        let pattern = format!(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\
             \\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
        );
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    };
    let plain = |pre_tokenizer| Split { normalizer: Value::Null, pre_tokenizer, whole_tokens: false, begins: false };
    Some(match pre {
        "gpt-2" | "phi-2" => plain(byte_level(true)),
        "smollm" | "starcoder" | "refact" | "codeshell" => {
            plain(sequence(json!({"type": "Digits", "individual_digits": true}), true))
        }
        "llama-bpe" | "llama3" | "llama-v3" => {
            Split { whole_tokens: true, begins: true, ..plain(sequence(pattern("{1,3}"), false)) }
        }
        "qwen2" => Split { normalizer: json!({"type": "NFC"}), ..plain(sequence(pattern(""), false)) },
        _ => return None,
    })
}

fn byte_level(metadata: &Metadata) -> Result<Result<Parts<'_>, String>, ConvertError> {
    let Some(pre) = metadata.optional_str("tokenizer.ggml.pre")? else {
        return Ok(Err("the file does not say how its tokenizer splits a text (no `tokenizer.ggml.pre`)".to_owned()));
    };
    let Some(Split { normalizer, pre_tokenizer, whole_tokens, begins }) = split(pre) else {
        return Ok(Err(format!("how the tokenizer splits a text (`tokenizer.ggml.pre` = {pre}) is not known here")));
    };
    let merges = metadata.texts("tokenizer.ggml.merges")?;
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let vocabulary = match vocabulary(tokens) {
        Ok(vocabulary) => vocabulary,
        Err(reason) => return Ok(Err(reason)),
    };
    let broken = merges.iter().find(|merge| {
        let halves = merge.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty() && !b.contains(' '));
        let known = |token: &str| vocabulary.contains_key(token);
        !halves.is_some_and(|(a, b)| known(a) && known(b) && known(&format!("{a}{b}")))
    });
    if let Some(merge) = broken {
        return Ok(Err(format!("its tokenizer is broken: `{merge}` merges no two tokens into a third")));
    }
    let model = Bpe {
        dropout: (),
        unk_token: None,
        continuing_subword_prefix: (),
        end_of_word_suffix: (),
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: whole_tokens,
        vocab: tokens,
        merges: Merges::Lines(merges),
    };
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    Ok(Ok(Parts { normalizer, pre_tokenizer, decoder, model, begins }))
}

fn sentencepiece(metadata: &Metadata) -> Result<Result<Parts<'_>, String>, ConvertError> {
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let scores = metadata.numbers("tokenizer.ggml.scores")?;
    if scores.len() != tokens.len() || scores.iter().any(|score| score.is_nan()) {
        return Err(metadata.error("tokenizer.ggml.scores", &format!("{} numbers, one for each token", tokens.len())));
    }
    let vocabulary = match vocabulary(tokens) {
        Ok(vocabulary) => vocabulary,
        Err(reason) => return Ok(Err(reason)),
    };
    if let Some(long) = tokens.iter().position(|token| token.chars().count() > LONGEST) {
        return Ok(Err(format!("token {long} of its tokenizer has more than {LONGEST} characters")));
    }
    let unknown = metadata.usize("tokenizer.ggml.unknown_token_id")?;
    let Some(unknown) = tokens.get(unknown) else {
        let expected = format!("one of the {} tokens", tokens.len());
        return Err(metadata.error("tokenizer.ggml.unknown_token_id", &expected));
    };
    let Some(merges) = merges(tokens, &scores, &vocabulary) else {
        return Ok(Err(format!("its tokenizer has more than {MERGES_PER_TOKEN} merges for each token")));
    };
    let space = metadata.optional_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", "▁")];
    let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if space {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let model = Bpe {
        dropout: (),
        unk_token: Some(unknown),
        continuing_subword_prefix: (),
        end_of_word_suffix: (),
        fuse_unk: true,
        byte_fallback: true,
        ignore_merges: false,
        vocab: tokens,
        merges: Merges::Pairs(merges),
    };
    Ok(Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model,
        begins: true,
    }))
}

/// SentencePiece has no merges but scores: any two tokens whose union is a token merge, the best union first.
///
/// `None` for more merges than any real vocabulary gives: their texts would fill the memory.
fn merges<'a>(tokens: &'a [String], scores: &[f64], vocabulary: &HashMap<&str, usize>) -> Option<Vec<[&'a str; 2]>> {
    let mut found = Vec::new();
    for (token, score) in tokens.iter().zip(scores) {
        let mut halves: Vec<(usize, usize, &str, &str)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some((*vocabulary.get(left)?, *vocabulary.get(right)?, left, right))
            })
            .collect();
        halves.sort_unstable();
        let length = |text: &str| text.chars().count();
        found.extend(halves.into_iter().map(|(_, _, left, right)| (*score, length(left), length(right), left, right)));
        if found.len() > MERGES_PER_TOKEN * tokens.len() {
            return None;
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    Some(found.into_iter().map(|(_, _, _, left, right)| [left, right]).collect())
}

/// The tokens with their ids, or what is wrong with them.
fn vocabulary(tokens: &[String]) -> Result<HashMap<&str, usize>, String> {
    let mut vocabulary = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = vocabulary.insert(token.as_str(), id) {
            return Err(format!("its tokenizer is ambiguous: `{token}` is token {first} and token {id}"));
        }
    }
    Ok(vocabulary)
}

/// Tokens that are found in a text before anything else.
fn added_tokens(metadata: &Metadata) -> Result<Vec<Value>, ConvertError> {
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let key = "tokenizer.ggml.token_type";
    let kinds = if metadata.contains(key) { metadata.numbers(key)? } else { vec![NORMAL; tokens.len()] };
    if kinds.len() != tokens.len() {
        return Err(metadata.error(key, &format!("{} numbers, one for each token", tokens.len())));
    }
    // Those that the tokenizer_config.json of an export names are special, whatever their kind.
    let named: Vec<Option<usize>> =
        NAMED.iter().map(|(_, key)| metadata.optional_usize(key)).collect::<Result<_, _>>()?;
    let added = tokens.iter().zip(kinds).enumerate().filter(|(_, (token, _))| !token.is_empty());
    Ok(added
        .filter(|(id, (_, kind))| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind) || named.contains(&Some(*id)))
        .map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind != USER_DEFINED,
            })
        })
        .collect())
}

/// Puts the tokens that begin and end a text around it, where the file asks for them.
fn post_processor(metadata: &Metadata, begins: bool) -> Result<Value, ConvertError> {
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let token = |wanted: &str, id: &str, default: bool| {
        let wanted = metadata.optional_bool(&format!("tokenizer.ggml.{wanted}"))?.unwrap_or(default);
        if !wanted {
            return Ok(None);
        }
        let key = format!("tokenizer.ggml.{id}");
        let id = metadata.usize(&key)?;
        let Some(token) = tokens.get(id) else {
            return Err(metadata.error(&key, &format!("one of the {} tokens", tokens.len())));
        };
        Ok(Some((token, id)))
    };
    let first = token("add_bos_token", "bos_token_id", begins)?;
    let last = token("add_eos_token", "eos_token_id", false)?;
    if first.is_none() && last.is_none() {
        return Ok(Value::Null);
    }
    let special = |(token, _): (&String, usize)| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let around = |texts: &[&str]| {
        let texts = texts.iter().map(|text| json!({"Sequence": {"id": text, "type_id": 0}}));
        first.map(special).into_iter().chain(texts).chain(last.map(special)).collect::<Vec<_>>()
    };
    let named = first.into_iter().chain(last);
    let named = named.map(|(token, id)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})));
    Ok(json!({
        "type": "TemplateProcessing", "single": around(&["A"]), "pair": around(&["A", "B"]),
        "special_tokens": named.collect::<Map<_, _>>(),
    }))
}
