//! Weights in two tensors: codes, and scales for blocks of them. What a configuration says of them, which tensors belong together, and
//! the way back from rows of a [`Format`].

use std::collections::HashMap;
use std::path::Path;

use bsbr_weights::Format;
use half::{bf16, f16};
use safetensors::Dtype;

use crate::ConvertError;
use crate::json::ConfigFile;
use crate::problem::PlanProblem;
use crate::tensors::TensorEntry;

/// How codes and scales lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `NAME_blocks` `[.., outputs, inputs / 32, 16]` of U8, two codes to a byte, the lower half first, and `NAME_scales`
    /// `[.., outputs, inputs / 32]` of U8, powers of two.
    Mxfp4,
    /// `NAME` `[.., outputs, inputs]` of F8_E4M3, and `NAME_scale_inv` with a number for each block, the last of rows and of columns as
    /// small as they come. Despite its name numbers are multiplied with it.
    F8 {
        /// Outputs and inputs of a block.
        block: [usize; 2],
    },
}

const MX_CODES: &str = "_blocks";
const MX_SCALES: &str = "_scales";
const F8_SCALES: &str = "_scale_inv";

impl Form {
    /// The one that `quantization_config` describes; `None` for any other, and where there is none.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] where a description of these forms is of a kind that is not read.
    pub(crate) fn of(config: &ConfigFile) -> Result<Option<Self>, ConvertError> {
        let Some(settings) = config.object("quantization_config")? else { return Ok(None) };
        match settings.optional_str("quant_method")?.as_deref() {
            Some("mxfp4") => Ok(Some(Self::Mxfp4)),
            Some("fp8") => {
                const BLOCK: &str = "weight_block_size";
                if settings.optional_str("fmt")?.is_some_and(|name| name != "e4m3") {
                    return Err(settings.error("fmt", "e4m3, the one float of 8 bits that is read"));
                }
                let expected =
                    "two numbers above 0, the outputs and inputs that share a scale: other scales are not read";
                match settings.optional_usize_list(BLOCK)?.as_deref() {
                    Some(&[outputs, inputs]) if outputs > 0 && inputs > 0 => {
                        Ok(Some(Self::F8 { block: [outputs, inputs] }))
                    }
                    _ => Err(settings.error(BLOCK, expected)),
                }
            }
            _ => Ok(None),
        }
    }

    /// The name of the scales that belong to a tensor, if it is codes.
    fn scales_of(self, entry: &TensorEntry) -> Option<String> {
        match (self, entry.dtype, &entry.shape[..]) {
            (Self::Mxfp4, Dtype::U8, &[.., _, _, 16]) => {
                Some(entry.name.strip_suffix(MX_CODES)?.to_owned() + MX_SCALES)
            }
            (Self::F8 { .. }, Dtype::F8_E4M3, &[.., _, _]) => Some(format!("{}{F8_SCALES}", entry.name)),
            _ => None,
        }
    }

    /// The name of the codes that scales of this name would belong to.
    fn codes_of(self, scales: &str) -> Option<String> {
        match self {
            Self::Mxfp4 => Some(scales.strip_suffix(MX_SCALES)?.to_owned() + MX_CODES),
            Self::F8 { .. } => scales.strip_suffix(F8_SCALES).map(str::to_owned),
        }
    }
}

/// Codes and the scales that belong to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scaled {
    pub(crate) form: Form,
    /// Names.
    pub(crate) codes: String,
    pub(crate) scales: String,
    /// Shape of the numbers.
    pub(crate) shape: Vec<usize>,
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Codes,
    Scales,
}

/// All such weights among the tensors of a checkpoint in `dir`, by its configuration.
///
/// # Errors
///
/// Those of [`Form::of`]; [`ConvertError::Plan`] with every pair that does not fit.
pub(crate) fn of_checkpoint(
    dir: &Path,
    config: &ConfigFile,
    entries: &[&TensorEntry],
) -> Result<Vec<Scaled>, ConvertError> {
    find(Form::of(config)?, entries).map_err(|problems| {
        let rules = "codes and their scales".to_owned();
        ConvertError::Plan { dir: dir.to_owned(), rules, sizes: String::new(), problems }
    })
}

