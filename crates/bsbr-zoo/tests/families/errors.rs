//! What is refused, and in which words.

use bsbr_attn::BlockAttentionConfig;
use bsbr_zoo::{DecoderConfig, Family, Positions, SmallDecoder, ZooError};
use burn::tensor::{Device, Int, Tensor, TensorData};

fn refused(config: DecoderConfig, setting: &str) {
    let error = SmallDecoder::new(&config, 1, &Device::flex()).unwrap_err();
    let found = match &error {
        ZooError::Config { setting, .. } => *setting,
        ZooError::Attention(_) => "bsbr",
        other => panic!("{other}"),
    };
    assert_eq!(found, setting, "{error}");
}

#[test]
fn impossible_settings_are_refused_by_name() {
    let base = DecoderConfig::default();
    refused(DecoderConfig { vocabulary: 0, ..base.clone() }, "vocabulary");
    refused(DecoderConfig { width: 0, ..base.clone() }, "width");
    refused(DecoderConfig { width: usize::MAX, ..base.clone() }, "width");
    refused(DecoderConfig { layers: 0, ..base.clone() }, "layers");
    refused(DecoderConfig { heads: 0, ..base.clone() }, "heads");
    refused(DecoderConfig { heads: 5, ..base.clone() }, "heads");
    refused(DecoderConfig { mlp_factor: 1000, ..base.clone() }, "mlp_factor");
    refused(DecoderConfig { short_convolution: 1000, ..base.clone() }, "short_convolution");
    refused(DecoderConfig { chunk_size: 0, ..base.clone() }, "chunk_size");
    refused(DecoderConfig { window: 0, ..base.clone() }, "window");
    refused(DecoderConfig { sinks: usize::MAX, ..base.clone() }, "sinks");
    refused(DecoderConfig { hopfield_steps: 0, ..base.clone() }, "hopfield_steps");
    refused(DecoderConfig { hopfield_beta: 0.0, ..base.clone() }, "hopfield_beta");
    refused(DecoderConfig { hopfield_beta: f64::NAN, ..base.clone() }, "hopfield_beta");
    refused(DecoderConfig { width: 6, heads: 2, ..base.clone() }, "width / heads");
    refused(DecoderConfig { family: Family::Gau, width: 3, heads: 1, ..base.clone() }, "width");
    let bsbr = BlockAttentionConfig { block_size: 3, ..base.bsbr.clone() };
    refused(DecoderConfig { bsbr, ..base.clone() }, "bsbr");
    // Without a rotation odd heads are fine.
    let odd = DecoderConfig { width: 6, heads: 2, positions: Positions::None, ..base.clone() };
    SmallDecoder::new(&odd, 1, &Device::flex()).unwrap();
    let meta = BlockAttentionConfig { selector: bsbr_attn::Selector::Meta, ..base.bsbr.clone() };
    refused(DecoderConfig { family: Family::Bsbr, bsbr: meta, ..base }, "bsbr.selector");
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let device = Device::flex();
    let decoder = SmallDecoder::new(&DecoderConfig::default(), 1, &device).unwrap();
    let tokens = |ids: Vec<i64>, shape: [usize; 2]| Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &device);
    let empty = decoder.forward(tokens(vec![], [1, 0])).unwrap_err();
    assert_eq!(empty, ZooError::Empty { batch: 1, tokens: 0 });
    assert_eq!(decoder.start(0).unwrap_err(), ZooError::Empty { batch: 0, tokens: 0 });
    let outside = decoder.forward(tokens(vec![1, 2, 3, 256], [2, 2])).unwrap_err();
    assert_eq!(outside, ZooError::Token { token: 256, text: 1, position: 1, vocabulary: 256 });
    assert!(decoder.forward(tokens(vec![-1], [1, 1])).is_err());
    let places = Tensor::<1, Int>::from_data([0, 2], &device);
    let outside = decoder.logits_at(tokens(vec![1, 2], [1, 2]), places).unwrap_err();
    assert_eq!(outside, ZooError::Place { place: 2, places: 2 });

    let mut state = decoder.start(2).unwrap();
    let error = decoder.step(tokens(vec![1], [1, 1]), &mut state).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the state is of 2 texts, expected 1 texts: start one with the decoder and batch it is for"
    );
    let other = DecoderConfig { family: Family::Linear, ..Default::default() };
    let other = SmallDecoder::new(&other, 1, &device).unwrap();
    assert!(matches!(other.step(tokens(vec![1, 1], [2, 1]), &mut state), Err(ZooError::State { .. })));
    assert!(state.is_empty());
}

#[test]
fn families_are_read_by_name() {
    for family in Family::ALL {
        assert_eq!(family.name().parse::<Family>().unwrap(), family);
        assert_eq!(serde_json::to_string(&family).unwrap(), format!("\"{family}\""));
    }
    let error = "mamba".parse::<Family>().unwrap_err();
    assert_eq!(error, ZooError::Family("mamba".into()));
    let config: DecoderConfig = serde_json::from_str(r#"{"family": "hopfield", "window": 8}"#).unwrap();
    assert_eq!((config.family, config.window, config.width), (Family::Hopfield, 8, 64));
    let unknown = serde_json::from_str::<DecoderConfig>(r#"{"famly": "gau"}"#).unwrap_err();
    assert!(unknown.to_string().contains("famly"), "{unknown}");
}
