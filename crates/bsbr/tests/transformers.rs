//! The export of every kind of source opens in transformers, where Python and transformers are at hand.
#![allow(clippy::print_stderr)] // what a failure belongs to, and what was not tested

mod common;

use std::{fs, path::Path, process::Command};

use common::{Place, checkpoint_dir, files};

/// Converts what is in `model` and exports that to `name`.
fn export(place: &Place, model: &str, name: &str) {
    place.done(&format!("convert -m {model} -o converted --force"));
    place.done(&format!("export -m converted -o {name}"));
}

#[test]
fn every_export_opens_in_transformers() {
    let asked = Command::new("python3").args(["-c", "import transformers"]).output();
    if !asked.is_ok_and(|output| output.status.success()) {
        eprintln!("there is no Python with transformers: not tested");
        return;
    }
    let place = Place::empty();
    let mut exports = Vec::new();
    let mut entries: Vec<_> =
        fs::read_dir(checkpoint_dir("")).expect("fixtures").map(|entry| entry.expect("one").path()).collect();
    let listed = fs::read_dir(checkpoint_dir("gguf")).expect("fixtures");
    entries.extend(listed.map(|entry| entry.expect("one").path()));
    entries.sort();
    for path in entries {
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let is_gguf = path.extension().is_some_and(|end| end == "gguf");
        let is_model = if is_gguf {
            !name.starts_with("tokenizer") && name != "formats"
        } else {
            path.join("config.json").is_file()
        };
        if !is_model {
            continue;
        }
        let name = if is_gguf { format!("gguf_{name}") } else { name };
        export(&place, path.to_str().expect("plain"), &name);
        exports.push(name.clone());
        // The settings as a newer version of transformers writes them are another source.
        let other = path.join("config_v4.json");
        if other.is_file() {
            copy_with(&path, &other, &place.path("older"));
            export(&place, "older", &format!("{name}_v4"));
            exports.push(format!("{name}_v4"));
        }
    }
    assert!(exports.len() > 100, "{} exports", exports.len());
    place.done(&format!("split compress -m {} --preset svd -o compressed", checkpoint_dir("llama").display()));
    place.done("split fold -m compressed -o folded");
    exports.push("folded".to_owned());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/open_exports.py");
    let output =
        Command::new("python3").arg(script).args(&exports).current_dir(place.path("")).output().expect("Python");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let failed: Vec<&str> = text.lines().filter(|line| line.contains("Error")).collect();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{errors}", failed.join("\n"));
    assert_eq!(text.lines().count(), exports.len(), "{text}");
}

/// The fixture in `from` with another configuration, as a directory of its own.
fn copy_with(from: &Path, config: &Path, to: &Path) {
    if to.exists() {
        fs::remove_dir_all(to).expect("it is there");
    }
    fs::create_dir(to).expect("room");
    for (name, content) in
        files(from).into_iter().filter(|(name, _)| name.starts_with("model") || name.starts_with("pytorch"))
    {
        fs::write(to.join(name), content).expect("room");
    }
    fs::copy(config, to.join("config.json")).expect("room");
}