/// All weights of a form among the tensors of a checkpoint.
///
/// # Errors
///
/// Every pair that does not fit.
fn find(form: Option<Form>, entries: &[&TensorEntry]) -> Result<Vec<Scaled>, Vec<PlanProblem>> {
    let Some(form) = form else { return Ok(Vec::new()) };
    let by_name: HashMap<&str, &TensorEntry> = entries.iter().map(|entry| (entry.name.as_str(), *entry)).collect();
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for entry in entries {
        if let Some(codes) = form.codes_of(&entry.name)
            && by_name.get(codes.as_str()).is_none_or(|entry| form.scales_of(entry).is_none())
        {
            problems.push(PlanProblem::ScalesOfNothing { tensor: entry.name.clone(), codes });
            continue;
        }
        let Some(scales) = form.scales_of(entry) else { continue };
        let Some(of) = by_name.get(scales.as_str()) else {
            problems.push(PlanProblem::MissingScales { tensor: scales, codes: entry.name.clone() });
            continue;
        };
        let shape = match form {
            Form::Mxfp4 => {
                let (rows, last) = entry.shape.split_at(entry.shape.len() - 2);
                [rows, &[2 * last[0] * last[1]]].concat()
            }
            Form::F8 { .. } => entry.shape.clone(),
        };
        let scaled = Scaled { form, codes: entry.name.clone(), scales, shape };
        let (expected, dtypes) = (scaled.scales_shape(), scaled.scales_dtypes());
        if of.shape != expected {
            let (tensor, codes, found) = (scaled.scales, scaled.codes, of.shape.clone());
            problems.push(PlanProblem::ScalesShape { tensor, codes, expected, found });
        } else if !dtypes.contains(&of.dtype) {
            let expected = dtypes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
            problems.push(PlanProblem::Dtype { tensor: scaled.scales, found: of.dtype.to_string(), expected });
        } else {
            found.push(scaled);
        }
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

impl Scaled {
    /// Numbers of a row.
    pub(crate) fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Rows of all matrices.
    pub(crate) fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }

    /// Rows of one matrix.
    fn height(&self) -> usize {
        self.shape.len().checked_sub(2).map_or(1, |at| self.shape[at])
    }

    fn scales_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        let last = shape.len() - 1;
        match self.form {
            Form::Mxfp4 => shape[last] /= 32,
            Form::F8 { block: [outputs, inputs] } => {
                shape[last - 1] = shape[last - 1].div_ceil(outputs);
                shape[last] = shape[last].div_ceil(inputs);
            }
        }
        shape
    }

    fn scales_dtypes(&self) -> &'static [Dtype] {
        match self.form {
            Form::Mxfp4 => &[Dtype::U8],
            Form::F8 { .. } => &[Dtype::F32, Dtype::BF16, Dtype::F16],
        }
    }

    /// The place of the scale of a number, in the order of the scales.
    pub(crate) fn scale_of(&self, row: usize, column: usize) -> usize {
        match self.form {
            Form::Mxfp4 => (row * self.width() + column) / 32,
            Form::F8 { block: [outputs, inputs] } => {
                let (matrix, row) = (row / self.height(), row % self.height());
                let [down, across] = [self.height().div_ceil(outputs), self.width().div_ceil(inputs)];
                (matrix * down + row / outputs) * across + column / inputs
            }
        }
    }

    /// The format whose rows hold codes and scales; `None` where its blocks do not lie within those of the scales.
    pub(crate) fn format(&self) -> Option<Format> {
        match self.form {
            Form::Mxfp4 => Some(Format::Mxfp4),
            Form::F8 { block: [_, inputs] } => {
                let whole = |size: usize| size.is_multiple_of(Format::F8E4M3.block());
                (whole(inputs) && whole(self.width())).then_some(Format::F8E4M3)
            }
        }
    }

    /// Appends what row `row` of the format holds of one of the two tensors, whose type is `dtype`.
    pub(crate) fn give_back(&self, part: Part, row: usize, bytes: &[u8], dtype: Dtype, out: &mut Vec<u8>) {
        match (self.form, part) {
            (Form::Mxfp4, Part::Codes) => {
                for block in bytes.chunks_exact(17) {
                    let code = |n: usize| block[1 + n % 16] >> (n / 16 * 4) & 15;
                    out.extend((0..16).map(|n| code(2 * n) | code(2 * n + 1) << 4));
                }
            }
            (Form::Mxfp4, Part::Scales) => out.extend(bytes.chunks_exact(17).map(|block| block[0])),
            (Form::F8 { .. }, Part::Codes) => {
                bytes.chunks_exact(132).for_each(|block| out.extend_from_slice(&block[4..]))
            }
            (Form::F8 { block: [outputs, inputs] }, Part::Scales) => {
                // All rows of a block have the same: the first of them gives it.
                if !(row % self.height()).is_multiple_of(outputs) {
                    return;
                }
                for block in bytes.chunks_exact(132).step_by(inputs / 128) {
                    let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
                    match dtype {
                        Dtype::BF16 => out.extend_from_slice(&bf16::from_f32(scale).to_le_bytes()),
                        Dtype::F16 => out.extend_from_slice(&f16::from_f32(scale).to_le_bytes()),
                        _ => out.extend_from_slice(&scale.to_le_bytes()),
                    }
                }
            }
        }
    }
}
