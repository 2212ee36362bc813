//! The two things that are measured, each with its arms: attention alone and a whole model.

use std::{path::PathBuf, rc::Rc};

use anyhow::{Context, Result, bail};
use bsbr_attn::{BlockAttentionConfig, Retrieved};
use bsbr_model::Decoder;
use burn::tensor::{DType, Device};
use serde_json::json;

use super::{
    Arm, DECODE_TOKENS, Part, Phase, Subject,
    arithmetic::{Operations, TRAINING, operations},
    attention::{AttentionSubject, Inputs, Shape, difference},
    data::Data,
    glued::ModelRows,
    llama::{LlamaBench, LlamaSubject},
    memory::{Memory, Of, Probe, measure},
    model::{self, ModelSubject, Quality, lengths},
    pytorch::{PythonSubject, Shared},
    report::Difference,
};

/// Tokens that quality is measured on at each length if there is time, unless one window is longer.
const QUALITY_TOKENS: usize = 8192;

/// Something to measure, entered at one length after the other.
pub(crate) trait Field {
    fn part(&self) -> Part;

    fn arms(&self) -> &[Arm];

    /// Tokens that a run reads of texts of this length, or decodes behind them at a time.
    fn tokens_read(&self, phase: Phase, tokens: usize) -> usize;

    /// Why an arm cannot run texts of this length, `more` tokens decoded behind them.
    fn obstacle(&self, arm: Arm, phase: Phase, tokens: usize, more: usize) -> Option<String>;

    /// Makes what the arms share at a length. What they shared before is let go.
    fn enter(&mut self, tokens: usize) -> Result<()>;

    /// An arm at the length entered.
    fn subject(&self, arm: Arm) -> Result<Box<dyn Subject>>;

    /// Operations of a run with a whole text, for which an index retrieved what it says, or what is usual.
    fn operations(&self, _arm: Arm, _phase: Phase, _tokens: usize, _found: Option<Retrieved>) -> Option<Operations> {
        None
    }

    /// Memory of a run with a whole text.
    fn memory(&self, arm: Arm, phase: Phase, tokens: usize) -> Result<Memory>;

    /// Windows of text to measure quality on: at least and at most; `None` where nothing can be lost.
    fn windows(&self, _tokens: usize) -> Option<(usize, usize)> {
        None
    }

    /// Quality of arms that ran.
    fn quality(&self, _arms: &[Arm], _tokens: usize, _windows: usize) -> Result<Vec<(Arm, Quality)>> {
        Ok(Vec::new())
    }
}

/// The processes that PyTorch's arms run in: one to time, one to measure memory.
#[derive(Clone)]
pub(crate) struct Pythons {
    pub(crate) timing: Shared,
    pub(crate) memory: Shared,
}

/// Attention of one layer.
pub(crate) struct AttentionField {
    pub(crate) shape: Shape,
    pub(crate) attention: BlockAttentionConfig,
    pub(crate) arms: Vec<Arm>,
    pub(crate) device: Device,
    pub(crate) pythons: Option<Pythons>,
    /// Flags of this program that choose the same device and threads.
    pub(crate) flags: Vec<String>,
    /// Memory of the machine, where known.
    pub(crate) machine_memory: Option<u64>,
    /// Of a model, where the data is one's.
    pub(crate) rows: Option<Rc<ModelRows>>,
    pub(crate) entered: Option<(usize, Rc<Inputs>)>,
}

impl AttentionField {
    fn entered(&self) -> Result<(usize, Rc<Inputs>)> {
        self.entered.clone().context("no length was entered")
    }

    fn own(&self, arm: Arm) -> Result<AttentionSubject> {
        Ok(AttentionSubject::new(arm, self.shape, &self.attention, self.entered()?.1, &self.device))
    }

    /// What the script needs to make an arm.
    fn python_arguments(&self, tokens: usize) -> serde_json::Value {
        let Shape { batch, heads, kv_heads, head_dim, dtype, .. } = self.shape;
        let dtype = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        json!({
            "batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "tokens": tokens,
            "chunk_size": self.attention.chunk_size, "dtype": dtype,
        })
    }

