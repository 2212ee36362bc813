//! How much an error of each input of a weight counts.

use std::collections::HashMap;

use bsbr_model::DecoderConfig;
use bsbr_splitlinear::{MomentsFile, SplitError};

/// The mean squares of what each linear weight of the blocks is multiplied with, by the name of the weight: what
/// [`crate::ConvertOptions::importance`] takes. Weights that no token reached, as those of idle experts, are left out.
///
/// # Errors
///
/// Where the moments lack an input of the decoder, or have it in another width.
pub fn importance(decoder: &DecoderConfig, moments: &MomentsFile) -> Result<HashMap<String, Vec<f32>>, SplitError> {
    let mut found: HashMap<String, Option<Vec<f32>>> = HashMap::new();
    let mut importance = HashMap::new();
    for place in decoder.linear_places() {
        let name = place.input_name();
        if !found.contains_key(&name) {
            let squares = moments.mean_squares(&name)?;
            if let (Some(squares), Some([width, _])) = (&squares, decoder.linear_shape(place))
                && squares.len() != width
            {
                let (expected, found) = (format!("inputs {width} wide"), squares.len().to_string());
                return Err(SplitError::Shape { module: name, expected, found });
            }
            found
                .insert(name.clone(), squares.map(|squares| squares.into_iter().map(|square| square as f32).collect()));
        }
        if let Some(Some(squares)) = found.get(&name) {
            importance.insert(format!("{place}.weight"), squares.clone());
        }
    }
    Ok(importance)
}
