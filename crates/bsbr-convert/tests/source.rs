//! Reading weights for running.

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector};
use bsbr_convert::{ConvertError, ConvertOptions, Dtype, ModelSource, convert};
use bsbr_model::{WeightSpec, weight_specs};
use common::{Tensor, checkout, convert_plain, edit_tensors};

fn meta() -> BlockAttentionConfig {
    BlockAttentionConfig { selector: Selector::Meta, ..Default::default() }
}

fn read(source: &ModelSource, name: &str) -> Vec<f32> {
    let spec = weight_specs(source.model_config()).into_iter().find(|spec| spec.name == name).expect(name);
    let values = source.read_weight(&spec).expect(name);
    assert_eq!(values.len(), spec.shape.iter().product::<usize>());
    values
}

#[test]
fn a_checkpoint_and_its_conversion_give_the_same_weights_and_description_of_themselves() {
    for name in ["gpt2", "gpt2_sharded", "gpt_bigcode_mqa", "gpt_bigcode_mha", "llama", "llama_bf16"] {
        let (temp, dir) = checkout(name, "config.json");
        let output = temp.path().join("out");
        let options = ConvertOptions { attention: Some(meta()), ..Default::default() };
        convert(&dir, &output, &options, &mut |_| {}).expect(name);
        let original = ModelSource::open(&dir).expect(name).with_attention(Some(meta())).expect("possible settings");
        let converted = ModelSource::open(&output).expect(name);
        assert_eq!((original.is_converted(), converted.is_converted()), (false, true));
        assert_eq!(original.model_config(), converted.model_config());
        assert_eq!(original.parameter_counts(), converted.parameter_counts());
        assert!(converted.description().contains("made of `model`"), "{}", converted.description());
        for spec in weight_specs(original.model_config()) {
            assert_eq!(original.read_weight(&spec).expect(name), converted.read_weight(&spec).expect(name));
        }
    }
}

#[test]
fn meta_projections_start_as_the_means_of_queries_keys_and_values_with_kv_heads_repeated() {
    for (name, heads, kv_heads, bias) in [("gpt_bigcode_mqa", 4, 1, true), ("llama", 4, 2, false), ("gpt2", 4, 4, true)]
    {
        let (_temp, dir) = checkout(name, "config.json");
        let source = ModelSource::open(&dir).expect(name).with_attention(Some(meta())).expect("possible settings");
        for (kind, width) in [("weight", 48), ("bias", 1)] {
            if kind == "bias" && !bias {
                continue;
            }
            let [query, key, value] =
                ["query", "key", "value"].map(|part| read(&source, &format!("layers.1.attention.{part}.{kind}")));
            let meta_query = read(&source, &format!("bsbr.layers.1.meta_query.{kind}"));
            let meta_key = read(&source, &format!("bsbr.layers.1.meta_key.{kind}"));
            for row in 0..48 {
                let (head, within) = (row / 12, row % 12);
                let shared = head / (heads / kv_heads) * 12 + within;
                for col in 0..width {
                    let (own, shared) = (row * width + col, shared * width + col);
                    assert_eq!(meta_query[own], (query[own] + key[shared]) / 2.0, "{name}");
                    assert_eq!(meta_key[own], (key[shared] + value[shared]) / 2.0, "{name}");
                }
            }
        }
    }
}

#[test]
fn settings_given_later_replace_those_of_a_converted_model() {
    let (temp, dir) = checkout("llama", "config.json");
    let output = temp.path().join("out");
    convert_plain(&dir, &output).expect("sound");
    let source = ModelSource::open(&output).expect("sound");
    assert_eq!(source.parameter_counts().1, 0);
    let source = source.with_attention(Some(meta())).expect("possible settings");
    assert_eq!(source.parameter_counts().1, 2 * 2 * 48 * 48);
    read(&source, "bsbr.layers.0.meta_key.weight");
    let impossible = BlockAttentionConfig { block_size: 48, ..meta() };
    assert!(matches!(source.with_attention(Some(impossible)), Err(ConvertError::Model(_))));
}

#[test]
fn settings_that_need_no_meta_projections_add_none() {
    let (temp, dir) = checkout("llama", "config.json");
    let attention = BlockAttentionConfig { retrieval: Retrieval::None, ..meta() };
    let options = ConvertOptions { attention: Some(attention), ..Default::default() };
    let report = convert(&dir, &temp.path().join("out"), &options, &mut |_| {}).expect("sound");
    assert_eq!(report.record.parameters_before, report.record.parameters_after);
}

