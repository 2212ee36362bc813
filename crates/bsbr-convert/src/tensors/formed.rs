//! Tensors that are read as other numbers than they stand in their file: f64, and codes whose scales are a tensor of their own.
//!
//! A file with such tensors presents itself as one with what they stand for: f64 as the nearest f32, codes under their own name as f32
//! numbers that can be had as rows of a [`Format`], and no scales. What stands there is at hand for whoever keeps it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use bsbr_weights::{Format, TWICE_E2M1, e4m3, half_e8m0};
use half::{bf16, f16};
use safetensors::Dtype;

use super::any::{TensorBytes, TensorFile};
use super::copy::{Block, Pattern};
use super::header::{Header, TensorEntry};
use super::map::{Mapping, SharedPart};
use super::recipe::TensorRef;
use crate::ConvertError;
use crate::gguf::{GgufKind, Order, Stored};
use crate::scaled::{Form, Scaled};

/// Numbers of a block of MXFP4.
const MX: usize = 32;

/// Where the scales of codes are.
#[derive(Debug, Clone)]
struct Scales {
    dtype: Dtype,
    owner: Arc<Mapping>,
    range: Range<usize>,
}

impl Scales {
    fn bytes(&self) -> &[u8] {
        &self.owner[self.range.clone()]
    }

    /// Scale `at`.
    fn get(&self, at: usize) -> f32 {
        let bytes = self.bytes();
        match self.dtype {
            Dtype::F32 => f32::from_le_bytes([0, 1, 2, 3].map(|n| bytes[4 * at + n])),
            Dtype::BF16 => bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            _ => f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
        }
    }
}

/// One of those tensors.
#[derive(Debug, Clone)]
pub(crate) struct Formed {
    /// As it stands in the file.
    entry: TensorEntry,
    /// None of f64.
    scaled: Option<(Scaled, Scales)>,
}

/// A file that presents some of its tensors as what they stand for.
#[derive(Debug)]
pub(crate) struct FormedFile {
    file: Box<TensorFile>,
    header: Header,
    formed: HashMap<String, Formed>,
    stored: HashMap<String, Stored>,
    /// Scales as they stand there.
    left_out: HashMap<String, TensorEntry>,
}

impl FormedFile {
    /// `file` as it is.
    pub(crate) fn as_it_is(&self) -> &TensorFile {
        &self.file
    }

    /// The tensors that it presents.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Whether a tensor is none of those that stand there as they are presented.
    pub(crate) fn is_formed(&self, tensor: &TensorEntry) -> bool {
        self.formed.contains_key(&tensor.name)
    }

    /// The format in which the rows of a tensor of codes can be had.
    pub(crate) fn stored(&self, tensor: &TensorEntry) -> Option<&Stored> {
        self.stored.get(&tensor.name)
    }

    /// What stands in the file under this name, where that is not presented.
    pub(crate) fn standing(&self, name: &str) -> Option<TensorRef<'_>> {
        let entry = self.formed.get(name).map(|formed| &formed.entry).or_else(|| self.left_out.get(name))?;
        Some(TensorRef { file: &self.file, entry })
    }

    pub(crate) fn shared(&self, tensor: &TensorEntry) -> Result<Option<SharedPart>, ConvertError> {
        if self.is_formed(tensor) { Ok(None) } else { self.file.shared(tensor) }
    }

    pub(crate) fn read(&self, tensor: &TensorEntry) -> Result<TensorBytes, ConvertError> {
        match self.formed.get(&tensor.name) {
            None => self.file.read(tensor),
            Some(formed) => {
                let codes = Box::new(self.file.read(&formed.entry)?);
                Ok(TensorBytes::Formed(FormedBytes { formed: formed.clone(), codes }))
            }
        }
    }
}

/// The tensors of `header` as what they stand for, without the scales of `all`.
pub(crate) fn presented(header: &Header, all: &[Scaled]) -> Header {
    let codes: HashMap<&str, &Scaled> = all.iter().map(|scaled| (scaled.codes.as_str(), scaled)).collect();
    let scales: HashSet<&str> = all.iter().map(|scaled| scaled.scales.as_str()).collect();
    let mut header = header.clone();
    header.tensors.retain(|entry| !scales.contains(entry.name.as_str()));
    for entry in &mut header.tensors {
        if let Some(scaled) = codes.get(entry.name.as_str()) {
            (entry.dtype, entry.shape) = (Dtype::F32, scaled.shape.clone());
        } else if entry.dtype == Dtype::F64 {
            entry.dtype = Dtype::F32;
        }
    }
    header
}

