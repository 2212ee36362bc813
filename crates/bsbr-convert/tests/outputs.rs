//! Output directories and converted models that are refused, and what survives a failure.

mod common;

use std::fs;

use bsbr_convert::{ConvertError, ConvertOptions, ModelSource, convert, export};
use common::{Tensor, checkout, convert_plain, edit_tensors, message, snapshot};

#[test]
fn an_output_in_use_is_left_alone() {
    let (temp, dir) = checkout("llama", "config.json");
    let output = temp.path().join("out");
    fs::create_dir(&output).expect("room");
    convert_plain(&dir, &output).expect("an empty directory may be used");
    let before = snapshot(&output);
    assert!(matches!(convert_plain(&dir, &output), Err(ConvertError::OutputExists { .. })));
    assert_eq!(snapshot(&output), before);

    // Forced: an earlier conversion may go, the source itself and other people's files may not.
    let force = ConvertOptions { force: true, ..Default::default() };
    convert(&dir, &output, &force, &mut |_| {}).expect("an earlier conversion may be replaced");
    let source = snapshot(&dir);
    for foreign in [&dir, &temp.path().to_path_buf()] {
        let error = convert(&dir, foreign, &force, &mut |_| {}).expect_err("a directory of other files");
        assert!(matches!(error, ConvertError::OutputForeign { .. }), "{error}");
    }
    assert_eq!(snapshot(&dir), source);
    let file = temp.path().join("file");
    fs::write(&file, "x").expect("room");
    assert!(message(&convert(&dir, &file, &force, &mut |_| {}).expect_err("a file")).contains("not a directory"));
}

#[test]
fn a_failed_forced_conversion_leaves_the_earlier_one() {
    let (temp, dir) = checkout("llama", "config.json");
    let output = temp.path().join("out");
    convert_plain(&dir, &output).expect("sound");
    let before = snapshot(&output);
    edit_tensors(&dir, |tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.name == "model.norm.weight").expect("a norm");
        *norm = Tensor::f32("model.norm.weight", &[48], [f32::NAN; 48]);
    });
    let force = ConvertOptions { force: true, ..Default::default() };
    assert!(matches!(convert(&dir, &output, &force, &mut |_| {}), Err(ConvertError::NotFinite { .. })));
    assert_eq!(snapshot(&output), before);
}

#[test]
fn a_failed_conversion_leaves_no_directory_it_made_on_the_way() {
    let (temp, dir) = checkout("llama", "config.json");
    edit_tensors(&dir, |tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.name == "model.norm.weight").expect("a norm");
        norm.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let error = convert_plain(&dir, &temp.path().join("new/deep/out")).expect_err("a NaN");
    assert!(matches!(error, ConvertError::NotFinite { .. }), "{error}");
    assert!(!temp.path().join("new").exists());
}

#[test]
fn an_export_refuses_what_is_not_a_whole_converted_model() {
    let (temp, dir) = checkout("gpt2", "config.json");
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    let fails = |expected: &str| {
        let text = message(&export(&converted, &back, false, &mut |_| {}).expect_err(expected));
        assert!(text.contains(expected), "{expected}\n{text}");
        assert!(!back.exists());
    };
    assert!(matches!(export(&dir, &back, false, &mut |_| {}), Err(ConvertError::NotConverted { .. })));
    convert_plain(&dir, &converted).expect("sound");
    assert!(matches!(convert_plain(&converted, &back), Err(ConvertError::AlreadyConverted { .. })));

    let sound = snapshot(&converted);
    let restore = || sound.iter().for_each(|(name, content)| fs::write(converted.join(name), content).expect("room"));
    let replace = |file: &str, from: &str, to: &str| {
        let text = fs::read_to_string(converted.join(file)).expect("a text");
        assert!(text.contains(from));
        fs::write(converted.join(file), text.replacen(from, to, 1)).expect("room");
    };

    edit_tensors(&converted, |tensors| tensors.retain(|tensor| tensor.name != "position.weight"));
    fails("missing: `position.weight`");
    assert!(ModelSource::open(&converted).is_err());
    restore();
    edit_tensors(&converted, |tensors| {
        tensors[0].dtype = "I32".into();
    });
    fails("expected F32, F16, BF16 or codes");
    restore();
    edit_tensors(&converted, |tensors| tensors.push(Tensor::f32("stray", &[1], [0.0])));
    fails("no rule reads `stray`");
    restore();
    fs::write(converted.join("model.safetensors"), &sound["model.safetensors"][..5000]).expect("room");
    fails("is cut off");
    restore();
    replace("conversion.json", "\"rules_version\": 1", "\"rules_version\": 0");
    fails("made with rules `gpt2` version 0, this version has rules `gpt2` version 1");
    restore();
    replace("conversion.json", "\"format_version\": 1", "\"format_version\": 9");
    fails("made with format 9, this version has format 1");
    restore();
    replace("conversion.json", "\"name\": \"model.safetensors\"", "\"name\": \"../model.safetensors\"");
    fails("expected a plain file name".replace("expected", "must be").as_str());
    restore();
    replace("config.json", "\"hidden_size\": 48", "\"hidden_size\": 96");
    fails("shape: `embed.weight` is [97, 48], expected [97, 96]");
    restore();
    replace("config.json", "\"vocab_size\"", "\"vocabulary\"");
    fails("config.json is not the JSON expected here");
    restore();
    export(&converted, &back, false, &mut |_| {}).expect("restored");
}

