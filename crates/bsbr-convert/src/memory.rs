//! What a model needs of memory while it runs, and what a machine has.

use std::fmt;

use bsbr_model::{DecoderConfig, GatedDelta, ModelConfig, PREFILL_PIECE, WeightSpec, weight_specs};

use crate::ConvertError;
use crate::policy::WeightsPolicy;
use crate::source::ModelSource;
use crate::tensors::TensorDeclaration;

/// What the process takes besides: code, buffers.
const REST: u64 = 48 << 20;

/// What the tokenizer takes for each token it knows, its merges included.
const OF_A_TOKEN: u64 = 512;

/// Bytes of memory that a model needs while it runs on the CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights in mapped files: the system may drop them and read them again, which is slow.
    pub mapped: u64,
    /// Weights of which memory holds a copy: decoded, or rearranged.
    pub copied: u64,
    /// Keys and values.
    pub cache: u64,
    /// All else, the intermediate numbers of a piece of text above all.
    pub working: u64,
}

impl MemoryNeed {
    /// All of it.
    pub fn total(self) -> u64 {
        self.resident().saturating_add(self.mapped)
    }

    /// What has to stay in memory.
    pub fn resident(self) -> u64 {
        self.copied.saturating_add(self.cache).saturating_add(self.working)
    }
}

/// Bytes of memory of a machine, or of the part of it that this process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineMemory {
    /// Altogether.
    pub total: u64,
    /// Free, or used for nothing but copies of files.
    pub available: u64,
}

impl MachineMemory {
    /// That of this machine, no more than the control groups of this process allow; none where the system does not say.
    pub fn read() -> Option<Self> {
        let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let limits = limit_files(&groups).into_iter().filter_map(|path| std::fs::read_to_string(path).ok());
        Self::of(&meminfo, limits)
    }

    /// From the text of `/proc/meminfo` and those of limits.
    fn of(meminfo: &str, limits: impl Iterator<Item = String>) -> Option<Self> {
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        };
        let (total, available) = (field("MemTotal")?, field("MemAvailable")?);
        // `max` is no limit.
        let limit = limits.filter_map(|limit| limit.trim().parse::<u64>().ok()).min().unwrap_or(u64::MAX);
        Some(Self { total: total.min(limit), available: available.min(limit) })
    }

    /// Whether a model that needs so much can run: what has to stay fits in what is free, and all of it in all there is, as weights that are
    /// read from the disk for every token are of no use.
    pub fn holds(self, need: MemoryNeed) -> bool {
        need.resident() <= self.available && need.total() <= self.total
    }
}

impl fmt::Display for MachineMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} GB are free of {:.1} GB", self.available as f64 / 1e9, self.total as f64 / 1e9)
    }
}

/// The files that may limit the memory of a process with these control groups: of both versions, in its group and those around it.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(kinds), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (root, name) = match kinds {
            "" => ("/sys/fs/cgroup", "memory.max"),
            kinds if kinds.split(',').any(|kind| kind == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let mut at = path.trim_matches('/');
        loop {
            files.push(if at.is_empty() { format!("{root}/{name}") } else { format!("{root}/{at}/{name}") });
            if at.is_empty() {
                break;
            }
            at = at.rsplit_once('/').map_or("", |(above, _)| above);
        }
    }
    files
}

impl ModelSource {
    /// What the model needs to run on the CPU, with a cache for `tokens` tokens of full attention in f32. Matrices are kept as they are
    /// stored, all else becomes f32.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Rules`] for a mistake in the rules of its architecture.
    pub fn memory_need(&self, tokens: usize) -> Result<MemoryNeed, ConvertError> {
        let mut need = without_weights(self.model_config(), self.cache_bytes_per_token(), tokens);
        for spec in weight_specs(self.model_config()) {
            let (bytes, mapped) = self.stored_bytes(&spec)?.unwrap_or((f32_bytes(&spec), false));
            *(if mapped { &mut need.mapped } else { &mut need.copied }) += bytes;
        }
        Ok(need)
    }

    /// What a conversion of the model to another number format would need.
    ///
    /// # Errors
    ///
    /// As [`ModelSource::memory_need`].
    pub fn memory_need_as(&self, policy: WeightsPolicy, tokens: usize) -> Result<MemoryNeed, ConvertError> {
        let mut need = without_weights(self.model_config(), self.cache_bytes_per_token(), tokens);
        for spec in weight_specs(self.model_config()) {
            match self.own_format(&spec)? {
                Some(own) if spec.shape.len() == 2 => {
                    let format = policy.apply(&spec, own);
                    need.mapped += TensorDeclaration::weight(spec.name, format, spec.shape).bytes() as u64;
                }
                _ => need.copied += f32_bytes(&spec),
            }
        }
        Ok(need)
    }
}