    /// Compares the outputs of arms that should agree, for the length entered.
    pub(crate) fn differences(&self) -> Result<Vec<Difference>> {
        let pairs = [(Arm::Bsbr, Arm::BsbrPlain), (Arm::Dense, Arm::Burn)];
        let tokens = self.entered()?.0;
        let compared = pairs.into_iter().filter(|(arm, from)| self.arms.contains(arm) && self.arms.contains(from));
        compared
            .map(|(arm, from)| {
                let (largest, rms) = difference(&self.own(arm)?, &self.own(from)?)?;
                Ok(Difference { arm, from, tokens, largest, rms })
            })
            .collect()
    }
}

impl Field for AttentionField {
    fn part(&self) -> Part {
        Part::Attention
    }

    fn arms(&self) -> &[Arm] {
        &self.arms
    }

    fn tokens_read(&self, phase: Phase, tokens: usize) -> usize {
        self.shape.batch * if phase.takes_text() { tokens } else { 1 }
    }

    fn obstacle(&self, arm: Arm, phase: Phase, tokens: usize, _: usize) -> Option<String> {
        let inputs = self.shape.input_bytes(tokens);
        if self.machine_memory.is_some_and(|memory| inputs > 0.7 * memory as f64) {
            return Some(format!("queries, keys and values would take {}", crate::output::bytes(inputs as u64)));
        }
        if arm == Arm::TorchOriginal && phase == Phase::Decode {
            return Some("it keeps nothing: a token costs a prefill".into());
        }
        let needed = self.shape.kept_numbers_bytes(arm, phase, &self.attention, tokens);
        let too_much = self.machine_memory.is_some_and(|memory| needed > memory as f64 / 3.0 * 2.0);
        too_much.then(|| format!("its scores, and what it copies, would take {}", crate::output::bytes(needed as u64)))
    }

    fn enter(&mut self, tokens: usize) -> Result<()> {
        self.entered = None;
        self.entered = Some((tokens, Rc::new(Inputs::new(&self.shape, self.rows.as_deref(), tokens, &self.device))));
        Ok(())
    }

    fn subject(&self, arm: Arm) -> Result<Box<dyn Subject>> {
        match &self.pythons {
            Some(pythons) if arm.is_python() => {
                let arguments = self.python_arguments(self.entered()?.0);
                Ok(Box::new(PythonSubject::new(&pythons.timing, arm, &arguments)?))
            }
            _ => Ok(Box::new(self.own(arm)?)),
        }
    }

    fn operations(&self, arm: Arm, phase: Phase, tokens: usize, found: Option<Retrieved>) -> Option<Operations> {
        let attention = arm.is_bsbr().then_some(&self.attention);
        let kv_heads = (self.shape.batch * self.shape.kv_heads) as f64;
        let heads = (self.shape.batch * self.shape.heads) as f64;
        let retrieved = found.map(|found| found.keys as f64 / kv_heads);
        // The original's n x n form computes what it then masks: there is no fair count of what it needs.
        let one = || operations(attention, self.shape.head_dim, 0..tokens, retrieved);
        // Choosing has no gradient.
        let times = if phase == Phase::Training { TRAINING } else { 1.0 };
        (arm != Arm::TorchOriginal)
            .then(one)
            .map(|Operations { float, integer }| Operations { float: times * heads * float, integer: heads * integer })
    }

    fn memory(&self, arm: Arm, phase: Phase, tokens: usize) -> Result<Memory> {
        let peak = match &self.pythons {
            Some(pythons) if arm.is_python() => {
                PythonSubject::new(&pythons.memory, arm, &self.python_arguments(tokens))?.peak(phase)?
            }
            _ => {
                // What the rows are hardly matters here, and a process of its own does not have a model's.
                let data = if self.shape.data == Data::Model { Data::Walk } else { self.shape.data };
                let (attention, of) = (self.attention.clone(), Of::Shape(Shape { data, ..self.shape }));
                measure("bench", &Probe { arm, attention, phase, tokens, of }, &self.flags)?
            }
        };
        let (kv_bytes, output_bytes) = (self.shape.kv_bytes(tokens), self.shape.output_bytes(tokens));
        // Gradients have the sizes of queries, keys and values.
        let handed_out = if phase == Phase::Training { output_bytes + kv_bytes } else { output_bytes };
        Ok(Memory::new(peak, kv_bytes, handed_out))
    }
}

