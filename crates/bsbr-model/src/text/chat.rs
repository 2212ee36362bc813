//! Chats: messages as the one text that a model was trained to see, by the template that comes with it.

mod python;
mod time;

use std::collections::BTreeMap;

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};

use crate::ModelError;

pub use time::strftime;

/// What someone said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who: `system`, `user` or `assistant`.
    pub role: String,
    /// What.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// A chat template: Jinja, as `apply_chat_template` of transformers renders it.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    special: BTreeMap<String, String>,
    seconds: Option<i64>,
}

/// The part of tokenizer_config.json that chats need.
#[derive(Debug, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
    template: String,
}

impl ChatTemplate {
    /// The template in `source`; `special` are the special tokens it may name, such as `bos_token`.
    ///
    /// # Errors
    ///
    /// [`ModelError::Template`] if it is no template.
    pub fn new(source: &str, special: BTreeMap<String, String>) -> Result<Self, ModelError> {
        let template = Self { source: python::without_generation_marks(source), special, seconds: None };
        template.environment()?;
        Ok(template)
    }

    /// The template that files beside a tokenizer hold: that of `chat_template.jinja`, else that of `tokenizer_config.json`,
    /// of several the one called `default`, or the only one. Special tokens are those of `tokenizer_config.json`. `None` where
    /// neither has one.
    ///
    /// # Errors
    ///
    /// [`ModelError::Template`] if a file cannot be read as what it is, or has several templates and none called `default`.
    pub fn from_files(jinja: Option<&str>, tokenizer_config: Option<&str>) -> Result<Option<Self>, ModelError> {
        let config = tokenizer_config.map(serde_json::from_str::<TokenizerConfig>).transpose();
        let config = config.map_err(|error| ModelError::Template(format!("tokenizer_config.json: {error}")))?;
        let (templates, rest) = config.map_or((None, BTreeMap::new()), |config| (config.chat_template, config.rest));
        let own = match templates {
            None => None,
            Some(Templates::One(template)) => Some(template),
            Some(Templates::Named(mut all)) => {
                let names: Vec<String> = all.iter().map(|named| named.name.clone()).collect();
                let default = all.iter().position(|named| named.name == "default");
                match default.or((all.len() == 1).then_some(0)) {
                    Some(at) => Some(all.swap_remove(at).template),
                    None if jinja.is_some() || all.is_empty() => None,
                    None => {
                        let names = names.join("`, `");
                        let problem = format!("tokenizer_config.json has templates `{names}`, expected one `default`");
                        return Err(ModelError::Template(problem));
                    }
                }
            }
        };
        let Some(source) = jinja.or(own.as_deref()) else { return Ok(None) };
        let special = rest.into_iter().filter(|(key, _)| key.ends_with("_token"));
        let special = special.filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key, text.to_owned()))
        });
        Self::new(source, special.collect()).map(Some)
    }

    /// The same template with the clock standing still: `strftime_now` says this many seconds after 1970 began, UTC.
    pub fn at_time(self, seconds: i64) -> Self {
        Self { seconds: Some(seconds), ..self }
    }

    /// The special token called `name` in the files, such as `eos_token`.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special.get(name).map(String::as_str)
    }

    /// The text of some messages; with `answering` it ends where the assistant is to begin. `more` are variables of some
    /// templates, such as `enable_thinking`.
    ///
    /// # Errors
    ///
    /// [`ModelError::Template`] where the template refuses these messages, or fails.
    pub fn render(
        &self,
        messages: &[Message],
        answering: bool,
        more: &BTreeMap<String, serde_json::Value>,
    ) -> Result<String, ModelError> {
        let environment = self.environment()?;
        let template = environment.get_template("chat").map_err(failed)?;
        let given = more.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value))));
        let special = self.special.iter().map(|(name, token)| (name.clone(), Value::from(token.clone())));
        let none = ["tools", "documents"].map(|name| (name.to_owned(), Value::from(())));
        let variables: BTreeMap<String, Value> = special.chain(none).chain(given).collect();
        let variables = Value::from_pairs(variables);
        let messages = Value::from(Serde(messages));
        let known = context! { messages, add_generation_prompt => answering };
        template.render(context! { ..known, ..variables }).map_err(failed)
    }

    /// What stands behind an answer: the end of the assistant's turn, where the template writes one.
    ///
    /// # Errors
    ///
    /// As [`ChatTemplate::render`].
    pub fn end_of_turn(&self, more: &BTreeMap<String, serde_json::Value>) -> Result<String, ModelError> {
        const ANSWER: &str = "4711";
        let messages = [Message::new("user", "?"), Message::new("assistant", ANSWER)];
        let text = self.render(&messages, false, more)?;
        Ok(text.rsplit_once(ANSWER).map_or_else(String::new, |(_, end)| end.to_owned()))
    }

    /// Jinja as transformers sets it up.
    fn environment(&self) -> Result<Environment<'_>, ModelError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        environment.set_syntax(syntax);
        environment.set_formatter(python::write);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python::tojson);
        let refuse =
            |message: String| -> Result<Value, Error> { Err(Error::new(ErrorKind::InvalidOperation, message)) };
        environment.add_function("raise_exception", refuse);
        let seconds = self.seconds;
        environment
            .add_function("strftime_now", move |format: String| strftime(&format, seconds.unwrap_or_else(time::now)));
        environment.add_template("chat", &self.source).map_err(failed)?;
        Ok(environment)
    }
}