#[test]
fn an_export_in_half_precision_of_what_was_f32_is_refused() {
    let (temp, dir) = checkout("llama", "config.json");
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    convert_plain(&dir, &converted).expect("sound");
    edit_tensors(&converted, |tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.name == "final_norm.weight").expect("a norm");
        norm.dtype = "BF16".into();
        norm.bytes.truncate(96);
    });
    let text = message(&export(&converted, &back, false, &mut |_| {}).expect_err("another dtype"));
    assert!(text.contains("`final_norm.weight` is BF16, expected F32 as in the original"), "{text}");
    assert!(!back.exists());
}

#[test]
fn a_forced_export_replaces_an_earlier_export_and_nothing_else() {
    let (temp, dir) = checkout("gpt2_sharded", "config.json");
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    convert_plain(&dir, &converted).expect("sound");
    export(&converted, &back, false, &mut |_| {}).expect("sound");
    assert!(matches!(export(&converted, &back, false, &mut |_| {}), Err(ConvertError::OutputExists { .. })));
    export(&converted, &back, true, &mut |_| {}).expect("an earlier export may be replaced");
    fs::write(back.join("notes.txt"), "mine").expect("room");
    let error = export(&converted, &back, true, &mut |_| {}).expect_err("a file of someone else");
    assert!(matches!(error, ConvertError::OutputForeign { .. }), "{error}");
    assert!(back.join("notes.txt").is_file());
}

#[test]
fn impossible_settings_are_refused_before_anything_is_written() {
    let (temp, dir) = checkout("llama", "config.json");
    let attention = bsbr_attn::BlockAttentionConfig { block_size: 48, ..Default::default() };
    let options = ConvertOptions { attention: Some(attention), ..Default::default() };
    let output = temp.path().join("out");
    assert!(matches!(convert(&dir, &output, &options, &mut |_| {}), Err(ConvertError::Model(_))));
    let options = ConvertOptions { original_layers: vec![2], ..Default::default() };
    assert!(matches!(convert(&dir, &output, &options, &mut |_| {}), Err(ConvertError::Model(_))));
    assert!(!output.exists());
}

/// Runs the test again in a process that may write 64 kB to a file: the closest thing to a full disk that needs no
/// privileges.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_reported_with_the_file_and_leaves_nothing_behind() {
    const NAME: &str = "a_full_disk_is_reported_with_the_file_and_leaves_nothing_behind";
    const CHILD: &str = "BSBR_TEST_CHILD";
    if let Some(dir) = std::env::var_os(CHILD) {
        let dir = std::path::PathBuf::from(dir);
        let text = message(&common::refused(&dir));
        assert!(text.contains("cannot write") && text.contains("model.safetensors"), "{text}");
        return;
    }
    let (_temp, dir) = checkout("llama", "config.json");
    let status = std::process::Command::new("sh")
        .args(["-c", r#"trap "" XFSZ; ulimit -f 128; exec "$0" --exact "$1""#])
        .arg(std::env::current_exe().expect("this test"))
        .arg(NAME)
        .env(CHILD, &dir)
        .output()
        .expect("a shell");
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
}
