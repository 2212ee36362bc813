//! Converting a sharded checkpoint that is large beside what may be in memory: how much memory, and how long beside
//! copying its files.
#![allow(clippy::print_stderr)] // What was measured, for whoever runs the large form.
#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::convert_plain;
use serde_json::{Value, json};

/// One at a time: memory is that of the whole process, and time that of the whole machine.
static ALONE: Mutex<()> = Mutex::new(());

/// Sizes of a decoder like Llama's.
struct Sizes {
    vocabulary: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
}

impl Sizes {
    fn config(&self) -> Value {
        json!({"model_type": "llama", "vocab_size": self.vocabulary, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden / 128, "num_key_value_heads": self.hidden / 512})
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let &Self { vocabulary, hidden, intermediate, layers } = self;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden])];
        for layer in 0..layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
            };
            add("input_layernorm", &[hidden]);
            add("self_attn.q_proj", &[hidden, hidden]);
            add("self_attn.k_proj", &[hidden / 4, hidden]);
            add("self_attn.v_proj", &[hidden / 4, hidden]);
            add("self_attn.o_proj", &[hidden, hidden]);
            add("post_attention_layernorm", &[hidden]);
            add("mlp.gate_proj", &[intermediate, hidden]);
            add("mlp.up_proj", &[intermediate, hidden]);
            add("mlp.down_proj", &[hidden, intermediate]);
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        tensors.push(("lm_head.weight".to_owned(), vec![vocabulary, hidden]));
        tensors
    }
}

fn bytes(shape: &[usize]) -> usize {
    2 * shape.iter().product::<usize>()
}

/// Bytes of bf16 numbers between -2 and 2 that do not repeat for long: a page is nowhere like another.
struct Numbers(u64);

impl Numbers {
    fn fill(&mut self, buffer: &mut [u8]) {
        for eight in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            // Without the upper exponent bit a number is below 2 and finite.
            let numbers = (self.0 & 0xbfff_bfff_bfff_bfff).to_le_bytes();
            eight.copy_from_slice(&numbers[..eight.len()]);
        }
    }
}

/// Writes a checkpoint of `shards` files and returns their paths and the bytes of the largest tensor.
fn write_checkpoint(dir: &Path, sizes: &Sizes, shards: usize) -> (Vec<PathBuf>, usize) {
    fs::create_dir(dir).expect("room");
    fs::write(dir.join("config.json"), sizes.config().to_string()).expect("room");
    let tensors = sizes.tensors();
    let total: usize = tensors.iter().map(|(_, shape)| bytes(shape)).sum();
    let (mut files, mut map, mut numbers) = (Vec::new(), serde_json::Map::new(), Numbers(1));
    let mut rest = &tensors[..];
    for shard in 1..=shards {
        let mut end = 0;
        let mut size = 0;
        while end < rest.len() && (shard == shards || size < total / shards) {
            size += bytes(&rest[end].1);
            end += 1;
        }
        let name = format!("model-{shard:05}-of-{shards:05}.safetensors");
        write_shard(&dir.join(&name), &rest[..end], &mut numbers);
        map.extend(rest[..end].iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        files.push(dir.join(name));
        rest = &rest[end..];
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("room");
    (files, tensors.iter().map(|(_, shape)| bytes(shape)).max().expect("tensors"))
}

fn write_shard(path: &Path, tensors: &[(String, Vec<usize>)], numbers: &mut Numbers) {
    let mut start = 0;
    let entries = tensors.iter().map(|(name, shape)| {
        let end = start + bytes(shape);
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        start = end;
        format!("{}:{entry}", json!(name))
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let mut file = File::create_new(path).expect("room");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("room");
    file.write_all(header.as_bytes()).expect("room");
    let mut buffer = vec![0; 1 << 20];
    while start > 0 {
        let piece = buffer.len().min(start);
        numbers.fill(&mut buffer[..piece]);
        file.write_all(&buffer[..piece]).expect("room");
        start -= piece;
    }
    file.sync_all().expect("a disk");
}

/// Most memory this process had resident since `forget_peak`, in bytes.
fn peak() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    1024 * line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok()).expect("a number")
}

fn forget_peak() {
    fs::write("/proc/self/clear_refs", "5").expect("Linux lets a process reset its own peak");
}

/// Copies files through a buffer and to the disk, as a conversion writes.
fn copy(files: &[PathBuf], to: &Path) {
    fs::create_dir(to).expect("room");
    let mut buffer = vec![0; 1 << 20];
    for file in files {
        let mut from = File::open(file).expect("a file");
        let mut into = File::create_new(to.join(file.file_name().expect("a name"))).expect("room");
        loop {
            match from.read(&mut buffer).expect("a file") {
                0 => break,
                count => into.write_all(&buffer[..count]).expect("room"),
            }
        }
        into.sync_all().expect("a disk");
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

const MIB: usize = 1 << 20;

/// The largest tensor with a fifth to spare, and `more` for everything else.
fn limit(largest: usize, more: usize) -> usize {
    largest + largest / 5 + more
}

#[test]
fn a_sharded_checkpoint_is_converted_in_the_memory_of_its_largest_tensor() {
    let _alone = ALONE.lock();
    let temp = tempfile::tempdir().expect("a temporary directory");
    let (dir, output) = (temp.path().join("model"), temp.path().join("converted"));
    let sizes = Sizes { vocabulary: 4000, hidden: 2048, intermediate: 4096, layers: 2 };
    let (_, largest) = write_checkpoint(&dir, &sizes, 4);
    forget_peak();
    let report = convert_plain(&dir, &output).expect("sound");
    let (peak, limit) = (peak(), limit(largest, 64 * MIB));
    assert!(report.source_bytes as usize > 2 * limit, "the model must be larger than the limit to show anything");
    assert!(peak < limit, "peak {peak}, limit {limit}");
}

/// Takes six gigabytes of disk and half a minute. The times mean something only where two cores have nothing else to do:
///
/// `cargo test --release -p bsbr-convert --test large -- --ignored --nocapture`
#[test]
#[ignore = "writes six gigabytes and measures time: run it alone"]
fn two_gigabytes_are_converted_in_the_memory_of_a_tensor_and_the_time_of_two_copies() {
    let _alone = ALONE.lock();
    let temp = tempfile::tempdir().expect("a temporary directory");
    let (dir, output, copied) = (temp.path().join("model"), temp.path().join("converted"), temp.path().join("copied"));
    let sizes = Sizes { vocabulary: 16_000, hidden: 4096, intermediate: 14_336, layers: 4 };
    let (files, largest) = write_checkpoint(&dir, &sizes, 5);
    let limit = limit(largest, 200 * MIB);
    let (mut copies, mut conversions) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        copies.push(timed(|| copy(&files, &copied)));
        fs::remove_dir_all(&copied).expect("a directory");
        forget_peak();
        conversions.push(timed(|| {
            convert_plain(&dir, &output).expect("sound");
        }));
        let peak = peak();
        assert!(peak < limit, "peak {peak}, limit {limit}");
        eprintln!("peak {} MiB, largest tensor {} MiB", peak / MIB, largest / MIB);
        fs::remove_dir_all(&output).expect("a directory");
    }
    eprintln!("copies {copies:.2?}, conversions {conversions:.2?}");
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let (copy, conversion) = (median(copies), median(conversions));
    assert!(conversion <= 2 * copy, "a conversion takes {conversion:.2?}, a copy {copy:.2?}");
}
