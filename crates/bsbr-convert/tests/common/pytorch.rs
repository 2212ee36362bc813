//! PyTorch files written by hand, so that they can be strange or wrong.

use std::io::{Cursor, Seek, SeekFrom, Write};

use super::Tensor;

/// A tensor in a PyTorch file: a view of a storage.
#[derive(Debug, Clone)]
pub struct View {
    pub name: String,
    pub storage: usize,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub stride: Vec<usize>,
}

/// Bytes that tensors share; `kind` is the name of a class of `torch`.
#[derive(Debug, Clone)]
pub struct Storage {
    pub kind: &'static str,
    pub bytes: Vec<u8>,
    /// Zeros that follow the bytes, in the older format only: a hole in the file.
    pub zeros: usize,
}

impl Storage {
    fn numbers(&self) -> usize {
        let size = match self.kind {
            "LongStorage" | "DoubleStorage" => 8,
            "FloatStorage" | "IntStorage" => 4,
            "HalfStorage" | "BFloat16Storage" => 2,
            _ => 1,
        };
        (self.bytes.len() + self.zeros) / size
    }
}

/// A state dict, before it is written.
#[derive(Debug, Clone, Default)]
pub struct StateDict {
    pub views: Vec<View>,
    pub storages: Vec<Storage>,
    /// Further entries: a key and the opcodes of its value.
    pub others: Vec<(String, Vec<u8>)>,
}

impl StateDict {
    /// One storage for each tensor.
    pub fn of(tensors: &[Tensor]) -> Self {
        let mut dict = Self::default();
        for tensor in tensors {
            let kind = match tensor.dtype.as_str() {
                "F64" => "DoubleStorage",
                "F32" => "FloatStorage",
                "F16" => "HalfStorage",
                "BF16" => "BFloat16Storage",
                "I64" => "LongStorage",
                "U8" => "ByteStorage",
                "BOOL" => "BoolStorage",
                other => panic!("no storage for {other}"),
            };
            dict.views.push(View {
                name: tensor.name.clone(),
                storage: dict.storages.len(),
                offset: 0,
                shape: tensor.shape.clone(),
                stride: contiguous(&tensor.shape),
            });
            dict.storages.push(Storage { kind, bytes: tensor.bytes.clone(), zeros: 0 });
        }
        dict
    }

    pub fn view(&mut self, name: &str) -> &mut View {
        self.views.iter_mut().find(|view| view.name == name).expect("a view of this name")
    }

    /// The pickle that describes the tensors.
    pub fn pickle(&self) -> Vec<u8> {
        let mut out = b"\x80\x02}(".to_vec();
        for view in &self.views {
            text(&mut out, &view.name);
            self.tensor(&mut out, view);
        }
        for (key, value) in &self.others {
            text(&mut out, key);
            out.extend(value);
        }
        out.extend(b"u.");
        out
    }

    fn tensor(&self, out: &mut Vec<u8>, view: &View) {
        let storage = &self.storages[view.storage];
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(out, "storage");
        out.extend(format!("ctorch\n{}\n", storage.kind).bytes());
        text(out, &view.storage.to_string());
        text(out, "cpu");
        int(out, storage.numbers());
        out.extend(b"tQ");
        int(out, view.offset);
        tuple(out, &view.shape);
        tuple(out, &view.stride);
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }

    /// The format before PyTorch 1.6.
    pub fn legacy(&self) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        self.write_legacy(&mut out);
        out.into_inner()
    }

    /// The same, to a file that may have holes.
    pub fn write_legacy(&self, file: &mut (impl Write + Seek)) {
        let mut out = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}(".to_vec();
        text(&mut out, "little_endian");
        out.extend(b"\x88u.");
        out.extend(self.pickle());
        out.extend(b"\x80\x02](");
        (0..self.storages.len()).for_each(|key| text(&mut out, &key.to_string()));
        out.extend(b"e.");
        file.write_all(&out).expect("room");
        for storage in &self.storages {
            file.write_all(&(storage.numbers() as u64).to_le_bytes()).expect("room");
            file.write_all(&storage.bytes).expect("room");
            if let Some(last) = storage.zeros.checked_sub(1) {
                file.seek(SeekFrom::Current(last as i64)).expect("a hole");
                file.write_all(&[0]).expect("room");
            }
        }
    }

    /// A zip archive, as PyTorch writes it since 1.6.
    pub fn zip(&self) -> Vec<u8> {
        let mut entries = vec![("archive/data.pkl".to_owned(), self.pickle())];
        for (key, storage) in self.storages.iter().enumerate() {
            entries.push((format!("archive/data/{key}"), storage.bytes.clone()));
        }
        zip(&entries)
    }
}

/// An archive of entries without compression and without checksums.
pub fn zip(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in entries {
        let size = u32::try_from(content.len()).expect("small").to_le_bytes();
        // Version, flags, method, time, date and checksum; then both sizes, the length of the name and of nothing else.
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0, 0, 0, 0, 0];
        common.extend([size, size].concat());
        common.extend([u16::try_from(name.len()).expect("short").to_le_bytes(), [0; 2]].concat());
        let at = u32::try_from(out.len()).expect("small").to_le_bytes();
        out.extend([b"PK\x03\x04", common.as_slice(), name.as_bytes(), content].concat());
        directory.extend([b"PK\x01\x02\x14\0", common.as_slice(), &[0; 10], &at, name.as_bytes()].concat());
    }
    let (count, start) = (entries.len() as u16, out.len() as u32);
    let size = (directory.len() as u32).to_le_bytes();
    out.extend(directory);
    out.extend([b"PK\x05\x06\0\0\0\0", [count.to_le_bytes(); 2].as_flattened(), &size].concat());
    out.extend([start.to_le_bytes().as_slice(), &[0; 2]].concat());
    out
}

pub fn contiguous(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend(u32::try_from(text.len()).expect("short").to_le_bytes());
    out.extend(text.bytes());
}

fn int(out: &mut Vec<u8>, number: usize) {
    out.extend(b"\x8a\x08");
    out.extend((number as u64).to_le_bytes());
}

fn tuple(out: &mut Vec<u8>, numbers: &[usize]) {
    out.push(b'(');
    numbers.iter().for_each(|&number| int(out, number));
    out.push(b't');
}
