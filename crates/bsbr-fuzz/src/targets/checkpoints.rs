//! Files of weights, their index, and the configuration beside them.

use std::fs::{self, File};
use std::io::Write;

use bsbr_convert::{ConvertOptions, Header, ModelSource, SafetensorsFile, convert, plan_checkpoint};

use super::{Place, Run, Target, all_called, contents, fixtures, said};

/// Longest part of a file that is changed: what stands before the numbers.
const HEAD: usize = 16 << 10;

const HEADER_WORDS: &[&str] = &[
    "\"dtype\":",
    "\"shape\":",
    "\"data_offsets\":",
    "\"__metadata__\":",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F4",
    "BOOL",
    "I64",
    "[0,0]",
    "[]",
    "[1,1]",
    "{}",
    "\"\"",
    "\\u0000",
    " ",
];

/// The text of a header, without what stands around it.
pub(super) const SAFETENSORS_HEADER: Target = Target {
    name: "safetensors_header",
    prepare: |_| Box::new(|bytes| said(Header::parse(String::from_utf8_lossy(bytes).into_owned()))),
    fixtures: || all_called("model.safetensors").iter().map(|file| header(file).to_vec()).collect(),
    words: HEADER_WORDS,
    longest: HEAD,
};

/// The text of the header of a safetensors file.
fn header(file: &[u8]) -> &[u8] {
    let (length, rest) = file.split_first_chunk().expect("a length");
    &rest[..u64::from_le_bytes(*length) as usize]
}

