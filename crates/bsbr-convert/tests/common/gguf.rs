//! GGUF files taken apart and put together again, so that they can be changed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bsbr_weights::Format;
use tempfile::TempDir;

/// A tensor of a GGUF file.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    pub name: String,
    /// As in the file: the fastest axis first.
    pub axes: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
}

/// A sound GGUF file in parts.
#[derive(Debug, Clone)]
pub struct GgufParts {
    /// Type and bytes of each value.
    pub metadata: BTreeMap<String, (u32, Vec<u8>)>,
    pub tensors: Vec<GgufTensor>,
}

pub fn gguf_fixture(name: &str) -> PathBuf {
    super::fixtures().join("gguf").join(name)
}

impl GgufParts {
    pub fn read(name: &str) -> Self {
        let bytes = fs::read(gguf_fixture(name)).expect("a fixture");
        let mut at = 8;
        let tensors = u64_at(&bytes, &mut at);
        let mut metadata = BTreeMap::new();
        for _ in 0..u64_at(&bytes, &mut at) {
            let key = text_at(&bytes, &mut at);
            let kind = u32_at(&bytes, &mut at);
            let start = at;
            skip(&bytes, &mut at, kind);
            metadata.insert(key, (kind, bytes[start..at].to_vec()));
        }
        let mut found = Vec::new();
        for _ in 0..tensors {
            let name = text_at(&bytes, &mut at);
            let axes = (0..u32_at(&bytes, &mut at)).map(|_| u64_at(&bytes, &mut at)).collect();
            let kind = u32_at(&bytes, &mut at);
            found.push((GgufTensor { name, axes, kind, data: Vec::new() }, u64_at(&bytes, &mut at) as usize));
        }
        let start = at.next_multiple_of(32);
        let ends: Vec<usize> = found.iter().skip(1).map(|(_, offset)| *offset).chain([bytes.len() - start]).collect();
        let tensors = found.into_iter().zip(ends).map(|((tensor, offset), end)| GgufTensor {
            // With the padding behind it.
            data: bytes[start + offset..start + end].to_vec(),
            ..tensor
        });
        Self { metadata, tensors: tensors.collect() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        let text = |out: &mut Vec<u8>, text: &str| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        };
        for (key, (kind, value)) in &self.metadata {
            text(&mut out, key);
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut offset = 0_u64;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.axes.len() as u32).to_le_bytes());
            tensor.axes.iter().for_each(|axis| out.extend(axis.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += tensor.data.len().next_multiple_of(32) as u64;
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.data);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out
    }

    /// Writes the file into a directory of its own.
    pub fn write(&self) -> (TempDir, PathBuf) {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let path = temp.path().join("model.gguf");
        fs::write(&path, self.bytes()).expect("room");
        (temp, path)
    }

    pub fn set_u32(&mut self, key: &str, value: u32) {
        self.metadata.insert(key.to_owned(), (4, value.to_le_bytes().to_vec()));
    }

    pub fn set_f32(&mut self, key: &str, value: f32) {
        self.metadata.insert(key.to_owned(), (6, value.to_le_bytes().to_vec()));
    }

    pub fn set_bool(&mut self, key: &str, value: bool) {
        self.metadata.insert(key.to_owned(), (7, vec![value.into()]));
    }

    pub fn set_text(&mut self, key: &str, text: &str) {
        let mut value = (text.len() as u64).to_le_bytes().to_vec();
        value.extend(text.as_bytes());
        self.metadata.insert(key.to_owned(), (8, value));
    }

    pub fn set_texts(&mut self, key: &str, texts: &[&str]) {
        let mut value = 8_u32.to_le_bytes().to_vec();
        value.extend((texts.len() as u64).to_le_bytes());
        for text in texts {
            value.extend((text.len() as u64).to_le_bytes());
            value.extend(text.as_bytes());
        }
        self.metadata.insert(key.to_owned(), (9, value));
    }

    pub fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of the fixture")
    }

    pub fn add_f32(&mut self, name: &str, numbers: &[f32]) {
        let data = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.tensors.push(GgufTensor { name: name.into(), axes: vec![numbers.len() as u64], kind: 0, data });
    }
}

/// Copies a fixture into a directory of its own, under its name.
pub fn gguf_checkout(name: &str) -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let path = temp.path().join(Path::new(name).file_name().expect("a name"));
    fs::copy(gguf_fixture(name), &path).expect("a fixture");
    (temp, path)
}

fn take<const N: usize>(bytes: &[u8], at: &mut usize) -> [u8; N] {
    *at += N;
    bytes[*at - N..*at].try_into().expect("N bytes")
}

fn u32_at(bytes: &[u8], at: &mut usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

fn u64_at(bytes: &[u8], at: &mut usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}

fn text_at(bytes: &[u8], at: &mut usize) -> String {
    let len = u64_at(bytes, at) as usize;
    *at += len;
    String::from_utf8(bytes[*at - len..*at].to_vec()).expect("UTF-8")
}

fn skip(bytes: &[u8], at: &mut usize, kind: u32) {
    match kind {
        8 => drop(text_at(bytes, at)),
        9 => {
            let (kind, count) = (u32_at(bytes, at), u64_at(bytes, at));
            (0..count).for_each(|_| skip(bytes, at, kind));
        }
        0 | 1 | 7 => *at += 1,
        2 | 3 => *at += 2,
        4..=6 => *at += 4,
        _ => *at += 8,
    }
}

/// Kinds of codes by their number in a file.
pub const CODES: [(u32, Format); 8] = [
    (2, Format::Q4_0),
    (3, Format::Q4_1),
    (6, Format::Q5_0),
    (7, Format::Q5_1),
    (8, Format::Q8_0),
    (12, Format::Q4K),
    (13, Format::Q5K),
    (14, Format::Q6K),
];

/// Codes without a meaning, with scales around 0.01.
pub fn sound_codes(format: Format, numbers: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let mut bytes: Vec<u8> = (0..numbers / format.block() * format.block_bytes()).map(|_| byte()).collect();
    let places: &[usize] = match format {
        Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => &[0],
        Format::Q6K => &[208],
        _ => &[0, 2],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for &at in places {
            // Half precision: the sign stays, the exponent is that of numbers from 2^-8 to 2^-7.
            block[at + 1] = block[at + 1] & 0x83 | 0x1c;
        }
    }
    bytes
}
