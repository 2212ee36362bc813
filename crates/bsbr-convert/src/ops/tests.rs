use proptest::prelude::*;

use super::*;
use crate::tensors::fill;

/// Moves u32 numbers, in bands of a few rows as converting does.
fn run(blocks: &[Block], sources: &[Vec<u32>], shape: &[usize], budget: usize) -> Vec<u32> {
    let bytes: Vec<Vec<u8>> = sources.iter().map(|s| s.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let bytes: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
    let mut out = Vec::new();
    for band in crate::tensors::bands(shape, 4, budget) {
        let mut part = vec![0; band.len() * 4];
        fill(&mut part, band, blocks, &bytes, 4);
        out.extend(part.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    }
    out
}

fn size(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// What the ops mean, written down number by number and without any of the code above.
fn naive(ops: &[SizedOp], mut tensors: Vec<(Vec<usize>, Vec<u32>)>) -> Vec<(Vec<usize>, Vec<u32>)> {
    for op in ops {
        tensors = match op {
            SizedOp::Transpose => tensors
                .iter()
                .map(|(shape, x)| {
                    let (a, b) = (shape[shape.len() - 2], shape[shape.len() - 1]);
                    let at = |n: usize| x[n / (a * b) * (a * b) + n % a * b + n % (a * b) / a];
                    ([&shape[..shape.len() - 2], &[b, a]].concat(), (0..x.len()).map(at).collect())
                })
                .collect(),
            SizedOp::Unstack { count } => {
                let (shape, x) = &tensors[0];
                let size = x.len() / count;
                (0..*count).map(|n| (shape[1..].to_vec(), x[n * size..(n + 1) * size].to_vec())).collect()
            }
            SizedOp::Split { .. } if tensors.len() > 1 => {
                tensors.into_iter().flat_map(|tensor| naive(std::slice::from_ref(op), vec![tensor])).collect()
            }
            SizedOp::Split { groups, parts } => {
                let (shape, x) = &tensors[0];
                let width = size(&shape[1..]);
                let mut outs = vec![Vec::new(); parts.len()];
                let mut row = 0;
                for _ in 0..*groups {
                    for (out, part) in outs.iter_mut().zip(parts) {
                        out.extend_from_slice(&x[row * width..(row + part) * width]);
                        row += part;
                    }
                }
                let shape_of = |part: usize| [&[groups * part], &shape[1..]].concat();
                parts.iter().map(|part| shape_of(*part)).zip(outs).collect()
            }
            SizedOp::RopePermute { heads, head_dim, rotary } => {
                let (shape, x) = &tensors[0];
                let width = size(&shape[1..]);
                let mut out = Vec::new();
                for head in 0..*heads {
                    for row in 0..*head_dim {
                        let from = match row {
                            row if row >= *rotary => row,
                            row if row < rotary / 2 => 2 * row,
                            row => 2 * (row - rotary / 2) + 1,
                        };
                        let row = head * head_dim + from;
                        out.extend_from_slice(&x[row * width..(row + 1) * width]);
                    }
                }
                vec![(shape.clone(), out)]
            }
            SizedOp::SwapHalves { heads, head_dim } => {
                let (shape, x) = &tensors[0];
                let (width, half) = (size(&shape[1..]), head_dim / 2);
                let from = |row: usize| row / head_dim * head_dim + (row % head_dim + half) % head_dim;
                let rows = (0..heads * head_dim).flat_map(|row| &x[from(row) * width..(from(row) + 1) * width]);
                vec![(shape.clone(), rows.copied().collect())]
            }
            SizedOp::Each(lists) => {
                let each = lists.iter().zip(tensors).flat_map(|(ops, tensor)| naive(ops, vec![tensor]));
                each.collect()
            }
            SizedOp::Stack { count } => {
                let shape = [&[*count], &tensors[0].0[..]].concat();
                vec![(shape, tensors.into_iter().flat_map(|(_, x)| x).collect())]
            }
        };
    }
    tensors
}

fn check(ops: &[SizedOp], sources: &[Vec<usize>], budget: usize) -> Result<(), TestCaseError> {
    let mut next = 0..;
    let values: Vec<Vec<u32>> = sources.iter().map(|shape| next.by_ref().take(size(shape)).collect()).collect();
    let expected = naive(ops, sources.iter().cloned().zip(values.iter().cloned()).collect());
    let blocks = blocks(ops, sources).expect("the ops fit the shapes");
    let mut targets = Vec::new();
    for (blocks, (shape, values_expected)) in blocks.iter().zip(&expected) {
        let out = run(blocks, &values, shape, budget);
        prop_assert_eq!(&out, values_expected);
        targets.push(out);
    }
    // Shapes backwards.
    let shapes: Vec<_> = expected.iter().map(|(shape, _)| shape.clone()).collect();
    prop_assert_eq!(source_shapes(ops, &shapes).expect("the same ops"), sources.to_vec());
    // Numbers backwards.
    for (n, (shape, values)) in sources.iter().zip(&values).enumerate() {
        let back: Vec<Block> = blocks
            .iter()
            .enumerate()
            .flat_map(|(target, blocks)| blocks.iter().filter(|b| b.source == n).map(move |b| b.inverse(target)))
            .collect();
        prop_assert_eq!(&run(&back, &targets, shape, budget), values);
    }
    Ok(())
}

fn split() -> impl Strategy<Value = (usize, Vec<usize>)> {
    (1..5_usize, prop::collection::vec(1..7_usize, 1..5))
}

proptest! {
    #[test]
    fn split_moves_the_numbers_it_says_and_back((groups, parts) in split(), width in 1..9_usize, budget in 1..200_usize) {
        let rows = groups * parts.iter().sum::<usize>();
        let op = SizedOp::Split { groups, parts };
        check(std::slice::from_ref(&op), &[vec![rows, width]], budget)?;
        check(&[op], &[vec![rows]], budget)?;
    }

    #[test]
    fn transpose_and_split_move_the_numbers_they_say_and_back(
        (groups, parts) in split(), width in 1..70_usize, budget in 1..2000_usize
    ) {
        let rows = groups * parts.iter().sum::<usize>();
        check(&[SizedOp::Transpose], &[vec![width, rows]], budget)?;
        check(&[SizedOp::Transpose, SizedOp::Split { groups, parts }], &[vec![width, rows]], budget)?;
    }

    #[test]
    fn rope_permute_moves_the_numbers_it_says_and_back(
        heads in 1..5_usize, half in 0..5_usize, rest in 0..4_usize, width in 1..9_usize, transposed: bool
    ) {
        let head_dim = 2 * half + rest;
        prop_assume!(head_dim > 0);
        let op = SizedOp::RopePermute { heads, head_dim, rotary: 2 * half };
        check(std::slice::from_ref(&op), &[vec![heads * head_dim]], 16)?;
        if transposed {
            check(&[SizedOp::Transpose, op], &[vec![width, heads * head_dim]], 64)?;
        } else {
            check(&[op], &[vec![heads * head_dim, width]], 64)?;
        }
    }

    #[test]
    fn experts_come_out_of_a_stack_and_go_back(
        count in 1..6_usize, (groups, parts) in split(), width in 1..40_usize, budget in 1..900_usize
    ) {
        let rows = groups * parts.iter().sum::<usize>();
        let (unstack, split) = (SizedOp::Unstack { count }, SizedOp::Split { groups, parts });
        check(std::slice::from_ref(&unstack), &[vec![count, rows, width]], budget)?;
        check(std::slice::from_ref(&unstack), &[vec![count, rows]], budget)?;
        check(&[unstack.clone(), split.clone()], &[vec![count, rows, width]], budget)?;
        check(&[SizedOp::Transpose, unstack.clone()], &[vec![count, width, rows]], budget)?;
        check(&[SizedOp::Transpose, unstack, split], &[vec![count, width, rows]], budget)?;
    }

    #[test]
    fn swapped_halves_move_and_what_is_done_to_each_part_is(
        heads in 1..5_usize, half in 1..5_usize, groups in 1..3_usize, width in 1..9_usize, budget in 1..200_usize
    ) {
        let (head_dim, rows) = (2 * half, heads * 2 * half);
        let swap = SizedOp::SwapHalves { heads, head_dim };
        check(std::slice::from_ref(&swap), &[vec![rows, width]], budget)?;
        check(std::slice::from_ref(&swap), &[vec![rows]], budget)?;
        // Queries and keys permuted, values between them not.
        let permute = SizedOp::RopePermute { heads: groups * heads, head_dim, rotary: head_dim };
        let split = SizedOp::Split { groups, parts: vec![rows, 3, rows] };
        let each = SizedOp::Each(vec![vec![permute.clone()], vec![], vec![permute]]);
        check(&[split, each], &[vec![groups * (2 * rows + 3), width]], budget)?;
    }

    #[test]
    fn stack_moves_the_numbers_it_says_and_back(count in 1..6_usize, rows in 1..5_usize, width in 1..5_usize) {
        check(&[SizedOp::Stack { count }], &vec![vec![width]; count], 16)?;
        check(&[SizedOp::Stack { count }], &vec![vec![rows, width]; count], 16)?;
        check(&[SizedOp::Transpose, SizedOp::Stack { count }], &vec![vec![rows, width]; count], 16)?;
    }
}

#[test]
fn ops_that_do_not_fit_are_refused_in_both_directions() {
    let split = SizedOp::Split { groups: 1, parts: vec![2, 2] };
    assert!(blocks(std::slice::from_ref(&split), &[vec![5, 3]]).is_err());
    assert!(source_shapes(std::slice::from_ref(&split), &[vec![2, 3], vec![3, 3]]).is_err());
    assert!(source_shapes(&[split], &[vec![2, 3]]).is_err());
    assert!(blocks(&[SizedOp::Transpose], &[vec![4]]).is_err());
    let odd = SizedOp::RopePermute { heads: 1, head_dim: 4, rotary: 3 };
    assert!(blocks(&[odd], &[vec![4]]).is_err());
    assert!(blocks(&[SizedOp::Stack { count: 3 }], &[vec![4], vec![4]]).is_err());
    assert!(blocks(&[SizedOp::Unstack { count: 3 }], &[vec![4, 2]]).is_err());
    assert!(source_shapes(&[SizedOp::Unstack { count: 2 }], &[vec![4], vec![5]]).is_err());
    assert!(source_shapes(&[SizedOp::Unstack { count: 3 }], &[vec![4], vec![4]]).is_err());
    assert!(blocks(&[SizedOp::SwapHalves { heads: 2, head_dim: 3 }], &[vec![6]]).is_err());
    assert!(blocks(&[SizedOp::Each(vec![vec![], vec![]])], &[vec![6]]).is_err());
    assert!(source_shapes(&[SizedOp::Each(vec![vec![]])], &[vec![6], vec![6]]).is_err());
}