/// A file as it lies on disk, its length included.
pub(super) const SAFETENSORS_FILE: Target = Target {
    name: "safetensors_file",
    prepare: |place| {
        Box::new(|bytes| {
            place.write("model.safetensors", bytes);
            said(SafetensorsFile::open(&place.path("model.safetensors")))
        })
    },
    fixtures: || {
        let small = |file: &Vec<u8>| {
            // The first tensors, and no more numbers than they have.
            let whole = Header::parse(String::from_utf8_lossy(header(file)).into_owned()).expect("a fixture");
            let entry = whole.tensors.iter().min_by_key(|tensor| tensor.bytes.len()).expect("a tensor");
            let (name, dtype, shape, length) = (&entry.name, entry.dtype, &entry.shape, entry.bytes.len());
            let text = format!(r#"{{"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[0,{length}]}}}}"#);
            [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &vec![0; length]].concat()
        };
        all_called("model.safetensors").iter().map(small).collect()
    },
    words: HEADER_WORDS,
    longest: HEAD,
};

/// A GGUF file: header, metadata, tokenizer, and the plan of what it would become.
pub(super) const GGUF: Target = Target {
    name: "gguf",
    prepare: |place| {
        Box::new(|bytes| {
            let path = place.path("model.gguf");
            // The numbers of the tensors, which mean nothing here.
            let written = File::create(&path).and_then(|mut file| {
                file.write_all(bytes)?;
                file.set_len(512 << 10)
            });
            written.expect("room");
            said(plan_checkpoint(&path))
        })
    },
    fixtures: || {
        let files = contents(&fixtures().join("gguf")).into_iter().filter(|file| file.starts_with(b"GGUF"));
        files.map(|file| file[..file.len().min(HEAD)].to_vec()).collect()
    },
    words: &[
        "general.architecture",
        "general.alignment",
        "llama",
        "gemma3",
        ".block_count",
        ".context_length",
        ".rope.freq_base",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.pre",
        "token_embd.weight",
        "blk.0.attn_q.weight",
        "\x08\0\0\0",
        "\x09\0\0\0",
        "\x0c\0\0\0",
        "\x04\0\0\0\0\0\0\0",
    ],
    longest: HEAD,
};

/// A PyTorch file beside a configuration that fits.
pub(super) const PICKLE: Target = Target {
    name: "pickle",
    prepare: |place| {
        let config = fs::read(fixtures().join("gpt2_legacy_bin/config.json")).expect("a fixture");
        place.write("config.json", &config);
        Box::new(|bytes| {
            place.write("pytorch_model.bin", bytes);
            said(plan_checkpoint(&place.path("")))
        })
    },
    fixtures: || {
        let file = fs::read(fixtures().join("gpt2_legacy_bin/pytorch_model.bin")).expect("a fixture");
        vec![file[..HEAD].to_vec()]
    },
    words: &[
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "ctorch\nFloatStorage\n",
        "ccollections\nOrderedDict\n",
        "\u{2}",
        "q\0",
        "h\0",
        "(",
        "t",
        "R",
        "}",
        "]",
        ")",
        "X\x04\0\0\0",
        "K\x01",
        "J\x01\0\0\0",
        "M\0\x01",
        "Q",
        "s",
        "u",
        ".",
        "0",
        "1",
        "2",
        "PK\x01\x02",
        "PK\x03\x04",
        "PK\x05\x06",
        "PK\x06\x06",
    ],
    longest: HEAD,
};

/// The index of a checkpoint in several pieces.
pub(super) const INDEX: Target = Target {
    name: "index",
    prepare: |place| {
        let dir = fixtures().join("gpt2_sharded");
        for entry in fs::read_dir(dir).expect("a fixture").flatten() {
            fs::copy(entry.path(), place.path(&entry.file_name().to_string_lossy())).expect("room");
        }
        Box::new(|bytes| {
            place.write("model.safetensors.index.json", bytes);
            said(plan_checkpoint(&place.path("")))
        })
    },
    fixtures: || all_called("model.safetensors.index.json"),
    words: &[
        "\"weight_map\":",
        "\"metadata\":",
        "model.safetensors",
        "model-00001-of-00006.safetensors",
        "..",
        "/",
        "\\",
        "wte.weight",
        "{}",
        "[]",
        "null",
    ],
    longest: HEAD,
};

/// `config.json` of every architecture, beside the weights of one.
pub(super) const CONFIG: Target = Target {
    name: "config",
    prepare: |place| {
        fs::copy(fixtures().join("llama/model.safetensors"), place.path("model.safetensors")).expect("room");
        Box::new(|bytes| {
            place.write("config.json", bytes);
            said(plan_checkpoint(&place.path("")))
        })
    },
    fixtures: || [all_called("config.json"), all_called("config_v4.json")].concat(),
    words: &[
        "\"model_type\":",
        "\"architectures\":",
        "\"rope_scaling\":",
        "\"rope_parameters\":",
        "\"rope_type\":",
        "\"factor\":",
        "\"layer_types\":",
        "\"sliding_attention\"",
        "\"full_attention\"",
        "\"sliding_window\":",
        "\"num_hidden_layers\":",
        "\"num_attention_heads\":",
        "\"num_key_value_heads\":",
        "\"head_dim\":",
        "\"vocab_size\":",
        "\"quantization_config\":",
        "\"tie_word_embeddings\":",
        "\"hidden_act\":",
        "\"long_factor\":",
        "\"mrope_section\":",
        "\"num_kv_shared_layers\":",
        "\"per_layer_config\":",
        "null",
        "true",
        "false",
        "[]",
        "{}",
    ],
    longest: HEAD,
};

/// A converted model, in which one file is replaced.
fn converted<'a>(place: &'a Place, name: &'static str) -> Run<'a> {
    let options = ConvertOptions { attention: Some(bsbr_attn::BlockAttentionConfig::default()), ..Default::default() };
    convert(&fixtures().join("llama"), &place.path("model"), &options, &mut |_| {}).expect("a fixture");
    Box::new(move |bytes| {
        fs::write(place.path("model").join(name), bytes).expect("room");
        said(ModelSource::open(&place.path("model")))
    })
}

/// A file that a conversion writes.
fn written(name: &str) -> Vec<Vec<u8>> {
    let place = Place::new();
    let file = |fixture: &str| {
        let dir = place.path(fixture);
        let options =
            ConvertOptions { attention: Some(bsbr_attn::BlockAttentionConfig::default()), ..Default::default() };
        convert(&fixtures().join(fixture), &dir, &options, &mut |_| {}).expect("a fixture");
        fs::read(dir.join(name)).expect("it was written")
    };
    ["llama", "gemma3_text", "phi3_long", "bloom"].into_iter().map(file).collect()
}

/// `config.json` of a converted model.
pub(super) const CONVERTED_CONFIG: Target = Target {
    name: "converted_config",
    prepare: |place| converted(place, "config.json"),
    fixtures: || written("config.json"),
    words: &[
        "\"layers\":",
        "\"attention\":",
        "\"split\":",
        "\"original_layers\":",
        "\"position_policy\":",
        "\"grouped\"",
        "\"retrieval\":",
        "\"state\"",
        "\"adapters\":",
        "\"rank\":",
        "null",
        "[]",
        "{}",
        "\"version\":",
    ],
    longest: HEAD,
};

/// `conversion.json`.
pub(super) const RECORD: Target = Target {
    name: "record",
    prepare: |place| converted(place, "conversion.json"),
    fixtures: || written("conversion.json"),
    words: &[
        "\"tensors\":",
        "\"files\":",
        "\"header\":",
        "\"casts\":",
        "\"head\":",
        "\"calibration\":",
        "null",
        "[]",
        "{}",
        "\\\"",
    ],
    longest: 4 * HEAD,
};

/// A converted model whose weights are codes.
fn coded(place: &Place) -> std::path::PathBuf {
    let dir = place.path("coded");
    convert(&fixtures().join("gguf/mixed.gguf"), &dir, &ConvertOptions::default(), &mut |_| {}).expect("a fixture");
    dir
}

/// The header of the weights of such a model, which says what is codes.
pub(super) const CODED: Target = Target {
    name: "coded",
    prepare: |place| {
        let dir = coded(place);
        let path = dir.join("model.safetensors");
        let len = fs::metadata(&path).expect("it was written").len();
        Box::new(move |bytes| {
            // The codes, which mean nothing here.
            let written = File::create(&path).and_then(|mut file| {
                file.write_all(bytes)?;
                file.set_len(len)
            });
            written.expect("room");
            said(ModelSource::open(&dir))
        })
    },
    fixtures: || {
        let place = Place::new();
        let file = fs::read(coded(&place).join("model.safetensors")).expect("it was written");
        vec![file[..8 + header(&file).len()].to_vec()]
    },
    words: &[
        "\"__metadata__\":",
        "format.",
        "format.final_norm.weight",
        "\"Q4_0\"",
        "\"Q8_0\"",
        "\"Q6_K\"",
        "\"Q2_K\"",
        "\"F32\"",
        "\"U8\"",
        "\"I8\"",
        "\"shape\":",
        "\"data_offsets\":",
        "[0,0]",
        "[256,0]",
        "18446744073709551615",
        "null",
        "{}",
    ],
    longest: HEAD,
};
