//! Numbers that are NaN or infinite.

use rayon::prelude::*;

use crate::{Format, decode};

/// Bytes that one thread looks at: enough that handing them out costs nothing.
const PIECE: usize = 1 << 20;
/// Bytes looked at before it is decided: that much the compiler turns into vector instructions.
const BLOCK: usize = 4096;

/// The first of the numbers in `bytes` that is NaN or infinite, counted from their start; `None` where all are finite.
///
/// Of integer codes it looks at the scales alone: with finite ones every number is finite, with any other no number of the block is.
/// (Codes that are floats can be no number by themselves, or too large beside a scale.) Large inputs are looked at by all threads; each
/// byte that matters is read once.
///
/// What is behind the last whole block of the format is not looked at.
pub fn first_not_finite(format: Format, bytes: &[u8]) -> Option<usize> {
    let size = format.block_bytes();
    let piece = PIECE / size * size;
    let blocks = |found: Option<usize>| found.map(|block| block * format.block());
    let found = |piece: &[u8]| match format {
        Format::Mxfp4 => floats(format, piece, |block| block[0] >= LEAST_LARGE_POWER),
        Format::F8E4M3 => floats(format, piece, |block| {
            let large = u16::from_le_bytes([block[2], block[3]]) & 0x7f80 >= LEAST_LARGE_SCALE;
            block[4..].iter().fold(large, |any, code| any | (code & 0x7f == 0x7f))
        }),
        _ => blocks(codes_or_numbers(format, piece)),
    };
    if bytes.len() <= piece {
        return found(bytes);
    }
    let (at, place) = bytes.par_chunks(piece).map(found).enumerate().find_first(|(_, found)| found.is_some())?;
    place.map(|place| at * (piece / size) * format.block() + place)
}

/// From this byte on numbers of [`Format::Mxfp4`] can be too large.
const LEAST_LARGE_POWER: u8 = 253;
/// From this exponent on, in its place, those of [`Format::F8E4M3`]: of scales from 2^119 on not all.
const LEAST_LARGE_SCALE: u16 = (127 + 119) << 7;

/// The first number that is not finite among those of the blocks that `suspect` tells.
fn floats(format: Format, bytes: &[u8], suspect: impl Fn(&[u8]) -> bool) -> Option<usize> {
    let mut numbers = vec![0.0; format.block()];
    let mut suspects = bytes.chunks_exact(format.block_bytes()).enumerate().filter(|(_, block)| suspect(block));
    suspects.find_map(|(at, block)| {
        decode(format, block, &mut numbers);
        numbers.iter().position(|number| !number.is_finite()).map(|place| at * format.block() + place)
    })
}

/// The first block of codes, or number, that is not finite.
fn codes_or_numbers(format: Format, piece: &[u8]) -> Option<usize> {
    let size = format.block_bytes();
    match format {
        Format::F32 => plain::<4>(piece, 0x7f80_0000),
        Format::F16 => plain::<2>(piece, 0x7c00),
        Format::Bf16 => plain::<2>(piece, 0x7f80),
        Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => scales::<1>(piece, size, [0]),
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => scales::<2>(piece, size, [0, 2]),
        Format::Q6K => scales::<1>(piece, size, [208]),
        // What floats are has its own way.
        Format::Mxfp4 | Format::F8E4M3 => None,
    }
}

/// Numbers of `SIZE` bytes whose bits `exponent` are all set are not finite.
fn plain<const SIZE: usize>(bytes: &[u8], exponent: u32) -> Option<usize> {
    let bits = |number: &[u8; SIZE]| number.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
    let full = |number: &[u8; SIZE]| bits(number) & exponent == exponent;
    let any = |block: &[u8]| block.as_chunks().0.iter().fold(false, |any, number| any | full(number));
    let start = bytes.chunks(BLOCK).position(any)? * BLOCK;
    let at = bytes[start..].as_chunks().0.iter().position(full)?;
    Some(start / SIZE + at)
}

