//! The summary page of a directory: one section for each part, each replaced by its next run.

use std::{fs, path::Path};

use anyhow::{Context, Result};

/// Name of the page.
pub(crate) const PAGE: &str = "summary.md";

const TITLE: &str = "# Attention families compared\n\n`cargo xtask compare`: the same small decoder with the attention of each \
                     family.\n";

/// A part of a comparison, in the order of the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Cost,
    Trained,
}

impl Part {
    const ALL: [Self; 2] = [Self::Cost, Self::Trained];

    /// The name of its files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cost => "cost",
            Self::Trained => "trained",
        }
    }

    fn marks(self) -> [String; 2] {
        ["begin", "end"].map(|edge| format!("<!-- {edge} {} -->\n", self.name()))
    }
}

/// The page with a new section in the place of the old one.
fn with_section(page: &str, part: Part, section: &str) -> String {
    let old = |part: Part| {
        let [begin, end] = part.marks();
        let (_, rest) = page.split_once(&begin)?;
        rest.split_once(&end).map(|(section, _)| section.to_owned())
    };
    let mut text = TITLE.to_owned();
    for one in Part::ALL {
        let content = if one == part { Some(format!("\n{section}\n\n")) } else { old(one) };
        if let Some(content) = content {
            let [begin, end] = one.marks();
            text.extend(["\n", &begin, &content, &end]);
        }
    }
    text
}

/// What the page in a directory is to become.
pub(crate) fn updated(dir: &Path, part: Part, section: &str) -> Result<String> {
    let path = dir.join(PAGE);
    let page = match fs::read_to_string(&path) {
        Ok(page) => page,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    Ok(with_section(&page, part, section))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_replaces_its_former_self_and_leaves_the_other_alone() {
        let one = with_section("", Part::Trained, "learned A");
        let two = with_section(&one, Part::Cost, "costs B");
        let three = with_section(&two, Part::Trained, "learned C");
        assert!(two.find("costs B") < two.find("learned A") && two.contains("learned A"), "{two}");
        assert!(three.contains("costs B") && three.contains("learned C") && !three.contains("learned A"), "{three}");
        assert_eq!(with_section(&three, Part::Trained, "learned C"), three);
        assert_eq!(three.matches("# Attention").count(), 1);
    }
}
