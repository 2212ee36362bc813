//! PyTorch files that are damaged or want to harm: a named error, never a panic, never a half-written output.

mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use bsbr_convert::{ConvertError, TorchProblem, plan_checkpoint};
use common::pytorch::{StateDict, Storage, View, zip};
use common::{PYTORCH, checkout, convert_plain, message, read_tensors, refused};
use proptest::prelude::*;
use tempfile::TempDir;

/// The state dict of the fixture `gpt2`.
fn gpt2() -> StateDict {
    StateDict::of(&read_tensors(&common::fixtures().join("gpt2/model.safetensors")))
}

fn checkpoint(bytes: &[u8]) -> (TempDir, PathBuf) {
    let (temp, dir) = checkout("gpt2_bin_tied", "config.json");
    fs::write(dir.join("pytorch_model.bin"), bytes).expect("room");
    (temp, dir)
}

/// The error of converting such a file, and its text.
fn error(bytes: &[u8]) -> (TorchProblem, String) {
    let (_temp, dir) = checkpoint(bytes);
    let error = refused(&dir);
    let text = message(&error);
    assert!(text.contains("pytorch_model.bin: "), "{text}");
    match error {
        ConvertError::Torch { problem, .. } => (*problem, text),
        other => panic!("{other:?}"),
    }
}

fn both(dict: &StateDict) -> [Vec<u8>; 2] {
    [dict.zip(), dict.legacy()]
}

#[test]
fn what_is_no_pytorch_file_is_refused() {
    for bytes in [&b""[..], b"PK", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"not a file of weights", &[0; 600]] {
        assert!(matches!(error(bytes).0, TorchProblem::Unreadable(_)), "{bytes:?}");
    }
    let archive = zip(&[("archive/something".into(), vec![1, 2, 3])]);
    let (_, text) = error(&archive);
    assert!(text.contains("No data.pkl entry"), "{text}");
    // A pickle of its own has no place for numbers; a list and a number are no dictionary of tensors.
    assert!(matches!(error(b"\x80\x02}.").0, TorchProblem::Container));
    assert!(matches!(error(b"\x80\x02].").0, TorchProblem::NoDictionary { found } if found == "a list"));
    assert!(matches!(error(b"\x80\x02K\x01.").0, TorchProblem::NoDictionary { found } if found == "a number"));
    assert!(matches!(error(&StateDict::default().zip()).0, TorchProblem::Empty));
}

