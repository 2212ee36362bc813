//! What is wrong with a GGUF file is said by name.

mod common;

use std::fs;
use std::path::Path;

use bsbr_convert::{ConvertError, GgufProblem, ModelSource, PlanProblem};
use common::gguf::{GgufParts, gguf_checkout};
use common::message;

type Change = fn(&mut GgufParts);

fn error(change: impl FnOnce(&mut GgufParts)) -> ConvertError {
    let mut parts = GgufParts::read("llama.gguf");
    change(&mut parts);
    let (_temp, file) = parts.write();
    ModelSource::open(&file).expect_err("a file that cannot be used")
}

fn notes(change: impl FnOnce(&mut GgufParts)) -> Vec<String> {
    let mut parts = GgufParts::read("llama.gguf");
    change(&mut parts);
    let (_temp, file) = parts.write();
    ModelSource::open(&file).expect("a sound file").notes()
}

#[test]
fn a_missing_key_is_named() {
    for (name, keys) in [
        (
            "llama.gguf",
            &[
                "general.architecture",
                "llama.block_count",
                "llama.context_length",
                "llama.embedding_length",
                "llama.feed_forward_length",
                "llama.attention.head_count",
                "llama.attention.layer_norm_rms_epsilon",
            ][..],
        ),
        (
            "gpt2.gguf",
            &[
                "gpt2.block_count",
                "gpt2.context_length",
                "gpt2.embedding_length",
                "gpt2.feed_forward_length",
                "gpt2.attention.head_count",
                "gpt2.attention.layer_norm_epsilon",
            ],
        ),
        ("phi3.gguf", &["phi3.rope.dimension_count", "phi3.rope.scaling.original_context_length"]),
        ("starcoder2.gguf", &["starcoder2.attention.layer_norm_epsilon"]),
        ("mixed.gguf", &["tokenizer.ggml.tokens", "tokenizer.ggml.merges"]),
    ] {
        for key in keys {
            let mut parts = GgufParts::read(name);
            parts.metadata.remove(*key).expect("a key of the fixture");
            let (_temp, file) = parts.write();
            let error = ModelSource::open(&file).expect_err(key);
            assert!(matches!(&error, ConvertError::ConfigKey { key: named, .. } if named == key), "{key}: {error}");
            assert!(message(&error).contains("model.gguf"), "{error}");
        }
    }
}

#[test]
fn a_value_of_the_wrong_type_or_size_is_named() {
    let cases: [(&str, Change); 8] = [
        ("llama.block_count", |parts| parts.set_text("llama.block_count", "two")),
        ("llama.attention.layer_norm_rms_epsilon", |parts| {
            parts.set_f32("llama.attention.layer_norm_rms_epsilon", f32::NAN);
        }),
        ("llama.attention.key_length", |parts| parts.set_u32("llama.attention.key_length", 7)),
        ("llama.attention.value_length", |parts| parts.set_u32("llama.attention.value_length", 8)),
        ("llama.rope.dimension_count", |parts| parts.set_u32("llama.rope.dimension_count", 6)),
        ("llama.rope.scaling.type", |parts| parts.set_text("llama.rope.scaling.type", "other")),
        ("llama.rope.scaling.factor", |parts| parts.set_text("llama.rope.scaling.type", "linear")),
        ("rope_freqs.weight", |parts| parts.add_f32("rope_freqs.weight", &[1.0, 0.0])),
    ];
    for (key, change) in cases {
        let error = error(change);
        assert!(matches!(&error, ConvertError::ConfigKey { key: named, .. } if named == key), "{key}: {error}");
    }
}

#[test]
fn what_the_decoder_does_not_compute_is_refused() {
    let cases: [(&str, Change); 5] = [
        ("llama.expert_count", |parts| parts.set_u32("llama.expert_count", 8)),
        ("llama.attention.sliding_window", |parts| parts.set_u32("llama.attention.sliding_window", 512)),
        ("llama.attention.causal", |parts| parts.set_bool("llama.attention.causal", false)),
        ("llama.logit_scale", |parts| parts.set_f32("llama.logit_scale", 0.5)),
        ("llama.rope.scaling.type", |parts| {
            parts.set_text("llama.rope.scaling.type", "linear");
            parts.add_f32("rope_freqs.weight", &[1.0; 6]);
        }),
    ];
    for (key, change) in cases {
        let error = error(change);
        assert!(matches!(&error, ConvertError::Rejected { key: named, .. } if named == key), "{key}: {error}");
    }
    let absent: Change = |parts| {
        parts.set_u32("llama.expert_count", 0);
        parts.set_bool("llama.attention.causal", true);
    };
    assert_eq!(notes(absent), notes(|_| {}));
}

