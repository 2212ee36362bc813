//! Tokenizers and settings.

use std::fs;
use std::path::Path;

use bsbr_attn::BlockAttentionConfig;
use bsbr_model::TextTokenizer;
use bsbr_splitlinear::SplitConfig;

use super::{Target, contents, said};

/// A tokenizer of byte pairs, small enough to be changed everywhere.
const BYTE_PAIRS: &str = r##"{"version":"1.0","truncation":{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0},
"padding":{"strategy":{"Fixed":8},"direction":"Right","pad_to_multiple_of":null,"pad_id":0,"pad_type_id":0,"pad_token":"<pad>"},
"added_tokens":[{"id":0,"content":"<pad>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\p{N}{1,3}"},
"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}]},
"post_processor":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":false,"use_regex":true},
"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,
"byte_fallback":false,"ignore_merges":false,"vocab":{"<pad>":0,"a":1,"b":2,"c":3,"Ġ":4,"ab":5,"abc":6,"Ġa":7},"merges":["a b","ab c","Ġ a"]}}"##;

/// The same of other kinds.
const PIECES: &str = r##"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":{"type":"Sequence","normalizers":
[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},"pre_tokenizer":null,
"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"<s>":{"id":"<s>","ids":[1],
"tokens":["<s>"]}}},"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"Unigram","unk_id":0,
"vocab":[["<unk>",0.0],["<s>",-1.0],["▁a",-2.0],["b",-2.5],["c",-3.0]],"byte_fallback":false}}"##;

const TOKENIZER_WORDS: &[&str] = &[
    "\"type\":",
    "\"BPE\"",
    "\"Unigram\"",
    "\"WordPiece\"",
    "\"WordLevel\"",
    "\"ByteLevel\"",
    "\"Split\"",
    "\"Regex\":",
    "\"Sequence\"",
    "\"Metaspace\"",
    "\"Precompiled\"",
    "\"added_tokens\":",
    "\"special\":",
    "\"content\":",
    "\"merges\":",
    "\"vocab\":",
    "\"id\":",
    "(a*)*b",
    "[",
    "\\p{L}+",
    "null",
    "[]",
    "{}",
    "true",
    "4294967295",
    "\u{fffd}",
    "▁",
];

/// `tokenizer.json`; what it makes of a text, and of tokens.
pub(super) const TOKENIZER: Target = Target {
    name: "tokenizer",
    prepare: |_| Box::new(|bytes| use_tokenizer(TextTokenizer::from_bytes(bytes, "tokenizer.json"))),
    fixtures: || vec![BYTE_PAIRS.into(), PIECES.into()],
    words: TOKENIZER_WORDS,
    longest: 8 << 10,
};

fn use_tokenizer(tokenizer: Result<TextTokenizer, bsbr_model::ModelError>) -> String {
    let tokenizer = match tokenizer {
        Ok(tokenizer) => tokenizer,
        error => return said(error),
    };
    let texts = [tokenizer.encode("abc a1234 \u{fffd}\u{301}ß"), tokenizer.encode(""), tokenizer.encode_within("a b")];
    let back = tokenizer.decode(&[0, 1, 5, 6, 7, u32::MAX]);
    format!("{} {}", texts.map(said).concat(), said(back))
}

/// The files beside a tokenizer: the first byte says which one is replaced.
pub(super) const TOKENIZER_COMPANIONS: Target = Target {
    name: "tokenizer_companions",
    prepare: |place| {
        place.write("tokenizer.json", BYTE_PAIRS.as_bytes());
        Box::new(|bytes| {
            const NAMES: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];
            let (&which, content) = bytes.split_first().unwrap_or((&0, &[]));
            for name in NAMES {
                // One that is not there is no error.
                let _ = fs::remove_file(place.path(name));
            }
            place.write(NAMES[usize::from(which) % NAMES.len()], content);
            use_tokenizer(TextTokenizer::open(&place.path("tokenizer.json")))
        })
    },
    fixtures: || {
        let config = r#"{"added_tokens_decoder":{"8":{"content":"<x>","lstrip":false,"normalized":false,"rstrip":true,
            "single_word":false,"special":true}},"bos_token":"<x>","eos_token":{"content":"</x>","__type":"AddedToken"},
            "additional_special_tokens":["<y>"],"model_max_length":1000000000000000019884624838656,"tokenizer_class":"X",
            "clean_up_tokenization_spaces":false,"add_bos_token":true,"chat_template":"{{ x }}"}"#;
        let map =
            r#"{"bos_token":"<s>","eos_token":{"content":"</s>","lstrip":false},"additional_special_tokens":["<y>"]}"#;
        [(0, config), (1, map), (2, r#"{"<z>":8,"<w>":9}"#)]
            .map(|(which, text)| [&[which], text.as_bytes()].concat())
            .into()
    },
    words: TOKENIZER_WORDS,
    longest: 8 << 10,
};

/// Files of this repository's settings.
fn configs() -> Vec<Vec<u8>> {
    contents(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs"))
}

/// Settings of attention.
pub(super) const ATTENTION_TOML: Target = Target {
    name: "attention_toml",
    prepare: |_| {
        Box::new(|bytes| match toml::from_str::<BlockAttentionConfig>(&String::from_utf8_lossy(bytes)) {
            Ok(config) => said(config.validate()),
            error => said(error),
        })
    },
    fixtures: configs,
    words: &[
        "retrieval = ",
        "\"blocks\"",
        "\"state\"",
        "\"none\"",
        "\"additive\"",
        "chunk_size = ",
        "block_size = ",
        "kept_tokens = ",
        "max_chunks = ",
        "selector = ",
        "\"meta\"",
        "far_shift = ",
        "inf",
        "nan",
        "\"\"\"",
        "[[",
        "]]",
        "=",
        ".",
        "\n",
        "#",
        "'''",
        "1979-05-27T07:32:00Z",
        "0x_",
    ],
    longest: 4 << 10,
};

/// Settings of linear layers, in each of their languages: the first byte says which.
pub(super) const SPLIT_SETTINGS: Target = Target {
    name: "split_settings",
    prepare: |_| {
        Box::new(|bytes| {
            let (&which, text) = bytes.split_first().unwrap_or((&0, &[]));
            let text = String::from_utf8_lossy(text);
            let read = match which % 3 {
                0 => SplitConfig::from_toml(&text),
                1 => SplitConfig::from_yaml(&text),
                _ => SplitConfig::from_json(&text),
            };
            match read {
                Ok(config) => said(config.validate()),
                error => said(error),
            }
        })
    },
    fixtures: || {
        let yaml: &[u8] =
            b"\x01groups:\n  - layers: [0, 1]\n    share: input\nkeep: 0.5\nrank: &a uniform\nother: *a\n";
        let mut all: Vec<Vec<u8>> = configs().into_iter().map(|text| [&[0], text.as_slice()].concat()).collect();
        all.extend([yaml.to_vec(), b"\x02{\"keep\":0.5,\"groups\":[]}".to_vec()]);
        all
    },
    words: &[
        "keep",
        "rank",
        "groups",
        "share",
        "layers",
        "parts",
        "objective",
        "calibration",
        "refit",
        "&a ",
        "*a",
        "<<: ",
        "- ",
        "  ",
        ": ",
        "!!binary",
        "|",
        ">",
        "? ",
        "---",
        "...",
        "\t",
        "{",
        "}",
        "[",
        "]",
    ],
    longest: 4 << 10,
};
