//! The bytes that tokens stand for, by their names in vocabularies of bytes.

/// The bytes of a token called `name`: `<0xE2>`, or characters of the alphabet in which GPT-2 writes bytes. `None` if it is
/// neither.
pub(super) fn of_name(name: &str) -> Option<Vec<u8>> {
    if let Some(byte) = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
        return u8::from_str_radix(byte, 16).ok().map(|byte| vec![byte]);
    }
    name.chars().map(of_character).collect()
}

/// The byte that a character of that alphabet stands for: printable ones for themselves, the others by their order from U+0100 on.
fn of_character(character: char) -> Option<u8> {
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(character) {
        code @ 0..=0xff => Some(code as u8).filter(printable),
        code => (0..=0xff_u8).filter(|byte| !printable(byte)).nth((code - 0x100) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_alphabet_of_bytes_are_read() {
        assert_eq!(of_name("\u{120}a"), Some(b" a".to_vec()));
        assert_eq!(of_name("\u{10a}"), Some(b"\n".to_vec()));
        assert_eq!(of_name("\u{e2}\u{122}"), Some(vec![0xe2, 0x80]));
        assert_eq!(of_name("<0xE2>"), Some(vec![0xe2]));
        assert_eq!(of_name("\u{2581}a"), None);
        // Every byte has a character of its own.
        let all: std::collections::BTreeSet<u8> =
            (0..0x144).filter_map(char::from_u32).filter_map(of_character).collect();
        assert_eq!(all.len(), 256);
    }
}
