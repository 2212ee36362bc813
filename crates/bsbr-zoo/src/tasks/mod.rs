//! Tasks that small models are trained on and compared by: what has to be found again, and how far back it lies.
//!
//! | task | a sequence | asked |
//! |---|---|---|
//! | [`Task::Recall`] | pairs of a key and a value, then every key once more among filler | the value of each key |
//! | [`Task::Copy`] | a random string, a separator, the string again | each symbol of the second string |
//! | [`Task::Passkey`] | filler with a marked key of ten digits somewhere, a mark at the end | the digits |
//! | [`Task::Text`] | characters of a text | each next character |
//!
//! Associative recall with many queries is MQAR (Arora et al. 2023, "Zoology"); the passkey follows Mohtashami and Jaggi
//! (2023). A sequence is a function of its seed and its index alone, so every model reads the same ones in the same order. What
//! is learned from and what is asked in the end come from different streams of random numbers, and from different parts of a
//! text.

mod copy;
mod passkey;
mod random;
mod recall;
#[cfg(test)]
mod tests;
mod text;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use random::Stream;
pub use text::Corpus;

/// Filler, in every task but text.
const FILLER: u32 = 0;

/// Filler that every sequence begins with, so that the first tokens, which some mechanisms always read, tell nothing.
const LEAD: usize = 8;

/// What a model is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Associative recall with many queries.
    Recall,
    /// Copying a random string.
    Copy,
    /// Finding a marked key among filler.
    Passkey,
    /// Predicting the characters of a text.
    Text,
}

impl Task {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Recall, Self::Copy, Self::Passkey, Self::Text];

    /// The name on a command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recall => "recall",
            Self::Copy => "copy",
            Self::Passkey => "passkey",
            Self::Text => "text",
        }
    }

    /// What [`Question::size`] counts; `None` where there is one size only.
    pub fn size_name(self) -> Option<&'static str> {
        match self {
            Self::Recall => Some("pairs"),
            Self::Copy => Some("symbols"),
            Self::Passkey | Self::Text => None,
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Task {
    type Err = TaskError;

    fn from_str(name: &str) -> Result<Self, TaskError> {
        let found = Self::ALL.into_iter().find(|task| task.name() == name);
        found.ok_or_else(|| TaskError::Unknown { name: name.to_owned() })
    }
}

/// A task that cannot be set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// No task has this name.
    #[error("task `{name}`: expected recall, copy, passkey or text")]
    Unknown {
        /// As given.
        name: String,
    },
    /// Sequences are too short for what they must hold.
    #[error("{task} needs sequences of at least {needed} tokens, found {length}: make them longer")]
    TooShort {
        /// The task.
        task: Task,
        /// Tokens of a sequence.
        length: usize,
        /// Tokens it takes.
        needed: usize,
    },
    /// There is no text, or too little of it.
    #[error(
        "the text has {found} characters, expected at least {needed}: it is cut into pieces, some of them held out"
    )]
    Text {
        /// Characters of it.
        found: usize,
        /// Characters it takes.
        needed: usize,
    },
}

/// One thing asked of a model: which token comes at a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Sequence of the batch.
    pub row: usize,
    /// Token after which it is asked.
    pub position: usize,
    /// The right token.
    pub answer: u32,
    /// How much the sequence holds that could be asked for: pairs, symbols of the string; 0 where that is always the same.
    pub size: usize,
    /// Tokens from what has to be found to `position`; in a text, tokens before it.
    pub distance: usize,
}

/// Sequences and what is asked about them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Tokens of all sequences, one after the other.
    pub tokens: Vec<u32>,
    /// Tokens of each.
    pub length: usize,
    /// In order of rows and positions.
    pub questions: Vec<Question>,
}

impl Batch {
    /// Sequences.
    pub fn rows(&self) -> usize {
        self.tokens.len() / self.length.max(1)
    }

    fn push(&mut self, sequence: Sequence) {
        let row = self.rows();
        self.questions.extend(sequence.questions.into_iter().map(|question| Question { row, ..question }));
        self.tokens.extend(sequence.tokens);
    }
}

/// One sequence; its questions are in row 0.
#[derive(Debug, Default)]
struct Sequence {
    tokens: Vec<u32>,
    questions: Vec<Question>,
}

/// Makes the sequences of a task.
#[derive(Debug, Clone)]
pub struct Generator {
    task: Task,
    length: usize,
    sizes: Vec<usize>,
    /// The largest size of the longest sequences, which the vocabulary is made for.
    most: usize,
    corpus: Option<Corpus>,
}

