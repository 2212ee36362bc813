//! Models and texts as the commands use them.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use bsbr_attn::{BlockAttentionConfig, Retrieval};
use bsbr_convert::{ConvertError, MachineMemory, ModelSource, Placeholder, check_file, fitting_weights};
use bsbr_model::{
    Decoder, EvaluateConfig, EvaluationReport, LayerRotary, PositionPolicy, Positions, RotaryScaling, TextTokenizer,
    WeightSource, WeightSpec, check_windows, evaluate, weight_specs,
};
use bsbr_weights::StoredMatrix;
use burn::tensor::{DType, Device};

use crate::{
    commands::chat::RunArgs,
    model::LocalModel,
    output::{self, Progress},
    record,
};

/// Opens a model under the name it was asked for.
pub(crate) fn open(model: &LocalModel) -> Result<ModelSource> {
    let source = ModelSource::open(&model.dir)?;
    Ok(match &model.origin {
        Some(origin) => source.with_name(origin.to_string()),
        None => source,
    })
}

/// Tokens whose keys and values are counted before it is known how long a text will be.
const USUAL_TOKENS: usize = 4096;

/// Whether weights stay as they are stored in the memory of this machine.
fn is_cpu(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    let cpu = *device == Device::flex();
    #[cfg(not(feature = "flex"))]
    let cpu = {
        let _ = device;
        false
    };
    cpu
}

/// Refuses a model that this machine cannot run, before anything is read.
fn check_memory(source: &ModelSource, machine: MachineMemory) -> Result<()> {
    let tokens = source.model_config().decoder.max_positions.min(USUAL_TOKENS);
    let need = source.memory_need(tokens)?;
    if machine.holds(need) {
        return Ok(());
    }
    let mut text = format!(
        "{} needs {} of memory (weights {}, keys and values of {tokens} tokens {}, the rest {}), and {machine}",
        source.description(),
        output::bytes(need.total()),
        output::bytes(need.mapped + need.copied),
        output::bytes(need.cache),
        output::bytes(need.working)
    );
    let fitting = fitting_weights(source, machine, tokens)?;
    let what = if source.is_converted() { "convert its original" } else { "convert it" };
    match &fitting[..] {
        [] => text += "; no number format of `bsbr convert --weights` makes it fit",
        all => {
            let all = all.iter().map(|(name, need)| format!("--weights {name} ({})", output::bytes(need.total())));
            text += &format!("; {what} first, it fits with {}", all.collect::<Vec<_>>().join(" or "));
        }
    }
    bail!(text)
}

/// Reads the weights of a model onto a device, unless they do not fit.
pub(crate) fn load(mut source: ModelSource, device: &Device) -> Result<Decoder> {
    if let Some(machine) = MachineMemory::read().filter(|_| is_cpu(device)) {
        check_memory(&source, machine)?;
    }
    struct Counted<'a> {
        source: &'a mut ModelSource,
        progress: Progress,
        done: u64,
        total: u64,
    }
    impl WeightSource for Counted<'_> {
        fn read(&mut self, spec: &WeightSpec) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
            let numbers = self.source.read(spec)?;
            self.count();
            Ok(numbers)
        }
        fn stored(
            &mut self,
            spec: &WeightSpec,
        ) -> Result<Option<StoredMatrix>, Box<dyn std::error::Error + Send + Sync>> {
            let stored = self.source.stored(spec)?;
            if stored.is_some() {
                self.count();
            }
            Ok(stored)
        }
    }
    impl Counted<'_> {
        fn count(&mut self) {
            self.done += 1;
            self.progress.set(self.done, self.total);
        }
    }
    let config = source.model_config().clone();
    let total = weight_specs(&config).len() as u64;
    let mut counted = Counted { source: &mut source, progress: Progress::new("loading"), done: 0, total };
    Ok(Decoder::load(config, &mut counted, device)?)
}

/// A model with the attention that the flags ask for: settings make a converted model of a checkpoint while it runs, and change
/// those of a converted one.
pub(crate) fn configured(mut source: ModelSource, run: &RunArgs) -> Result<Decoder> {
    let own = source.model_config().attention.clone();
    match (run.attention.resolve(own.as_ref())?, run.full_attention) {
        (Some(_), true) => bail!("--full-attention leaves no use for settings of BSBR attention: give one of them"),
        (Some(attention), false) => source = source.with_attention(Some(attention))?,
        (None, true) => source = source.with_attention(None)?,
        (None, false) => {}
    }
    let device = run.device.resolve()?;
    let mut decoder =
        load(source, &device)?.with_cache_type(run.cache.on(&device)).with_arithmetic(run.arithmetic.into());
    if let Some(policy) = run.positions {
        decoder = decoder.with_config(|config| config.position_policy = policy)?;
    }
    Ok(decoder)
}

