use std::collections::HashSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::header::GgufHeader;
use super::kind::GgufKind;
use super::names::ARCHITECTURES;
use super::problem::GgufProblem;
use super::stored::{Order, Stored, StoredBytes};
use crate::rules::{Prefix, Rule, expand};
use crate::tensors::{Block, Mapping, Pattern};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(fixture(name)).unwrap()
}

#[test]
fn every_format_gives_the_numbers_of_the_gguf_package_bit_for_bit() {
    let (file, expected) = (bytes("formats.gguf"), bytes("formats.safetensors"));
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let header = GgufHeader::parse(&file).unwrap();
    let mut seen = Vec::new();
    for tensor in &header.tensors {
        assert_eq!(tensor.shape, [2, 256], "{}", tensor.name);
        let data = &file[tensor.bytes.clone()];
        let expected = expected.tensor(&tensor.name).unwrap();
        let numbers = expected.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
        for (at, expected) in numbers.enumerate() {
            let found = tensor.kind.number(data, at).to_bits();
            assert_eq!(found, expected, "{} at {at}: {}", tensor.name, f32::from_bits(found));
        }
        seen.push(tensor.kind.name);
    }
    let read = GgufKind::all_read();
    let mut read: Vec<&str> = read.split(", ").collect();
    seen.sort_unstable();
    read.sort_unstable();
    assert_eq!(seen, read);
}

