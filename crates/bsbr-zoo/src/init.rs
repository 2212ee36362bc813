//! Start values that depend on a seed and a name alone, so that what families share starts the same in each.

use burn::{
    module::Param,
    tensor::{Device, Tensor, TensorData},
};

/// Makes the parameters of one decoder.
#[derive(Debug, Clone)]
pub(crate) struct Init {
    seed: u64,
    pub(crate) device: Device,
}

impl Init {
    pub(crate) fn new(seed: u64, device: &Device) -> Self {
        Self { seed, device: device.clone() }
    }

    /// Normal deviates times `deviation`.
    pub(crate) fn normal<const D: usize>(&self, name: &str, shape: [usize; D], deviation: f64) -> Param<Tensor<D>> {
        let mut numbers = Numbers::new(self.seed, name);
        let data = (0..shape.iter().product()).map(|_| (numbers.normal() * deviation) as f32).collect();
        self.tensor(data, shape)
    }

    /// A weight `[inputs, outputs]` that keeps the size of what goes through.
    pub(crate) fn weight(&self, name: &str, inputs: usize, outputs: usize) -> Param<Tensor<2>> {
        self.normal(name, [inputs, outputs], 1.0 / (inputs as f64).sqrt())
    }

    /// Uniform in `-bound..bound`.
    pub(crate) fn uniform<const D: usize>(&self, name: &str, shape: [usize; D], bound: f64) -> Param<Tensor<D>> {
        let mut numbers = Numbers::new(self.seed, name);
        let data = (0..shape.iter().product()).map(|_| ((2.0 * numbers.uniform() - 1.0) * bound) as f32).collect();
        self.tensor(data, shape)
    }

    pub(crate) fn constant<const D: usize>(&self, shape: [usize; D], value: f64) -> Param<Tensor<D>> {
        self.tensor(vec![value as f32; shape.iter().product()], shape)
    }

    fn tensor<const D: usize>(&self, data: Vec<f32>, shape: [usize; D]) -> Param<Tensor<D>> {
        Param::from_tensor(Tensor::from_data(TensorData::new(data, shape), &self.device))
    }
}

/// A generator that is the same everywhere: splitmix64.
struct Numbers(u64);

impl Numbers {
    fn new(seed: u64, name: &str) -> Self {
        // FNV-1a of the name; one step of the generator separates neighbouring seeds.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut numbers = Self(seed);
        Self(numbers.next() ^ hash)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().max(1e-300).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}
