//! What calibration remembers, in memory and on disk.

use std::collections::BTreeMap;
use std::path::Path;

use bsbr_splitlinear::{Moments, MomentsFile, MomentsHeader, MomentsWriter, PairedMoments, SplitError};
use proptest::prelude::*;

/// Numbers between -1 and 1, the same for the same seed.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn of(rows: &[f32], width: usize) -> Moments {
    let mut moments = Moments::new(width);
    moments.add_rows("m", rows).unwrap();
    moments
}

#[test]
fn moments_are_sums_of_products_in_double_precision() {
    let (width, tokens) = (7, 3000);
    let rows = numbers(width * tokens, 1);
    let moments = of(&rows, width);
    assert_eq!(moments.tokens(), tokens as u64);
    let gram = moments.second_moments();
    for i in 0..width {
        let sum: f64 = rows.iter().skip(i).step_by(width).map(|&value| f64::from(value)).sum();
        assert!((moments.sum()[i] - sum).abs() < 1e-9);
        for j in 0..width {
            let expected: f64 = rows.chunks(width).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
            // Sums of at most 1024 products in f32, of which each is at most 1.
            assert!((gram[(i, j)] - expected).abs() < 3e-6 * tokens as f64, "{} is not {expected}", gram[(i, j)]);
            assert_eq!(gram[(i, j)], gram[(j, i)]);
        }
    }
}

#[test]
fn parts_of_a_text_add_up() {
    let rows = numbers(5 * 400, 2);
    let (first, second) = rows.split_at(5 * 150);
    let mut parts = of(first, 5);
    parts.merge("m", &of(second, 5)).unwrap();
    let mut continued = of(first, 5);
    continued.add_rows("m", second).unwrap();
    assert_eq!(parts, continued);
    let whole = of(&rows, 5).second_moments();
    assert!((whole - parts.second_moments()).norm_max() < 1e-4);
    assert!(parts.merge("h.3.c_fc", &Moments::new(4)).unwrap_err().to_string().contains("h.3.c_fc"));
}

#[test]
fn large_inputs_do_not_leave_the_range() {
    let moments = of(&[3e38, 1.0, -3e38, 2.0], 2);
    let gram = moments.second_moments();
    let large = f64::from(3e38_f32);
    assert_eq!(gram[(0, 0)], 2.0 * large * large);
    assert_eq!(gram[(1, 0)], large - 2.0 * large);
    let mut paired = PairedMoments::new(2);
    paired.add_rows("m", &[3e38, 1.0], &[3e38, 2.0]).unwrap();
    assert_eq!(paired.cross()[(0, 0)], large * large);
}

#[test]
fn numbers_that_are_none_name_the_module_and_change_nothing() {
    let mut moments = of(&[1.0, 2.0], 2);
    let before = moments.clone();
    for bad in [f32::NAN, f32::INFINITY] {
        let error = moments.add_rows("transformer.h.4.mlp.c_fc", &[1.0, 2.0, 3.0, bad]).unwrap_err();
        assert!(matches!(error, SplitError::NotFinite { index: 1, .. }));
        assert!(error.to_string().contains("transformer.h.4.mlp.c_fc"), "{error}");
    }
    assert!(moments.add_rows("m", &[1.0; 3]).is_err());
    assert_eq!(moments, before);
    let mut paired = PairedMoments::new(2);
    assert!(paired.add_rows("m", &[1.0, 2.0], &[f32::NAN, 1.0]).is_err());
    assert!(paired.add_rows("m", &[1.0, 2.0], &[1.0, 2.0, 3.0, 4.0]).is_err());
    assert_eq!(paired, PairedMoments::new(2));
    assert!(Moments::new(0).add_rows("m", &[1.0]).is_err());
}

#[test]
fn paired_moments_cross_the_compressed_with_the_original() {
    let (original, compressed) = (numbers(3 * 50, 3), numbers(3 * 50, 4));
    let mut paired = PairedMoments::new(3);
    paired.add_rows("m", &original, &compressed).unwrap();
    assert_eq!(paired.original(), &of(&original, 3));
    assert_eq!(paired.compressed(), &of(&compressed, 3));
    let expected: f64 =
        original.chunks(3).zip(compressed.chunks(3)).map(|(x, xh)| f64::from(xh[2]) * f64::from(x[0])).sum();
    assert!((paired.cross()[(2, 0)] - expected).abs() < 1e-4);
    let mut twice = paired.clone();
    twice.merge("m", &paired).unwrap();
    assert_eq!(twice.cross()[(2, 0)], 2.0 * paired.cross()[(2, 0)]);
}

fn header() -> MomentsHeader {
    MomentsHeader {
        model_sha256: "a1".into(),
        text_sha256: "b2".into(),
        settings: BTreeMap::from([("length".to_owned(), "1024".to_owned())]),
    }
}

