//! What a layer of a group is fitted to, and what judges the fit.

use faer::{Mat, MatRef, Side};

use super::matrix::{add_diagonal, dot, from_rows, solve_positive, square, trace};
use crate::{Calibration, Member, Objective, Ridge, SolveSettings, SplitError};

/// Tokens for each input from which on the smaller ridge is used.
const MANY_TOKENS: u64 = 4;
/// The ridge with fewer tokens, and with more.
const RIDGES: (f64, f64) = (1e-2, 1e-3);
/// The ridge tried where none was asked for but the moments cannot be solved with.
const LEAST_RIDGE: f64 = 1e-10;

/// A member of a group, ready to be solved: minimise `|| gram^1/2 (target - factors) ||^2`.
pub(super) struct Layer {
    /// `[inputs, outputs]`.
    pub(super) weight: Mat<f64>,
    /// What the factors should be; `None` for the weight itself.
    pub(super) target: Option<Mat<f64>>,
    /// Second moments of the inputs for each token, with the ridge; `None` where all directions count the same.
    pub(super) gram: Option<Mat<f64>>,
    /// What judges on the calibration text.
    pub(super) judge: Judge,
    /// What judges on held-out text.
    pub(super) held_out: Option<Judge>,
    pub(super) tokens: u64,
    pub(super) ridge: f64,
}

/// Measures the error of factors on a text, without the ridge.
pub(super) enum Judge {
    /// By the weights alone.
    Weights,
    /// By second moments for each token.
    Inputs(Mat<f64>),
    /// By the difference to the original outputs, when the compressed model gives the inputs.
    Paired { original: Mat<f64>, compressed: Mat<f64>, cross: Mat<f64> },
}

impl Judge {
    fn new(calibration: Calibration<'_>, name: &str, inputs: usize) -> Result<Self, SplitError> {
        let mean = |moments: &crate::Moments| -> Result<Mat<f64>, SplitError> {
            if moments.width() != inputs {
                let expected = format!("moments of its {inputs} inputs");
                return Err(SplitError::shape(name, expected, moments.width().to_string()));
            }
            if moments.tokens() == 0 {
                let problem = "no token of the text reached it".to_owned();
                return Err(SplitError::Calibration { module: name.to_owned(), problem });
            }
            Ok(moments.second_moments() * faer::Scale(1.0 / moments.tokens() as f64))
        };
        Ok(match calibration {
            Calibration::Nothing => Self::Weights,
            Calibration::Inputs(moments) => Self::Inputs(mean(moments)?),
            Calibration::Paired(paired) => Self::Paired {
                original: mean(paired.original())?,
                compressed: mean(paired.compressed())?,
                cross: paired.cross() * faer::Scale(1.0 / paired.original().tokens() as f64),
            },
        })
    }

    /// Energy of the outputs of the original layer.
    pub(super) fn energy(&self, weight: MatRef<'_, f64>) -> f64 {
        match self {
            Self::Weights => square(weight),
            Self::Inputs(gram) | Self::Paired { original: gram, .. } => dot((gram * weight).as_ref(), weight),
        }
    }

    /// Squared difference of the outputs of the original layer and of what takes its place.
    pub(super) fn error(&self, weight: MatRef<'_, f64>, approximation: MatRef<'_, f64>) -> f64 {
        match self {
            Self::Weights => square((weight - approximation).as_ref()),
            Self::Inputs(gram) => {
                let difference = weight - approximation;
                dot((gram * &difference).as_ref(), difference.as_ref()).max(0.0)
            }
            Self::Paired { original, compressed, cross } => {
                let mut read = compressed * approximation;
                read -= cross * weight * faer::Scale(2.0);
                (dot((original * weight).as_ref(), weight) + dot(read.as_ref(), approximation)).max(0.0)
            }
        }
    }

    /// The second moments of what the layer will read.
    fn gram(&self) -> Option<&Mat<f64>> {
        match self {
            Self::Weights => None,
            Self::Inputs(gram) | Self::Paired { compressed: gram, .. } => Some(gram),
        }
    }
}

