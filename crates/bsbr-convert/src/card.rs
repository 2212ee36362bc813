//! The model card of a converted model.

use std::fmt::Write as _;

use serde_json::Value;

use crate::record::ConversionRecord;
use crate::tensors::FileFormat;
use crate::tie::HeadForm;

/// The text of `README.md`. Says nothing that depends on when or where it was written.
pub(crate) fn model_card(record: &ConversionRecord, notes: &[String], measured: &[(String, String)]) -> String {
    let mut text = String::from("---\ntags:\n- bsbr\n");
    // A hub id has one slash; the name of a directory has none and means nothing to anyone else.
    if record.source.contains('/') {
        let _ = writeln!(text, "base_model: {}", record.source);
    }
    let _ = write!(
        text,
        "---\n\n# {} with BSBR attention\n\n\
         The weights of `{}` in the layout of BSBR (block sparse attention with block retrieval): exact softmax \
         attention near a token, retrieval of blocks further back. {}\n\n## How it was made\n\n",
        record.source,
        record.source,
        reversibility(record)
    );
    let head = match record.head {
        HeadForm::Absent => "the embedding table (not stored a second time)",
        HeadForm::TiedCopy => "the embedding table (stored a second time in the source)",
        HeadForm::Own => "weights of its own",
    };
    let _ = writeln!(text, "- rules: `{}` version {}, prefix `{}`", record.rules, record.rules_version, record.prefix);
    let _ = writeln!(text, "- output head: {head}");
    if let Some(hub) = &record.hub {
        let _ = writeln!(text, "- source: `{}`, revision `{}`, commit `{}`", hub.repository, hub.revision, hub.commit);
    }
    for file in &record.files {
        let _ = writeln!(text, "- source file: `{}`, {} bytes, SHA-256 `{}`", file.name, file.bytes, file.sha256);
    }
    for note in notes {
        let _ = writeln!(text, "- note: {note}");
    }
    let added = record.parameters_after - record.parameters_before;
    let _ = write!(
        text,
        "\n## Parameters\n\n| original | added | together |\n|---:|---:|---:|\n| {} | {added} | {} |\n\n## Settings\n\n",
        record.parameters_before, record.parameters_after
    );
    match record.settings.as_ref().and_then(|settings| serde_json::to_value(settings).ok()) {
        Some(Value::Object(settings)) => {
            text.push_str("| setting | value |\n|---|---|\n");
            for (setting, value) in settings {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                let _ = writeln!(text, "| `{setting}` | {} |", if value == "null" { "unset" } else { &value });
            }
        }
        _ => text.push_str("The original attention: no BSBR settings were given.\n"),
    }
    if !measured.is_empty() {
        text.push_str("\n## Measured\n\n| measure | value |\n|---|---|\n");
        for (measure, value) in measured {
            let _ = writeln!(text, "| {measure} | {value} |");
        }
    }
    text
}

/// What is said of a model whose weights are no longer the original's.
pub(crate) const CHANGED: &str =
    "Weights of the original were changed after converting; exporting gives the changed ones.";

/// What an export can give back.
pub(crate) fn reversibility(record: &ConversionRecord) -> &'static str {
    if record.changed {
        CHANGED
    } else if record.casts.iter().any(|cast| cast.is_lossy()) {
        "Weights were cast to another number format, which changed some of them for good: it cannot be exported."
    } else if record.weights.keeps() && record.files.iter().any(|file| file.format == FileFormat::Gguf) {
        "No number of the original was changed, codes are as they were; `export --to gguf` gives the GGUF file back byte for byte."
    } else if record.files.iter().any(|file| record.is_decoded(&file.name)) {
        "Its numbers are those the quantised codes of the original stand for; exporting writes them in safetensors \
         files, the codes are not kept."
    } else if record.files.iter().all(|file| file.export.is_none()) {
        "No original weight was changed; exporting gives the original files back bit for bit."
    } else {
        "No original weight was changed; exporting gives the original tensors back bit for bit, in safetensors files."
    }
}

/// A model card with a section in place of one of the same heading, or at its end.
pub(crate) fn with_section(card: &str, heading: &str, text: &str) -> String {
    let start = format!("\n## {heading}\n");
    let (before, after) = match card.split_once(&start) {
        // Up to the next section.
        Some((before, old)) => (before, old.find("\n## ").map_or("", |next| &old[next..])),
        None => (card, ""),
    };
    format!("{before}{start}\n{}\n{after}", text.trim_end())
}

/// A model card with a section on calibration in place of any that it had.
pub(crate) fn with_calibration(card: &str, record: &ConversionRecord) -> String {
    let whole = if card.is_empty() { model_card(record, &[], &[]) } else { card.to_owned() };
    let Some(calibration) = &record.calibration else { return whole };
    let accepted = calibration.meta.iter().filter(|layer| layer.accepted).count();
    let mut text = String::new();
    if !calibration.meta.is_empty() {
        let layers = calibration.meta.len();
        let _ = writeln!(
            text,
            "Meta projections: fitted in {accepted} of {layers} layers, the others keep their start values."
        );
    }
    if !calibration.states.is_empty() {
        let _ = writeln!(text, "States: a basis to compress them along in {} layers.", calibration.states.len());
    }
    if !calibration.far.is_empty() {
        let shifted = calibration.far.iter().filter(|layer| layer.shift != 0.0).count();
        let layers = calibration.far.len();
        let _ = writeln!(text, "Keys read by means: their masses are shifted in {shifted} of {layers} layers.");
    }
    if let Some(index) = &calibration.index {
        let (found, layers) = (index.found.settings, index.threshold_factors.iter().filter(|factor| **factor != 1.0));
        let _ = writeln!(
            text,
            "Index: `threshold` {}, `max_keys` {}, `index_channels` {} in place of the settings above, and a threshold of its own in \
             {} layers: the cheapest found within a KL of {} from the original, {:.5} on held-out windows.",
            found.threshold,
            found.max_keys,
            found.index_channels,
            layers.count(),
            index.target_kl,
            index.held_out_kl,
        );
    }
    let _ = writeln!(
        text,
        "Read: {} tokens in windows of {}, {} of them held out, of a text with SHA-256 `{}`. No weight of the original was \
         changed. Anything measured above was measured before.",
        calibration.tokens, calibration.window, calibration.held_out, calibration.text_sha256,
    );
    with_section(&whole, "Calibration", &text)
}
