//! Texts on their way in and out: flags, files, standard input, tokens that show nothing until the end.

mod common;

use std::fs;

use common::{Place, Run, bsbr, check_refusal, run};
use serde_json::{Value, json};

const TEXT: &str = "And the king said\nunto the people";

/// Continues by eight tokens what `arguments` name, with `input` on standard input.
fn generate(place: &Place, arguments: &[&str], input: &[u8]) -> Run {
    let mut command = bsbr();
    command.current_dir(place.path("")).args(["generate", "-n", "8"]).args(arguments).write_stdin(input);
    run(&mut command)
}

/// The same, which must succeed; what it prints.
fn continued(place: &Place, arguments: &[&str], input: &[u8]) -> String {
    let run = generate(place, arguments, input);
    assert_eq!(run.code, 0, "{arguments:?}: {}", run.stderr);
    run.stdout
}

#[test]
fn a_prompt_may_begin_with_a_hyphen() {
    let place = Place::empty();
    for prompt in ["- item", "-n", "--help", "-1", "--prompt=x", "name/of.file"] {
        fs::write(place.path("prompt.txt"), prompt).expect("room");
        let expected = continued(&place, &["--prompt-file", "prompt.txt"], b"");
        assert_eq!(continued(&place, &["-p", prompt], b""), expected, "{prompt}");
        assert_eq!(continued(&place, &["--prompt", prompt], b""), expected, "{prompt}");
    }
}

#[test]
fn a_hyphen_alone_is_standard_input() {
    let place = Place::empty();
    let expected = continued(&place, &["-p", TEXT], b"");
    for flag in ["-p", "--prompt", "--prompt-file"] {
        assert_eq!(continued(&place, &[flag, "-"], TEXT.as_bytes()), expected, "{flag}");
    }
    check_refusal(&generate(&place, &["-p", "-"], b""), 2, &["the prompt is empty"]);
}

#[test]
fn a_mark_in_front_and_the_line_ends_of_another_system_are_no_part_of_a_text() {
    let place = Place::empty();
    let expected = continued(&place, &["-p", TEXT], b"");
    for content in
        [TEXT.replace('\n', "\r\n"), format!("\u{feff}{TEXT}"), format!("\u{feff}{TEXT}").replace('\n', "\r\n")]
    {
        fs::write(place.path("prompt.txt"), &content).expect("room");
        assert_eq!(continued(&place, &["--prompt-file", "prompt.txt"], b""), expected, "{content:?}");
        assert_eq!(continued(&place, &["--prompt-file", "-"], content.as_bytes()), expected, "{content:?}");
    }
    // `eval` reads its text likewise.
    let text = "All the days of the years of his life were many.\n".repeat(200);
    fs::write(place.path("plain.txt"), &text).expect("room");
    fs::write(place.path("other.txt"), format!("\u{feff}{text}").replace('\n', "\r\n")).expect("room");
    let perplexity = |name: &str| {
        let json = place.done(&format!("eval --text {name} --windows 1 --seq-len 256 --format json"));
        let json: Value = serde_json::from_str(&json).expect("JSON");
        json["lengths"][0]["original"]["all"].as_f64().expect("a number")
    };
    assert_eq!(perplexity("plain.txt"), perplexity("other.txt"));
}

