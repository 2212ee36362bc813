//! The settings files of `configs/`, which are part of the program.

/// A settings file by the name without its ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Preset {
    /// The defaults
    Default,
    /// Reads about half as many keys
    Fast,
    /// Constant memory, to be calibrated
    Bounded,
    /// One choice for 16 tokens by meta projections, to be calibrated
    Meta,
    /// The published formula; ruins a model that is not tuned to it
    Published,
}

impl Preset {
    /// Its TOML.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Default => include_str!("../configs/default.toml"),
            Self::Fast => include_str!("../configs/fast.toml"),
            Self::Bounded => include_str!("../configs/bounded.toml"),
            Self::Meta => include_str!("../configs/meta.toml"),
            Self::Published => include_str!("../configs/published.toml"),
        }
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Fast => "fast",
            Self::Bounded => "bounded",
            Self::Meta => "meta",
            Self::Published => "published",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_settings_file_of_attention_is_a_preset_of_its_name() {
        let configs = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")).unwrap();
        let stems = configs.map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned());
        // Settings of compression, not of attention.
        let files: BTreeSet<String> = stems.filter(|name| name != "split").collect();
        let presets = Preset::value_variants().iter().map(|preset| preset.name().to_owned()).collect();
        assert_eq!(files, presets);
        for preset in Preset::value_variants() {
            assert_eq!(preset.to_possible_value().unwrap().get_name(), preset.name());
        }
    }
}
