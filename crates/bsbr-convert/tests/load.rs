//! One call gives a model and its tokenizer, and files beside the weights are found wherever the weights are.

#![cfg(all(feature = "flex", feature = "text"))]

mod common;

use std::{fs, path::Path};

use bsbr_convert::{ConvertError, ExpectedLogits, ModelSource, load};
use bsbr_model::{TextTokenizer, compare_logits};
use burn::tensor::Device;
use common::gguf::GgufParts;
use common::{checkout, fixtures};

/// A tokenizer of three letters.
const TOKENIZER: &str = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
    "post_processor": null, "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}}"#;

#[test]
fn a_loaded_model_gives_the_logits_of_transformers_and_has_its_tokenizer() {
    for name in ["llama", "gpt2", "gemma2"] {
        let (_temp, dir) = checkout(name, "config.json");
        fs::write(dir.join("tokenizer.json"), TOKENIZER).expect("room");
        let (decoder, tokenizer) = load(&dir, &Device::flex()).expect("a sound model");
        let expected = ExpectedLogits::open(&fixtures().join(name).join("expected.safetensors")).expect("a sound file");
        let found = compare_logits(&decoder, &expected.tokens, &expected.logits).expect("sound texts");
        assert!(found.max <= 1e-4, "{name}: {}", found.max);
        assert_eq!(tokenizer.encode("cab").unwrap(), [2, 0, 1]);
    }
}

#[test]
fn what_is_not_there_is_named() {
    let (_temp, dir) = checkout("llama", "config.json");
    let error = load(&dir, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("not found"), "{error}");
    assert!(load(Path::new("/no/such/place"), &Device::flex()).is_err());
    let mut parts = GgufParts::read("mixed.gguf");
    parts.set_text("tokenizer.ggml.pre", "newest");
    let (_temp, file) = parts.write();
    let error = load(&file, &Device::flex()).unwrap_err();
    assert!(matches!(&error, ConvertError::NoTokenizer { reason, .. } if reason.contains("newest")), "{error}");
}

#[test]
fn files_beside_the_weights_are_read_from_a_directory_and_from_a_gguf_file() {
    let (_temp, dir) = checkout("llama", "config.json");
    let source = ModelSource::open(&dir).expect("a sound model");
    assert_eq!(source.companion("chat_template.jinja").expect("readable"), None);
    fs::write(dir.join("chat_template.jinja"), "{{ messages }}").expect("room");
    let found = source.companion("chat_template.jinja").expect("readable");
    assert_eq!(found.as_deref(), Some(b"{{ messages }}".as_slice()));

    let mut parts = GgufParts::read("mixed.gguf");
    parts.set_text("tokenizer.chat_template", "{{ bos_token }}");
    let (_temp, file) = parts.write();
    let source = ModelSource::open(&file).expect("a sound file");
    let found = source.companion("chat_template.jinja").expect("readable");
    assert_eq!(found.as_deref(), Some(b"{{ bos_token }}".as_slice()));
    let tokenizer: TextTokenizer = source.text_tokenizer().expect("a known kind");
    assert!(!tokenizer.encode("a").unwrap().is_empty());
    assert_eq!(source.companion("added_tokens.json").expect("readable"), None);
}