/// A whole model.
pub(crate) struct ModelField {
    pub(crate) decoder: Decoder,
    pub(crate) dir: PathBuf,
    pub(crate) attention: BlockAttentionConfig,
    pub(crate) arms: Vec<Arm>,
    pub(crate) text: Rc<[u32]>,
    /// Texts read together, of [these lengths](model::lengths).
    pub(crate) batch: usize,
    /// What caches keep keys and values in.
    pub(crate) stored: DType,
    /// Windows to measure quality on, where a number was asked for.
    pub(crate) windows: Option<usize>,
    /// Bytes of keys and values of one token in all layers, in f32.
    pub(crate) kv_bytes_per_token: u64,
    pub(crate) pythons: Option<Pythons>,
    pub(crate) llama: Option<Rc<LlamaBench>>,
    pub(crate) flags: Vec<String>,
    pub(crate) entered: usize,
}

impl ModelField {
    fn python_arguments(&self, tokens: usize) -> serde_json::Value {
        let mut text = self.text.iter().cycle().copied();
        let read: Vec<u32> = text.by_ref().take(tokens).collect();
        json!({"dir": self.dir, "tokens": read, "next": text.take(DECODE_TOKENS).collect::<Vec<_>>()})
    }
}

impl Field for ModelField {
    fn part(&self) -> Part {
        Part::Model
    }

    fn arms(&self) -> &[Arm] {
        &self.arms
    }

    fn tokens_read(&self, phase: Phase, tokens: usize) -> usize {
        if phase.takes_text() { lengths(tokens, self.batch).sum() } else { self.batch }
    }

    fn obstacle(&self, _: Arm, phase: Phase, tokens: usize, more: usize) -> Option<String> {
        model::obstacle(&self.decoder, tokens + if phase == Phase::Decode { more } else { 0 })
    }

    fn enter(&mut self, tokens: usize) -> Result<()> {
        self.entered = tokens;
        Ok(())
    }

    fn subject(&self, arm: Arm) -> Result<Box<dyn Subject>> {
        if let Some(llama) = self.llama.as_ref().filter(|_| arm == Arm::LlamaCpp) {
            return Ok(Box::new(LlamaSubject::new(llama, self.entered)));
        }
        match &self.pythons {
            Some(pythons) if arm.is_python() => {
                Ok(Box::new(PythonSubject::new(&pythons.timing, arm, &self.python_arguments(self.entered))?))
            }
            _ => {
                let decoder = model::as_arm(&self.decoder, &self.attention, arm)?;
                Ok(Box::new(ModelSubject::new(decoder, Rc::clone(&self.text), self.entered, self.batch)))
            }
        }
    }

    fn memory(&self, arm: Arm, phase: Phase, tokens: usize) -> Result<Memory> {
        if arm == Arm::LlamaCpp {
            bail!("llama-bench does not say");
        }
        let peak = match &self.pythons {
            Some(pythons) if arm.is_python() => {
                PythonSubject::new(&pythons.memory, arm, &self.python_arguments(tokens))?.peak(phase)?
            }
            _ => {
                let (attention, of) = (self.attention.clone(), Of::Model(self.dir.clone(), self.batch, self.stored));
                measure("bench", &Probe { arm, attention, phase, tokens, of }, &self.flags)?
            }
        };
        let numbers = self.kv_bytes_per_token / size_of::<f32>() as u64;
        // What runs in Python knows nothing of this type.
        let size = if arm.is_python() { size_of::<f32>() } else { self.stored.size() } as u64;
        let kv_bytes = numbers * size * lengths(tokens, self.batch).sum::<usize>() as u64;
        Ok(Memory::new(peak, kv_bytes, kv_bytes))
    }

    fn windows(&self, tokens: usize) -> Option<(usize, usize)> {
        Some(self.windows.map_or((1, (QUALITY_TOKENS / tokens.max(1)).max(1)), |windows| (windows, windows)))
    }

    fn quality(&self, arms: &[Arm], tokens: usize, windows: usize) -> Result<Vec<(Arm, Quality)>> {
        model::quality(&self.decoder, &self.attention, arms, &self.text, (tokens, windows))
    }
}
