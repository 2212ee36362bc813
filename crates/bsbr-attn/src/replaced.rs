//! Settings of earlier versions that mean nothing any more, and what does their work now.

/// Names of settings that are gone, as files spell them, each with what replaced it.
pub const REPLACED_SETTINGS: [(&str, &str); 7] = [
    ("top_k", "`threshold` and `max_keys` say which keys are read, `meta_blocks` how many blocks with selector = meta"),
    ("reach", "keys are scored one by one, and `threshold` says which are read"),
    ("section_size", "sections have 64 tokens, and `fine_tokens` says from where on they are scored first"),
    ("top_sections", "`max_sections` bounds how many are opened"),
    ("middle_tokens", "there are no pages above sections: `fine_tokens` and `max_sections` bound the work for a token"),
    ("page_size", "there are no pages above sections: `fine_tokens` and `max_sections` bound the work for a token"),
    ("top_pages", "there are no pages above sections: `fine_tokens` and `max_sections` bound the work for a token"),
];

/// The selector that is gone, and what replaced it.
pub const REPLACED_SELECTOR: (&str, &str) =
    ("mean-key", "`index` takes its place: it scores every key, not the mean of a block, and has no parameters either");

/// What replaced the setting `name`, where it was one.
pub fn replaced_setting(name: &str) -> Option<&'static str> {
    REPLACED_SETTINGS.iter().find(|(gone, _)| *gone == name).map(|(_, instead)| *instead)
}