/// The files of a checkpoint with what is in them.
///
/// # Errors
///
/// [`ConvertError::Io`] where scales cannot be mapped.
pub(crate) fn present(files: Vec<TensorFile>, all: &[Scaled]) -> Result<Vec<TensorFile>, ConvertError> {
    let mut scales: HashMap<&str, Scales> = HashMap::new();
    let names: HashSet<&str> = all.iter().map(|scaled| scaled.scales.as_str()).collect();
    for file in &files {
        for entry in file.header().tensors.iter().filter(|entry| names.contains(entry.name.as_str())) {
            if let Some((owner, range)) = file.shared(entry)? {
                let range = range.start as usize..range.end as usize;
                scales.insert(&entry.name, Scales { dtype: entry.dtype, owner, range });
            }
        }
    }
    let scales: HashMap<String, Scales> = scales.into_iter().map(|(name, scales)| (name.to_owned(), scales)).collect();
    let codes: HashMap<&str, &Scaled> = all.iter().map(|scaled| (scaled.codes.as_str(), scaled)).collect();
    let of = |file: TensorFile| {
        let mut formed = HashMap::new();
        for entry in &file.header().tensors {
            let scaled = codes.get(entry.name.as_str());
            let scaled = scaled.and_then(|&scaled| Some((scaled.clone(), scales.get(&scaled.scales)?.clone())));
            if scaled.is_some() || entry.dtype == Dtype::F64 {
                formed.insert(entry.name.clone(), Formed { entry: entry.clone(), scaled });
            }
        }
        let left_out = file.header().tensors.iter().filter(|entry| names.contains(entry.name.as_str()));
        let left_out: HashMap<String, TensorEntry> =
            left_out.map(|entry| (entry.name.clone(), entry.clone())).collect();
        if formed.is_empty() && left_out.is_empty() {
            return file;
        }
        let header = presented(file.header(), all);
        let stored = formed.iter().filter_map(|(name, formed)| {
            let (scaled, _) = formed.scaled.as_ref()?;
            let kind = GgufKind::of_format(scaled.format()?)?;
            let (width, rows) = (scaled.width(), scaled.rows());
            Some((name.clone(), Stored { kind, order: Order::Same, width, rows, bytes: 0..0 }))
        });
        let stored = stored.collect();
        TensorFile::Formed(FormedFile { file: Box::new(file), header, formed, stored, left_out })
    };
    Ok(files.into_iter().map(of).collect())
}

/// The bytes of such a tensor.
#[derive(Debug)]
pub(crate) struct FormedBytes {
    formed: Formed,
    codes: Box<TensorBytes>,
}

impl FormedBytes {
    /// As they stand in the file; scales are not among them.
    pub(crate) fn standing(&self) -> &[u8] {
        &self.codes
    }

    /// Number `at`.
    fn number(&self, at: usize) -> f32 {
        let codes: &[u8] = &self.codes;
        let Some((scaled, scales)) = &self.formed.scaled else {
            return f64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n| codes[8 * at + n])) as f32;
        };
        match scaled.form {
            Form::Mxfp4 => {
                let code = usize::from(codes[at / 2] >> (4 * (at % 2)) & 15);
                f32::from(TWICE_E2M1[code]) * half_e8m0(scales.bytes()[at / MX])
            }
            Form::F8 { .. } => {
                let (row, column) = (at / scaled.width(), at % scaled.width());
                e4m3(codes[at]) * scales.get(scaled.scale_of(row, column))
            }
        }
    }

    /// Does for one block what `fill_block` does for plain bytes.
    pub(crate) fn fill(&self, out: &mut [u8], range: &Range<usize>, block: &Block) {
        let mut put = |position: usize, number: f32| {
            let to = (position - range.start) * 4;
            out[to..to + 4].copy_from_slice(&number.to_le_bytes());
        };
        match block.copy {
            Pattern::Run { len } => {
                for at in block.to.max(range.start)..(block.to + len).min(range.end) {
                    put(at, self.number(block.from + at - block.to));
                }
            }
            Pattern::Transpose { rows, cols, from_stride, to_stride } => {
                let row_at = |position: usize| position.saturating_sub(block.to).div_ceil(to_stride).min(rows);
                for row in row_at(range.start)..row_at(range.end) {
                    for col in 0..cols {
                        put(block.to + row * to_stride + col, self.number(block.from + row + col * from_stride));
                    }
                }
            }
        }
    }

    /// Appends whole rows in the format of the codes.
    pub(crate) fn rows(&self, rows: Range<usize>, out: &mut Vec<u8>) {
        let Some((scaled, scales)) = &self.formed.scaled else { return };
        let (codes, width): (&[u8], usize) = (&self.codes, scaled.width());
        for row in rows {
            match scaled.form {
                Form::Mxfp4 => {
                    let first = row * width / MX;
                    let blocks = codes[row * width / 2..(row + 1) * width / 2].chunks_exact(MX / 2);
                    for (scale, codes) in scales.bytes()[first..].iter().zip(blocks) {
                        let code = |n: usize| codes[n / 2] >> (4 * (n % 2)) & 15;
                        out.push(*scale);
                        out.extend((0..MX / 2).map(|n| code(n) | code(n + MX / 2) << 4));
                    }
                }
                Form::F8 { .. } => {
                    let block = Format::F8E4M3.block();
                    for (at, codes) in codes[row * width..(row + 1) * width].chunks_exact(block).enumerate() {
                        out.extend_from_slice(&scales.get(scaled.scale_of(row, at * block)).to_le_bytes());
                        out.extend_from_slice(codes);
                    }
                }
            }
        }
    }
}
