//! Queries, keys and values of latent attention: [`crate::LatentAttention`].

use burn::tensor::{Tensor, TensorData};

use super::{Heads, normalised, projected, show};
use crate::{
    AdapterTarget, Projection,
    latent::LatentProjections,
    modules::{Normalisation, Projections},
    rotary::{Places, Rotation},
};

/// [`super::heads`]; values are filled up with zeros to the width of a head.
pub(super) fn heads(
    x: &Tensor<2>,
    norm: Option<&Normalisation>,
    projections: &Projections,
    latent: &LatentProjections,
    places: Places<'_>,
    width: usize,
) -> Heads {
    let packing = places.packing;
    let x = normalised(norm, x);
    let through = |x: &Tensor<2>, projection: &Projection| projected(x.clone(), projection, packing);
    // Who looks at an input sees it under each that reads it.
    let of_stream = [Some(&latent.latent), Some(&latent.key_rotary), latent.query_latent.as_ref()];
    show(of_stream, || x.clone());
    let source = match (&latent.query_latent, &latent.query_latent_norm) {
        (Some(projection), Some(norm)) => norm.forward(through(&x, projection)),
        _ => x.clone(),
    };
    show([Some(&projections.query), Some(&latent.query_rotary)], || source.clone());
    let tokens = x.dims()[0];
    let by_head = |y: Tensor<2>, width: usize| {
        let heads = y.dims()[1] / width;
        y.reshape([tokens, heads, width])
    };
    let rotated =
        |y: Tensor<3>| places.rotation.map_or_else(|| y.clone(), |rotation: &Rotation| rotation.apply(y.clone()));
    let rotary = latent.rotary_dim;
    let still = width - rotary;

    let turning = rotated(by_head(through(&source, &latent.query_rotary), rotary));
    let query = through(&source, &projections.query);
    let query = match projections.adapter(AdapterTarget::Query) {
        Some(adapter) => query + adapter.forward(source),
        None => query,
    };
    let query = Tensor::cat(vec![turning, by_head(query, still)], 2).swap_dims(0, 1);
    let query = match places.temperature {
        Some(factors) => {
            let (device, dtype) = (query.device(), query.dtype());
            query * Tensor::<3>::from_data(TensorData::new(factors.to_vec(), [1, tokens, 1]), (&device, dtype))
        }
        None => query,
    };

    let vector = latent.latent_norm.forward(through(&x, &latent.latent));
    show([projections.key.as_ref(), projections.value.as_ref()], || vector.clone());
    let turning = rotated(by_head(through(&x, &latent.key_rotary), rotary));
    let rows = projections.key.as_ref().zip(projections.value.as_ref()).map(|(key, value)| {
        let keys = by_head(through(&vector, key), still);
        let heads = keys.dims()[1];
        let keys = Tensor::cat(vec![turning.expand([tokens, heads, rotary]), keys], 2).swap_dims(0, 1);
        let values = by_head(through(&vector, value), latent.value_dim).swap_dims(0, 1);
        let missing = width - latent.value_dim;
        let values = if missing == 0 {
            values
        } else {
            let zeros = Tensor::zeros([heads, tokens, missing], (&values.device(), values.dtype()));
            Tensor::cat(vec![values, zeros], 2)
        };
        [keys, values]
    });
    Heads { query, rows }
}