#[test]
fn a_weight_the_model_does_not_have_is_refused() {
    let (_temp, dir) = checkout("llama", "config.json");
    let source = ModelSource::open(&dir).expect("sound");
    for (name, shape) in [
        ("embed.weight", vec![97, 47]),
        ("layers.9.attention.query.weight", vec![48, 48]),
        ("bsbr.layers.0.meta_query.weight", vec![48, 48]),
    ] {
        let spec = WeightSpec { name: name.into(), shape, extra: false, whole: false };
        let error = source.read_weight(&spec).expect_err(name);
        assert!(error.to_string().contains(&format!("no weight `{name}` of shape")), "{error}");
    }
}

#[test]
fn a_listing_names_every_tensor_its_dtype_and_its_bytes() {
    let (_temp, dir) = checkout("llama_bf16", "config.json");
    let source = ModelSource::open(&dir).expect("sound");
    let listing = source.tensors();
    assert_eq!(listing.len(), 21);
    let embed = listing.iter().find(|t| t.name == "model.embed_tokens.weight").expect("an embedding");
    assert_eq!((embed.dtype, &embed.shape[..], embed.bytes), (Dtype::BF16, &[97, 48][..], 97 * 48 * 2));
    assert_eq!(
        source.dtype_totals().into_iter().map(|(d, (n, _))| (d, n)).collect::<Vec<_>>(),
        [("BF16".to_owned(), 21)]
    );
    assert_eq!(source.total_bytes(), std::fs::metadata(dir.join("model.safetensors")).expect("a file").len());
    assert_eq!(source.cache_bytes_per_token(), 2 * 2 * 2 * 12 * 4);
    assert_eq!(source.tokenizer(), None);
    assert!(source.plan().is_some());
}

#[test]
fn half_precision_numbers_are_widened_exactly() {
    let (_temp, dir) = checkout("llama", "config.json");
    edit_tensors(&dir, |tensors| {
        let norm = tensors.iter_mut().find(|t| t.name == "model.norm.weight").expect("a norm");
        norm.dtype = "F16".into();
        norm.bytes = (0..48_u16).flat_map(|n| (0x3c00 + n).to_le_bytes()).collect(); // 1, 1 + 2^-10, ...
    });
    let norm = read(&ModelSource::open(&dir).expect("sound"), "final_norm.weight");
    assert_eq!(norm[3], 1.0 + 3.0 / 1024.0);
}

#[test]
fn a_nan_is_named_with_its_tensor_and_place_when_its_weight_is_read_and_no_earlier() {
    let (_temp, dir) = checkout("gpt2", "config.json");
    let (row, col) = (5, 60); // of the fused weight [48, 144]: input 5, output 12 of the keys
    edit_tensors(&dir, |tensors| {
        let fused = tensors.iter_mut().find(|t| t.name == "transformer.h.1.attn.c_attn.weight").expect("a weight");
        let mut values = fused.values();
        values[row * 144 + col] = f32::NAN;
        *fused = Tensor::f32(&fused.name, &[48, 144], values);
    });
    let source = ModelSource::open(&dir).expect("headers are sound");
    read(&source, "layers.1.attention.query.weight");
    let spec = weight_specs(source.model_config()).into_iter().find(|s| s.name == "layers.1.attention.value.weight");
    source.read_weight(&spec.expect("a value weight")).expect("the values are finite");
    let spec = weight_specs(source.model_config()).into_iter().find(|s| s.name == "layers.1.attention.key.weight");
    let error = source.read_weight(&spec.expect("a key weight")).expect_err("a NaN").to_string();
    let place = format!("tensor `transformer.h.1.attn.c_attn.weight` holds NaN at element {}", row * 144 + col);
    assert!(error.contains(&place), "{error}");
}

#[test]
fn a_model_with_settings_of_an_earlier_version_is_refused_with_what_to_do() {
    let (temp, dir) = checkout("llama", "config.json");
    for (key, value, word) in [("top_k", "76", "`top_k`"), ("selector", "mean-key", "`selector = mean-key`")] {
        for (file, settings, original) in
            [("conversion.json", "settings", "its original `model`"), ("config.json", "attention", "the original")]
        {
            let output = temp.path().join(format!("{key}-{file}"));
            let options = ConvertOptions { attention: Some(meta()), ..Default::default() };
            convert(&dir, &output, &options, &mut |_| {}).expect("sound");
            let path = output.join(file);
            let mut content: serde_json::Value =
                serde_json::from_slice(&std::fs::read(&path).expect("a file")).expect("JSON");
            content[settings][key] = value.into();
            std::fs::write(&path, content.to_string()).expect("written");
            let error = ModelSource::open(&output).expect_err("an earlier version");
            assert!(matches!(error, ConvertError::OldSettings { .. }), "{error}");
            let text = error.to_string();
            for part in [file, word, "earlier version", &format!("convert {original} again"), "nothing in its weights"]
            {
                assert!(text.contains(part), "{part}: {text}");
            }
        }
    }
}