/// Tokens of a text file, and the SHA-256 of the file in lower-case hexadecimal.
pub(crate) fn read_tokens(tokenizer: &TextTokenizer, path: &Path) -> Result<(Vec<u32>, String)> {
    let (text, sha256) = read_hashed(path)?;
    if text.trim().is_empty() {
        bail!("{}: the text is empty", path.display());
    }
    Ok((tokenizer.encode(&text)?, sha256))
}

/// The text in a file, or on standard input for `-`: in UTF-8, without the mark that some editors put in front, its lines
/// ended by line feeds alone. That is how Python reads texts, and so how models were trained on them.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    read_hashed(path).map(|(text, _)| text)
}

/// The same, and the SHA-256 of what was read.
fn read_hashed(path: &Path) -> Result<(String, String)> {
    let (shown, bytes) = if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        let read = std::io::stdin().lock().read_to_end(&mut bytes);
        ("standard input".to_owned(), read.map(|_| bytes))
    } else {
        match check_file(path) {
            // A text may be the name of a file.
            Ok(()) | Err(ConvertError::Placeholder { problem: Placeholder::WrittenLink { .. }, .. }) => {}
            Err(error) => return Err(error.into()),
        }
        (path.display().to_string(), std::fs::read(path))
    };
    let bytes = bytes.with_context(|| format!("cannot read the text {shown}"))?;
    let sha256 = record::sha256_of(&bytes);
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) if error.as_bytes().starts_with(&[0xff, 0xfe]) || error.as_bytes().starts_with(&[0xfe, 0xff]) => {
            bail!("{shown} is in UTF-16: write it in UTF-8")
        }
        Err(error) => {
            bail!("{shown} is not in UTF-8, from byte {} on: write it in UTF-8", error.utf8_error().valid_up_to())
        }
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    Ok((text.replace("\r\n", "\n"), sha256))
}

/// A note where a text of `length` tokens reaches beyond what rotary positions were trained for and nothing is done about it.
pub(crate) fn note_beyond_training(decoder: &Decoder, length: usize) {
    let config = decoder.config();
    let trained = config.decoder.max_positions;
    // The base of this scaling grows with the text.
    let rotary = match &config.decoder.positions {
        Positions::Rotary { scaling, .. } => !matches!(scaling, Some(RotaryScaling::Dynamic { .. })),
        _ => false,
    };
    // Within its window a layer knows no distance that is too long.
    let far = (0..config.decoder.layers).any(|layer| {
        config.decoder.rotary(layer) != LayerRotary::Off
            && config.decoder.window(layer).is_none_or(|window| window > trained)
    });
    if !rotary || !far || length <= trained || config.position_policy == PositionPolicy::Grouped {
        return;
    }
    let how = match config.attention {
        Some(_) => "--positions grouped reads what is far at positions it was trained on",
        None => "converted, it can read what is far at positions it was trained on: --positions grouped",
    };
    output::note(&format!(
        "note: up to {length} tokens, and the model was trained on {trained} positions: beyond them it gets worse; {how}"
    ));
}

/// SHA-256 of a file, in lower-case hexadecimal.
///
/// # Errors
///
/// If it cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    let content = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(record::sha256_of(&content))
}

/// What to measure with a window of `window` tokens.
fn windows_of(attention: &BlockAttentionConfig, window: usize, windows: usize) -> EvaluateConfig {
    EvaluateConfig { window, windows, skip: attention.chunk_size.min(window.saturating_sub(2)) }
}

/// Measures `decoder` under `attention` against its own original attention, or against `original`, with `retrieval = none` as the
/// control; one report for each of the window lengths `lengths`. All of them are checked before the first runs.
pub(crate) fn measure(
    decoder: &Decoder,
    original: Option<&Decoder>,
    attention: &BlockAttentionConfig,
    tokens: &[u32],
    (lengths, windows): (&[usize], usize),
    mut each: impl FnMut(EvaluationReport) -> Result<()>,
) -> Result<()> {
    let compared = original.is_some();
    let full = decoder.with_config(|config| config.attention = None)?.with_cache_type(DType::F32);
    let original = match original {
        Some(original) => {
            check_comparable(original, decoder)?;
            original.with_config(|config| config.attention = None)?.with_cache_type(DType::F32)
        }
        None => full.clone(),
    };
    let converted = decoder.with_config(|config| config.attention = Some(attention.clone()))?;
    let control = decoder.with_config(|config| config.attention = Some(attention.without_retrieval()))?;
    let mut variants = vec![("converted", &converted)];
    if compared {
        variants.insert(0, ("full attention", &full));
    }
    if attention.retrieval != Retrieval::None {
        variants.push(("control: none", &control));
    }
    for &length in lengths {
        check_windows(decoder, tokens.len(), windows_of(attention, length, windows))?;
    }
    for &length in lengths {
        let config = windows_of(attention, length, windows);
        let mut progress = Progress::new("evaluating");
        let report =
            evaluate(&original, &variants, tokens, config, |done, total| progress.set(done as u64, total as u64))?;
        drop(progress);
        each(report)?;
    }
    Ok(())
}