#[test]
fn a_pickle_that_calls_other_programs_runs_nothing_and_is_refused_by_the_name_it_calls() {
    let (temp, _) = checkout("gpt2_bin_tied", "config.json");
    let evidence = temp.path().join("evidence");
    let command = format!("touch {}", evidence.display());
    let mut call = b"cposix\nsystem\n(X".to_vec();
    call.extend((command.len() as u32).to_le_bytes());
    call.extend(command.bytes());
    call.extend(b"tR");
    let mut dict = gpt2();
    dict.others.push(("transformer.h.9.hook".into(), call.clone()));
    for bytes in both(&dict) {
        let (problem, text) = error(&bytes);
        let expected = TorchProblem::NoTensor { key: "transformer.h.9.hook".into(), found: "a `posix.system`".into() };
        assert_eq!(problem, expected);
        assert!(text.contains("no code in a pickle is run"), "{text}");
    }
    // As the root, and as what a tensor is made with.
    let root = zip(&[("archive/data.pkl".into(), [&b"\x80\x02"[..], &call, b"."].concat())]);
    assert!(matches!(error(&root).0, TorchProblem::NoDictionary { found } if found == "a `posix.system`"));
    let other = replace(&gpt2().zip(), b"_rebuild_tensor_v2", b"_rebuild_nested_v2");
    let (_, text) = error(&other);
    assert!(text.contains("torch._utils._rebuild_nested_v2"), "{text}");
    assert!(!evidence.exists());
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    while let Some(at) = bytes.windows(from.len()).position(|window| window == from) {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    bytes
}

#[test]
fn a_training_checkpoint_and_a_dictionary_of_other_things_are_told_apart() {
    let mut dict = gpt2();
    dict.others.push(("epoch".into(), b"K\x03".to_vec()));
    for bytes in both(&dict) {
        let expected = TorchProblem::NoTensor { key: "epoch".into(), found: "a number".into() };
        assert_eq!(error(&bytes).0, expected);
    }
    // The pickle of the whole dictionary under a key, after the two bytes that start it and before the one that ends it.
    let inner = gpt2();
    let pickle = inner.pickle();
    let dict = StateDict {
        others: vec![("state_dict".into(), pickle[2..pickle.len() - 1].to_vec())],
        views: Vec::new(),
        storages: inner.storages,
    };
    for bytes in both(&dict) {
        let (problem, text) = error(&bytes);
        assert_eq!(problem, TorchProblem::Nested { key: "state_dict".into() });
        assert!(text.contains("save the state dict of the model alone"), "{text}");
    }
    // What PyTorch notes about its modules is no tensor and no reason to refuse.
    let mut dict = gpt2();
    dict.others.push(("_metadata".into(), b"}(X\x00\x00\x00\x00K\x01u".to_vec()));
    for bytes in both(&dict) {
        let (_temp, dir) = checkpoint(&bytes);
        plan_checkpoint(&dir).expect("sound");
    }
}

#[test]
fn shapes_strides_and_offsets_beyond_the_storage_are_refused() {
    let name = "transformer.h.0.ln_1.bias";
    type Edit = fn(&mut View);
    let edits: [(&str, Edit); 6] = [
        ("offset", |view| view.offset = 1),
        ("far offset", |view| view.offset = usize::MAX),
        ("shape", |view| view.shape = vec![49]),
        ("overflowing shape", |view| (view.shape, view.stride) = (vec![1 << 40, 1 << 40], vec![0, 0])),
        ("stride", |view| view.stride = vec![2]),
        ("overflowing stride", |view| view.stride = vec![usize::MAX >> 1]),
    ];
    for (what, edit) in edits {
        let mut dict = gpt2();
        edit(dict.view(name));
        for bytes in both(&dict) {
            assert!(matches!(error(&bytes).0, TorchProblem::Unreadable(_)), "{what}");
        }
    }
}

#[test]
fn a_tensor_larger_than_its_file_is_refused_before_anything_of_that_size_is_made() {
    let mut dict = gpt2();
    let view = dict.view("transformer.wte.weight");
    // Nine gigabytes out of one number, within what the reader itself allows.
    (view.shape, view.stride) = (vec![9 << 20, 256], vec![0, 0]);
    for bytes in both(&dict) {
        let (problem, text) = error(&bytes);
        assert!(matches!(problem, TorchProblem::LargerThanFile { bytes, .. } if bytes == 9 << 30), "{text}");
        assert!(text.contains("`transformer.wte.weight` of shape [9437184, 256] claims 9663676416 bytes"), "{text}");
    }
}

#[test]
fn a_storage_that_claims_more_than_the_file_holds_is_refused() {
    for size in [1_000_000_usize, 1 << 60] {
        let claimed = (size as u64).to_le_bytes();
        let sound = gpt2();
        let count = sound.storages[0].bytes.len() as u64 / 4;
        let at = |bytes: &[u8]| bytes.windows(8).position(|window| window == count.to_le_bytes()).expect("the count");
        for mut bytes in both(&sound) {
            let at = at(&bytes);
            bytes[at..at + 8].copy_from_slice(&claimed);
            // In an archive the count is only a claim: its entry has the length that is read.
            let (_temp, dir) = checkpoint(&bytes);
            match convert_plain(&dir, &dir.with_file_name("out")) {
                Ok(_) => assert!(bytes.starts_with(b"PK")),
                Err(ConvertError::Torch { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn sparse_complex_and_quantised_storages_are_refused() {
    for kind in ["ComplexFloatStorage", "QInt8Storage", "Float8_e4m3fnStorage"] {
        let mut dict = gpt2();
        dict.storages[0] = Storage { kind, bytes: vec![0; 4656], zeros: 0 };
        for bytes in both(&dict) {
            let (_, text) = error(&bytes);
            assert!(text.contains(kind), "{text}");
        }
    }
}

/// Converts a mutated file; whatever it says, it says it in an error.
fn survives(bytes: &[u8], what: &str) {
    let (_temp, dir) = checkpoint(bytes);
    let result = catch_unwind(AssertUnwindSafe(|| convert_plain(&dir, &dir.with_file_name("out")).map(drop)));
    assert!(result.is_ok(), "panicked on {what}");
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    let fixtures = PYTORCH.map(|name| {
        let path = common::fixtures().join(name).join("pytorch_model.bin");
        (name, fs::read(path).expect("a fixture"))
    });
    let dict = gpt2();
    fixtures.into_iter().chain([("zip", dict.zip()), ("legacy", dict.legacy())]).collect()
}

/// The parts of a file that are not numbers: the first and the last bytes.
const STRUCTURE: usize = 4500;

#[test]
fn truncated_files_are_refused() {
    for (name, bytes) in files() {
        let near_the_ends = (0..STRUCTURE).chain(bytes.len() - STRUCTURE..bytes.len()).step_by(61);
        for len in near_the_ends.chain((STRUCTURE..bytes.len() - STRUCTURE).step_by(9001)) {
            error(&bytes[..len]);
            survives(&bytes[len..], name);
        }
    }
}

#[test]
fn files_with_bytes_cut_out_or_doubled_do_no_harm() {
    for (name, bytes) in files() {
        for at in (0..STRUCTURE).step_by(173) {
            survives(&[&bytes[..at], &bytes[at + 1..]].concat(), name);
            survives(&[&bytes[..at + 8], &bytes[at..]].concat(), name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn files_with_other_bytes_in_their_structure_do_no_harm(
        file in 0_usize..4,
        places in prop::collection::vec((0..2 * STRUCTURE, prop_oneof![any::<u8>(), Just(0xff), Just(0x7f)]), 1..4),
    ) {
        let (name, mut bytes) = files().swap_remove(file);
        for (at, byte) in &places {
            let at = if *at < STRUCTURE { *at } else { bytes.len() - 1 - (at - STRUCTURE) };
            bytes[at] = *byte;
        }
        survives(&bytes, name);
    }
}
