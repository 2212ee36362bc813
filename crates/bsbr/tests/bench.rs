//! `bench`: what it measures, leaves out, writes and refuses. No test depends on how fast anything is.

mod common;

use std::fs;

use common::Place;
use serde_json::{Value, json};

/// A few tokens of little attention.
const TINY: &str = "bench --seq-len 64,128 --heads 2 --head-dim 16 --runs 2 --chunk-size 64 --local-chunks 0 --max-keys 2 --exact-tokens 0";

fn report(place: &Place, arguments: &str) -> Value {
    serde_json::from_str(&place.done(&format!("{arguments} --format json"))).expect("JSON")
}

fn rows(report: &Value) -> &[Value] {
    report["rows"].as_array().expect("a list")
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_else(|| panic!("no text {key} in {row}"))
}

/// Leaves what every run on every machine has: numbers become 0, what names the machine goes.
fn redacted(value: &Value) -> Value {
    match value {
        Value::Number(_) => json!(0),
        Value::Array(values) => values.iter().map(redacted).collect(),
        Value::Object(fields) => {
            let kept = fields.iter().map(|(key, value)| {
                let value = match key.as_str() {
                    "machine" | "versions" => value.as_object().expect("fields").keys().map(|key| json!(key)).collect(),
                    // Whether times spread is a matter of luck.
                    "notes" => json!([]),
                    // So is whether a power can be told, of which unit tests know the form.
                    "fits" => json!([]),
                    _ => redacted(value),
                };
                (key.clone(), value)
            });
            Value::Object(kept.collect())
        }
        other => other.clone(),
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_json_keeps_its_form() {
    let report = report(&Place::empty(), &format!("{TINY} --arms bsbr,dense --threads 2"));
    insta::assert_snapshot!("json", serde_json::to_string_pretty(&redacted(&report)).expect("JSON"));
}

#[test]
fn every_arm_has_a_row_at_every_length_with_all_its_samples() {
    let report = report(&Place::empty(), TINY);
    let mut expected = Vec::new();
    for tokens in [64, 128] {
        for phase in ["prefill", "decode"] {
            expected.extend(["bsbr", "bsbr-plain", "dense", "burn"].map(|arm| (tokens, phase, arm)));
        }
    }
    let key = |row: &'_ Value| (row["tokens"].as_u64(), text(row, "phase").to_owned(), text(row, "arm").to_owned());
    let found: Vec<_> = rows(&report).iter().map(key).collect();
    let expected: Vec<_> = expected.into_iter().map(|(n, p, a)| (Some(n), p.to_owned(), a.to_owned())).collect();
    assert_eq!(found, expected);
    for row in rows(&report) {
        let samples: Vec<f64> = serde_json::from_value(row["samples"].clone()).expect("numbers");
        assert!(samples.len() == 2 && samples.iter().all(|&seconds| seconds > 0.0), "{row}");
        let median = row["seconds"]["median"].as_f64().expect("a number");
        assert!((median - (samples[0] + samples[1]) / 2.0).abs() < 1e-12, "{row}");
        let tokens = if text(row, "phase") == "prefill" { row["tokens"].as_f64().unwrap() } else { 1.0 };
        let rate = row["tokens_per_second"].as_f64().expect("a number");
        assert!((rate * median / tokens - 1.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn arms_that_compute_the_same_are_compared() {
    let report = report(&Place::empty(), TINY);
    let differences = report["differences"].as_array().expect("a list");
    assert_eq!(differences.len(), 2);
    for difference in differences {
        assert!(difference["largest"].as_f64().is_some_and(|largest| largest < 1e-4), "{difference}");
        assert_eq!(difference["tokens"], 128);
    }
}

#[test]
fn the_table_goes_to_standard_output_and_the_course_of_things_to_standard_error() {
    let run = Place::empty().run(&format!("{TINY} --kv-heads 1 --data iid"));
    assert_eq!(run.code, 0, "{}", run.stderr);
    for part in [
        "GFLOP/s (\"gemm\")",
        "Attention alone, batch 1, 2 heads on 1 KV heads of 16, f32: reading a text",
        "| bsbr-plain ",
        "| against dense |",
        "one token behind a text",
    ] {
        assert!(run.stdout.contains(part), "no {part:?} in: {}", run.stdout);
    }
    let points: Vec<_> = run.stderr.lines().map(|line| line.split(':').next().expect("a word")).collect();
    let expected = ["prefill 64", "decode 64", "prefill 128", "decode 128"].map(|point| format!("attention {point}"));
    assert_eq!(points, expected);
}

#[test]
fn parts_phases_and_arms_can_be_chosen() {
    let report = report(&Place::empty(), &format!("{TINY} --phase decode --arms burn,dense"));
    let arms: Vec<_> = rows(&report).iter().map(|row| (text(row, "phase"), text(row, "arm"))).collect();
    assert_eq!(arms, [("decode", "dense"), ("decode", "burn")].repeat(2));
}

#[test]
fn training_is_measured_where_it_is_asked_for() {
    let place = Place::empty();
    place.done(&format!("{TINY} --kv-heads 1 --phase training --format json --output report.json --plot plot.svg"));
    let report = place.json("report.json");
    let arms: Vec<_> = rows(&report).iter().map(|row| (text(row, "phase"), text(row, "arm"))).collect();
    assert_eq!(arms, ["bsbr", "bsbr-plain", "dense", "burn"].map(|arm| ("training", arm)).repeat(2));
    for row in rows(&report) {
        assert_eq!((row["samples"].as_array().map(Vec::len), &row["left_out"]), (Some(2), &Value::Null), "{row}");
        let (tokens, dense) = (row["tokens"].as_f64().unwrap(), text(row, "arm") == "dense");
        // Seven products of 2 x 16 operations for each pair of a token and one not after it, of two heads.
        let pairs = tokens * (tokens + 1.0) / 2.0;
        assert!(!dense || row["operations"] == json!(2.0 * 7.0 * 32.0 * pairs), "{row}");
    }
    let shown = place.run(&format!("{TINY} --phase training --arms dense,burn"));
    for part in ["reading a text and the gradients of queries, keys and values", "| against burn |"] {
        assert!(shown.stdout.contains(part), "no {part:?} in: {}", shown.stdout);
    }
    assert!(place.read("plot.svg").contains("attention: time to read a text and of its gradients"));
}

#[cfg(target_os = "linux")]
#[test]
fn training_of_full_attention_keeps_no_scores() {
    let flags = "--seq-len 2048 --heads 2 --runs 1 --warmup 0 --phase training --arms dense,burn";
    let report = report(&Place::empty(), &format!("bench {flags}"));
    let extra = |row: &Value| row["memory"]["extra_bytes"].as_u64().expect("bytes");
    let [dense, burn] = rows(&report) else { panic!("two rows") };
    // The scores of two heads in f32.
    let scores = 2 * 2048 * 2048 * 4;
    assert!(extra(dense) < scores && extra(burn) > 2 * scores, "{} and {}", extra(dense), extra(burn));
}

#[test]
fn a_model_reads_texts_of_different_lengths_together() {
    let flags = "--part model --seq-len 320 --batch 3 --arms bsbr,dense --runs 1 --warmup 0 --windows 1";
    let report = report(&Place::empty(), &format!("bench {flags}"));
    let read: Vec<_> = rows(&report)
        .iter()
        .map(|row| {
            let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("no number in {row}"));
            let tokens = number(&row["tokens_per_second"]) * number(&row["seconds"]["median"]);
            (text(row, "phase"), tokens.round() as u64)
        })
        .collect();
    // A third of the length, two thirds and all of it.
    let [prefill, decode] = [("prefill", 106 + 213 + 320), ("decode", 3)];
    assert_eq!(read, [prefill, prefill, decode, decode]);
}

#[test]
fn a_model_has_its_quality_beside_every_time() {
    let report = report(&Place::empty(), "bench --part model --seq-len 320 --runs 1 --warmup 0 --windows 2");
    assert_eq!(rows(&report).len(), 6);
    for row in rows(&report) {
        assert_eq!((text(row, "part"), &row["left_out"]), ("model", &Value::Null));
        let quality = &row["quality"];
        let perplexity = ["perplexity", "original_perplexity"].map(|key| quality[key].as_f64().expect("a number"));
        assert!(perplexity.iter().all(|&perplexity| perplexity > 1.0) && quality["windows"] == 2, "{row}");
        if text(row, "arm") == "dense" {
            assert!(perplexity[0] == perplexity[1] && quality["kl"].is_null(), "{row}");
        } else {
            assert!(quality["kl"].as_f64().is_some_and(|kl| kl > -1e-6), "{row}");
        }
    }
}

#[test]
fn a_length_past_the_learned_positions_is_left_out_and_the_row_says_so() {
    let report = report(&Place::empty(), "bench --part model --seq-len 4096 --arms dense");
    for row in rows(&report) {
        assert!(text(row, "left_out").contains("2048 learned positions"), "{row}");
        assert_eq!(row["seconds"], Value::Null);
    }
}

#[test]
fn what_no_machine_can_do_in_time_is_left_out_and_the_row_says_so() {
    let place = Place::empty();
    let stdout = place.done("bench --seq-len 16m --heads 1 --head-dim 1 --arms dense --phase prefill --seconds 1");
    assert!(stdout.contains("| dense | 16,777,216 | left out |"), "{stdout}");
    assert!(stdout.contains("left out: dense at 16,777,216 tokens: no time: would take about"), "{stdout}");
}

#[cfg(target_os = "linux")]
#[test]
fn what_does_not_fit_into_memory_is_left_out_and_the_row_says_so() {
    let stdout =
        Place::empty().done("bench --seq-len 64 --heads 99999999999 --head-dim 4096 --seed 18446744073709551615");
    assert!(
        stdout.contains("bsbr, bsbr-plain, dense, burn at 64 tokens: queries, keys and values would take"),
        "{stdout}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn memory_is_that_of_a_process_of_its_own() {
    let place = Place::empty();
    let report = report(&place, "bench --seq-len 4096 --heads 2 --runs 1 --phase prefill --arms dense,burn");
    for row in rows(&report) {
        let memory = &row["memory"];
        assert_eq!(memory["kv_bytes"], 2 * 2 * 4096 * 64 * 4);
        let [before, peak] = ["before_bytes", "peak_bytes"].map(|key| memory[key].as_u64().expect("bytes"));
        // Queries, keys and values are there before.
        assert!(before > 3 * 2 * 4096 * 64 * 4 && peak > before, "{row}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn keys_and_values_of_a_model_are_counted_in_the_type_of_its_caches() {
    let flags = "--part model --seq-len 320 --phase prefill --arms bsbr,dense --runs 1 --warmup 0 --windows 1";
    let place = Place::empty();
    let bytes = |dtype: &str| {
        let report = report(&place, &format!("bench {flags} --cache-dtype {dtype}"));
        let of = |row: &Value| row["memory"]["kv_bytes"].as_u64().expect("bytes");
        rows(&report).iter().map(of).collect::<Vec<_>>()
    };
    let whole = bytes("f32");
    assert!(whole.len() == 2 && whole.iter().all(|&bytes| bytes > 0));
    for dtype in ["f16", "bf16"] {
        assert_eq!(bytes(dtype), whole.iter().map(|bytes| bytes / 2).collect::<Vec<_>>(), "{dtype}");
    }
}

#[test]
fn json_and_plot_are_written_beside_the_table() {
    let place = Place::empty();
    let stdout = place.done(&format!("{TINY} --format json --output report.json --plot plot.svg"));
    assert!(stdout.contains("| dense "), "{stdout}");
    assert_eq!(place.json("report.json")["schema"], "bsbr-bench/1");
    let svg = place.read("plot.svg");
    for part in ["<svg ", "attention: time to read a text", "bsbr-plain", "tokens", "attention: time of one token"] {
        assert!(svg.contains(part), "no {part:?} in: {svg}");
    }
    assert!(!svg.contains("whole model"), "{svg}");
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_runs() {
    let place = Place::with("builtin");
    place.write("text.txt", "");
    for (flags, words) in [
        ("--seq-len 0", &["length `0`", "512..65536*2"][..]),
        ("--seq-len 1024..512", &["1024..512 is empty"]),
        ("--seq-len 512 --arms sparse", &["'sparse'", "bsbr-plain"]),
        ("--seq-len 64 --heads 0", &["--heads is 0"]),
        ("--seq-len 64 --runs 0", &["--runs is 0"]),
        ("--seq-len 64 --runs 18446744073709551615", &["--runs is 18446744073709551615", "at most 10000"]),
        ("--seq-len 64 --threads 0", &["--threads is 0"]),
        ("--seq-len 64 --seconds 0", &["--seconds is 0"]),
        ("--seq-len 64 --heads 12 --kv-heads 5", &["--kv-heads is 5", "a divisor of the 12 heads"]),
        ("--seq-len 64 --chunk-size 100", &["chunk_size", "a multiple of 64"]),
        ("--seq-len 64 --layers 1", &["--layers", "--data model"]),
        ("--seq-len 64 --data model --layers 4", &["layer 4", "layers 0 to 3"]),
        ("--seq-len 64 --data model --head-dim 64", &["--head-dim is 64", "are 32 wide"]),
        ("--seq-len 64 --selector meta", &["--selector meta", "--part model"]),
        ("--seq-len 64 --output nowhere/report.json", &["--output: nowhere/report.json cannot be written"]),
        ("--seq-len 64 --plot model", &["--plot: model is no name of an SVG file"]),
        ("--seq-len 64 --plot report.png", &["--plot: report.png is no name of an SVG file"]),
        ("--seq-len 64 --plot nowhere/plot.svg", &["--plot: nowhere/plot.svg cannot be written"]),
        ("--part model --arms burn", &["--arms burn is attention alone"]),
        ("--part model --phase training", &["--phase training is attention alone"]),
        ("--part model -m nowhere", &["nowhere is not a directory"]),
        ("-m model --text nowhere.txt", &["cannot read the text nowhere.txt"]),
        ("-m model --text text.txt", &["text.txt: the text is empty"]),
        ("--python python3", &["--against"]),
        ("--seq-len 64 --against pytorch --python ./nothing", &["cannot start `./nothing`", "--python"]),
    ] {
        place.refused(&format!("bench {flags}"), 2, words);
    }
}

/// A program that stands for Python with torch.
#[cfg(unix)]
fn fake_python(place: &Place, script: &str) {
    use std::os::unix::fs::PermissionsExt;

    place.write("python", &format!("#!/bin/sh\n{script}\n"));
    fs::set_permissions(place.path("python"), fs::Permissions::from_mode(0o755)).expect("a file");
}

#[cfg(unix)]
#[test]
fn the_opponent_times_itself_and_takes_its_turn() {
    let place = Place::empty();
    fake_python(
        &place,
        r#"echo '{"torch": "9.9", "transformers": null, "threads": 1}'
while read -r line; do
    case "$line" in
        *'"arm":"torch-original"'*) echo '{"error": "out of memory"}';;
        *'"do":"make"'*) echo '{"id": 7}';;
        *'"do":"peak"'*) echo '{"before": 1000, "peak": 9001000}';;
        *'"do":"prefill","id":7'*) echo '{"seconds": 0.25}';;
        *'"do":"decode","id":7'*) echo '{"seconds": 0.125}';;
        *'"do":"training","id":7'*) echo '{"seconds": 0.5}';;
        *) echo '{}';;
    esac
done"#,
    );
    let flags = "--phase prefill,decode,training --against pytorch --python ./python --arms dense --threads 1";
    let report = report(&place, &format!("{TINY} {flags}"));
    assert_eq!(report["opponent"]["torch"], "9.9");
    let of = |arm: &'static str, phase: &'static str| {
        rows(&report).iter().filter(move |row| (text(row, "arm"), text(row, "phase")) == (arm, phase))
    };
    for row in of("torch-sdpa", "prefill") {
        assert_eq!(row["samples"], json!([0.25, 0.25]));
        let output = 2 * 16 * 4 * row["tokens"].as_u64().unwrap();
        assert_eq!(row["memory"]["extra_bytes"], 9_000_000 - output);
    }
    assert_eq!(of("torch-sdpa", "prefill").count(), 2);
    of("torch-sdpa", "decode").for_each(|row| assert_eq!(row["samples"], json!([0.125, 0.125])));
    of("torch-sdpa", "training").for_each(|row| assert_eq!(row["samples"], json!([0.5, 0.5])));
    assert_eq!(of("torch-sdpa", "training").count(), 2);
    of("torch-original", "prefill").for_each(|row| assert_eq!(text(row, "left_out"), "out of memory"));
    of("torch-original", "decode").for_each(|row| assert!(text(row, "left_out").contains("keeps nothing")));
    of("dense", "prefill").for_each(|row| assert_eq!(row["left_out"], Value::Null));
}

#[cfg(unix)]
#[test]
fn a_python_without_torch_or_that_ends_is_an_error_that_says_so() {
    let place = Place::empty();
    let arguments = "bench --seq-len 64 --against pytorch --python ./python";
    fake_python(&place, r#"echo '{"error": "it cannot import torch (No module named torch)"}'"#);
    place.refused(arguments, 2, &["--against pytorch", "cannot import torch", "Install torch there", "--python"]);
    fake_python(&place, "exit 3");
    place.refused(arguments, 2, &["--against pytorch", "the Python process ended", "3"]);
    fake_python(&place, "echo hello");
    place.refused(arguments, 2, &["answered \"hello\", expected JSON"]);
}

#[test]
fn attention_is_measured_on_rows_of_a_model() {
    let flags = "--data model --seq-len 64,600 --heads 3 --runs 1 --warmup 0 --arms bsbr,dense --layers 1,3";
    let settings = "--chunk-size 64 --local-chunks 0 --exact-tokens 0 --phase prefill";
    let report = report(&Place::empty(), &format!("bench {flags} {settings}"));
    let (shape, data) = (&report["settings"]["shape"], text(&report["settings"], "data"));
    assert_eq!([&shape["heads"], &shape["kv_heads"], &shape["head_dim"]], [&json!(3), &json!(3), &json!(32)]);
    for part in ["builtin", "layers 1, 3", "reading 600 tokens of the built-in text"] {
        assert!(data.contains(part), "no {part:?} in: {data}");
    }
    let [short, short_dense, long, long_dense] = rows(&report) else { panic!("four rows") };
    let keys = |row: &Value| row["retrieved"]["mean"].as_f64().expect("a number");
    // A text of one chunk has nothing to choose from.
    assert_eq!((keys(short), &short["integer_operations"]), (0.0, &json!(0.0)));
    assert!(keys(long) > 0.0 && keys(long) < 512.0, "{long}");
    // Nine chunks but the first have blocks behind them, 4 for each chunk: their mean keys, and 16 keys of 32 channels.
    let blocks: usize = (0..600).map(|token| token / 64 * 4).sum();
    assert_eq!(long["integer_operations"], json!(3.0 * blocks as f64 * (2.0 * 32.0 + 16.0 * 2.0 * 32.0)));
    for dense in [short_dense, long_dense] {
        assert_eq!((&dense["retrieved"], &dense["integer_operations"]), (&Value::Null, &json!(0.0)));
    }
    let shown = Place::empty().done(&format!("bench {flags} {settings}"));
    assert!(shown.contains("keys chosen") && shown.contains("on queries, keys and values of"), "{shown}");
}

#[cfg(unix)]
#[test]
fn llama_bench_takes_its_turn_on_the_lengths_and_threads_of_the_others() {
    use std::os::unix::fs::PermissionsExt;

    let place = Place::empty();
    fs::copy(common::checkpoint_dir("gguf").join("mixed.gguf"), place.path("model.gguf")).expect("a fixture");
    place.write("text.txt", &"the quick brown fox jumps over the lazy dog. ".repeat(40));
    // A program that stands for llama-bench: as many tests as it was asked for, half a second for each token.
    let script = r#"#!/bin/sh
echo "$@" >> asked.txt
while [ $# -gt 0 ]; do
    case "$1" in -t) t=$2;; -p) p=$2;; -n) n=$2;; -d) d=$2;; esac
    shift
done
echo "[{\"build_commit\": \"abc\", \"backends\": \"CPU\", \"model_type\": \"llama Q4\", \"model_size\": 5, \"n_threads\": $t,
\"type_k\": \"f16\", \"n_prompt\": $p, \"n_gen\": $n, \"n_depth\": $d, \"samples_ns\": [$(( (p + n) * 500000000 ))]}]"
"#;
    place.write("llama-bench", script);
    fs::set_permissions(place.path("llama-bench"), fs::Permissions::from_mode(0o755)).expect("a file");
    let flags =
        "-m model.gguf --text text.txt --part model --arms dense --seq-len 16,32 --runs 2 --warmup 0 --threads 1";
    let report = report(&place, &format!("bench {flags} --against llama.cpp --llama-bench ./llama-bench"));
    assert_eq!((&report["llama_cpp"]["build"], &report["llama_cpp"]["model"]), (&json!("abc"), &json!("llama Q4")));
    let of = |phase: &'static str| {
        rows(&report).iter().filter(move |row| (text(row, "arm"), text(row, "phase")) == ("llama.cpp", phase))
    };
    assert_eq!((of("prefill").count(), of("decode").count()), (2, 2));
    for row in of("prefill") {
        let seconds = 0.5 * row["tokens"].as_f64().unwrap();
        assert_eq!(row["samples"], json!([seconds, seconds]), "{row}");
    }
    of("decode").for_each(|row| assert_eq!(row["samples"], json!([0.5, 0.5]), "{row}"));
    let asked = place.read("asked.txt");
    assert!(
        asked.lines().all(|line| line.starts_with("-m model.gguf -t 1 ") && line.ends_with("-r 1 -o json")),
        "{asked}"
    );
    assert!(asked.contains("-p 32 -n 0 -d 0") && asked.contains("-p 0 -n 8 -d 32"), "{asked}");

    place.refused(&format!("bench {flags} --against llama.cpp"), 2, &["--llama-bench PATH"]);
    place.refused(&format!("bench {flags} --against llama.cpp --llama-bench ./none"), 2, &["cannot start `./none`"]);
    place.write("llama-bench", "#!/bin/sh\necho 'error: no such model' >&2\nexit 1\n");
    place.refused(
        &format!("bench {flags} --against llama.cpp --llama-bench ./llama-bench"),
        2,
        &["ended with", "error: no such model"],
    );
}
