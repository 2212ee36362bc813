//! Converting and exporting give the original back, bit for bit.

mod common;

use std::fs;

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_convert::{ConvertOptions, HeadForm, ModelSource, convert, export, plan_checkpoint};
use common::{
    LATENT, Tensor, all_fixtures, checkout, convert_plain, edit_tensors, read_dir_tensors, snapshot, write_tensors,
};

fn meta() -> Option<BlockAttentionConfig> {
    Some(BlockAttentionConfig { selector: Selector::Meta, ..Default::default() })
}

#[test]
fn every_fixture_in_every_configuration_style_plans_without_a_problem() {
    for (name, config) in all_fixtures() {
        let (_temp, dir) = checkout(name, config);
        let planned = plan_checkpoint(&dir).unwrap_or_else(|error| panic!("{name} {config}: {error}"));
        let used: usize = planned.plan.steps.iter().map(|step| step.sources.len()).sum();
        let used = used + planned.plan.ignored.len();
        // Scales are read with the codes they belong to.
        let scales = read_dir_tensors(&dir).into_keys().filter(|name| name.ends_with("_scales")).count();
        assert_eq!(used + scales, read_dir_tensors(&dir).len(), "{name} {config}");
    }
}

#[test]
fn every_fixture_comes_back_file_for_file_and_byte_for_byte() {
    for (name, config) in all_fixtures() {
        let (temp, dir) = checkout(name, config);
        for (kind, attention) in [("plain", None), ("meta", meta())] {
            if kind == "meta" && LATENT.contains(&name) {
                continue;
            }
            let (converted, back) = (temp.path().join(format!("c-{kind}")), temp.path().join(format!("b-{kind}")));
            let options = ConvertOptions { attention, ..Default::default() };
            let converting = convert(&dir, &converted, &options, &mut |_| {});
            let report = converting.unwrap_or_else(|error| panic!("{name} {config}: {error}"));
            assert_eq!(report.record.parameters_after > report.record.parameters_before, kind == "meta");
            let exported = export(&converted, &back, false, &mut |_| {}).expect(name);
            assert!(exported.is_original(), "{name} {config}");
            assert_eq!(snapshot(&back), snapshot(&dir), "{name} {config}");
        }
    }
}

#[test]
fn converting_twice_gives_the_same_bytes() {
    for name in ["gpt2_sharded", "llama_bf16"] {
        let (temp, dir) = checkout(name, "config.json");
        let options = ConvertOptions { attention: meta(), ..Default::default() };
        let [first, second] = ["first", "second"].map(|output| {
            let output = temp.path().join(output);
            convert(&dir, &output, &options, &mut |_| {}).expect(name);
            snapshot(&output)
        });
        assert_eq!(first, second);
        for (file, content) in &first {
            let text = String::from_utf8_lossy(content);
            assert!(!text.contains(&*temp.path().to_string_lossy()), "{file} names a directory of this machine");
        }
    }
}

#[test]
fn weights_keep_their_dtype_and_the_meta_projections_are_f32() {
    let (temp, dir) = checkout("llama_bf16", "config.json");
    let output = temp.path().join("out");
    convert(&dir, &output, &ConvertOptions { attention: meta(), ..Default::default() }, &mut |_| {}).expect("sound");
    for (name, tensor) in read_dir_tensors(&output) {
        assert_eq!(tensor.dtype, if name.starts_with("bsbr.") { "F32" } else { "BF16" }, "{name}");
    }
}

#[test]
fn a_checkpoint_without_the_prefix_and_with_mask_buffers_comes_back_whole() {
    let (temp, dir) = checkout("gpt2", "config.json");
    edit_tensors(&dir, |tensors| {
        for tensor in tensors.iter_mut() {
            tensor.name = tensor.name.replace("transformer.", "");
        }
        for layer in 0..2 {
            let name = format!("h.{layer}.attn.bias");
            tensors.push(Tensor { name, dtype: "BOOL".into(), shape: vec![1, 1, 8, 8], bytes: vec![1; 64] });
            tensors.push(Tensor::f32(&format!("h.{layer}.attn.masked_bias"), &[], [f32::NEG_INFINITY]));
        }
    });
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    let report = convert_plain(&dir, &converted).expect("sound");
    assert_eq!(report.record.prefix, "");
    let kept = read_dir_tensors(&converted);
    assert_eq!(kept["source.ignored.h.1.attn.bias"].dtype, "BOOL");
    assert!(export(&converted, &back, false, &mut |_| {}).expect("sound").is_original());
    assert_eq!(snapshot(&back), snapshot(&dir));
}

#[test]
fn old_llama_files_with_rotary_buffers_and_without_the_prefix_come_back_whole() {
    let (temp, dir) = checkout("llama", "config_v4.json");
    edit_tensors(&dir, |tensors| {
        for tensor in tensors.iter_mut() {
            tensor.name = tensor.name.replace("model.", "");
        }
        tensors.push(Tensor::f32("layers.0.self_attn.rotary_emb.inv_freq", &[6], [1.0; 6]));
    });
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    assert_eq!(convert_plain(&dir, &converted).expect("sound").record.prefix, "");
    export(&converted, &back, false, &mut |_| {}).expect("sound");
    assert_eq!(snapshot(&back), snapshot(&dir));
}

#[test]
fn a_head_equal_to_the_embedding_is_stored_once_and_exported_twice() {
    let (temp, dir) = checkout("gpt2", "config.json");
    edit_tensors(&dir, |tensors| {
        let embed = tensors.iter().find(|t| t.name == "transformer.wte.weight").expect("an embedding").clone();
        tensors.insert(0, Tensor { name: "lm_head.weight".into(), ..embed });
    });
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    let report = convert_plain(&dir, &converted).expect("sound");
    assert_eq!(report.record.head, HeadForm::TiedCopy);
    assert!(report.config.decoder.tied_head);
    assert!(report.notes[0].contains("equal to the embedding table"), "{:?}", report.notes);
    assert!(!read_dir_tensors(&converted).contains_key("head.weight"));
    export(&converted, &back, false, &mut |_| {}).expect("sound");
    assert_eq!(snapshot(&back), snapshot(&dir));
}