fn failed(error: Error) -> ModelError {
    let line = error.line().map_or_else(String::new, |line| format!(" (line {line})"));
    // What a template raises is a sentence for the reader; anything else names its kind.
    let detail = error.detail().map(str::to_owned);
    let text = match (error.kind(), detail) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail,
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    ModelError::Template(format!("{text}{line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: BTreeMap<String, serde_json::Value> = BTreeMap::new();

    fn rendered(source: &str) -> String {
        let template = ChatTemplate::new(source, BTreeMap::new()).unwrap();
        template.render(&[Message::new("user", "Hi")], true, &NONE).unwrap()
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        assert_eq!(rendered("{{ true }} {{ none }} {{ 1.0 }} {{ 7 }} {{ nothing }}"), "True None 1.0 7 ");
        assert_eq!(rendered("{{ ['a', 1, true] }} {{ {'a': none} }}"), "['a', 1, True] {'a': None}");
    }

    #[test]
    fn json_is_that_of_python() {
        let value = "{'b': [1, 2.5, 'ü<\"', true, none], 'a': {}}";
        assert_eq!(rendered(&format!("{{{{ {value} | tojson }}}}")), r#"{"b": [1, 2.5, "ü<\"", true, null], "a": {}}"#);
        assert_eq!(
            rendered(&format!("{{{{ {value} | tojson(indent=2) }}}}")),
            "{\n  \"b\": [\n    1,\n    2.5,\n    \"ü<\\\"\",\n    true,\n    null\n  ],\n  \"a\": {}\n}"
        );
        assert_eq!(
            rendered(&format!("{{{{ {value} | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}}}")),
            r#"{"a":{},"b":[1,2.5,"\u00fc<\"",true,null]}"#
        );
    }

    #[test]
    fn what_a_template_refuses_is_told_in_its_words() {
        let template = ChatTemplate::new("{{ raise_exception('No system here!') }}", BTreeMap::new()).unwrap();
        let error = template.render(&[], true, &NONE).unwrap_err().to_string();
        assert!(error.contains("No system here!"), "{error}");
    }

    #[test]
    fn a_text_that_is_no_template_is_refused() {
        let error = ChatTemplate::new("{% if %}", BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("chat template") && error.contains("line 1"), "{error}");
    }

    #[test]
    fn the_template_is_found_where_files_keep_it() {
        let found = |jinja, config| {
            let template = ChatTemplate::from_files(jinja, config).unwrap()?;
            Some(template.render(&[Message::new("user", "Hi")], true, &NONE).unwrap())
        };
        let one = r#"{"bos_token": {"content": "<s>"}, "eos_token": null, "chat_template": "{{ bos_token }}one"}"#;
        let named =
            r#"{"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]}"#;
        assert_eq!(found(None, Some(one)).as_deref(), Some("<s>one"));
        assert_eq!(found(None, Some(named)).as_deref(), Some("two"));
        assert_eq!(found(Some("{{ bos_token }}three"), Some(one)).as_deref(), Some("<s>three"));
        assert_eq!(found(Some("four"), None).as_deref(), Some("four"));
        assert_eq!(found(None, Some("{}")), None);
        assert_eq!(found(None, None), None);
        let several = r#"{"chat_template": [{"name": "rag", "template": "no"}, {"name": "tool", "template": "no"}]}"#;
        let error = ChatTemplate::from_files(None, Some(several)).unwrap_err().to_string();
        assert!(error.contains("`rag`, `tool`"), "{error}");
        assert!(ChatTemplate::from_files(None, Some("[]")).is_err());
    }

    #[test]
    fn the_end_of_a_turn_is_what_stands_behind_an_answer() {
        let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}";
        let template = ChatTemplate::new(source, BTreeMap::new()).unwrap();
        assert_eq!(template.end_of_turn(&NONE).unwrap(), "<|end|>\n");
    }
}