#[test]
fn a_range_that_cuts_blocks_gives_the_same_numbers_as_the_whole() {
    let file = bytes("formats.gguf");
    for tensor in GgufHeader::parse(&file).unwrap().tensors {
        let (data, size) = (&file[tensor.bytes.clone()], tensor.kind.dtype().bitsize() / 8);
        let mut whole = Vec::new();
        tensor.kind.decode(data, 0..512, &mut whole);
        assert_eq!(whole.len(), 512 * size);
        for range in [0..1, 5..37, 31..33, 250..262, 511..512, 64..64, 100..480] {
            let mut part = Vec::new();
            tensor.kind.decode(data, range.clone(), &mut part);
            assert_eq!(part, whole[range.start * size..range.end * size], "{} {range:?}", tensor.name);
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    for name in ["formats.gguf", "tokenizer_sentencepiece.gguf"] {
        let file = bytes(name);
        let header = GgufHeader::parse(&file).unwrap();
        // The last bytes may be padding.
        let end = header.tensors.iter().map(|tensor| tensor.bytes.end).max().unwrap_or(file.len() - 31);
        for len in 0..end {
            if let Ok(cut) = GgufHeader::parse(&file[..len]) {
                panic!("{name}: {len} of {} bytes: {} tensors", file.len(), cut.tensors.len());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn changed_bytes_never_panic_and_what_is_accepted_lies_inside_the_file(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        late in any::<bool>(),
    ) {
        let mut file = bytes("formats.gguf");
        let data = GgufHeader::parse(&file).unwrap().tensors.iter().map(|tensor| tensor.bytes.start).min().unwrap();
        for (at, byte) in changes {
            // Half of the cases in the list of tensors, which a change in the middle of a text would hide.
            let from = if late { 60 } else { 0 };
            let at = from + at.index(data - from);
            file[at] = byte;
        }
        if let Ok(header) = GgufHeader::parse(&file) {
            for tensor in header.tensors {
                prop_assert!(tensor.bytes.start >= 24 && tensor.bytes.end <= file.len());
                let numbers: usize = tensor.shape.iter().product();
                prop_assert_eq!(tensor.kind.bytes_of(numbers), tensor.bytes.len());
                if tensor.kind.is_read() {
                    let mut out = Vec::new();
                    tensor.kind.decode(&file[tensor.bytes.clone()], 0..numbers, &mut out);
                    prop_assert_eq!(out.len() * 8, numbers * tensor.kind.dtype().bitsize());
                }
            }
        }
    }
}

#[test]
fn every_name_leads_to_a_rule_and_none_is_there_twice() {
    for known in ARCHITECTURES {
        let rules = crate::ARCHITECTURES.iter().find(|rules| rules.model_types.contains(&known.model_type)).unwrap();
        let mut seen = HashSet::new();
        for (ours, theirs, _) in known.tensors.iter().copied().flatten() {
            assert!(seen.insert(*ours) && seen.insert(*theirs), "{}: {ours}", known.name);
            let (name, _) = known.translate(&format!("{}.weight", ours.replace("{i}", "3"))).unwrap();
            let reads = rules.rules.iter().any(|rule| {
                let source = match *rule {
                    Rule::Map { source, .. } => source,
                    Rule::Tie { head, .. } => head,
                    Rule::Ignore { .. } | Rule::IgnoreIn { .. } | Rule::IgnorePart { .. } => return false,
                };
                rules.prefixes.iter().any(|prefix| expand(source, Prefix::of_body(prefix), (3, 0), 0) == name)
            });
            assert!(reads, "{}: no rule reads {name}", known.name);
        }
    }
}

/// A header by hand.
struct Writer(Vec<u8>);

impl Writer {
    fn new(version: u32, tensors: u64, pairs: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(tensors).u64(pairs)
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(self, text: &str) -> Self {
        let mut writer = self.u64(text.len() as u64);
        writer.0.extend(text.as_bytes());
        writer
    }

    fn tensor(self, name: &str, axes: &[u64], kind: u32, offset: u64) -> Self {
        let writer = self.text(name).u32(axes.len() as u32);
        axes.iter().fold(writer, |writer, &axis| writer.u64(axis)).u32(kind).u64(offset)
    }

    /// The file with `data` bytes after the header.
    fn with(mut self, data: usize) -> Result<GgufHeader, GgufProblem> {
        self.0.resize(self.0.len().next_multiple_of(32) + data, 0);
        GgufHeader::parse(&self.0)
    }

    fn refused(self, data: usize) -> GgufProblem {
        self.with(data).unwrap_err()
    }
}

#[test]
fn a_hostile_header_gets_an_error_of_its_own() {
    use GgufProblem as P;
    let new = |tensors, pairs| Writer::new(3, tensors, pairs);
    let huge = u64::MAX;
    assert!(matches!(GgufHeader::parse(b"GGUF").unwrap_err(), P::TooShort { len: 4 }));
    assert!(matches!(GgufHeader::parse(&[0; 64]).unwrap_err(), P::Magic { .. }));
    assert!(matches!(Writer::new(1, 0, 0).refused(0), P::Version { found: 1 }));
    assert!(matches!(Writer::new(3_u32.swap_bytes(), 0, 0).refused(0), P::Version { .. }));
    assert!(matches!(new(0, huge).refused(0), P::Cut { .. }));
    assert!(matches!(new(huge, 0).refused(0), P::Cut { .. } | P::Axes { .. }));
    assert!(matches!(new(0, 1).u64(huge).refused(64), P::Cut { len: u64::MAX, .. }));
    assert!(matches!(new(0, 1).text("k").u32(8).u64(1 << 40).refused(64), P::Cut { .. }));
    assert!(matches!(new(0, 1).text("k").u32(9).u32(8).u64(huge).refused(64), P::Cut { .. }));
    assert!(matches!(new(0, 1).text("k").u32(9).u32(10).u64(huge / 4).refused(64), P::Cut { .. }));
    assert!(matches!(new(0, 1).text("k").u32(9).u32(9).u64(1).refused(64), P::ValueType { found: 9, .. }));
    assert!(matches!(new(0, 1).text("k").u32(13).u64(1).refused(64), P::ValueType { found: 13, .. }));
    let mut text = new(0, 1).u64(2);
    text.0.extend([0xff, 0xfe]);
    assert!(matches!(text.refused(64), P::Text { .. }));
    assert!(matches!(new(0, 2).text("k").u32(4).u32(1).text("k").u32(4).u32(1).refused(0), P::DuplicateKey { .. }));
    let alignment = |value| new(0, 1).text("general.alignment").u32(4).u32(value);
    assert!(matches!(alignment(0).refused(0), P::Alignment { .. }));
    assert!(matches!(alignment(48).refused(0), P::Alignment { .. }));

    let one = |axes: &[u64], kind, offset| new(1, 0).tensor("t", axes, kind, offset);
    assert!(one(&[8], 0, 0).with(32).is_ok());
    assert!(matches!(one(&[], 0, 0).refused(32), P::Axes { found: 0, .. }));
    assert!(matches!(one(&[1; 5], 0, 0).refused(32), P::Axes { found: 5, .. }));
    assert!(matches!(one(&[8], 4, 0).refused(32), P::UnknownKind { found: 4, .. }));
    assert!(matches!(one(&[huge, huge], 0, 0).refused(32), P::TooLarge { .. }));
    assert!(matches!(one(&[1 << 62], 0, 0).refused(32), P::TooLarge { .. }));
    assert!(matches!(one(&[8], 0, huge - 31).refused(32), P::TooLarge { .. }));
    assert!(matches!(one(&[33], 8, 0).refused(64), P::Row { row: 33, block: 32, .. }));
    assert!(matches!(one(&[8], 0, 8).refused(64), P::Misaligned { offset: 8, .. }));
    assert!(matches!(one(&[8], 0, 64).refused(96), P::Gap { .. }));
    assert!(matches!(one(&[9], 0, 0).refused(32), P::Truncated { .. }));
    assert!(matches!(one(&[8], 0, 0).refused(64), P::Trailing { .. }));
    let two = |name, offset| new(2, 0).tensor("t", &[9], 0, 0).tensor(name, &[8], 0, offset);
    assert!(two("u", 64).with(96).is_ok());
    assert!(matches!(two("t", 64).refused(96), P::Duplicate { .. }));
    assert!(matches!(two("u", 32).refused(64), P::Overlap { .. }));
}

#[test]
fn every_order_is_undone_whatever_a_rule_does_with_the_tensor() {
    // A tensor of 8 rows and 4 columns whose numbers are their positions, written in the order of the file.
    let (rows, width) = (8, 4);
    let position = |row: usize, col: usize| (row * width + col) as f32;
    let file_order = |order| -> Vec<f32> {
        let all = (0..rows).flat_map(|row| (0..width).map(move |col| (row, col)));
        match order {
            Order::Same => all.map(|(r, c)| position(r, c)).collect(),
            Order::OneMore => all.map(|(r, c)| position(r, c) + 1.0).collect(),
            Order::Transposed => {
                (0..width).flat_map(|c| (0..rows).map(move |r| (r, c))).map(|(r, c)| position(r, c)).collect()
            }
            // Two heads of four rows: 0 2 1 3 | 4 6 5 7.
            Order::RotaryPairs { .. } => {
                [0, 2, 1, 3, 4, 6, 5, 7].into_iter().flat_map(|r| (0..width).map(move |c| position(r, c))).collect()
            }
        }
    };
    for order in [Order::Same, Order::OneMore, Order::Transposed, Order::RotaryPairs { head_dim: 4 }] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let data: Vec<u8> = file_order(order).iter().flat_map(|x| x.to_le_bytes()).collect();
        std::io::Write::write_all(&mut file, &data).unwrap();
        let mapping = Mapping::new(file.as_file(), 0..data.len() as u64).unwrap();
        let stored = Stored { kind: GgufKind::of(0).unwrap(), order, width, rows, bytes: 0..data.len() as u64 };
        let source = StoredBytes { stored, mapping };
        let numbers = |out: &[u8]| -> Vec<f32> {
            out.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };

        // As it is, in bands of three rows.
        let copy = Pattern::Run { len: 32 };
        let mut found = Vec::new();
        for range in [0..12, 12..24, 24..32] {
            let mut out = vec![0; 4 * range.len()];
            source.fill(&mut out, &range, &Block { source: 0, from: 0, to: 0, copy }, 4);
            found.extend(numbers(&out));
        }
        assert_eq!(found, (0..32).map(|n| n as f32).collect::<Vec<_>>(), "{order:?}");

        // Columns 1 to 3, transposed to three rows, the first band of one row.
        let copy = Pattern::Transpose { rows: 3, cols: 8, from_stride: 4, to_stride: 8 };
        let mut found = Vec::new();
        for range in [0..8, 8..24] {
            let mut out = vec![0; 4 * range.len()];
            source.fill(&mut out, &range, &Block { source: 0, from: 1, to: 0, copy }, 4);
            found.extend(numbers(&out));
        }
        let expected: Vec<f32> = (1..4).flat_map(|col| (0..8).map(move |row| position(row, col))).collect();
        assert_eq!(found, expected, "{order:?}");
    }
}
