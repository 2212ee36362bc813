//! Moments on disk: one safetensors file, written entry by entry and read likewise, so that one layer is in memory.
//!
//! An entry `NAME` is three tensors: `NAME.gram`, the lower triangle row by row (`F64`, `w (w + 1) / 2`), `NAME.sum`
//! (`F64`, `w`) and `NAME.tokens` (`U64`, 1). Nothing in it depends on what is done with it later.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use faer::Mat;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use tempfile::NamedTempFile;

use super::Moments;
use crate::SplitError;

/// The version of the form described above.
const FORMAT: &str = "1";
/// No header of a sane file is longer.
const LONGEST_HEADER: u64 = 100 << 20;

/// What a file of moments says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MomentsHeader {
    /// SHA-256 of the model that was calibrated, as the caller computes it.
    pub model_sha256: String,
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// What else chose the tokens, such as the length of the windows.
    pub settings: BTreeMap<String, String>,
}

/// Writes moments one by one. The file appears when [`MomentsWriter::finish`] returns, and not otherwise.
#[derive(Debug)]
pub struct MomentsWriter {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    /// What is still to come, last first.
    left: Vec<(String, usize)>,
}

impl MomentsWriter {
    /// Begins a file of `entries`, names and widths, in the order in which they will be added.
    ///
    /// # Errors
    /// Where the file system refuses or two entries have one name.
    pub fn create(
        path: impl AsRef<Path>,
        header: &MomentsHeader,
        entries: &[(String, usize)],
    ) -> Result<Self, SplitError> {
        let path = path.as_ref();
        let mut metadata = BTreeMap::from([
            ("format".to_owned(), format!("bsbr-splitlinear moments {FORMAT}")),
            ("model_sha256".to_owned(), header.model_sha256.clone()),
            ("text_sha256".to_owned(), header.text_sha256.clone()),
        ]);
        metadata.extend(header.settings.iter().map(|(key, value)| (format!("settings.{key}"), value.clone())));
        // Sorted keys: the same moments are the same bytes.
        let mut described = BTreeMap::from([("__metadata__".to_owned(), serde_json::json!(metadata))]);
        let mut offset = 0;
        for (name, width) in entries {
            for (tensor, kind, length) in
                [("gram", "F64", width * (width + 1) / 2), ("sum", "F64", *width), ("tokens", "U64", 1)]
            {
                let end = offset + 8 * length;
                let info = serde_json::json!({ "dtype": kind, "shape": [length], "data_offsets": [offset, end] });
                if described.insert(format!("{name}.{tensor}"), info).is_some() {
                    return Err(SplitError::SameName { module: name.clone() });
                }
                offset = end;
            }
        }
        let mut text = serde_json::to_vec(&described).map_err(|error| SplitError::MomentsFile {
            path: path.to_path_buf(),
            problem: format!("its header cannot be written: {error}"),
        })?;
        text.resize(text.len().next_multiple_of(8), b' ');

        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = NamedTempFile::new_in(directory).map_err(SplitError::io("create a file in", directory))?;
        let left = entries.iter().rev().cloned().collect();
        let mut writer = Self { path: path.to_path_buf(), file: BufWriter::new(file), left };
        writer.write(&(text.len() as u64).to_le_bytes())?;
        writer.write(&text)?;
        Ok(writer)
    }

