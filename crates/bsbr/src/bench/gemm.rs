//! The yardstick: the rate of a large matrix product in this process, on this device.

use std::time::Instant;

use anyhow::Result;
use burn::tensor::{Device, Distribution, Tensor};

use super::sync;

/// Rows and columns of the matrices.
pub(crate) const SIZE: usize = 1024;

/// Operations of one product.
pub(crate) const OPERATIONS: f64 = 2.0 * (SIZE * SIZE * SIZE) as f64;

/// A matrix product to time again and again, between whatever else is timed.
pub struct Gemm {
    left: Tensor<2>,
    right: Tensor<2>,
}

impl Gemm {
    pub(crate) fn new(device: &Device) -> Self {
        let random = || Tensor::random([SIZE, SIZE], Distribution::Default, device);
        Self { left: random(), right: random() }
    }

    /// Seconds of one product.
    pub(crate) fn run(&self) -> Result<f64> {
        let start = Instant::now();
        let product = self.left.clone().matmul(self.right.clone());
        sync(&self.left.device())?;
        let seconds = start.elapsed().as_secs_f64();
        drop(product);
        Ok(seconds)
    }
}