fn f32_bytes(spec: &WeightSpec) -> u64 {
    spec.shape.iter().product::<usize>() as u64 * 4
}

fn without_weights(config: &ModelConfig, cache_bytes_per_token: usize, tokens: usize) -> MemoryNeed {
    MemoryNeed {
        cache: cache_bytes_per_token as u64 * tokens as u64 + 4 * config.decoder.state_width() as u64,
        working: REST + OF_A_TOKEN * config.decoder.vocab_size as u64 + working_bytes(&config.decoder),
        ..MemoryNeed::default()
    }
}

/// The numbers between the layers of a block for a piece of text, and logits.
fn working_bytes(d: &DecoderConfig) -> u64 {
    let layers = || (0..d.layers).map(|layer| d.shape(layer));
    let attention = layers().map(|shape| 2 * (d.heads + shape.kv_heads) * shape.head_dim).max().unwrap_or(0);
    let of_recurrent = |recurrent: &GatedDelta| 3 * recurrent.channels() + 2 * recurrent.values_width();
    let attention = attention.max(d.recurrent.as_ref().map_or(0, of_recurrent));
    let inner = layers().map(|shape| shape.intermediate_size).max().unwrap_or(0);
    let inputs = d.embedding.per_layer.map_or(0, |inputs| 2 * d.layers * inputs.width);
    let experts = d.experts.as_ref().map_or(0, |experts| experts.chosen * experts.intermediate_size);
    let token = 4 * d.hidden_size + attention + 3 * inner.max(experts) + inputs;
    4 * (PREFILL_PIECE * token + 2 * d.vocab_size) as u64
}

/// Formats that a model may be converted to so that it fits, the nearest to its numbers first.
const SMALLER: [(&str, WeightsPolicy); 4] = [
    ("keep", WeightsPolicy::Keep),
    ("bf16", WeightsPolicy::Bf16),
    ("int8", WeightsPolicy::Int8),
    ("int4", WeightsPolicy::Int4),
];

/// The values of `--weights` with which a model would fit in `machine`, with what it then needs, the nearest to its numbers first.
///
/// # Errors
///
/// As [`ModelSource::memory_need`].
pub fn fitting_weights(
    source: &ModelSource,
    machine: MachineMemory,
    tokens: usize,
) -> Result<Vec<(&'static str, MemoryNeed)>, ConvertError> {
    let mut fitting = Vec::new();
    for (name, policy) in SMALLER {
        let need = source.memory_need_as(policy, tokens)?;
        if machine.holds(need) {
            fitting.push((name, need));
        }
    }
    Ok(fitting)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str =
        "MemTotal:       16384 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\nBuffers: 1 kB\n";

    #[test]
    fn the_memory_of_a_machine_is_no_more_than_the_smallest_limit() {
        let of = |limits: &[&str]| MachineMemory::of(MEMINFO, limits.iter().map(ToString::to_string));
        let machine =
            |total: u64, available: u64| Some(MachineMemory { total: total << 10, available: available << 10 });
        assert_eq!(of(&[]), machine(16384, 8192));
        assert_eq!(of(&["max\n", "9223372036854771712\n"]), machine(16384, 8192));
        assert_eq!(of(&["max\n", "12582912\n"]), machine(12288, 8192));
        assert_eq!(of(&["4194304\n", "12582912\n"]), machine(4096, 4096));
        assert_eq!(MachineMemory::of("MemTotal: 5 kB\n", std::iter::empty()), None);
        assert_eq!(MachineMemory::of("MemTotal: x kB\nMemAvailable: 4 kB\n", std::iter::empty()), None);
    }

    #[test]
    fn limits_are_looked_for_in_a_group_and_those_around_it() {
        assert_eq!(
            limit_files("0::/user.slice/a.scope\n"),
            [
                "/sys/fs/cgroup/user.slice/a.scope/memory.max",
                "/sys/fs/cgroup/user.slice/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            limit_files("4:cpu,memory:/docker/x\n3:cpuset:/y\n"),
            [
                "/sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes"
            ]
        );
        assert_eq!(limit_files("0::/\n"), ["/sys/fs/cgroup/memory.max"]);
        assert!(limit_files("nonsense\n\n").is_empty());
    }

    #[test]
    fn what_stays_must_be_free_and_all_must_be_there() {
        let machine = MachineMemory { total: 100, available: 40 };
        let need = |mapped, copied| MemoryNeed { mapped, copied, cache: 10, working: 10 };
        assert!(machine.holds(need(60, 20)));
        assert!(!machine.holds(need(0, 21)), "more copies than are free");
        assert!(!machine.holds(need(61, 20)), "more weights than there is memory");
        assert!(machine.holds(need(80, 0)), "mapped weights may take the place of what is cached");
        assert!(!machine.holds(need(u64::MAX, u64::MAX)));
    }
}
