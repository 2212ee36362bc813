//! `generate` as people know it: prompts from anywhere, ends, JSON, attention of unconverted models, flags without effect.

mod common;

use common::{Place, Run, bsbr, run};
use serde_json::Value;

const PROMPT: &str = "And the king said unto";

/// Continues [`PROMPT`] with the built-in model.
fn generate(flags: &[&str]) -> Run {
    let run = run(bsbr().args(["generate", "-n", "24", "--prompt", PROMPT]).args(flags));
    assert_eq!(run.code, 0, "{}", run.stderr);
    run
}

#[test]
fn a_prompt_comes_through_a_pipe_with_or_without_a_hyphen() {
    let expected = generate(&[]).stdout;
    for flags in [
        vec!["generate", "-n", "24"],
        vec!["generate", "-n", "24", "--prompt", "-"],
        vec!["generate", "-n", "24", "-f", "-"],
    ] {
        let run = run(bsbr().args(flags).write_stdin(PROMPT));
        assert_eq!((run.code, run.stdout), (0, expected.clone()), "{}", run.stderr);
    }
}

#[test]
fn a_stop_text_ends_the_text_wherever_its_tokens_end() {
    let free = generate(&[]).stdout;
    let text = free.trim_end_matches('\n');
    for (from, to) in [(0, 1), (3, 6), (5, 14), (11, 12)] {
        let (from, to) = (text.floor_char_boundary(from), text.ceil_char_boundary(to));
        let stop = &text[from..to];
        let end = text.find(stop).expect("it is there");
        let run = generate(&["--stop", "never there", "--stop", &stop.replace('\n', "\\n")]);
        assert_eq!(run.stdout, format!("{}\n", &text[..end]), "stop {stop:?}");
        assert!(run.stderr.contains("ended by --stop"), "{}", run.stderr);
    }
    assert_eq!(generate(&["--stop", "never there"]).stdout, free);
}

#[test]
fn json_says_what_was_written_and_by_what() {
    let text = generate(&[]).stdout;
    let run = generate(&["--json", "--temperature", "0.5", "--top-k", "1", "--threads", "1"]);
    let json: Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!(json["schema"], "bsbr-generate/1");
    assert_eq!(json["text"].as_str(), text.strip_suffix('\n'));
    assert_eq!((json["tokens"].as_array().map(Vec::len), json["ended"].as_str()), (Some(24), Some("length")));
    assert_eq!((json["sampling"]["top_k"].as_u64(), json["sampling"]["temperature"].as_f64()), (Some(1), Some(0.5)));
    let about = &json["about"];
    assert!(about["model"].as_str().is_some_and(|model| model.contains("gpt2")), "{about}");
    assert_eq!(about["text_sha256"].as_str().map(str::len), Some(64));
    assert_eq!(about["versions"]["tool"], env!("CARGO_PKG_VERSION"));
    assert!(about["machine"]["cores"].as_u64().is_some());
    let stopped: Value = serde_json::from_str(&generate(&["--json", "--stop", " "]).stdout).expect("JSON");
    assert_eq!((stopped["ended"].as_str(), stopped["text"].as_str()), (Some("stop-text"), Some("")));
}

#[test]
fn settings_of_attention_run_an_unconverted_model_as_its_conversion_would() {
    let place = Place::with("builtin");
    let heldout = std::fs::read_to_string(common::checkpoint_dir("builtin").join("heldout.txt")).expect("a text");
    place.write("long.txt", &heldout[..2400]);
    let settings = "--chunk-size 64 --local-chunks 0 --exact-tokens 0 --max-keys 4 --far none";
    place.done(&format!("convert -m model -o converted {settings}"));
    let text = |flags: &str| place.done(&format!("generate -n 40 --prompt-file long.txt {flags}"));
    let converted = text("-m converted");
    assert_eq!(text(&format!("-m model {settings}")), converted);
    assert_ne!(text("-m model"), converted);
    assert_eq!(text("-m converted --full-attention"), text("-m model"));
    assert_eq!(text("-m model --preset default"), text("-m converted --preset default"));
    place.refused(
        "generate -m model --prompt x --preset fast --full-attention",
        2,
        &["--full-attention leaves no use for settings"],
    );
}

#[test]
fn a_flag_without_effect_is_told() {
    let run = generate(&["--top-k", "5"]);
    assert!(run.stderr.starts_with("note: --top-k has no effect without --temperature"), "{}", run.stderr);
    let run = generate(&["--top-p", "0.5", "--min-p", "0.1", "--seed", "3", "--repeat-last-n", "9"]);
    assert!(run.stderr.contains("note: --top-p, --min-p, --seed have no effect"), "{}", run.stderr);
    assert!(run.stderr.contains("--repeat-last-n has no effect without --repeat-penalty"), "{}", run.stderr);
    let run = generate(&["--top-k", "5", "--temperature", "1", "--repeat-penalty", "1.2"]);
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
}

#[test]
fn a_repeat_penalty_and_the_least_probability_change_what_is_chosen() {
    let free = generate(&[]).stdout;
    assert_eq!(generate(&["--repeat-penalty", "1"]).stdout, free);
    assert_ne!(generate(&["--repeat-penalty", "1.8"]).stdout, free);
    assert_eq!(generate(&["--temperature", "1", "--min-p", "1"]).stdout, free);
    assert_ne!(generate(&["--temperature", "2", "--min-p", "0"]).stdout, free);
}

#[test]
fn quiet_tells_nothing_and_verbose_tells_how_far_it_is() {
    let run = generate(&["-q", "--top-k", "5"]);
    assert_eq!(run.stderr, "");
    let place = Place::empty();
    place.refused("-q generate --prompt x --min-p 2", 2, &["min_p"]);
    place.refused("generate --prompt x --repeat-penalty 0", 2, &["repeat_penalty"]);
}
