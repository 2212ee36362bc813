//! What the tests of this module share.

/// Numbers that are the same everywhere: splitmix64, two to a normal deviate.
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(super) fn normal(&mut self, count: usize, mean: f64, spread: f64) -> Vec<f32> {
        let mut deviate = || {
            let radius = (-2.0 * self.uniform().max(1e-300).ln()).sqrt();
            radius * (std::f64::consts::TAU * self.uniform()).cos()
        };
        (0..count).map(|_| (mean + spread * deviate()) as f32).collect()
    }
}
