//! Every command takes a GGUF file where it takes a checkpoint.

mod common;

use std::fs;

use common::{Place, checkpoint_dir, files};

/// A place that holds `mixed.gguf` alone, in a directory of its own, and the logits it must give.
fn place() -> Place {
    let place = Place::empty();
    fs::create_dir(place.path("dir")).expect("a fresh directory");
    let fixtures = checkpoint_dir("gguf");
    fs::copy(fixtures.join("mixed.gguf"), place.path("dir/mixed.gguf")).expect("a fixture");
    fs::copy(fixtures.join("mixed.safetensors"), place.path("expected.safetensors")).expect("a fixture");
    place
}

#[test]
fn a_file_and_a_directory_that_holds_it_are_verified_inspected_and_planned_alike() {
    let place = place();
    for model in ["dir/mixed.gguf", "dir"] {
        let verified = place.done(&format!("verify -m {model} -e expected.safetensors"));
        assert!(verified.starts_with("GGUF file `mixed.gguf` (llama): max |difference|"), "{verified}");
        let inspected = place.done(&format!("inspect -m {model} --tensors"));
        for text in ["GGUF file `mixed.gguf` (llama)", "Q4_K: 1 tensors, 36.9 kB", "note: 7 tensors are quantised"] {
            assert!(inspected.contains(text), "no {text:?} in {inspected}");
        }
        let plan = place.done(&format!("convert -m {model} --dry-run"));
        assert!(plan.contains("model.layers.{i}.self_attn.q_proj.weight"), "{plan}");
    }
}

#[test]
fn a_file_is_converted_run_and_exported() {
    let place = place();
    let stdout = place.done("convert -m dir/mixed.gguf -o out");
    assert!(stdout.contains("note: 7 tensors are quantised (Q4_0, Q4_1, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0)"), "{stdout}");
    let written: Vec<String> = files(&place.path("out")).into_keys().collect();
    let names = ["README.md", "config.json", "conversion.json", "model.safetensors", "source_config.json"];
    let names: Vec<&str> =
        names.into_iter().chain(["source_gguf.bin", "tokenizer.json", "tokenizer_config.json"]).collect();
    assert_eq!(written, names);
    assert_eq!(place.json("out/conversion.json")["source"], "mixed.gguf");
    assert_eq!(place.json("out/conversion.json")["files"][0]["format"], "gguf");
    assert!(place.read("out/README.md").contains("gives the GGUF file back byte for byte"));
    assert!(stdout.contains("bits per weight: ") && stdout.contains("Q4_K 36.9 kB in 1 tensors"), "{stdout}");
    let inspected = place.done("inspect -m out --tensors");
    assert!(inspected.contains("bits per weight") && inspected.contains("Q4_K: 1 tensors, 36.9 kB"), "{inspected}");

    // The file itself where that is asked for, else what transformers opens.
    let exported = place.done("export -m out -o file --to gguf");
    assert!(exported.contains("mixed.gguf") && exported.contains("the original, byte for byte"), "{exported}");
    assert!(fs::read(place.path("file/mixed.gguf")).unwrap() == fs::read(place.path("dir/mixed.gguf")).unwrap());
    place.done("export -m out -o file --to gguf --force");
    let exported = place.done("export -m out -o back");
    assert!(
        exported.contains("model.safetensors") && exported.contains("the numbers of mixed.gguf, decoded"),
        "{exported}"
    );
    let written: Vec<String> = files(&place.path("back")).into_keys().collect();
    assert_eq!(written, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(place.json("back/config.json")["architectures"][0], "LlamaForCausalLM");

    // The same weights in three forms give the same text, with the tokenizer of the file.
    let continued: Vec<String> = ["dir/mixed.gguf", "out --full-attention", "back"]
        .map(|model| place.done(&format!("generate -m {model} -n 8 --prompt Hello")))
        .into();
    assert!(continued[0] == continued[1] && continued[0] == continued[2], "{continued:?}");
    for model in ["out", "back"] {
        place.done(&format!("verify -m {model} -e expected.safetensors"));
    }
}

#[test]
fn a_file_becomes_codes_of_four_bits_by_what_its_inputs_are_like() {
    let place = place();
    place.write("text.txt", &"the quick brown fox jumps over the lazy dog. ".repeat(9000));
    let plain = place.done("convert -m dir/mixed.gguf -o plain --weights int4");
    assert!(plain.contains("weights were cast to Q4_0") && plain.contains("an export is refused"), "{plain}");
    place.refused("export -m plain -o back", 2, &["their original bits are gone"]);
    place.refused("export -m plain -o back --to gguf", 2, &["has no GGUF file to give back"]);
    place.done("split calibrate -m dir/mixed.gguf --text text.txt --windows 4 --seq-len 64 -o moments");
    place.done("convert -m dir/mixed.gguf -o fitted --weights int4 --calibration moments");
    let [plain, fitted] = ["plain", "fitted"].map(|dir| fs::read(place.path(dir).join("model.safetensors")).unwrap());
    assert!(plain.len() == fitted.len() && plain != fitted);
    place.done("generate -m fitted -n 4 --prompt Hello");
    place.refused(
        "convert -m dir/mixed.gguf -o out --weights int8 --calibration moments",
        2,
        &["--calibration chooses scales of --weights int4"],
    );
    place.refused(
        "convert -m fitted -o out --weights int4 --calibration moments",
        2,
        &["fitted is a converted model already"],
    );
}

#[test]
fn a_file_is_measured() {
    let place = place();
    place.write("text.txt", &"the quick brown fox jumps over the lazy dog. ".repeat(12));
    let flags = "--text text.txt --seq-len 64 --windows 1 --chunk-size 64 --local-chunks 0 --max-keys 2";
    let measured = place.done(&format!("eval -m dir/mixed.gguf {flags}"));
    assert!(
        measured.contains("GGUF file `mixed.gguf` (llama), ") && measured.contains("bits per weight"),
        "{measured}"
    );
}

#[test]
fn what_cannot_be_used_is_said() {
    let place = place();
    fs::copy(place.path("dir/mixed.gguf"), place.path("dir/other.gguf")).expect("room");
    place.refused(
        "inspect -m dir",
        2,
        &["dir holds no `config.json` and several GGUF files", "mixed.gguf, other.gguf"],
    );
    place.write("text.gguf", "no GGUF file at all, but a text");
    place.refused("convert -m text.gguf -o out", 2, &["text.gguf: the file begins with `no G`, expected `GGUF`"]);
    place.write("model.txt", "no magic");
    place.refused("inspect -m model.txt", 2, &["model.txt is neither a directory nor a GGUF file", "--model takes"]);
    // Known by its first bytes, whatever it is called.
    place.write("blob", "GGUF");
    place.refused("inspect -m blob", 2, &["blob: the file has 4 bytes", "GGUF"]);
    fs::rename(place.path("dir/mixed.gguf"), place.path("sha256-00ff")).expect("a file");
    assert!(place.done("inspect -m sha256-00ff").contains("GGUF file `sha256-00ff`"));
    fs::copy(checkpoint_dir("gguf").join("llama.gguf"), place.path("llama.gguf")).expect("a fixture");
    place.refused("generate -m llama.gguf -n 2 --prompt Hello", 2, &["llama.gguf: the file holds no tokenizer"]);
}
