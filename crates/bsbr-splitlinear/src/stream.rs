//! Calibration and compression along a model, block by block: of all windows of text the states at one border between
//! blocks are in memory, and what is known of the inputs of the blocks at hand.

mod anchored;
mod independent;
mod sensitivity;
mod windows;

pub use anchored::{AnchoredSettings, CompressedGroup, compress_anchored};
pub use independent::{compress_alone, spectrum};
pub use sensitivity::{held_out_divergence, sensitivities};
pub use windows::{Window, choose_windows};

use burn::tensor::Tensor;

use crate::{GroupFactors, Moments, MomentsFile, MomentsWriter, SavedGroup, SavedMember, SplitError};

/// Takes what a linear layer reads, `[tokens, inputs]`, under the path of the layer.
pub type See<'a, E> = dyn FnMut(&str, Tensor<2>) -> Result<(), E> + 'a;

/// A model that runs block by block.
pub trait BlockModel {
    /// What it refuses.
    type Error: std::error::Error + Send + Sync + From<SplitError> + 'static;

    /// Number of blocks.
    fn blocks(&self) -> usize;

    /// Names and widths of what the linear layers of a block read, each input once.
    fn inputs(&self, block: usize) -> Vec<(String, usize)>;

    /// Block and input of a linear layer; `None` if there is no such layer.
    fn input_of(&self, linear: &str) -> Option<(usize, String)>;

    /// The weight of a linear layer, `[inputs, outputs]` row by row.
    ///
    /// # Errors
    ///
    /// If there is no such layer or its numbers cannot be read.
    fn weight(&self, linear: &str) -> Result<Vec<f32>, Self::Error>;

    /// What the first block reads of a window, `[tokens, width]`.
    ///
    /// # Errors
    ///
    /// If the tokens cannot be read.
    fn first_states(&self, tokens: &[u32]) -> Result<Tensor<2>, Self::Error>;

    /// Runs a block over the states of a window; `see` is shown what its linear layers read.
    ///
    /// # Errors
    ///
    /// Those of `see`, and if the block cannot run.
    fn run_block(
        &self,
        block: usize,
        states: Tensor<2>,
        see: &mut See<'_, Self::Error>,
    ) -> Result<Tensor<2>, Self::Error>;

    /// What the model predicts from the states behind its last block: logits, `[tokens, vocabulary]`.
    ///
    /// # Errors
    ///
    /// If the states are no such.
    fn logits(&self, states: Tensor<2>) -> Result<Tensor<2>, Self::Error>;

    /// Puts the factors of a group in the place of its weights, or of the factors it has.
    ///
    /// # Errors
    ///
    /// If a layer is not divided into such parts.
    fn install(&mut self, group: &SavedGroup, factors: &GroupFactors) -> Result<(), Self::Error>;
}

/// Name of the moments of an input over held-out windows.
fn held_out(input: &str) -> String {
    format!("{input}.held-out")
}

/// The entries of a file of moments of a model: for each input of each block those over calibration windows and those
/// over held-out ones.
pub fn moments_entries<M: BlockModel>(model: &M) -> Vec<(String, usize)> {
    let inputs = (0..model.blocks()).flat_map(|block| model.inputs(block));
    inputs.flat_map(|(name, width)| [(name.clone(), width), (held_out(&name), width)]).collect()
}

/// Runs `model` over windows of text, block by block, and adds the second moments of every input to `writer`, which was
/// created for [`moments_entries`]. `progress` hears how many blocks of how many are done.
///
/// # Errors
///
/// Those of the model, and of the writer.
pub fn calibrate<M: BlockModel>(
    model: &M,
    tokens: &[u32],
    windows: &[Window],
    writer: &mut MomentsWriter,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), M::Error> {
    let mut states = first_states(model, tokens, windows)?;
    for block in 0..model.blocks() {
        let inputs = model.inputs(block);
        let mut moments: Vec<[Moments; 2]> =
            inputs.iter().map(|&(_, width)| [Moments::new(width), Moments::new(width)]).collect();
        for (window, states) in windows.iter().zip(&mut states) {
            let next = model.run_block(block, states.clone(), &mut |name, x| {
                if let Some(at) = inputs.iter().position(|(known, _)| known == name) {
                    moments[at][usize::from(window.held_out)].add_rows(name, &numbers(name, x)?)?;
                }
                Ok(())
            })?;
            *states = next;
        }
        for ((name, _), [calibration, held]) in inputs.iter().zip(&moments) {
            writer.add(name, calibration)?;
            writer.add(&held_out(name), held)?;
        }
        progress(block + 1, model.blocks());
    }
    Ok(())
}

/// The moments of an input over calibration windows and, where there are any, over held-out ones.
///
/// # Errors
///
/// As [`MomentsFile::read`].
pub fn read_moments(file: &MomentsFile, input: &str) -> Result<(Moments, Option<Moments>), SplitError> {
    let held = file.read(&held_out(input))?;
    Ok((file.read(input)?, (held.tokens() > 0).then_some(held)))
}

/// What the first block reads of each window.
fn first_states<M: BlockModel>(model: &M, tokens: &[u32], windows: &[Window]) -> Result<Vec<Tensor<2>>, M::Error> {
    let text = |window: &Window| {
        let text = tokens.get(window.tokens.clone());
        text.ok_or_else(|| {
            let expected = format!("windows of a text of {} tokens", tokens.len());
            SplitError::shape("calibration", expected, format!("{:?}", window.tokens))
        })
    };
    windows.iter().map(|window| model.first_states(text(window)?)).collect()
}

/// The numbers of a tensor.
fn numbers(name: &str, x: Tensor<2>) -> Result<Vec<f32>, SplitError> {
    let failed = |error| SplitError::shape(name, "numbers that can be read back", format!("{error:?}"));
    x.try_into_vec_as::<f32>().map_err(failed)
}

/// The weight of a member of a group, `[inputs, outputs]` row by row.
///
/// # Errors
///
/// Those of [`BlockModel::weight`].
pub fn member_weight<M: BlockModel>(model: &M, group: &SavedGroup, member: &SavedMember) -> Result<Vec<f32>, M::Error> {
    let mut weight = vec![0.0; group.inputs * group.outputs];
    let mut at = 0;
    for target in &member.targets {
        let whole = model.weight(&target.linear)?;
        let width = whole.len() / group.inputs.max(1);
        for (to, from) in weight.chunks_exact_mut(group.outputs).zip(whole.chunks_exact(width)) {
            to[at..at + target.width].copy_from_slice(&from[target.start..target.start + target.width]);
        }
        at += target.width;
    }
    Ok(weight)
}
