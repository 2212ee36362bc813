//! The parallel and the recurrent form are one function.

use bsbr_zoo::{DecoderConfig, Family, SmallDecoder};
use burn::tensor::{Device, Int, Tensor, TensorData};

#[test]
fn parallel_is_recurrent() {
    let device = Device::flex();
    for family in Family::ALL {
        let config = DecoderConfig { family, ..Default::default() };
        let model = SmallDecoder::new(&config, 1, &device).unwrap();
        let data: Vec<i64> = (0..200).map(|i| (i * 37 + i * i * 11) % 256).collect();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(data, [2, 100]), &device);
        let whole = model.forward(tokens.clone()).unwrap();
        let mut state = model.start(2).unwrap();
        let parts = (0..100).map(|at| model.step(tokens.clone().narrow(1, at, 1), &mut state).unwrap()).collect();
        let difference: f32 = (whole - Tensor::cat(parts, 1)).abs().max().into_scalar();
        assert!(difference < 1e-4, "{family}: {difference}");
    }
}
