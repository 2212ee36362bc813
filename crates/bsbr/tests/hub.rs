//! Models by name, from a hub that the tests serve themselves.
#![cfg(feature = "hub")]

mod common;
#[path = "../../bsbr-convert/tests/hub/server.rs"]
mod server;

use assert_cmd::Command;
use common::{Place, Run, bsbr, check_refusal, checkpoint_dir, files, run};
use server::{COMMIT, Hub, TOKEN, files_of};

const MODEL: &str = "test/llama";

/// The program here, with a home of its own and nothing of the environment that speaks of a hub.
fn command(place: &Place, hub: &Hub, arguments: &str) -> Command {
    let mut command = bsbr();
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["HF_", "HUGGING", "TRANSFORMERS_", "SSL_CERT"].iter().any(|start| name.starts_with(start)) {
            command.env_remove(name);
        }
    }
    // A proxy, were it asked, would not answer.
    command.env("HTTP_PROXY", "http://127.0.0.1:9").env_remove("NO_PROXY").env_remove("no_proxy");
    command.env("HF_HOME", place.path("home")).env("HF_ENDPOINT", &hub.endpoint);
    command.current_dir(place.path("")).args(arguments.split_whitespace());
    command
}

fn done(place: &Place, hub: &Hub, arguments: &str) -> Run {
    let run = run(&mut command(place, hub, arguments));
    assert_eq!(run.code, 0, "{arguments}\n{}", run.stderr);
    run
}

#[track_caller]
fn refused(place: &Place, hub: &Hub, arguments: &str, words: &[&str]) {
    check_refusal(&run(&mut command(place, hub, arguments)), 2, words);
}

fn hub_with(fixture: &str) -> Hub {
    let mut files = files_of(&checkpoint_dir(fixture));
    files.remove("expected.safetensors");
    Hub::with(MODEL, files)
}

#[test]
fn a_model_is_converted_by_its_name_and_again_without_a_network() {
    let (place, hub) = (Place::empty(), hub_with("llama"));
    let expected = checkpoint_dir("llama").join("expected.safetensors");
    let expected = expected.to_str().expect("plain paths");
    done(&place, &hub, "convert --model test/llama -o first");
    let record = place.json("first/conversion.json");
    assert_eq!(record["source"], MODEL);
    assert_eq!(record["hub"]["repository"], MODEL);
    assert_eq!(record["hub"]["revision"], "main");
    assert_eq!(record["hub"]["commit"], COMMIT);
    let card = place.read("first/README.md");
    assert!(card.contains("base_model: test/llama") && card.contains(&format!("commit `{COMMIT}`")), "{card}");

    hub.seen();
    done(&place, &hub, "convert --model test/llama -o second --offline");
    assert!(files(&place.path("first")) == files(&place.path("second")));
    let verified = done(&place, &hub, &format!("verify --model {MODEL} --offline -e {expected}"));
    assert!(verified.stdout.contains(&format!("`test/llama at commit {COMMIT}`")), "{}", verified.stdout);
    let mut offline = command(&place, &hub, &format!("verify -m {MODEL} -e {expected}"));
    assert_eq!(run(offline.env("HF_HUB_OFFLINE", "1")).code, 0);
    assert!(hub.seen().is_empty());
    done(&place, &hub, &format!("verify --model first -e {expected}"));
}

#[test]
fn every_command_takes_a_name() {
    let (place, hub) = (Place::empty(), hub_with("builtin"));
    done(&place, &hub, "inspect -m test/llama --revision main");
    done(&place, &hub, "convert -m test/llama --offline --dry-run");
    done(&place, &hub, "generate -m test/llama --offline -p Abraham -n 2");
    done(&place, &hub, "eval -m test/llama --offline --seq-len 64 --windows 1");
    done(&place, &hub, "convert -m test/llama --offline -o out --chunk-size 64");
    // A converted model that someone put on a hub, and back to what it was made of.
    hub.publish("test/converted", COMMIT, files_of(&place.path("out")));
    done(&place, &hub, "export -m test/converted -o back");
    assert!(place.path("back/model.safetensors").is_file());
    let exported = files(&place.path("back"))["model.safetensors"].clone();
    assert!(exported == files(&checkpoint_dir("builtin"))["model.safetensors"]);
    done(&place, &hub, "generate -m test/converted --offline -p Abraham -n 2");
}