#[test]
fn a_file_that_is_no_text_is_refused_by_name() {
    let place = Place::empty();
    let utf16: Vec<u8> = [0xfeff].into_iter().chain(TEXT.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    for (content, words) in [
        (&utf16[..], "prompt.txt is in UTF-16: write it in UTF-8"),
        (b"abc\xff", "prompt.txt is not in UTF-8, from byte 3 on"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "prompt.txt is a git-lfs pointer"),
    ] {
        fs::write(place.path("prompt.txt"), content).expect("room");
        check_refusal(&generate(&place, &["--prompt-file", "prompt.txt"], b""), 2, &[words]);
        place.refused("eval --text prompt.txt", 2, &[words]);
    }
    check_refusal(&generate(&place, &["-p", "-"], b"\xff"), 2, &["standard input is not in UTF-8"]);
    place.refused("generate --prompt-file nowhere.txt", 2, &["nowhere.txt"]);
}

#[test]
fn a_number_below_zero_is_refused_for_what_it_is() {
    let place = Place::empty();
    for (flags, words) in [
        ("--temperature -1", ["temperature", "-1"]),
        ("--top-p -0.5", ["top_p", "-0.5"]),
        ("-n -3", ["--max-new-tokens", "-3"]),
        ("--seed -1", ["--seed", "-1"]),
    ] {
        let run = place.run(&format!("generate -p x {flags}"));
        assert_eq!(run.code, 2, "{flags}: {}", run.stderr);
        assert!(!run.stderr.contains("unexpected argument"), "{}", run.stderr);
        for word in words {
            assert!(run.stderr.contains(word), "{flags}: no {word:?} in: {}", run.stderr);
        }
    }
}

/// The Llama fixture with a tokenizer whose tokens all stand for `text`.
fn saying(text: &str, decoder: &Value) -> Place {
    let place = Place::with("llama");
    let vocabulary: serde_json::Map<String, Value> = (0..97).map(|id| (format!("{id}"), json!(id))).collect();
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"Regex": "[0-9]+"}, "content": text}, decoder, {"type": "Fuse"},
    ]});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "0"},
    });
    place.write("model/tokenizer.json", &tokenizer.to_string());
    place
}

#[test]
fn what_a_stream_holds_at_the_end_is_printed() {
    let real = saying("\u{fffd}", &json!({"type": "Fuse"}));
    assert_eq!(real.done("generate -m model -p 5 -n 3"), "\u{fffd}\u{fffd}\u{fffd}\n");
    // The first byte of a character that no token completes.
    let bytes = saying("<0xE2>", &json!({"type": "ByteFallback"}));
    assert_eq!(bytes.done("generate -m model -p 5 -n 3"), "\u{fffd}\u{fffd}\u{fffd}\n");
}

#[test]
fn a_prompt_past_the_trained_length_gets_a_note_that_names_a_way() {
    let note = "the model was trained on 16 positions";
    let place = saying("x ", &json!({"type": "Fuse"}));
    let with_length = |positions: usize| {
        place.edit_json("model/config.json", |config| config["max_position_embeddings"] = json!(positions));
    };
    with_length(16);
    place.done("convert -m model -o converted --retrieval none --chunk-size 4 --block-size 4");
    let stderr = |arguments: &str| {
        let run = place.run(&format!("generate {arguments}"));
        assert_eq!(run.code, 0, "{}", run.stderr);
        run.stderr
    };
    for model in ["model", "converted"] {
        let long = stderr(&format!("-m {model} -p 5 -n 20"));
        assert!(long.contains(note) && long.contains("--positions grouped"), "{long}");
        assert!(!stderr(&format!("-m {model} -p 5 -n 15")).contains(note));
    }
    assert!(!stderr("-m converted -p 5 -n 20 --positions grouped").contains(note));
    // A base that grows with the text is made for this, and so is a window.
    place.edit_json("model/config.json", |config| {
        config["rope_parameters"] = json!({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0});
    });
    assert!(!stderr("-m model -p 5 -n 20").contains(note));
}

#[test]
fn more_tokens_than_can_be_counted_are_a_limit_that_is_never_reached() {
    let place = saying("x ", &json!({"type": "Fuse"}));
    // The fixture's own end stops it at once.
    place.edit_json("model/config.json", |config| config["eos_token_id"] = (0..97).collect());
    let stderr = place.run(&format!("generate -m model -p 5 -n {}", usize::MAX)).stderr;
    assert!(stderr.contains("0 new tokens") && stderr.contains("ended by a stop token"), "{stderr}");
}

#[test]
fn windows_that_differ_are_shown_by_layer() {
    let place = Place::with("gemma2");
    place.done("convert -m model -o converted");
    for model in ["model", "converted"] {
        let shown = place.done(&format!("inspect -m {model} --tensors"));
        assert!(shown.contains("windows: 8 tokens in layers 0; none in layers 1\n"), "{shown}");
        assert!(shown.contains("[decoder]"), "{shown}");
    }
}

#[test]
fn a_file_of_a_model_is_told_from_the_model() {
    let place = Place::with("llama");
    place.refused("inspect -m model/model.safetensors", 2, &["is a file of a model: name its directory, model"]);
    place.write("text", "no model");
    place.refused("inspect -m text", 2, &["text is neither a directory nor a GGUF file"]);
}
