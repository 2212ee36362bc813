//! What `--help` says.

mod common;

use common::{Place, checkpoint_dir};

#[test]
fn the_program_lists_its_commands() {
    insta::assert_snapshot!("program", Place::empty().done("--help"));
}

#[test]
fn every_command_explains_its_flags() {
    let commands =
        ["calibrate", "convert", "export", "eval", "generate", "verify", "inspect", "tune", "bench", "serve", "split"];
    for command in commands {
        insta::assert_snapshot!(command, Place::empty().done(&format!("{command} --help")));
    }
    for command in ["plan", "verify", "calibrate", "compress", "report", "fold"] {
        insta::assert_snapshot!(format!("split_{command}"), Place::empty().done(&format!("split {command} --help")));
    }
}

#[test]
fn the_defaults_it_names_are_those_of_the_settings_file() {
    let text = std::fs::read_to_string(checkpoint_dir("builtin").join("../configs/default.toml")).expect("a file");
    let settings: toml::Table = toml::from_str(&text).expect("TOML");
    for command in ["convert", "eval"] {
        let help = Place::empty().done(&format!("{command} --help"));
        for (key, value) in &settings {
            let flag = format!("--{} <", key.replace('_', "-"));
            let (_, after) = help.split_once(&flag).expect("a flag for every setting");
            let explanation = after.lines().nth(1).expect("an explanation");
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            assert!(explanation.contains(&format!("[default: {value}]")), "{flag} {explanation}, in the file {value}");
        }
    }
}

#[test]
fn no_command_is_a_usage_error_with_the_list_of_commands() {
    let run = Place::empty().run("");
    assert_eq!((run.code, run.stdout.as_str()), (2, ""));
    insta::assert_snapshot!("nothing", run.stderr);
}

#[test]
fn a_missing_flag_is_named() {
    let place = Place::with("llama");
    for (arguments, flag) in [
        ("export -m model", "--output-dir <DIR>"),
        ("verify -m model", "--expected <FILE>"),
        ("convert -m model", "--output-dir DIR"),
        ("generate", "--prompt-file FILE"),
        ("tune -m model -o out", "--text <FILE>"),
    ] {
        place.refused(arguments, 2, &[flag]);
    }
}
