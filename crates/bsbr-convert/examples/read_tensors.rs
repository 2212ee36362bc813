//! Reads a checkpoint tensor by tensor: plans from headers what each becomes, then brings one weight at a time into memory.
//!
//! cargo run --release --example read_tensors -- DIRECTORY_OR_GGUF
#![allow(clippy::print_stdout)]

use std::path::PathBuf;

use bsbr_convert::{ConvertError, ModelSource};
use bsbr_model::weight_specs;

fn main() -> Result<(), ConvertError> {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama");
    let path = std::env::args_os().nth(1).map_or_else(|| PathBuf::from(fixture), PathBuf::from);
    let source = ModelSource::open(&path)?;
    println!("{}", source.description());
    // What is in the files, by the names there.
    for tensor in source.tensors().iter().take(3) {
        println!("{} {} {:?} in {}", tensor.name, tensor.format(), tensor.shape, tensor.file);
    }
    // What the decoder needs, by its own names: each is put together as its rule says.
    for spec in weight_specs(source.model_config()) {
        let numbers = source.read_weight(&spec)?;
        let square: f64 = numbers.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        println!("{} {:?}: root mean square {:.4}", spec.name, spec.shape, (square / numbers.len() as f64).sqrt());
    }
    Ok(())
}