/// Refuses two models whose scores are not about the same tokens.
fn check_comparable(original: &Decoder, decoder: &Decoder) -> Result<()> {
    let sizes = |decoder: &Decoder| {
        let decoder = &decoder.config().decoder;
        (decoder.vocab_size, decoder.hidden_size)
    };
    let ((vocab, hidden), (own_vocab, own_hidden)) = (sizes(original), sizes(decoder));
    if (vocab, hidden) != (own_vocab, own_hidden) {
        bail!(
            "the original has {vocab} tokens and states of {hidden} numbers, the model {own_vocab} and {own_hidden}: take the model \
             that it was made from"
        );
    }
    Ok(())
}

/// An evaluation as two tables.
pub(crate) fn evaluation_tables(report: &EvaluationReport) -> String {
    let number = |value: f64| format!("{value:.3}");
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let original = &report.original;
    let dash = || "-".to_owned();
    let mut rows = vec![vec![
        "original".to_owned(),
        number(original.all),
        number(original.later),
        dash(),
        dash(),
        dash(),
        dash(),
        dash(),
        dash(),
        percent(original.keys_share),
        format!("{:.1}", original.seconds),
    ]];
    for variant in &report.variants {
        let (perplexity, agreement) = (&variant.perplexity, &variant.agreement);
        rows.push(vec![
            variant.name.clone(),
            number(perplexity.all),
            number(perplexity.later),
            format!("{:+.2} %", 100.0 * (perplexity.all / original.all - 1.0)),
            percent(agreement.top1),
            percent(agreement.top5),
            percent(agreement.top10),
            format!("{:.5}", agreement.kl),
            format!("{:.5}", agreement.cosine),
            percent(perplexity.keys_share),
            format!("{:.1}", perplexity.seconds),
        ]);
    }
    let later = format!("after {}", report.skip);
    let agreement = ["top-1", "top-5", "top-10", "KL", "cosine"];
    let header =
        [["attention", "perplexity", &later, "change"].as_slice(), &agreement, &["keys read", "seconds"]].concat();
    let summary = output::table(&header, &rows);

    let ranges: Vec<String> =
        original.by_position.iter().map(|bucket| format!("{}-{}", bucket.start, bucket.end)).collect();
    let header: Vec<&str> = std::iter::once("perplexity at").chain(ranges.iter().map(String::as_str)).collect();
    let all = std::iter::once(("original", original));
    let all = all.chain(report.variants.iter().map(|variant| (variant.name.as_str(), &variant.perplexity)));
    let rows: Vec<Vec<String>> = all
        .map(|(name, perplexity)| {
            let buckets = perplexity.by_position.iter().map(|bucket| format!("{:.2}", bucket.perplexity));
            std::iter::once(name.to_owned()).chain(buckets).collect()
        })
        .collect();
    let head =
        format!("{} windows of {} tokens; agreement after the first {}", report.windows, report.window, report.skip);
    format!("{head}\n\n{summary}\n\n{}", output::table(&header, &rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builtin;

    #[test]
    fn a_model_that_is_too_large_is_refused_with_what_would_fit() {
        let source = ModelSource::open(&builtin::or_builtin(None).unwrap()).unwrap();
        let tokens = source.model_config().decoder.max_positions.min(USUAL_TOKENS);
        let need = source.memory_need(tokens).unwrap();
        let machine = |bytes: u64| MachineMemory { total: bytes, available: bytes };
        check_memory(&source, machine(need.total())).unwrap();
        let everything = fitting_weights(&source, machine(u64::MAX), tokens).unwrap();
        let of = |name: &str| everything.iter().find(|(known, _)| *known == name).unwrap().1;
        let (kept, int8) = (of("keep"), of("int8"));
        assert!(int8.total() < kept.total() && kept.total() <= need.total());
        let text = check_memory(&source, machine(int8.total())).unwrap_err().to_string();
        assert!(text.contains("fits with --weights int8 ("), "{text}");
        assert!(!text.contains("--weights keep"), "{text}");
        let text = check_memory(&source, machine(1 << 20)).unwrap_err().to_string();
        assert!(text.contains("no number format") && text.contains("0.0 GB are free"), "{text}");
    }
}
