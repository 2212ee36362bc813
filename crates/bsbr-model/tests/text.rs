//! Tokens from text and text from tokens, at once and as they come.
#![cfg(feature = "text")]

mod common;

use std::path::{Path, PathBuf};

use bsbr_model::{ModelError, TextTokenizer};
use common::Numbers;
use serde_json::{Value, json};

const TEXTS: [&str; 8] = [
    "A plain sentence.",
    "  leading and trailing spaces  ",
    "\n\n line ends \n  then spaces\r\n\ttabs\n",
    "naïve café, Straße, Ω ≈ 1, 日本語のテキスト",
    "🦀🚀 emoji 👩‍👩‍👧‍👦 with joiners 🏳️‍🌈\n🦀",
    "¿?¡!«»…—–\u{a0}\u{2003}\u{200b}",
    "\u{1}\u{7f}\u{85} control characters",
    "",
];

fn builtin() -> TextTokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bsbr/builtin/tokenizer.json");
    TextTokenizer::open(&path).unwrap()
}

/// A `tokenizer.json` of this name and content.
fn written(name: &str, content: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// A tokenizer of whole words with a decoder; token 0 is special.
fn with_decoder(name: &str, words: &[&str], decoder: Value) -> TextTokenizer {
    let vocabulary: serde_json::Map<String, Value> =
        std::iter::once(&"<s>").chain(words).enumerate().map(|(id, word)| ((*word).to_owned(), id.into())).collect();
    let special = json!({
        "id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    });
    let content = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"},
    });
    TextTokenizer::open(&written(name, &content.to_string())).unwrap()
}

/// The text of tokens that come one by one, to the end.
fn streamed(tokenizer: &TextTokenizer, tokens: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let shown: String = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
    shown + &stream.finish().unwrap()
}

#[test]
fn a_text_comes_back_from_its_tokens() {
    for text in TEXTS {
        let tokens = builtin().encode(text).unwrap();
        assert_eq!(builtin().decode(&tokens).unwrap(), text);
    }
}

#[test]
fn streamed_text_is_the_text_of_all_tokens() {
    let tokenizer = builtin();
    for text in TEXTS {
        assert_eq!(streamed(&tokenizer, &tokenizer.encode(text).unwrap()), text);
    }
    let together = TEXTS.concat();
    assert_eq!(streamed(&tokenizer, &tokenizer.encode(&together).unwrap()), together);
}

#[test]
fn a_character_of_several_tokens_comes_whole_with_its_last() {
    let tokenizer = builtin();
    let tokens = tokenizer.encode("🦀").unwrap();
    assert!(tokens.len() > 1, "the tokenizer splits it");
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
    let (last, before) = pieces.split_last().unwrap();
    assert!(before.iter().all(String::is_empty), "{pieces:?}");
    assert_eq!(last, "🦀");
}

#[test]
fn complete_text_is_not_held_back() {
    let tokenizer = builtin();
    let mut stream = tokenizer.stream();
    for token in tokenizer.encode("Every token of plain text is shown at once.").unwrap() {
        assert_eq!(stream.push(token).unwrap(), tokenizer.decode(&[token]).unwrap());
    }
}

#[test]
fn special_tokens_are_not_shown() {
    let tokenizer = builtin();
    let tokens = tokenizer.encode("one<|endoftext|> two").unwrap();
    assert!(tokens.contains(&0));
    assert_eq!(tokenizer.decode(&tokens).unwrap(), "one two");
    assert_eq!(streamed(&tokenizer, &tokens), "one two");
}

#[test]
fn random_tokens_stream_as_they_decode() {
    let tokenizer = builtin();
    let mut numbers = Numbers::new(5);
    for _ in 0..300 {
        // The first 300 are mostly single bytes, of which few make characters.
        let among = if numbers.bits().is_multiple_of(2) { 300 } else { 2048 };
        let mut tokens: Vec<u32> = (0..12).map(|_| (numbers.bits() % among) as u32).collect();
        // Whatever is incomplete at the end included.
        assert_eq!(streamed(&tokenizer, &tokens), tokenizer.decode(&tokens).unwrap());
        tokens.extend(tokenizer.encode(".").unwrap());
        assert_eq!(streamed(&tokenizer, &tokens), tokenizer.decode(&tokens).unwrap());
    }
}

/// Decoders that treat the first token of a text differently, or a token by what follows it.
#[test]
fn every_kind_of_decoder_streams_what_it_decodes() {
    let pieces = ["▁Hello", "▁world", "▁", "ing", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "\n", "▁▁▁end"];
    let llama = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let word_pieces = ["hello", "##ing", ".", "do", "n't", "\n", "world"];
    let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let suffixed = ["hel", "lo</w>", "world</w>", "\n</w>", "</w>"];
    let bpe = json!({"type": "BPEDecoder", "suffix": "</w>"});
    let kinds: [(&str, &[&str], Value); 4] = [
        ("llama.json", &pieces, llama),
        ("metaspace.json", &pieces, metaspace),
        ("word-piece.json", &word_pieces, word_piece),
        ("bpe.json", &suffixed, bpe),
    ];
    for (name, words, decoder) in kinds {
        let tokenizer = with_decoder(name, words, decoder);
        let mut numbers = Numbers::new(6);
        let mut texts = std::collections::HashSet::new();
        for _ in 0..300 {
            let mut tokens: Vec<u32> = Vec::new();
            for _ in 0..10 {
                match (numbers.bits() % (words.len() as u64 + 1)) as u32 {
                    // The three bytes of the euro sign come together: elsewhere they are no text.
                    6..=8 if words == pieces => tokens.extend([6, 7, 8]),
                    token => tokens.push(token),
                }
            }
            let expected = tokenizer.decode(&tokens).unwrap();
            assert_eq!(streamed(&tokenizer, &tokens), expected, "{name}: {tokens:?}");
            texts.insert(expected);
        }
        assert!(texts.len() > 200, "{name} decodes to something");
    }
}

#[test]
fn a_line_end_does_not_take_the_space_after_it() {
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let tokenizer = with_decoder("line-end.json", &["▁Hello", "\n", "▁world"], metaspace);
    assert_eq!(streamed(&tokenizer, &[1, 2, 3]), "Hello\n world");
}

#[test]
fn bytes_that_break_a_character_do_not_take_the_text_after_them() {
    let fallback = json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]});
    let tokenizer = with_decoder("broken-bytes.json", &["<0x41>", "<0xE2>", "text"], fallback);
    let found = streamed(&tokenizer, &[1, 2, 3, 3]);
    assert!(found.starts_with('A') && found.ends_with("\u{fffd}texttext"), "{found}");
}

