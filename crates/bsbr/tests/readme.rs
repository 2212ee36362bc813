//! Every command in the READMEs is one: those that need no model of the reader's are run, the others are parsed.

mod common;

use std::{fs, path::Path, process::Stdio};

use bsbr::Program;
use common::Place;

/// Commands that are not run here though they name no model, and why.
const NOT_RUN: [(&str, &str); 3] = [
    ("cargo ", "builds, or belongs to the repository"),
    ("bsbr bench", "takes five minutes on purpose"),
    ("bsbr serve", "has no end"),
];

/// What stands for files of the reader; a command that names one is parsed.
const PLACEHOLDERS: [&str; 2] = [" -m ", "--model "];

/// READMEs of the repository and its crates, with their names.
fn readmes() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let crates = fs::read_dir(root.join("crates")).expect("crates").map(|entry| entry.expect("one").path());
    let mut paths: Vec<_> = crates.map(|dir| dir.join("README.md")).chain([root.join("README.md")]).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.display().to_string(), fs::read_to_string(&path).expect("a README"))).collect()
}

/// The lines of the blocks for a shell, without comments.
fn commands(text: &str) -> Vec<String> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in text.lines() {
        match line.strip_prefix("```") {
            Some(kind) => inside = !inside && kind == "sh",
            None if inside => found.push(line.split("  #").next().unwrap_or(line).trim().to_owned()),
            None => {}
        }
    }
    found.retain(|line| !line.is_empty());
    found
}

/// Words of a line as a shell splits it.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut some) = (Vec::new(), String::new(), None, false);
    for character in line.chars() {
        match (quote, character) {
            (Some(open), same) if same == open => quote = None,
            (None, '"' | '\'') => (quote, some) = (Some(character), true),
            (None, ' ') => {
                if some || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                some = false;
            }
            _ => word.push(character),
        }
    }
    if some || !word.is_empty() {
        words.push(word);
    }
    words
}

#[test]
fn every_command_parses() {
    let mut count = 0;
    for (name, text) in readmes() {
        for line in commands(&text) {
            let words = words(&line);
            let arguments = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["bsbr", ..] => words.clone(),
                // The comparison is a command of the repository's own program, with tests of its own.
                ["cargo", "xtask", "compare", ..] => continue,
                ["cargo", "xtask", ..] => words[1..].to_vec(),
                ["cargo", "install" | "test" | "bench" | "run", ..] => continue,
                _ => panic!("{name}: `{line}` is no command that is known here"),
            };
            let program = Program { name: "bsbr", repository: None, more: Vec::new() };
            let parsed = bsbr::parses(&program, &arguments);
            assert!(parsed.is_ok(), "{name}: {line}\n{}", parsed.unwrap_err());
            count += 1;
        }
    }
    assert!(count > 40, "{count} commands");
}

#[test]
fn commands_that_need_no_model_of_the_readers_run() {
    let mut run = Vec::new();
    for (name, text) in readmes() {
        for line in commands(&text) {
            let skipped = NOT_RUN.iter().any(|(start, _)| line.starts_with(start));
            if skipped || PLACEHOLDERS.iter().any(|part| line.contains(part)) || run.contains(&line) {
                continue;
            }
            let place = Place::empty();
            let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("bsbr"));
            command.current_dir(place.path("")).args(&words(&line)[1..]).stdin(Stdio::null());
            let output = command.output().expect("it starts");
            assert!(output.status.success(), "{name}: {line}\n{}", String::from_utf8_lossy(&output.stderr));
            run.push(line);
        }
    }
    for line in ["bsbr convert", "bsbr --version", "bsbr inspect --rules list"] {
        assert!(run.iter().any(|found| found == line), "{line} is not among {run:?}");
    }
}

#[test]
fn the_first_page_is_short() {
    let (_, text) = readmes().into_iter().find(|(name, _)| name.ends_with("../../README.md")).expect("it is there");
    assert!(text.len() <= 10_240, "{} bytes", text.len());
}