#[test]
fn a_directory_of_that_name_wins() {
    let (place, hub) = (Place::with("llama"), hub_with("llama"));
    std::fs::create_dir(place.path("test")).expect("room");
    std::fs::rename(place.path("model"), place.path(MODEL)).expect("a directory");
    let inspected = done(&place, &hub, "inspect -m test/llama");
    assert!(inspected.stdout.contains("Hugging Face checkpoint `llama`"), "{}", inspected.stdout);
    assert!(hub.seen().is_empty());
    let words = ["test/llama is a directory and has no revision `main`", "leave --revision out"];
    refused(&place, &hub, "inspect -m test/llama --revision main", &words);
}

#[test]
fn two_programs_at_once_share_the_cache() {
    let (place, hub) = (Place::empty(), hub_with("builtin"));
    let run_one = || done(&place, &hub, "inspect -m test/llama").stdout;
    let [first, second] = std::thread::scope(|scope| {
        [scope.spawn(run_one), scope.spawn(run_one)].map(|thread| thread.join().expect("no panic"))
    });
    assert_eq!(first, second);
    assert_eq!(hub.seen().iter().filter(|seen| !seen.hub).count(), 1);
}

#[test]
fn what_is_no_name_is_refused_without_asking_anyone() {
    let (place, hub) = (Place::empty(), hub_with("llama"));
    for (name, word) in [
        ("a/b.", "begins or ends with `-` or `.`"),
        ("gpt2", "no organisation before a slash"),
        ("a/b?c", "something else than letters"),
    ] {
        let words =
            [&format!("{name} is not a directory"), "--model takes", &format!("`{name}` is not the name"), word];
        refused(&place, &hub, &format!("inspect -m {name}"), &words.map(|word| word as &str));
    }
    for path in ["a/b/c/d", "../x", "/nowhere/x", "/nowhere/x.gguf"] {
        refused(&place, &hub, &format!("inspect -m {path}"), &[&format!("there is no directory or file {path}")]);
    }
    let empty = run(command(&place, &hub, "inspect").args(["-m", ""]));
    check_refusal(&empty, 2, &["a value is required for '--model <PATH|NAME>'"]);
    refused(&place, &hub, "inspect -m test/llama --revision a/../b", &["`a/../b` is not a revision"]);
    refused(&place, &hub, "inspect --revision main", &["--model <PATH|NAME>"]);
    std::fs::write(place.path("file"), "x").expect("room");
    refused(&place, &hub, "inspect -m file", &["file is neither a directory nor a GGUF file", "--model takes"]);
    assert!(hub.seen().is_empty());
    assert!(!place.path("home").exists());
}

#[test]
fn what_the_hub_refuses_is_said_and_nothing_is_written() {
    let (place, hub) = (Place::empty(), hub_with("llama"));
    let convert = "convert -o out -m";
    let words = ["test/other is not a directory, so it was looked for on a hub", "no repository `test/other`"];
    refused(&place, &hub, &format!("{convert} test/other"), &words);
    refused(&place, &hub, &format!("{convert} {MODEL} --revision v9"), &["`test/llama` has no revision `v9`"]);
    refused(&place, &hub, &format!("{convert} {MODEL} --offline"), &["`config.json` of `test/llama`", "--offline"]);
    hub.state().gated.push(MODEL.to_owned());
    refused(&place, &hub, &format!("{convert} {MODEL}"), &["private or gated", "HF_TOKEN"]);
    let run = run(command(&place, &hub, &format!("{convert} {MODEL}")).env("HF_TOKEN", format!("{TOKEN}x")));
    check_refusal(&run, 2, &["403", "the token of HF_TOKEN"]);
    assert!(!run.stderr.contains(TOKEN));
    let run = common::run(command(&place, &hub, &format!("{convert} {MODEL}")).env("HF_ENDPOINT", "localhost"));
    check_refusal(&run, 2, &["HF_ENDPOINT", "begins with `https://`"]);
    assert!(!place.path("out").exists());
}
