//! What weights and factors of a group hold: arithmetic on its sizes.

use crate::{Form, Share};

/// What is added before rounding down, so that `0.3 = 1 - 0.7` gives what 0.3 means.
const ROUNDING: f64 = 1e-9;

/// The sizes of layers that share a basis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupSize {
    /// How the factors are kept.
    pub form: Form,
    /// The side whose basis is shared.
    pub share: Share,
    /// How many layers.
    pub layers: usize,
    /// Width of what a layer reads.
    pub inputs: usize,
    /// Width of what a layer gives.
    pub outputs: usize,
}

impl GroupSize {
    /// Numbers in the weights of all layers.
    pub fn dense(&self) -> usize {
        self.layers * self.inputs * self.outputs
    }

    /// Numbers in factors of this rank: the basis, the coefficients of every layer, and of pivots which inputs they are.
    ///
    /// ```
    /// use bsbr_splitlinear::{Form, GroupSize, Share};
    ///
    /// let two = GroupSize { form: Form::TwoFactor, share: Share::None, layers: 1, inputs: 768, outputs: 768 };
    /// assert_eq!(two.parameters(307), 307 * (768 + 768));
    /// let pivoted = GroupSize { form: Form::Pivoted, ..two };
    /// assert_eq!(pivoted.parameters(307), 307 * (768 - 307) + 307 * 768 + 307);
    /// ```
    pub fn parameters(&self, rank: usize) -> usize {
        let numbers = rank * self.parameters_per_rank();
        match self.form {
            Form::TwoFactor => numbers,
            // A dimension passes one input on: the basis lacks those rows, and says which they are.
            Form::Pivoted => (numbers + rank).saturating_sub(self.bases() * rank * rank),
        }
    }

    /// The largest rank that a product of the factors can have.
    pub fn largest_rank(&self) -> usize {
        match self.share {
            Share::Input => self.inputs.min(self.layers * self.outputs),
            Share::Output => self.outputs.min(self.layers * self.inputs),
            Share::None => self.inputs.min(self.outputs),
        }
    }

    /// The largest rank at which at most the fraction `keep` of the parameters is kept. May be 0, and of two factors more
    /// than the group can use.
    ///
    /// A basis of two factors that `layers` weights of `inputs x outputs` share costs `inputs + layers * outputs` for each
    /// dimension when it is on the input side, `layers * inputs + outputs` on the output side.
    ///
    /// ```
    /// use bsbr_splitlinear::{Form, GroupSize, Share};
    ///
    /// let shared = GroupSize { form: Form::TwoFactor, share: Share::Input, layers: 4, inputs: 768, outputs: 768 };
    /// assert_eq!(shared.rank_for(0.5), 307);
    /// let alone = GroupSize { layers: 1, ..shared };
    /// assert_eq!((alone.rank_for(0.8), GroupSize { form: Form::Pivoted, ..alone }.rank_for(0.8)), (307, 423));
    /// ```
    pub fn rank_for(&self, keep: f64) -> usize {
        let allowed = keep * self.dense() as f64;
        match self.form {
            // A negative or undefined quotient becomes 0.
            Form::TwoFactor => (allowed / self.parameters_per_rank() as f64 + ROUNDING).floor() as usize,
            Form::Pivoted => self.largest_within((allowed + ROUNDING).floor() as usize),
        }
    }

    /// The largest rank up to [`GroupSize::largest_rank`] whose factors hold at most `parameters` numbers.
    pub(crate) fn largest_within(&self, parameters: usize) -> usize {
        // The factors grow with the rank as long as it is one that a product of them can have.
        let (mut fits, mut over) = (0, self.largest_rank() + 1);
        while over - fits > 1 {
            let rank = usize::midpoint(fits, over);
            if self.parameters(rank) <= parameters { fits = rank } else { over = rank }
        }
        fits
    }

    /// Multiplications of a layer by itself in units of those of the dense layer.
    pub fn flop_ratio(&self, rank: usize) -> f64 {
        let (inputs, outputs) = (self.inputs as f64, self.outputs as f64);
        let passed_on = if self.form == Form::Pivoted { rank as f64 } else { 0.0 };
        rank as f64 * (inputs - passed_on + outputs) / (inputs * outputs)
    }

    /// How many bases there are.
    fn bases(&self) -> usize {
        if self.share == Share::None { self.layers } else { 1 }
    }

    /// Numbers that one dimension costs where all are kept.
    fn parameters_per_rank(&self) -> usize {
        match self.share {
            Share::Input => self.inputs + self.layers * self.outputs,
            Share::Output => self.layers * self.inputs + self.outputs,
            Share::None => self.layers * (self.inputs + self.outputs),
        }
    }
}