#[test]
fn metadata_that_nothing_reads_are_told() {
    let notes = notes(|parts| parts.set_u32("llama.new_fashion", 3));
    assert_eq!(notes[0], "metadata that nothing here reads: `llama.new_fashion`");
}

#[test]
fn an_architecture_without_a_table_is_named_with_those_that_have_one() {
    let error = error(|parts| parts.set_text("general.architecture", "mamba"));
    let ConvertError::UnknownModelType { found, supported, .. } = &error else { panic!("{error}") };
    assert_eq!(found, "mamba");
    for name in ["llama", "gpt2", "qwen2", "qwen3", "phi3", "starcoder2", "gemma"] {
        assert!(supported.contains(&format!("`{name}`")), "{supported}");
    }
}

#[test]
fn parts_foreign_files_and_formats_that_are_not_read_are_named() {
    let problem = |error: ConvertError| match error {
        ConvertError::Gguf { problem, .. } => *problem,
        other => panic!("{other}"),
    };
    let split = error(|parts| parts.set_u32("split.count", 3));
    assert!(matches!(problem(split), GgufProblem::Split { parts: 3 }));
    let none = error(|parts| parts.tensors.retain(|tensor| tensor.name != "token_embd.weight"));
    assert!(matches!(problem(none), GgufProblem::NoEmbedding));
    let unread = error(|parts| {
        let tensor = parts.tensor("blk.0.ffn_up.weight");
        (tensor.kind, tensor.axes, tensor.data) = (20, vec![32, 2], vec![0; 36]);
    });
    let GgufProblem::UnreadKind { tensor, found, read } = problem(unread) else { panic!("another problem") };
    assert_eq!((tensor.as_str(), found), ("blk.0.ffn_up.weight", "IQ4_NL"));
    assert!(read.contains("Q4_K"));
    let (_temp, file) = gguf_checkout("llama.gguf");
    fs::write(&file, b"{\"not\": \"a GGUF file\", \"at\": \"all\"}").expect("room");
    assert!(matches!(problem(ModelSource::open(&file).unwrap_err()), GgufProblem::Magic { .. }));
}

#[test]
fn tensors_that_do_not_fit_are_listed_by_their_hugging_face_names_or_by_their_own() {
    let error = error(|parts| {
        parts.tensors.retain(|tensor| tensor.name != "blk.1.ffn_down.weight");
        parts.tensor("blk.0.ffn_up.weight").name = "blk.0.ffn_side.weight".into();
        parts.add_f32("blk.00.attn_norm.weight", &[0.0; 48]);
        let tensor = parts.tensor("blk.0.attn_norm.weight");
        tensor.axes = vec![47];
    });
    let ConvertError::Plan { problems, .. } = &error else { panic!("{error}") };
    let text: Vec<String> = problems.iter().map(ToString::to_string).collect();
    let missing = |name: &str| {
        problems.iter().any(|problem| matches!(problem, PlanProblem::MissingSource { tensor, .. } if tensor == name))
    };
    let unused = |name: &str| {
        problems.iter().any(|problem| matches!(problem, PlanProblem::UnusedSource { tensor, .. } if tensor == name))
    };
    assert!(missing("model.layers.1.mlp.down_proj.weight"), "{text:?}");
    assert!(missing("model.layers.0.mlp.up_proj.weight"), "{text:?}");
    assert!(unused("blk.0.ffn_side.weight") && unused("blk.00.attn_norm.weight"), "{text:?}");
    assert!(text.iter().any(|text| text.contains("`model.layers.0.input_layernorm.weight` is [47], expected [48]")));
    assert_eq!(problems.len(), 5, "{text:?}");
}

