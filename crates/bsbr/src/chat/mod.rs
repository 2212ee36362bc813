//! Chats with a model: what `chat` and `generate --chat` share.

pub(crate) mod commands;
pub(crate) mod session;

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context, Result, bail};
use bsbr_convert::ModelSource;
use bsbr_model::{ChatTemplate, TextTokenizer};
use serde_json::Value;

use crate::running::read_text;

/// Tokens that end a turn in well-known models, where the tokenizer has them as special ones. Some checkpoints name only the
/// end of the whole text in their settings.
const ENDS: [&str; 9] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|call|>",
    "<|eot|>",
];

/// How messages become a text.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Chat")]
pub(crate) struct TemplateArgs {
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    form: FormArgs,
}

/// The template itself.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Chat")]
pub(crate) struct FormArgs {
    /// Jinja file to use instead of the model's own chat template
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Variables for the chat template, as a JSON object such as {"enable_thinking": false}
    #[arg(long, value_name = "JSON")]
    chat_template_args: Option<String>,
}

impl FormArgs {
    /// Variables for the template.
    pub(crate) fn variables(&self) -> Result<BTreeMap<String, Value>> {
        let Some(json) = &self.chat_template_args else { return Ok(BTreeMap::new()) };
        serde_json::from_str(json).context("--chat-template-args: expected a JSON object")
    }

    /// The template asked for, or the model's own.
    pub(crate) fn template(&self, source: &ModelSource) -> Result<ChatTemplate> {
        match self.find(source)? {
            Some(template) => Ok(template),
            None => bail!(
                "{} has no chat template: it continues texts (generate), or takes the template of another model with \
                 --chat-template FILE",
                source.description()
            ),
        }
    }

    /// The same; `None` where there is neither.
    pub(crate) fn find(&self, source: &ModelSource) -> Result<Option<ChatTemplate>> {
        find(source, self.chat_template.as_ref().map(|path| read_text(path)).transpose()?)
    }
}

impl TemplateArgs {
    /// Variables for the template.
    pub(crate) fn variables(&self) -> Result<BTreeMap<String, Value>> {
        self.form.variables()
    }

    /// The template asked for, or the model's own.
    pub(crate) fn template(&self, source: &ModelSource) -> Result<ChatTemplate> {
        self.form.template(source)
    }

    /// Whether anything here was asked for.
    pub(crate) fn asked(&self) -> Option<&'static str> {
        let given = [
            ("--system", self.system.is_some()),
            ("--chat-template", self.form.chat_template.is_some()),
            ("--chat-template-args", self.form.chat_template_args.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }
}

/// The template `given`, or that of a model, with the model's special tokens.
pub(crate) fn find(source: &ModelSource, given: Option<String>) -> Result<Option<ChatTemplate>> {
    let text = |name: &str| -> Result<Option<String>> {
        let Some(bytes) = source.companion(name)? else { return Ok(None) };
        String::from_utf8(bytes).map(Some).with_context(|| format!("{name} of {} is not UTF-8", source.description()))
    };
    let jinja = match given {
        Some(given) => Some(given),
        None => text("chat_template.jinja")?,
    };
    let config = text("tokenizer_config.json")?;
    Ok(ChatTemplate::from_files(jinja.as_deref(), config.as_deref())?)
}

/// Tokens that end an answer: those that end a text of the model, what the template writes behind an answer, and the usual ones.
pub(crate) fn end_tokens(
    text_ends: &[u32],
    template: &ChatTemplate,
    variables: &BTreeMap<String, Value>,
    tokenizer: &TextTokenizer,
) -> Vec<u32> {
    let mut ends = text_ends.to_vec();
    let named = template.special_token("eos_token").into_iter().chain(ENDS);
    ends.extend(named.filter_map(|token| tokenizer.special_token(token)));
    // A template that takes no such messages names none.
    let behind = template.end_of_turn(variables).unwrap_or_default();
    let first = tokenizer.encode_within(behind.trim_start()).unwrap_or_default().into_iter().next();
    ends.extend(first.filter(|&token| tokenizer.is_special(token)));
    ends.sort_unstable();
    ends.dedup();
    ends
}