impl Layer {
    pub(super) fn new(
        member: &Member<'_>,
        inputs: usize,
        outputs: usize,
        settings: &SolveSettings,
    ) -> Result<Self, SplitError> {
        if Some(member.weight.len()) != inputs.checked_mul(outputs) {
            let expected = format!("a weight of {inputs} x {outputs}");
            return Err(SplitError::shape(member.name, expected, format!("{} numbers", member.weight.len())));
        }
        if let Some((index, value)) = member.weight.iter().enumerate().find(|(_, value)| !value.is_finite()) {
            return Err(SplitError::NotFinite {
                module: member.name.to_owned(),
                what: "weight",
                index,
                value: f64::from(*value),
                advice: "is the checkpoint sound?",
            });
        }
        let weight = from_rows(member.weight, inputs, outputs);
        let judge = Judge::new(member.calibration, member.name, inputs)?;
        let held_out = member.held_out.map(|text| Judge::new(text, member.name, inputs)).transpose()?;
        let tokens = match member.calibration {
            Calibration::Nothing => 0,
            Calibration::Inputs(moments) => moments.tokens(),
            Calibration::Paired(paired) => paired.original().tokens(),
        };
        let mut layer = Self { weight, target: None, gram: None, judge, held_out, tokens, ridge: 0.0 };
        if settings.objective == Objective::Activations {
            layer.fit_to_activations(settings.ridge);
        }
        Ok(layer)
    }

    fn fit_to_activations(&mut self, ridge: Ridge) {
        let Some(gram) = self.judge.gram() else { return };
        let mut gram = gram.clone();
        let inputs = gram.nrows();
        let relative = match ridge {
            Ridge::Relative(ridge) => ridge,
            Ridge::Auto if self.tokens < MANY_TOKENS * inputs as u64 => RIDGES.0,
            Ridge::Auto => RIDGES.1,
        };
        let mean = trace(gram.as_ref()) / inputs as f64;
        self.ridge = relative * mean;
        add_diagonal(&mut gram, self.ridge);
        if let Judge::Paired { cross, .. } = &self.judge {
            // min || X W - Xh T ||^2 + ridge || W - T ||^2; the second pull keeps directions that the text does not show.
            let mut wanted = cross * &self.weight;
            wanted += &self.weight * faer::Scale(self.ridge);
            self.target = solve_positive(gram.as_ref(), wanted.as_ref()).or_else(|| {
                let least = LEAST_RIDGE * mean;
                add_diagonal(&mut gram, least);
                self.ridge += least;
                wanted += &self.weight * faer::Scale(least);
                solve_positive(gram.as_ref(), wanted.as_ref())
            });
        }
        self.gram = Some(gram);
    }

    /// What the factors should be.
    pub(super) fn target(&self) -> MatRef<'_, f64> {
        self.target.as_ref().unwrap_or(&self.weight).as_ref()
    }

    /// `gram matrix`.
    pub(super) fn weighted(&self, matrix: MatRef<'_, f64>) -> Mat<f64> {
        self.gram.as_ref().map_or_else(|| matrix.to_owned(), |gram| gram * matrix)
    }

    /// Energy of the target under the moments it is fitted with.
    pub(super) fn fitted_energy(&self) -> f64 {
        dot(self.weighted(self.target()).as_ref(), self.target())
    }

    /// Mean of the diagonal of the moments.
    pub(super) fn input_energy(&self) -> f64 {
        self.gram.as_ref().map_or(1.0, |gram| trace(gram.as_ref()) / gram.nrows().max(1) as f64)
    }

    /// Largest eigenvalue of the moments in units of the smallest, where that is more than rounding, and how many are.
    pub(super) fn condition(&self) -> (Option<f64>, usize) {
        let inputs = self.weight.nrows();
        let Some(gram) = self.judge.gram() else { return (Some(1.0), inputs) };
        let Ok(values) = gram.self_adjoint_eigenvalues(Side::Lower) else { return (None, 0) };
        let largest = values.last().copied().unwrap_or(0.0);
        let rounding = inputs as f64 * f64::EPSILON * largest;
        let rank = values.iter().filter(|&&value| value > rounding).count();
        let smallest = values.first().copied().filter(|_| rank == inputs);
        (smallest.map(|smallest| largest / smallest), rank)
    }
}
