//! What a line is in a chat: a message, or a command to the program.

use std::path::PathBuf;

/// One line, or several joined.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Message(String),
    Clear,
    Exit,
    Help,
    Save(PathBuf),
    /// A command that does not exist, or lacks something.
    Wrong(String),
}

/// What `/help` says.
pub(crate) const HELP: &str = "\
/clear      begin a new conversation
/save FILE  write the conversation as JSON
/help       this list
/exit       end (so does Ctrl-D)
A line that ends in \\ goes on in the next one. A message that begins with a slash is written with two.
Ctrl-C ends an answer.";

/// Reads a line; `None` for one without content.
pub(crate) fn parse(text: &str) -> Option<Line> {
    let text = text.trim();
    if text.is_empty() {
        return None;
    }
    let Some(command) = text.strip_prefix('/') else { return Some(Line::Message(text.to_owned())) };
    if command.starts_with('/') {
        return Some(Line::Message(command.to_owned()));
    }
    let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    Some(match (name, rest.trim()) {
        ("clear", "") => Line::Clear,
        ("exit" | "quit" | "bye", "") => Line::Exit,
        ("help" | "?", "") => Line::Help,
        ("save", "") => Line::Wrong("/save needs the name of a file: /save FILE".to_owned()),
        ("save", file) => Line::Save(file.into()),
        ("clear" | "exit" | "quit" | "bye" | "help" | "?", _) => Line::Wrong(format!("/{name} takes nothing more")),
        _ => Line::Wrong(format!("there is no /{name}: /clear, /save FILE, /help, /exit")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let message = |text: &str| Some(Line::Message(text.to_owned()));
        assert_eq!(parse(" What is /help? \n"), message("What is /help?"));
        assert_eq!(parse("//etc is a directory"), message("/etc is a directory"));
        assert_eq!(parse("  \n"), None);
        assert_eq!(parse("/clear\n"), Some(Line::Clear));
        assert_eq!(parse("/exit"), Some(Line::Exit));
        assert_eq!(parse("/save a b.json"), Some(Line::Save("a b.json".into())));
        for wrong in ["/save", "/sav x", "/clear all", "/"] {
            assert!(matches!(parse(wrong), Some(Line::Wrong(_))), "{wrong}");
        }
    }
}
