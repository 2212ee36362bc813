//! The weights BSBR adds: the meta projections at their start values.
//!
//! `meta_query = (query + key) / 2` and `meta_key = (key + value) / 2`, biases alike. With fewer KV heads than heads
//! the rows of keys and values are repeated first, so that head `h` reads KV head `h / (heads / kv_heads)`. Computed
//! and stored in f32 whatever the dtype of the sources, and never part of an export.

use bsbr_model::{DecoderConfig, EXTRA_PREFIX, LayerKeys};

use crate::ConvertError;
use crate::tensors::{OpenRecipe, Recipe};

/// Name of an added projection and of the two projections it starts from.
const RULES: [(&str, [&str; 2]); 2] = [("meta_query", ["query", "key"]), ("meta_key", ["key", "value"])];

/// The weights that the added weight `name` is the mean of. Keys stand for values that are made of them, and those of the layer
/// whose keys are read for those of a layer without.
pub(crate) fn sources(name: &str, decoder: &DecoderConfig) -> Option<[String; 2]> {
    let path = name.strip_prefix(EXTRA_PREFIX)?;
    RULES.iter().find_map(|(part, sources)| {
        let (layer, kind) = path.split_once(&format!(".{part}."))?;
        let number: usize = layer.strip_prefix("layers.")?.parse().ok()?;
        Some(sources.map(|source| {
            let of = if source == "query" { number } else { decoder.key_owner(number).unwrap_or(number) };
            let also = source == "value" && decoder.shape(of).keys == LayerKeys::AlsoValues;
            format!("layers.{of}.attention.{}.{kind}", if also { "key" } else { source })
        }))
    })
}

/// Calls `each` with the rows of one of the `heads` query heads after the other, `[head_dim, width]`.
pub(crate) fn for_each_head(
    recipes: &[Recipe<'_>; 2],
    (heads, head_dim): (usize, usize),
    mut each: impl FnMut(&[f32]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let (first, second) = (recipes[0].open()?, recipes[1].open()?);
    for head in 0..heads {
        let read = |recipe: &OpenRecipe<'_>| read_head(recipe, head, (heads, head_dim));
        let [mut rows, other] = [read(&first)?, read(&second)?];
        for (a, b) in rows.iter_mut().zip(other) {
            *a = (*a + b) / 2.0;
        }
        each(&rows)?;
    }
    Ok(())
}

/// The rows of query head `head`, or of the KV head it reads.
fn read_head(
    recipe: &OpenRecipe<'_>,
    head: usize,
    (heads, head_dim): (usize, usize),
) -> Result<Vec<f32>, ConvertError> {
    let shape = recipe.shape();
    let width: usize = shape[1..].iter().product();
    let own = head * (shape[0] / head_dim) / heads;
    let size = head_dim * width;
    recipe.read(own * size..(own + 1) * size)
}