/// The first block of `size` bytes with a scale, a half-precision number at one of these places, that is not finite.
fn scales<const COUNT: usize>(bytes: &[u8], size: usize, places: [usize; COUNT]) -> Option<usize> {
    bytes.chunks_exact(size).position(|block| places.iter().any(|at| block[at + 1] & 0x7c == 0x7c))
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn nan_and_infinity_are_found_in_every_plain_format_and_the_largest_numbers_are_not() {
        let cases: [(Format, Vec<u8>, Vec<u8>); 3] = [
            (Format::F32, f32::NAN.to_le_bytes().into(), f32::MAX.to_le_bytes().into()),
            (Format::F16, f16::NEG_INFINITY.to_le_bytes().into(), f16::MAX.to_le_bytes().into()),
            (Format::Bf16, bf16::INFINITY.to_le_bytes().into(), bf16::MIN.to_le_bytes().into()),
        ];
        for (format, bad, good) in cases {
            let count = 2 * PIECE / good.len() + 5001;
            assert_eq!(first_not_finite(format, &good.repeat(count)), None);
            // At either end of a block and of a piece, in between, and in a last one that is not full.
            for place in [0, 1, 1023, 1024, 2047, 2048, 4095, 4096, 5000, PIECE / good.len(), count - 1] {
                let mut bytes = good.repeat(count);
                bytes[place * bad.len()..(place + 1) * bad.len()].copy_from_slice(&bad);
                assert_eq!(first_not_finite(format, &bytes), Some(place), "{format}");
                // The first of several.
                let last = bytes.len() - bad.len();
                bytes[last..].copy_from_slice(&bad);
                assert_eq!(first_not_finite(format, &bytes), Some(place), "{format}");
            }
        }
    }

    #[test]
    fn a_block_of_codes_is_not_finite_exactly_where_its_first_number_is_not() {
        let floats = [Format::Mxfp4, Format::F8E4M3];
        for format in Format::ALL.into_iter().filter(|format| format.is_quantised() && !floats.contains(format)) {
            let (size, block) = (format.block_bytes(), format.block());
            // Every byte in turn has the exponent of a half-precision NaN; the rest are ones.
            for place in 0..size {
                for count in [3, PIECE / size + 3] {
                    let mut bytes = vec![1_u8; count * size];
                    bytes[(count - 2) * size + place] = 0x7c;
                    let mut numbers = vec![0.0; 2 * block];
                    decode(format, &bytes[(count - 2) * size..], &mut numbers);
                    let (bad, good) = numbers.split_at(block);
                    assert!(good.iter().all(|number| number.is_finite()), "{format} {place}");
                    let finite = bad.iter().filter(|number| number.is_finite()).count();
                    assert!([0, block].contains(&finite), "{format} {place}: {finite} of {block}");
                    let expected = (finite == 0).then_some((count - 2) * block);
                    assert_eq!(first_not_finite(format, &bytes), expected, "{format} {place}");
                }
            }
        }
    }

    #[test]
    fn of_codes_that_are_floats_each_number_counts() {
        for (format, good, bad) in [
            // Powers of two up to the largest that every code can be multiplied by, and those beyond.
            (
                Format::Mxfp4,
                vec![vec![252], vec![0]],
                vec![(vec![253], 31, 0x70), (vec![254], 16, 0xe1), (vec![255], 0, 0)],
            ),
            (
                Format::F8E4M3,
                vec![2.0_f32.powi(119).to_le_bytes().to_vec(), 0.0_f32.to_le_bytes().to_vec()],
                vec![
                    (1.0_f32.to_le_bytes().to_vec(), 77, 0x7f),
                    (1.0_f32.to_le_bytes().to_vec(), 127, 0xff),
                    (2.0_f32.powi(120).to_le_bytes().to_vec(), 5, 0xfe),
                    (f32::INFINITY.to_le_bytes().to_vec(), 0, 0),
                    (f32::NAN.to_le_bytes().to_vec(), 0, 0x30),
                ],
            ),
        ] {
            let size = format.block_bytes();
            let block = |scale: &[u8], code: u8| [scale, &vec![code; size - scale.len()]].concat();
            let largest = if format == Format::Mxfp4 { 0x7f } else { 0xfe };
            for scale in &good {
                assert_eq!(first_not_finite(format, &block(scale, largest).repeat(PIECE / size + 2)), None, "{format}");
            }
            for (scale, place, code) in bad {
                let mut blocks = block(&good[1], largest).repeat(PIECE / size + 3);
                let at = PIECE / size + 1;
                let mut own = block(&scale, 0);
                let byte = scale.len() + if format == Format::Mxfp4 { place % 16 } else { place };
                own[byte] = code;
                blocks[at * size..(at + 1) * size].copy_from_slice(&own);
                let expected = Some(at * format.block() + place);
                assert_eq!(first_not_finite(format, &blocks), expected, "{format} {scale:?}");
            }
        }
    }
}
