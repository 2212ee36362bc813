//! Text inside of markup: HTML, SVG, and JSON within HTML.

use std::fmt::Write;

use serde_json::Value;

/// Text that can stand anywhere in HTML and SVG, in attributes too. Control characters, which neither can hold, become their
/// pictures.
pub(crate) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\n' => safe.push('\n'),
            // U+2400 and on are pictures of the control characters in their order.
            '\0'..='\u{1f}' => safe.push(char::from_u32(0x2400 + character as u32).unwrap_or('\u{fffd}')),
            '\u{7f}' => safe.push('\u{2421}'),
            '\u{80}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => safe.push('\u{fffd}'),
            _ => safe.push(character),
        }
    }
    safe
}

/// JSON that can stand in a script element: no character of it means anything in HTML, and it reads as the value it was.
pub(crate) fn json(value: &Value) -> String {
    let mut safe = String::new();
    for character in value.to_string().chars() {
        match character {
            // What delimits markup stands in JSON within strings alone.
            '<' | '>' | '&' | '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{fffe}' | '\u{ffff}' => {
                // A string takes whatever is written to it.
                let _ = write!(safe, "\\u{:04x}", character as u32);
            }
            _ => safe.push(character),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_of_a_text_is_left_that_means_something_in_markup() {
        let hostile = "</script><a href='x' onclick=\"y\">&\u{0}\u{1b}\r\t\n\u{7f}\u{85}\u{ffff}";
        let expected = "&lt;/script&gt;&lt;a href=&#39;x&#39; onclick=&quot;y&quot;&gt;&amp;\u{2400}\u{241b}\u{240d}\u{2409}\n\u{2421}\u{fffd}\u{fffd}";
        assert_eq!(escaped(hostile), expected);
    }

    #[test]
    fn json_in_a_page_is_the_same_value_without_markup() {
        let value =
            json!({"</script>": ["<!--", "]]>", "&amp;", "\u{2028}\u{2029}\u{0}\u{7f}\u{ffff}", "\"\\'", 1.5e-9]});
        let safe = super::json(&value);
        assert!(!safe.contains(['<', '>', '&', '\u{2028}', '\u{2029}', '\u{0}', '\u{7f}', '\u{ffff}']), "{safe}");
        assert_eq!(serde_json::from_str::<Value>(&safe).unwrap(), value);
    }
}