    /// Writes the next entry.
    ///
    /// # Errors
    /// Where the file system refuses, or name and width are not those announced.
    pub fn add(&mut self, name: &str, moments: &Moments) -> Result<(), SplitError> {
        let next = self.left.pop().unwrap_or_default();
        if (next.0.as_str(), next.1) != (name, moments.width()) {
            let expected = format!("`{}`, {} wide, as the file was begun", next.0, next.1);
            return Err(SplitError::shape(name, expected, format!("`{name}`, {} wide", moments.width())));
        }
        let mut row_bytes = Vec::new();
        for row in 0..moments.width() {
            row_bytes.clear();
            row_bytes.extend((0..=row).flat_map(|column| moments.lower[(row, column)].to_le_bytes()));
            self.write(&row_bytes)?;
        }
        let sum: Vec<u8> = moments.sum.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.write(&sum)?;
        self.write(&moments.tokens.to_le_bytes())
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// Where the file system refuses or an entry is missing.
    pub fn finish(self) -> Result<(), SplitError> {
        if let Some((name, width)) = self.left.last() {
            return Err(SplitError::shape(name, format!("its moments, {width} wide, before the file ends"), "none"));
        }
        let path = self.path;
        let file = self.file.into_inner().map_err(|error| SplitError::io("write", &path)(error.into_error()))?;
        file.as_file().sync_all().map_err(SplitError::io("write", &path))?;
        file.persist(&path).map_err(|error| SplitError::io("write", &path)(error.error))?;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SplitError> {
        let Self { path, file, .. } = self;
        file.write_all(bytes).map_err(SplitError::io("write", path))
    }
}

/// A file of moments. Opening it reads the header alone.
#[derive(Debug, Clone)]
pub struct MomentsFile {
    path: PathBuf,
    header: MomentsHeader,
    /// Where the numbers of an entry begin in the file, and the width.
    entries: BTreeMap<String, (u64, usize)>,
}

impl MomentsFile {
    /// Reads what a file holds, strictly: nothing may be missing, left over or of another type.
    ///
    /// # Errors
    /// Where the file cannot be read or is not one that [`MomentsWriter`] wrote.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SplitError> {
        let path = path.as_ref();
        let bad = |problem: String| SplitError::MomentsFile { path: path.to_path_buf(), problem };
        let mut file = File::open(path).map_err(SplitError::io("open", path))?;
        let length = file.metadata().map_err(SplitError::io("read", path))?.len();
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(bad(format!("it has {length} bytes, too few for a header")));
        }
        file.read_exact(&mut prefix).map_err(SplitError::io("read", path))?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > LONGEST_HEADER.min(length - 8) {
            return Err(bad(format!("its header claims {header_length} bytes of {length}")));
        }
        let mut text = vec![0; header_length as usize];
        file.read_exact(&mut text).map_err(SplitError::io("read", path))?;
        let metadata: Metadata =
            serde_json::from_slice(&text).map_err(|error| bad(format!("its header cannot be read: {error}")))?;
        let start = 8 + header_length;
        if start + metadata.data_len() as u64 != length {
            let described = metadata.data_len();
            return Err(bad(format!("its header describes {described} bytes, {} follow", length - start)));
        }
        let header = read_header(metadata.metadata().as_ref()).map_err(bad)?;
        let entries = read_entries(&metadata, start).map_err(bad)?;
        Ok(Self { path: path.to_path_buf(), header, entries })
    }

    /// What it says of itself.
    pub fn header(&self) -> &MomentsHeader {
        &self.header
    }

    /// Names and widths of its entries, sorted by name.
    pub fn entries(&self) -> impl Iterator<Item = (&str, usize)> {
        self.entries.iter().map(|(name, &(_, width))| (name.as_str(), width))
    }

    /// The mean squares of the inputs of one entry, of `width` inputs; none where it has no tokens. Reads no more than these of the file.
    ///
    /// # Errors
    /// Where there is no such entry, the file cannot be read, or its numbers are not mean squares.
    pub fn mean_squares(&self, name: &str) -> Result<Option<Vec<f64>>, SplitError> {
        let bad = |problem: String| SplitError::MomentsFile { path: self.path.clone(), problem };
        let &(start, width) = self.entries.get(name).ok_or_else(|| bad(format!("it has no entry `{name}`")))?;
        let mut file = File::open(&self.path).map_err(SplitError::io("open", &self.path))?;
        let mut word = |at: usize| -> Result<[u8; 8], SplitError> {
            let mut bytes = [0; 8];
            let place = SeekFrom::Start(start + 8 * at as u64);
            file.seek(place).and_then(|_| file.read_exact(&mut bytes)).map_err(SplitError::io("read", &self.path))?;
            Ok(bytes)
        };
        let tokens = u64::from_le_bytes(word(width * (width + 1) / 2 + width)?);
        if tokens == 0 {
            return Ok(None);
        }
        // The diagonal of a lower triangle, row by row.
        let diagonal = (0..width).map(|row| Ok(f64::from_le_bytes(word(row * (row + 1) / 2 + row)?) / tokens as f64));
        let squares = diagonal.collect::<Result<Vec<f64>, SplitError>>()?;
        match squares.iter().position(|square| !square.is_finite() || *square < 0.0) {
            Some(at) => Err(bad(format!("entry `{name}`: the mean square of input {at} is {}", squares[at]))),
            None => Ok(Some(squares)),
        }
    }

