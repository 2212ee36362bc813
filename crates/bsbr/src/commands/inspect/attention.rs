//! `bsbr inspect --attention`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use bsbr_convert::ModelSource;
use bsbr_model::{
    AttentionMap, AttentionMapConfig, HeadMap, LayerMap, PositionPolicy, Positions, TextTokenizer, attention_map,
};
use serde_json::{Value, json};

use crate::{
    args::{CacheArgs, SettingFlags, by_name},
    builtin,
    device::DeviceArgs,
    output::{Progress, table},
    page::{
        HtmlArgs,
        attention::{kind, layers, mean, page, said},
    },
    record,
    report::{Forms, ReportArgs},
    running::{load, note_beyond_training, read_tokens},
};

/// Tokens of a text that are read unless said otherwise.
const TOKENS: usize = 2048;

/// What to show of a text.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "What tokens read")]
pub(super) struct MapArgs {
    /// Show instead what the tokens of a text read in every layer and head; `-` is standard input, the built-in held-out text
    /// when no file is named
    #[arg(long, num_args = 0..=1, value_name = "TEXT", conflicts_with_all = ["tensors", "rules", "devices"])]
    attention: Option<Option<PathBuf>>,
    /// Most tokens of the text [default: 2048, or the learned positions]
    #[arg(long, value_name = "N", requires = "attention")]
    tokens: Option<usize>,
    #[command(flatten)]
    page: HtmlArgs,
    /// Past the trained length: error; clamp, interpolate, slide (learned); grouped (rotary) [default: the model's own]
    #[arg(long, value_name = "POLICY", value_parser = by_name::<PositionPolicy>, requires = "attention")]
    positions: Option<PositionPolicy>,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    settings: SettingFlags,
}

impl MapArgs {
    /// Whether a text is to be looked at.
    pub(super) fn wanted(&self) -> bool {
        self.attention.is_some()
    }

    /// Checks what can be checked before anything runs.
    pub(super) fn check(&self) -> Result<()> {
        if !self.wanted() && self.page.path().is_some() {
            bail!("--html belongs to --attention: without it nothing is drawn");
        }
        if !self.wanted() && self.settings.resolve(None)?.is_some() {
            bail!("settings of attention belong to --attention: without it nothing reads a text");
        }
        if self.tokens == Some(0) {
            bail!("--tokens is 0, expected at least 1");
        }
        self.page.check()
    }
}

pub(super) fn run(args: &MapArgs, mut source: ModelSource, report: &ReportArgs, device: &DeviceArgs) -> Result<()> {
    let own = source.model_config().attention.clone();
    let attention = args.settings.resolve(own.as_ref())?.or(own).unwrap_or_default();
    let device = device.resolve()?;
    let tokenizer = source.text_tokenizer()?;
    let file = builtin::or_heldout(args.attention.clone().flatten())?;
    let (mut tokens, text_sha256) = read_tokens(&tokenizer, &file)?;
    let description = source.description();
    source = source.with_attention(Some(attention.clone()))?;
    let mut decoder = load(source, &device)?.with_cache_type(args.cache.cache_dtype.into());
    if let Some(policy) = args.positions {
        decoder = decoder.with_config(|config| config.position_policy = policy)?;
    }
    let positions = match decoder.config().decoder.positions {
        Positions::Learned => decoder.config().decoder.max_positions,
        _ => usize::MAX,
    };
    let all = tokens.len();
    tokens.truncate(args.tokens.unwrap_or(TOKENS.min(positions)));
    note_beyond_training(&decoder, tokens.len());
    let mut progress = Progress::new("reading");
    let map = attention_map(&decoder, &tokens, AttentionMapConfig::default(), |done, total| {
        progress.set(done as u64, total as u64);
    })?;
    drop(progress);
    let [pieces, row_pieces] = pieces(&tokenizer, &tokens, &map)?;
    let data = json!({
        "schema": "bsbr-inspect-attention/1", "about": record::about(&description, Some(text_sha256)),
        "model": description, "attention": attention, "text": {"tokens": all}, "map": map, "pieces": pieces, "row_pieces": row_pieces,
    });
    args.page.write(|| Ok(page(&description, &map, &data)))?;
    report.emit(&Forms {
        table: &|| {
            let (header, rows) = layers(&map);
            Ok(format!("{description}\n{}\n\n{}", said(&map), table(&header, &rows)))
        },
        json: &|| Ok(data.clone()),
        rows: Some(&|_| heads(&map)),
    })
}

/// The text of each part, and that of each token that has a row. A character that takes several tokens belongs to the last.
fn pieces(tokenizer: &TextTokenizer, tokens: &[u32], map: &AttentionMap) -> Result<[Vec<String>; 2]> {
    let mut stream = tokenizer.stream();
    let mut texts = tokens.iter().map(|&token| stream.push(token)).collect::<Result<Vec<String>, _>>()?;
    let rest = stream.finish()?;
    if let Some(last) = texts.last_mut() {
        last.push_str(&rest);
    }
    let rows = map.rows.iter().map(|&at| texts[at].clone()).collect();
    Ok([texts.chunks(map.part).map(<[String]>::concat).collect(), rows])
}

/// A row to a head: means over the tokens that have a row.
fn heads(map: &AttentionMap) -> Vec<Value> {
    let row = |layer: &LayerMap, (head, map): (usize, &HeadMap)| {
        let count = |of: &[u32]| of.iter().map(|&x| f64::from(x)).sum::<f64>() / of.len().max(1) as f64;
        json!({
            "layer": layer.layer, "head": head, "attention": kind(layer),
            "near": mean(&map.near), "chosen": mean(&map.chosen), "statistics": mean(&map.statistics),
            "covered": mean(&map.covered), "apart": mean(&map.apart),
            "near_keys": count(&map.near_keys), "chosen_keys": count(&map.chosen_keys), "runs": count(&map.runs),
        })
    };
    map.layers.iter().flat_map(|layer| layer.heads.iter().enumerate().map(|head| row(layer, head))).collect()
}
