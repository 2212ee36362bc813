//! Texts that end a continuation.

/// Looks for texts in what comes piece by piece, and holds back what may become one of them.
#[derive(Debug, Clone)]
pub struct StopTexts {
    texts: Vec<String>,
    held: String,
    found: bool,
}

impl StopTexts {
    /// Looks for these; an empty one is never found.
    pub fn new(texts: impl IntoIterator<Item = String>) -> Self {
        let texts = texts.into_iter().filter(|text| !text.is_empty()).collect();
        Self { texts, held: String::new(), found: false }
    }

    /// The text that `more` makes certain: all before the first of the texts looked for, less an end that may be the beginning
    /// of one. Nothing comes after one was found.
    pub fn push(&mut self, more: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(more);
        if let Some(at) = self.texts.iter().filter_map(|text| self.held.find(text.as_str())).min() {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let starts = |at: &usize| self.texts.iter().any(|text| text.starts_with(&self.held[*at..]));
        let certain = self.held.char_indices().map(|(at, _)| at).find(starts).unwrap_or(self.held.len());
        let kept = self.held.split_off(certain);
        std::mem::replace(&mut self.held, kept)
    }

    /// Whether one was found.
    pub fn found(&self) -> bool {
        self.found
    }

    /// What is held back at the end of the text.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text before the first of `stops`, and whether there is one: by looking at the whole.
    fn whole(text: &str, stops: &[String]) -> (String, bool) {
        let at = stops.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| text.find(stop.as_str())).min();
        (text[..at.unwrap_or(text.len())].to_owned(), at.is_some())
    }

    proptest! {
        #[test]
        fn pieces_show_what_the_whole_shows(
            pieces in prop::collection::vec("[abü]{0,4}", 0..12),
            stops in prop::collection::vec("[abü]{0,4}", 0..3),
        ) {
            let mut watch = StopTexts::new(stops.clone());
            let mut shown = String::new();
            // As callers do: nothing more is made once one was found.
            let mut text = String::new();
            for piece in &pieces {
                text.push_str(piece);
                shown.push_str(&watch.push(piece));
                if watch.found() {
                    break;
                }
            }
            let found = watch.found();
            shown.push_str(&watch.finish());
            prop_assert_eq!((shown, found), whole(&text, &stops));
        }
    }

    #[test]
    fn no_more_is_held_back_than_may_become_a_stop() {
        let mut watch = StopTexts::new(["</end>".to_owned()]);
        assert_eq!(watch.push("a < b </e"), "a < b ");
        assert_eq!(watch.push("x"), "</ex");
        assert_eq!(watch.push("</end> behind"), "");
        assert!(watch.found());
        assert_eq!(watch.push("more"), "");
    }
}