#[test]
fn a_head_of_its_own_is_kept_although_the_configuration_ties_it() {
    let (temp, dir) = checkout("gpt2", "config.json");
    edit_tensors(&dir, |tensors| {
        let embed = tensors.iter().find(|t| t.name == "transformer.wte.weight").expect("an embedding").clone();
        let mut bytes = embed.bytes.clone();
        bytes[0] ^= 1;
        tensors.push(Tensor { name: "lm_head.weight".into(), bytes, ..embed });
    });
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    let report = convert_plain(&dir, &converted).expect("sound");
    assert!(!report.config.decoder.tied_head);
    assert!(report.notes[0].contains("the file is followed"), "{:?}", report.notes);
    export(&converted, &back, false, &mut |_| {}).expect("sound");
    assert_eq!(snapshot(&back), snapshot(&dir));
}

#[test]
fn a_checkpoint_of_three_dtypes_comes_back_whole_with_aligned_tensors_between() {
    let (temp, dir) = checkout("llama", "config.json");
    edit_tensors(&dir, |tensors| {
        for (n, tensor) in tensors.iter_mut().enumerate().filter(|(n, _)| n % 3 > 0) {
            tensor.dtype = ["F32", "F16", "BF16"][n % 3].into();
            // Upper halves of the numbers: finite in either format for weights around zero.
            let halves = tensor.bytes.chunks_exact(4).flat_map(|b| [b[2], b[3]]);
            tensor.bytes = halves.collect();
        }
    });
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    convert_plain(&dir, &converted).expect("sound");
    let file = bsbr_convert::SafetensorsFile::open(&converted.join("model.safetensors")).expect("sound");
    assert_eq!(file.header().text.len() % 8, 0);
    for tensor in &file.header().tensors {
        assert_eq!(tensor.bytes.start % (tensor.dtype.bitsize() / 8), 0, "{}", tensor.name);
    }
    export(&converted, &back, false, &mut |_| {}).expect("sound");
    assert_eq!(snapshot(&back), snapshot(&dir));
}

#[test]
fn tokenizer_and_generation_files_travel_along_and_others_do_not() {
    let (temp, dir) = checkout("llama", "config.json");
    for (name, content) in [
        ("tokenizer.json", "{}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("generation_config.json", r#"{"eos_token_id": [7, 1]}"#),
        ("training_args.bin", "x"),
    ] {
        fs::write(dir.join(name), content).expect("room");
    }
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    let report = convert_plain(&dir, &converted).expect("sound");
    assert_eq!(report.config.stop_tokens, [1, 7]);
    export(&converted, &back, false, &mut |_| {}).expect("sound");
    for output in [&converted, &back] {
        assert!(output.join("tokenizer.json").is_file() && output.join("chat_template.jinja").is_file());
        assert!(!output.join("training_args.bin").exists());
    }
}

#[test]
fn weights_changed_after_converting_are_exported_as_they_are_and_said_not_to_be_the_original() {
    let (temp, dir) = checkout("llama", "config.json");
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    convert_plain(&dir, &converted).expect("sound");
    let mut tensors = common::read_tensors(&converted.join("model.safetensors"));
    let tensor = tensors.iter_mut().find(|t| t.name == "layers.0.attention.key.weight").expect("a key");
    tensor.bytes[0] ^= 1;
    let changed = tensor.bytes.clone();
    write_tensors(&converted.join("model.safetensors"), &tensors);
    assert!(!export(&converted, &back, false, &mut |_| {}).expect("sound").is_original());
    assert_eq!(read_dir_tensors(&back)["model.layers.0.self_attn.k_proj.weight"].bytes, changed);
}

#[test]
fn progress_ends_at_the_total_of_every_stage() {
    let (temp, dir) = checkout("gpt2_sharded", "config.json");
    let mut last = std::collections::BTreeMap::new();
    let converting = convert(&dir, &temp.path().join("out"), &ConvertOptions::default(), &mut |p| {
        last.insert(p.stage, (p.done, p.total));
    });
    converting.expect("sound");
    assert_eq!(last.keys().copied().collect::<Vec<_>>(), ["hashing", "writing"]);
    assert!(last.values().all(|(done, total)| done == total && *total > 0));
    let mut last = (0, 1);
    let exporting =
        export(&temp.path().join("out"), &temp.path().join("back"), false, &mut |p| last = (p.done, p.total));
    exporting.expect("sound");
    assert!(last.0 == last.1 && last.1 > 0, "{last:?}");
}

#[test]
fn a_forced_conversion_replaces_an_earlier_one_and_leaves_nothing_else_behind() {
    let (temp, dir) = checkout("llama", "config.json");
    let output = temp.path().join("out");
    convert_plain(&dir, &output).expect("sound");
    // As an earlier one that was tuned has it.
    fs::write(output.join("tune.json"), "{}").expect("room");
    let options = ConvertOptions { force: true, ..Default::default() };
    convert(&dir, &output, &options, &mut |_| {}).expect("an earlier conversion may be replaced");
    assert!(!output.join("tune.json").exists());
    ModelSource::open(&output).expect("sound");
    let names: Vec<String> = snapshot_names(temp.path());
    assert_eq!(names, ["model", "out"]);
}

fn snapshot_names(dir: &std::path::Path) -> Vec<String> {
    let names = fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().expect("plain names")).collect();
    names.sort();
    names
}
