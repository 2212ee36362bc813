//! Weights go into a decoder each once, or the loading stops and says where.

mod common;

use std::{collections::HashMap, error::Error};

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_model::{Decoder, ModelConfig, ModelError, WeightSource, WeightSpec, weight_specs};
use common::{devices, families, gpt2_like, weight};

type Read = Result<Vec<f32>, Box<dyn Error + Send + Sync>>;

/// A source made of a function.
struct Source<F>(F);

impl<F: FnMut(&WeightSpec) -> Read> WeightSource for Source<F> {
    fn read(&mut self, spec: &WeightSpec) -> Read {
        (self.0)(spec)
    }
}

#[test]
fn every_weight_is_read_once() {
    let attention = Some(BlockAttentionConfig { selector: Selector::Meta, ..Default::default() });
    for decoder in families() {
        for attention in [None, attention.clone()] {
            let config = ModelConfig { attention, ..ModelConfig::original(decoder.clone()) };
            let mut read: HashMap<String, usize> = HashMap::new();
            let mut source = Source(|spec: &WeightSpec| {
                *read.entry(spec.name.clone()).or_default() += 1;
                Ok(weight(spec))
            });
            Decoder::load(config.clone(), &mut source, &devices()[0]).unwrap();
            let expected: HashMap<String, usize> =
                weight_specs(&config).into_iter().map(|spec| (spec.name, 1)).collect();
            assert_eq!(read, expected);
        }
    }
}

#[test]
fn a_weight_with_too_few_numbers_is_named() {
    let mut source = Source(|spec: &WeightSpec| {
        let mut numbers = weight(spec);
        if spec.name == "layers.1.mlp.down.weight" {
            numbers.pop();
        }
        Ok(numbers)
    });
    let error = Decoder::load(ModelConfig::original(gpt2_like()), &mut source, &devices()[0]).unwrap_err();
    let ModelError::WeightShape { tensor, expected, found } = error else { panic!("{error}") };
    assert_eq!((tensor.as_str(), expected, found), ("layers.1.mlp.down.weight", vec![24, 40], vec![24 * 40 - 1]));
}

#[test]
fn a_weight_that_cannot_be_read_is_named_with_the_reason() {
    let mut source =
        Source(|spec: &WeightSpec| if spec.name == "final_norm.bias" { Err("gone".into()) } else { Ok(weight(spec)) });
    let error = Decoder::load(ModelConfig::original(gpt2_like()), &mut source, &devices()[0]).unwrap_err();
    assert_eq!(error.to_string(), "tensor `final_norm.bias` cannot be read");
    assert_eq!(error.source().unwrap().to_string(), "gone");
}

#[test]
fn an_impossible_configuration_reads_nothing() {
    let mut source = Source(|_: &WeightSpec| panic!("a weight is read"));
    let config = ModelConfig { format_version: 7, ..ModelConfig::original(gpt2_like()) };
    assert!(Decoder::load(config, &mut source, &devices()[0]).is_err());
}
