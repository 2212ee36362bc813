//! The weights BSBR adds: the meta projections at their start values.
//!
//! `meta_query = (query + key) / 2` and `meta_key = (key + value) / 2`, biases alike. With fewer KV heads than heads
//! the rows of keys and values are repeated first, so that head `h` reads KV head `h / (heads / kv_heads)`. Computed
//! and stored in f32 whatever the dtype of the sources, and never part of an export.

use bsbr_model::{DecoderConfig, EXTRA_PREFIX};

use crate::ConvertError;
use crate::tensors::{OpenRecipe, Recipe};

/// Name of an added projection and of the two projections it starts from.
const RULES: [(&str, [&str; 2]); 2] = [("meta_query", ["query", "key"]), ("meta_key", ["key", "value"])];

/// The weights that the added weight `name` is the mean of.
pub(crate) fn sources(name: &str) -> Option<[String; 2]> {
    let path = name.strip_prefix(EXTRA_PREFIX)?;
    RULES.iter().find_map(|(part, sources)| {
        let (layer, kind) = path.split_once(&format!(".{part}."))?;
        Some(sources.map(|source| format!("{layer}.attention.{source}.{kind}")))
    })
}

/// Calls `each` with the rows of one head after the other, `[head_dim, width]`.
pub(crate) fn for_each_head(
    recipes: &[Recipe<'_>; 2],
    decoder: &DecoderConfig,
    mut each: impl FnMut(&[f32]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let (first, second) = (recipes[0].open()?, recipes[1].open()?);
    for head in 0..decoder.heads {
        let read = |recipe: &OpenRecipe<'_>| read_head(recipe, head, decoder);
        let [mut rows, other] = [read(&first)?, read(&second)?];
        for (a, b) in rows.iter_mut().zip(other) {
            *a = (*a + b) / 2.0;
        }
        each(&rows)?;
    }
    Ok(())
}

/// The rows of query head `head`, or of the KV head it reads.
fn read_head(recipe: &OpenRecipe<'_>, head: usize, decoder: &DecoderConfig) -> Result<Vec<f32>, ConvertError> {
    let shape = recipe.shape();
    let width: usize = shape[1..].iter().product();
    let heads = shape[0] / decoder.head_dim;
    let own = head * heads / decoder.heads;
    let size = decoder.head_dim * width;
    recipe.read(own * size..(own + 1) * size)
}