#[test]
fn what_is_held_back_comes_at_the_end() {
    let tokenizer = builtin();
    // A character that is U+FFFD itself, and the first bytes of one that never comes.
    for text in ["\u{fffd}", "A\u{fffd}", "\u{fffd}\u{fffd} and \u{fffd}"] {
        assert_eq!(streamed(&tokenizer, &tokenizer.encode(text).unwrap()), text);
    }
    let crab = tokenizer.encode("A🦀").unwrap();
    let cut = &crab[..crab.len() - 1];
    assert_eq!(streamed(&tokenizer, cut), tokenizer.decode(cut).unwrap());
    assert!(streamed(&tokenizer, cut).ends_with('\u{fffd}'));
    assert_eq!(tokenizer.stream().finish().unwrap(), "");
}

#[test]
fn bytes_that_are_no_text_are_shown_before_the_stream_has_held_many_of_them() {
    let fallback = json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]});
    let tokenizer = with_decoder("endless-bytes.json", &["<0xFF>"], fallback);
    let mut stream = tokenizer.stream();
    let shown: String = (0..1000).map(|_| stream.push(1).unwrap()).collect();
    assert!(shown.chars().count() > 900 && shown.chars().all(|c| c == '\u{fffd}'), "{}", shown.len());
    assert_eq!(shown + &stream.finish().unwrap(), "\u{fffd}".repeat(1000));
}

#[test]
fn what_training_left_in_a_tokenizer_is_not_applied() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bsbr/builtin/tokenizer.json");
    let mut content: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    content["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    content["padding"] = json!({"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    content["model"]["dropout"] = json!(0.5);
    let trained = TextTokenizer::from_bytes(content.to_string().as_bytes(), "trained").unwrap();
    for text in TEXTS {
        assert_eq!(trained.encode(text).unwrap(), builtin().encode(text).unwrap());
        assert_eq!(trained.encode_within(text).unwrap(), builtin().encode_within(text).unwrap());
    }
    assert_eq!(trained.prefix().unwrap(), builtin().prefix().unwrap());
}

#[test]
fn a_missing_tokenizer_is_named_with_a_way_to_make_one() {
    let error = TextTokenizer::open(Path::new("nowhere/tokenizer.json")).unwrap_err();
    assert!(matches!(error, ModelError::Tokenizer(_)));
    let message = error.to_string();
    assert!(message.starts_with("tokenizer: nowhere/tokenizer.json: not found"), "{message}");
    assert!(message.contains("save_pretrained"), "{message}");
}

#[test]
fn a_broken_tokenizer_is_named() {
    for (name, content) in [("no-json.json", "{"), ("no-model.json", "{}")] {
        let path = written(name, content);
        let error = TextTokenizer::open(&path).unwrap_err();
        assert!(matches!(error, ModelError::Tokenizer(_)));
        assert!(error.to_string().starts_with(&format!("tokenizer: {}: ", path.display())), "{error}");
    }
}

#[test]
fn a_tokenizer_whose_parts_are_unknown_or_contradict_each_other_is_an_error() {
    let model = json!({"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"});
    let bytes = |decoder: Value, processor: Value| {
        json!({"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": processor,
               "decoder": decoder, "model": model})
        .to_string()
        .into_bytes()
    };
    for decoder in [json!(3), json!({"type": "SomethingNew"}), json!([])] {
        let error = TextTokenizer::from_bytes(&bytes(decoder, json!(null)), "tokenizer.json").unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
    // What is put around a text is a token that nobody says more of.
    let single = json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let pair = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
    let named = |name: &str| json!({name: {"id": name, "ids": [1], "tokens": ["b"]}});
    let processor = |special: Value| json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special});
    let sound = TextTokenizer::from_bytes(&bytes(json!(null), processor(named("<s>"))), "tokenizer.json").unwrap();
    assert_eq!(sound.encode("a").unwrap(), [1, 0]);
    let other = TextTokenizer::from_bytes(&bytes(json!(null), processor(named("<t>"))), "tokenizer.json");
    assert!(other.and_then(|tokenizer| tokenizer.encode("a")).is_err());
}