    /// Reads one entry.
    ///
    /// # Errors
    /// Where there is no such entry, the file cannot be read, or its numbers are not moments.
    pub fn read(&self, name: &str) -> Result<Moments, SplitError> {
        let bad = |problem: String| SplitError::MomentsFile { path: self.path.clone(), problem };
        let &(start, width) = self.entries.get(name).ok_or_else(|| bad(format!("it has no entry `{name}`")))?;
        let mut file = File::open(&self.path).map_err(SplitError::io("open", &self.path))?;
        file.seek(SeekFrom::Start(start)).map_err(SplitError::io("read", &self.path))?;
        let triangle = width * (width + 1) / 2;
        let mut bytes = vec![0; 8 * (triangle + width + 1)];
        file.read_exact(&mut bytes).map_err(SplitError::io("read", &self.path))?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut words = words.iter();
        let mut moments = Moments::new(width);
        for row in 0..width {
            for (column, word) in (0..=row).zip(&mut words) {
                moments.lower[(row, column)] = f64::from_le_bytes(*word);
            }
        }
        moments.sum.iter_mut().zip(&mut words).for_each(|(sum, word)| *sum = f64::from_le_bytes(*word));
        moments.tokens = words.next().map_or(0, |word| u64::from_le_bytes(*word));
        check(&moments).map_err(|problem| bad(format!("entry `{name}`: {problem}")))?;
        Ok(moments)
    }
}

fn read_header(metadata: Option<&HashMap<String, String>>) -> Result<MomentsHeader, String> {
    let metadata = metadata.ok_or("its header has no metadata")?;
    let get = |key: &str| metadata.get(key).cloned().ok_or_else(|| format!("its metadata lacks `{key}`"));
    let (format, expected) = (get("format")?, format!("bsbr-splitlinear moments {FORMAT}"));
    if format != expected {
        return Err(format!("its format is `{format}`, expected `{expected}`"));
    }
    let mut settings = BTreeMap::new();
    let known = ["format", "model_sha256", "text_sha256"];
    let sorted: BTreeMap<_, _> = metadata.iter().collect();
    for (key, value) in sorted {
        match key.strip_prefix("settings.") {
            Some(setting) => {
                settings.insert(setting.to_owned(), value.clone());
            }
            None if known.contains(&key.as_str()) => {}
            None => return Err(format!("its metadata has the unknown key `{key}`")),
        }
    }
    Ok(MomentsHeader { model_sha256: get("model_sha256")?, text_sha256: get("text_sha256")?, settings })
}

fn read_entries(metadata: &Metadata, start: u64) -> Result<BTreeMap<String, (u64, usize)>, String> {
    let names = metadata.offset_keys();
    let mut entries = BTreeMap::new();
    for three in names.chunks(3) {
        let name = three.first().and_then(|name| name.strip_suffix(".gram"));
        let name = name.ok_or_else(|| format!("tensors {three:?} are not an entry"))?;
        let tensor = |suffix: &str, dtype: Dtype| {
            let full = format!("{name}.{suffix}");
            let info = metadata.info(&full).filter(|info| three.contains(&full) && info.dtype == dtype);
            info.ok_or_else(|| format!("entry `{name}` lacks `{full}` of type {dtype:?}"))
        };
        let (gram, sum) = (tensor("gram", Dtype::F64)?, tensor("sum", Dtype::F64)?);
        let tokens = tensor("tokens", Dtype::U64)?;
        let &[width] = &sum.shape[..] else { return Err(format!("`{name}.sum` is not a vector")) };
        let triangle = width.checked_add(1).and_then(|next| next.checked_mul(width)).map(|square| square / 2);
        let contiguous = gram.data_offsets.1 == sum.data_offsets.0 && sum.data_offsets.1 == tokens.data_offsets.0;
        if width == 0
            || triangle.map(|length| vec![length]) != Some(gram.shape.clone())
            || tokens.shape != [1]
            || !contiguous
        {
            return Err(format!("entry `{name}` has the shapes {:?}, {:?}, {:?}", gram.shape, sum.shape, tokens.shape));
        }
        entries.insert(name.to_owned(), (start + gram.data_offsets.0 as u64, width));
    }
    Ok(entries)
}

/// Whether these can be sums over tokens.
fn check(moments: &Moments) -> Result<(), String> {
    let finite = |matrix: &Mat<f64>| {
        (0..matrix.ncols()).all(|column| matrix.col_as_slice(column).iter().all(|value| value.is_finite()))
    };
    if !finite(&moments.lower) || moments.sum.iter().any(|value| !value.is_finite()) {
        return Err("a number is not finite".to_owned());
    }
    if (0..moments.width()).any(|index| moments.lower[(index, index)] < 0.0) {
        return Err("a sum of squares is negative".to_owned());
    }
    Ok(())
}
