//! A `tokenizer.json` whose model merges pairs, as most do, read straight into its tables.
//!
//! For a model of any kind the library makes trees of JSON values first: of a vocabulary of 262,144 tokens hundreds of megabytes, which
//! take longer to make than a small model takes to load.

use serde::Deserialize;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
    TokenizerBuilder,
    models::bpe::{BPE, Vocab},
};

/// What is read of the file; truncation, padding and merges left out at random are not.
#[derive(Deserialize)]
struct Content {
    version: Option<Version>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    model: Model,
}

#[derive(Clone, Copy, Deserialize)]
enum Version {
    #[serde(rename = "1.0")]
    First,
}

#[derive(Clone, Copy, Deserialize)]
enum Kind {
    #[serde(rename = "BPE")]
    BytePairs,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Kind,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: Vec<Merge>,
}

/// Two tokens, in older files with a blank between them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// The tokenizer; `None` where the file is of another kind or has a fault, which the library names.
pub(super) fn read(bytes: &[u8]) -> Option<Tokenizer> {
    let content: Content = serde_json::from_slice(bytes).ok()?;
    let (None | Some(Version::First), Kind::BytePairs) = (content.version, content.model.kind);
    let tokenizer = TokenizerBuilder::new()
        .with_model(content.model.tables()?)
        .with_normalizer(content.normalizer)
        .with_pre_tokenizer(content.pre_tokenizer)
        .with_post_processor(content.post_processor)
        .with_decoder(content.decoder)
        .build();
    let mut tokenizer = Tokenizer::from(tokenizer.ok()?);
    tokenizer.add_tokens(content.added_tokens).ok()?;
    Some(tokenizer)
}

impl Model {
    fn tables(self) -> Option<BPE> {
        let merges = self.merges.into_iter().filter_map(|merge| match merge {
            Merge::Pair(first, second) => Some(Some((first, second))),
            Merge::Line(line) if line.starts_with("#version") => None,
            Merge::Line(line) => {
                let halves = line.split_once(' ').filter(|(_, second)| !second.contains(' '));
                Some(halves.map(|(first, second)| (first.to_owned(), second.to_owned())))
            }
        });
        let mut tables = BPE::builder().vocab_and_merges(self.vocab, merges.collect::<Option<Vec<_>>>()?);
        if let Some(unknown) = self.unk_token {
            tables = tables.unk_token(unknown);
        }
        if let Some(prefix) = self.continuing_subword_prefix {
            tables = tables.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = self.end_of_word_suffix {
            tables = tables.end_of_word_suffix(suffix);
        }
        let tables = tables
            .fuse_unk(self.fuse_unk.unwrap_or_default())
            .byte_fallback(self.byte_fallback.unwrap_or_default())
            .ignore_merges(self.ignore_merges.unwrap_or_default());
        tables.build().ok()
    }
}