impl Generator {
    /// Sequences of `length` tokens. `corpus` is the text of [`Task::Text`]; the others need none.
    ///
    /// # Errors
    ///
    /// [`TaskError`] if the sequences are too short, or the text is.
    pub fn new(task: Task, length: usize, corpus: Option<&Corpus>) -> Result<Self, TaskError> {
        let too_short = |needed| TaskError::TooShort { task, length, needed };
        let sizes = match task {
            Task::Recall => recall::sizes(length),
            Task::Copy => copy::sizes(length),
            Task::Passkey | Task::Text => vec![0],
        };
        let needed = match task {
            Task::Recall => recall::length_for(recall::LEAST),
            Task::Copy => copy::length_for(copy::LEAST),
            Task::Passkey => passkey::LEAST_LENGTH,
            Task::Text => 2,
        };
        if length < needed {
            return Err(too_short(needed));
        }
        let corpus = match task {
            Task::Text => {
                let needed = text::least(length);
                let found = corpus.map_or(0, Corpus::len);
                Some(corpus.filter(|_| found >= needed).ok_or(TaskError::Text { found, needed })?.clone())
            }
            _ => None,
        };
        let most = sizes.last().copied().unwrap_or(0);
        Ok(Self { task, length, sizes, most, corpus })
    }

    /// The same task with the same tokens in sequences of `length` tokens, for what fits into them.
    ///
    /// # Errors
    ///
    /// [`TaskError`] if they are too short.
    pub fn shortened(&self, length: usize) -> Result<Self, TaskError> {
        let mut shorter = Self::new(self.task, length, self.corpus.as_ref())?;
        shorter.sizes.retain(|&size| size <= self.most);
        Ok(Self { most: self.most, ..shorter })
    }

    /// The task.
    pub fn task(&self) -> Task {
        self.task
    }

    /// Tokens there are.
    pub fn vocabulary(&self) -> usize {
        match self.task {
            Task::Recall => recall::vocabulary(self.most),
            Task::Copy => copy::VOCABULARY,
            Task::Passkey => passkey::VOCABULARY,
            Task::Text => self.corpus.as_ref().map_or(0, Corpus::vocabulary),
        }
    }

    /// Sizes that sequences come in, ascending; `[0]` where there is one only.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// The share of right answers by guessing among the answers that are possible; `None` where they are not equally likely.
    pub fn chance(&self) -> Option<f64> {
        match self.task {
            Task::Recall => Some(1.0 / self.most as f64),
            Task::Copy => Some(1.0 / copy::SYMBOLS as f64),
            Task::Passkey => Some(1.0 / passkey::DIGITS as f64),
            Task::Text => None,
        }
    }

    /// The batch of a training step: `rows` sequences, their sizes drawn with equal chance.
    pub fn training(&self, seed: u64, step: usize, rows: usize) -> Batch {
        let mut batch = Batch { length: self.length, ..Batch::default() };
        for row in 0..rows {
            let mut rng = random::generator(Stream::Training, self.task, seed, (step * rows + row) as u64);
            let size = self.sizes[random::below(&mut rng, self.sizes.len())];
            batch.push(self.sequence(size, &mut rng, Stream::Training));
        }
        batch
    }

    /// `rows` sequences of one of the [`sizes`](Generator::sizes) that no training step reads; the same for every seed of a model.
    pub fn evaluation(&self, size: usize, rows: usize) -> Batch {
        let mut batch = Batch { length: self.length, ..Batch::default() };
        for row in 0..rows {
            let mut rng = random::generator(Stream::Evaluation, self.task, size as u64, row as u64);
            batch.push(self.sequence(size, &mut rng, Stream::Evaluation));
        }
        batch
    }

    fn sequence(&self, size: usize, rng: &mut random::Rng, stream: Stream) -> Sequence {
        let sequence = match (self.task, &self.corpus) {
            (Task::Recall, _) => recall::sequence(size, self.most, self.length, rng),
            (Task::Copy, _) => copy::sequence(size, self.length, rng),
            (Task::Passkey, _) => passkey::sequence(self.length, rng),
            (Task::Text, Some(corpus)) => text::sequence(corpus, self.length, rng, stream),
            (Task::Text, None) => Sequence::default(),
        };
        debug_assert_eq!(sequence.tokens.len(), self.length);
        sequence
    }
}
