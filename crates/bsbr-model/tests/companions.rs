//! Tokens that only the files beside tokenizer.json name, as transformers adds them.
#![cfg(feature = "text")]

use std::fs;

use bsbr_model::{ModelError, TextTokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Letters a to d and a token for whatever else there is; `<s>` is special and `<u>` is not. None has the id 6.
fn directory(files: &[(&str, Value)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let token = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [token(0, "<s>", true), token(5, "<u>", false)],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "dropout": null, "unk_token": "?", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"<s>": 0, "?": 1, "a": 2, "b": 3, "c": 4}, "merges": []},
    });
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    for (name, content) in files {
        fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    dir
}

fn open(files: &[(&str, Value)]) -> Result<TextTokenizer, ModelError> {
    TextTokenizer::open(&directory(files).path().join("tokenizer.json"))
}

fn encode(files: &[(&str, Value)], text: &str) -> Vec<u32> {
    open(files).unwrap_or_else(|error| panic!("{error}")).encode(text).unwrap()
}

const CONFIG: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// As it stands alone: `<x>` is three characters nobody knows.
#[test]
fn without_companions_the_tokenizer_is_what_it_says() {
    assert_eq!(encode(&[], "a<x>b"), [2, 1, 1, 1, 3]);
    assert_eq!(encode(&[], "a<u>b<s>"), [2, 5, 3, 0]);
    assert_eq!(
        encode(&[(CONFIG, json!({"tokenizer_class": "X", "add_bos_token": true, "chat_template": "a_token"}))], "a"),
        [2]
    );
}

#[test]
fn tokens_of_the_decoder_list_are_added_in_the_order_of_their_ids() {
    let list = json!({"added_tokens_decoder": {
        "7": {"content": "<y>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true},
        "6": {"content": "<x>", "special": false},
        "0": {"content": "<s>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true},
    }});
    let files = [(CONFIG, list)];
    assert_eq!(encode(&files, "a<x><y>b<s>"), [2, 6, 7, 3, 0]);
    // The special one is left out of a text, the other one is not.
    assert_eq!(open(&files).unwrap().decode(&[2, 6, 7, 3]).unwrap(), "a<x>b");
}

#[test]
fn tokens_of_the_older_list_are_added_too_and_special_if_they_are_named_so() {
    let files = [(ADDED, json!({"<y>": 7, "<x>": 6})), (SPECIAL, json!({"pad_token": "<y>"}))];
    assert_eq!(encode(&files, "a<x><y>b"), [2, 6, 7, 3]);
    assert_eq!(open(&files).unwrap().decode(&[2, 6, 7, 3]).unwrap(), "a<x>b");
    // What the tokenizer says about a token of its own outweighs the older list.
    let own = [(ADDED, json!({"<u>": 5, "<s>": 0}))];
    assert_eq!(open(&own).unwrap().decode(&[0, 2, 5]).unwrap(), "a<u>");
}

#[test]
fn the_decoder_list_makes_the_older_files_silent() {
    let files = [
        (CONFIG, json!({"added_tokens_decoder": {"6": {"content": "<x>", "special": false}}})),
        (ADDED, json!({"<y>": 7})),
        (SPECIAL, json!({"pad_token": "<z>"})),
    ];
    assert_eq!(encode(&files, "<x><y><z>"), [6, 1, 1, 1, 1, 1, 1]);
}

#[test]
fn special_tokens_that_are_named_without_an_id_are_added_last() {
    for (file, content) in [
        (CONFIG, json!({"pad_token": "<x>"})),
        (CONFIG, json!({"pad_token": {"__type": "AddedToken", "content": "<x>", "normalized": true}})),
        (CONFIG, json!({"additional_special_tokens": ["<s>", "<x>"]})),
        (CONFIG, json!({"extra_special_tokens": [{"__type": "AddedToken", "content": "<x>"}]})),
        (CONFIG, json!({"extra_special_tokens": {"image_token": "<x>"}})),
        (CONFIG, json!({"image_token": "<x>"})),
        (SPECIAL, json!({"mask_token": {"content": "<x>", "lstrip": false}})),
        (SPECIAL, json!({"additional_special_tokens": ["<x>"]})),
    ] {
        let files = [(file, content.clone())];
        assert_eq!(encode(&files, "a<x>b"), [2, 6, 3], "{content}");
        assert_eq!(open(&files).unwrap().decode(&[2, 6, 3]).unwrap(), "ab", "{content}");
    }
    // A token of the vocabulary keeps its id, and is special from now on.
    let files = [(CONFIG, json!({"eos_token": "c"}))];
    assert_eq!(encode(&files, "ac"), [2, 4]);
    assert_eq!(open(&files).unwrap().decode(&[2, 4]).unwrap(), "a");
    for nothing in [json!({"pad_token": null}), json!({"pad_token": "<s>"}), json!({"added_tokens_decoder": null})] {
        assert_eq!(encode(&[(CONFIG, nothing)], "a<x>"), [2, 1, 1, 1]);
    }
}

#[test]
fn spaces_beside_a_token_belong_to_it_where_the_list_says_so() {
    let strips = json!({"added_tokens_decoder": {"6": {"content": "<x>", "lstrip": true, "rstrip": true}}});
    assert_eq!(encode(&[(CONFIG, strips)], "a <x> b"), [2, 6, 3]);
    let plain = json!({"added_tokens_decoder": {"6": {"content": "<x>"}}});
    assert_eq!(encode(&[(CONFIG, plain)], "a <x> b"), [2, 1, 6, 1, 3]);
}

#[test]
fn what_cannot_be_is_refused_by_file_and_token() {
    for (file, content, words) in [
        (CONFIG, json!({"added_tokens_decoder": {"9": {"content": "<x>"}}}), ["`<x>` has the id 9", "and 6 beside"]),
        (CONFIG, json!({"added_tokens_decoder": {"4": {"content": "<u>"}}}), ["`<u>` has the id 4", "and 5 beside"]),
        (ADDED, json!({"<x>": 9}), ["`<x>` has the id 9", "and 6 beside"]),
        (CONFIG, json!({"added_tokens_decoder": [1]}), ["`added_tokens_decoder` does not hold tokens", "map"]),
        (CONFIG, json!({"added_tokens_decoder": {"x": {"content": "<x>"}}}), ["`added_tokens_decoder`", "x"]),
        (CONFIG, json!({"pad_token": 7}), ["`pad_token` does not hold tokens", "7"]),
        (SPECIAL, json!({"additional_special_tokens": 7}), ["`additional_special_tokens` must be a list", "7"]),
        (ADDED, json!({"<x>": "6"}), ["does not hold tokens", "6"]),
        (SPECIAL, json!([]), ["not the JSON expected here", "map"]),
    ] {
        let error = open(&[(file, content.clone())]).expect_err("a contradiction");
        assert!(matches!(error, ModelError::Tokenizer(_)));
        let message = error.to_string();
        for word in words.into_iter().chain([file]) {
            assert!(message.contains(word), "{content}: no {word:?} in: {message}");
        }
    }
}