#[test]
fn a_scale_that_is_infinite_is_found_where_it_is_read() {
    let mut parts = GgufParts::read("mixed.gguf");
    // The scale of the second block of 32 in Q4_0.
    parts.tensor("blk.0.attn_output.weight").data[18..20].copy_from_slice(&[0x00, 0x7c]);
    let (temp, file) = parts.write();
    let error = common::convert_plain(&file, &temp.path().join("out")).expect_err("an infinite weight");
    let ConvertError::NotFinite { tensor, element, path, .. } = &error else { panic!("{error}") };
    assert_eq!(tensor, "model.layers.0.self_attn.o_proj.weight");
    assert!((32..64).contains(element), "{element}");
    assert_eq!(path, &file);
    assert!(!temp.path().join("out").exists());
}

#[test]
fn a_directory_says_which_gguf_files_it_holds() {
    let (temp, file) = gguf_checkout("llama.gguf");
    let dir = temp.path();
    fs::copy(&file, dir.join("another.gguf")).expect("room");
    let several = ModelSource::open(dir).unwrap_err();
    assert!(matches!(&several, ConvertError::SeveralGguf { names, .. } if names == &["another.gguf", "llama.gguf"]));
    fs::write(dir.join("config.json"), "{}").expect("room");
    let unclear = ModelSource::open(dir).unwrap_err();
    assert!(message(&unclear).contains("`another.gguf`") && message(&unclear).contains("name the file"), "{unclear}");
    let empty = tempfile::tempdir().expect("a temporary directory");
    assert!(message(&ModelSource::open(empty.path()).unwrap_err()).contains("GGUF"));
    assert!(ModelSource::open(Path::new("/nowhere.gguf")).is_err());
}

#[test]
fn a_tokenizer_that_is_not_known_leaves_the_weights_usable_and_says_why() {
    let reason = |change: &dyn Fn(&mut GgufParts)| {
        let mut parts = GgufParts::read("mixed.gguf");
        change(&mut parts);
        let (_temp, file) = parts.write();
        let source = ModelSource::open(&file).expect("a sound file");
        assert_eq!(source.tokenizer_json(), None);
        let reason = source.no_tokenizer().expect("a reason").to_owned();
        assert!(source.notes().iter().any(|note| note.ends_with(&reason)), "{:?}", source.notes());
        reason
    };
    assert!(reason(&|parts| parts.set_text("tokenizer.ggml.pre", "newest")).contains("newest"));
    let merges = |parts: &mut GgufParts, merge: &str| parts.set_texts("tokenizer.ggml.merges", &[merge]);
    assert!(reason(&|parts| merges(parts, "a zzz")).contains("`a zzz`"));
    assert!(reason(&|parts| merges(parts, "a")).contains("`a` merges"));
    assert!(reason(&|parts| parts.set_text("tokenizer.ggml.model", "bert")).contains("bert"));
    assert!(reason(&|parts| drop(parts.metadata.remove("tokenizer.ggml.pre"))).contains("tokenizer.ggml.pre"));
    assert!(reason(&|parts| drop(parts.metadata.remove("tokenizer.ggml.model"))).contains("no tokenizer"));
    // A file of kilobytes whose merges would fill gigabytes.
    let hostile = |parts: &mut GgufParts| {
        let tokens: Vec<String> = (1..300).map(|len| "a".repeat(len)).collect();
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        parts.set_texts("tokenizer.ggml.tokens", &tokens);
        let mut scores = 6_u32.to_le_bytes().to_vec();
        scores.extend((tokens.len() as u64).to_le_bytes());
        scores.resize(scores.len() + 4 * tokens.len(), 0);
        parts.metadata.insert("tokenizer.ggml.scores".into(), (9, scores));
        parts.metadata.remove("tokenizer.ggml.token_type");
        parts.set_u32("tokenizer.ggml.unknown_token_id", 0);
        parts.set_text("tokenizer.ggml.model", "llama");
    };
    assert!(reason(&hostile).contains("more than 32 merges"));
    let doubled = |parts: &mut GgufParts| parts.set_texts("tokenizer.ggml.tokens", &["a", "b", "a"]);
    assert!(reason(&doubled).contains("`a` is token 0 and token 2"));
}
