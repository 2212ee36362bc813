//! Which inputs a pivoted basis passes on.

use crate::SplitError;

/// The pivots of a tensor of whole numbers: of each of `rank` dimensions the input that it passes on.
///
/// # Errors
///
/// [`SplitError::Pivots`] if there are not `rank` of them, or one is no input or is there twice.
pub fn checked_pivots(tensor: &str, numbers: &[f32], rank: usize, inputs: usize) -> Result<Vec<u32>, SplitError> {
    let fail = |problem| Err(SplitError::Pivots { tensor: tensor.to_owned(), problem });
    if numbers.len() != rank {
        return fail(format!("has {} pivots, expected one for each of {rank} dimensions", numbers.len()));
    }
    let mut free = vec![true; inputs];
    let mut pivots = Vec::with_capacity(rank);
    for (at, &number) in numbers.iter().enumerate() {
        let pivot = number as usize;
        match free.get_mut(pivot).filter(|_| number >= 0.0 && number.fract() == 0.0) {
            None => return fail(format!("has the pivot {number} at {at}, expected a number below {inputs}")),
            Some(false) => return fail(format!("has the pivot {number} at {at} a second time")),
            Some(free) => *free = false,
        }
        pivots.push(pivot as u32);
    }
    Ok(pivots)
}

/// The inputs below `count` that are no pivots, rising.
pub(crate) fn others(count: usize, pivots: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut free = vec![true; count];
    for pivot in pivots {
        if let Some(free) = free.get_mut(pivot) {
            *free = false;
        }
    }
    free.iter().enumerate().filter(|(_, free)| **free).map(|(at, _)| at).collect()
}