fn saved(path: &Path) -> [(String, Moments); 2] {
    let entries =
        [("fit/h.0.c_fc".to_owned(), of(&numbers(40, 5), 4)), ("fit/h.1.c_fc".to_owned(), of(&numbers(30, 6), 3))];
    let sizes: Vec<_> = entries.iter().map(|(name, moments)| (name.clone(), moments.width())).collect();
    let mut writer = MomentsWriter::create(path, &header(), &sizes).unwrap();
    entries.iter().for_each(|(name, moments)| writer.add(name, moments).unwrap());
    writer.finish().unwrap();
    entries
}

#[test]
fn a_saved_file_holds_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("moments.safetensors");
    let entries = saved(&path);
    let file = MomentsFile::open(&path).unwrap();
    assert_eq!(file.header(), &header());
    assert_eq!(file.entries().collect::<Vec<_>>(), [("fit/h.0.c_fc", 4), ("fit/h.1.c_fc", 3)]);
    for (name, moments) in &entries {
        assert_eq!(file.read(name).unwrap(), *moments);
    }
    assert!(file.read("fit/h.2.c_fc").unwrap_err().to_string().contains("fit/h.2.c_fc"));
    // Any reader of the format reads it.
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("fit/h.0.c_fc.gram").unwrap().shape(), [10]);
    assert_eq!(tensors.tensor("fit/h.1.c_fc.tokens").unwrap().data(), 10_u64.to_le_bytes());
    // The same moments are the same bytes.
    let again = folder.path().join("again.safetensors");
    saved(&again);
    assert_eq!(std::fs::read(again).unwrap(), bytes);
}

#[test]
fn an_unfinished_file_is_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("moments.safetensors");
    let sizes = [("a".to_owned(), 2), ("b".to_owned(), 2)];
    let mut writer = MomentsWriter::create(&path, &header(), &sizes).unwrap();
    writer.add("a", &Moments::new(2)).unwrap();
    assert!(writer.finish().unwrap_err().to_string().contains("`b`"));
    let mut writer = MomentsWriter::create(&path, &header(), &sizes).unwrap();
    assert!(writer.add("b", &Moments::new(2)).is_err());
    drop(writer);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert!(MomentsWriter::create(&path, &header(), &[sizes[0].clone(), sizes[0].clone()]).is_err());
    assert!(MomentsWriter::create(folder.path().join("none/m"), &header(), &sizes).is_err());
}

/// Opens and reads everything; says what was refused.
fn refusal(path: &Path, bytes: &[u8]) -> Option<String> {
    std::fs::write(path, bytes).unwrap();
    let read_all = || -> Result<(), SplitError> {
        let file = MomentsFile::open(path)?;
        let names: Vec<String> = file.entries().map(|(name, _)| name.to_owned()).collect();
        names.iter().try_for_each(|name| file.read(name).map(drop))
    };
    read_all().err().map(|error| error.to_string())
}

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn damaged_and_foreign_files_are_refused_with_their_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("moments.safetensors");
    saved(&path);
    let good = std::fs::read(&path).unwrap();
    assert_eq!(refusal(&path, &good), None);
    let header_length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(good[8..8 + header_length].to_vec()).unwrap();
    let data = &good[8 + header_length..];
    let changed = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        file_of(&text.replace(from, to), data)
    };
    let mut cases = vec![
        (Vec::new(), "too few"),
        (good[..good.len() - 1].to_vec(), "follow"),
        ([&good[..], &[0]].concat(), "follow"),
        ([&u64::MAX.to_le_bytes()[..], &good[8..]].concat(), "claims"),
        (file_of("{}", &[]), "no metadata"),
        (file_of("[", &[]), "header"),
        (changed("moments 1", "moments 2"), "format"),
        (changed("b2\"", "b2\",\"more\":\"x\""), "unknown key `more`"),
        (changed("\"text_sha256\"", "\"settings.text\""), "text_sha256"),
        (changed("c_fc.sum", "c_fc.mean"), "fit/h.0.c_fc.sum"),
        (changed("h.0.c_fc.tokens", "h.0.c_fc.token"), "tokens"),
        (changed("\"F64\"", "\"I64\""), "F64"),
        (changed("\"shape\":[10]", "\"shape\":[2,5]"), "shapes"),
    ];
    let mut bad = good.clone();
    bad[8 + header_length..16 + header_length].copy_from_slice(&f64::NAN.to_le_bytes());
    cases.push((bad.clone(), "not finite"));
    bad[8 + header_length..16 + header_length].copy_from_slice(&(-1.0_f64).to_le_bytes());
    cases.push((bad, "negative"));
    for (bytes, word) in cases {
        let message = refusal(&path, &bytes).unwrap_or_else(|| panic!("accepted, expected {word}"));
        assert!(message.contains(word) && message.contains("moments.safetensors"), "{message} lacks {word}");
    }
    let message = MomentsFile::open(folder.path().join("nothing")).unwrap_err().to_string();
    assert!(message.contains("nothing"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_flipped_byte_is_a_panic(place in 0_usize..4000, value in any::<u8>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("moments.safetensors");
        saved(&path);
        let mut bytes = std::fs::read(&path).unwrap();
        let place = place % bytes.len();
        bytes[place] = value;
        let _ = refusal(&path, &bytes);
    }
}
