//! Prompts that ask for numbers hidden in a long text: the same for the same seed, and exactly as long as asked for.

use serde::{Deserialize, Serialize};

use crate::{ModelError, TextTokenizer};

/// Where what is asked for stands in a text, as a share of its length.
pub const DEPTHS: [f64; 5] = [0.05, 0.25, 0.45, 0.65, 0.85];

/// Digits of a number.
const DIGITS: usize = 5;

/// Numbers drawn before the text is given up: one in a hundred thousand stands in a common text.
const MOST_DRAWS: usize = 1000;

/// Tokens left for a question where places in the text are chosen: those of all prompts of a kind are the same.
const QUESTION_ROOM: usize = 48;

/// What the numbers of needles belong to.
const NAMES: [&str; 12] =
    ["London", "Paris", "Tokyo", "Cairo", "Sydney", "Moscow", "Lima", "Oslo", "Madrid", "Berlin", "Rome", "Boston"];

/// Who the numbers of chains belong to.
const PEOPLE: [&str; 8] = ["Anna", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry"];

/// What a prompt asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecallTask {
    /// The only number in the text.
    Passkey,
    /// One of five numbers, by its name.
    Needle,
    /// All five numbers, one after another in another order.
    Queries,
    /// A number through two steps: somebody's number is that of somebody else. Another number stands in the text as well.
    Chain,
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Which of [`DEPTHS`] the answer stands at.
    pub depth: usize,
    /// Tokens of the question, up to the first digit of the answer.
    pub question: Vec<u32>,
    /// One token for each digit.
    pub answer: Vec<u32>,
}

/// A text and questions about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What is asked for.
    pub task: RecallTask,
    /// Everything before the first question.
    pub context: Vec<u32>,
    /// The questions, one after another.
    pub turns: Vec<Turn>,
}

impl Prompt {
    /// Tokens of the context, all questions and all answers.
    pub fn len(&self) -> usize {
        let turns = self.turns.iter().map(|turn| turn.question.len() + turn.answer.len());
        self.context.len() + turns.sum::<usize>()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Makes prompts out of a text.
#[derive(Debug)]
pub struct PromptMaker<'a> {
    tokenizer: &'a TextTokenizer,
    /// What hides the numbers.
    filler: &'a [u32],
    /// Special tokens before a text.
    prefix: Vec<u32>,
    /// Tokens between a word and the first digit.
    lead: Vec<u32>,
    digits: Vec<u32>,
}

/// A number and where it is hidden.
struct Hidden {
    depth: f64,
    tokens: Vec<u32>,
}

impl<'a> PromptMaker<'a> {
    /// Prompts in the tokens of `tokenizer`, that hide their numbers in the text `filler`.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`] if there is no token for each digit.
    pub fn new(tokenizer: &'a TextTokenizer, filler: &'a [u32]) -> Result<Self, ModelError> {
        let prefix = tokenizer.prefix()?;
        // Every pair of digits, so that none of them is a token of its own.
        let pairs = || (0..10).flat_map(|first| (0..10).flat_map(move |second| [first, second]));
        let blank = tokenizer.encode_within(" 0")?;
        let mut alone = None;
        for separator in ["", " "] {
            let of = |digit: usize| tokenizer.encode_within(&format!("{separator}{digit}"));
            let digits: Vec<Vec<u32>> = (0..10).map(of).collect::<Result<_, _>>()?;
            let text: String = pairs().map(|digit| format!("{separator}{digit}")).collect();
            let whole = tokenizer.encode_within(&text)?;
            let single: Vec<u32> = digits.iter().filter(|tokens| tokens.len() == 1).map(|tokens| tokens[0]).collect();
            if single.len() < 10 {
                continue;
            }
            if pairs().map(|digit| single[digit]).eq(whole)
                && let Some(lead) = blank.strip_suffix(&[single[0]])
            {
                return Ok(Self { tokenizer, filler, prefix, lead: lead.to_vec(), digits: single });
            }
            alone.get_or_insert(single);
        }
        // Some digits are one token together. The model knows each alone as well.
        if let Some(digits) = alone {
            return Ok(Self { tokenizer, filler, prefix, lead: tokenizer.encode_within(" ")?, digits });
        }
        let problem = "the tokenizer has no token for each digit, so that digits cannot be asked for one by one: measure \
                       perplexity alone";
        Err(ModelError::Tokenizer(problem.into()))
    }

    /// The prompts of `task` that are `length` tokens long with their answers: one for each of [`DEPTHS`], or for
    /// [`RecallTask::Queries`] one that asks for all of them. `sample` chooses numbers, names and the piece of text;
    /// [`RecallTask::Needle`] and [`RecallTask::Queries`] hide the same numbers in the same text.
    ///
    /// # Errors
    ///
    /// [`ModelError::Input`] if the length has no room for questions and numbers, or the text is too short to fill it.
    pub fn prompts(&self, task: RecallTask, length: usize, sample: u64) -> Result<Vec<Prompt>, ModelError> {
        let mut random =
            Random::new(sample, length, if task == RecallTask::Queries { RecallTask::Needle } else { task });
        match task {
            RecallTask::Passkey => self.passkeys(length, &mut random),
            RecallTask::Needle | RecallTask::Queries => self.needles(task, length, &mut random),
            RecallTask::Chain => self.chains(length, &mut random),
        }
    }

    fn passkeys(&self, length: usize, random: &mut Random) -> Result<Vec<Prompt>, ModelError> {
        let intro = "There is an important pass key hidden inside a lot of text. Remember it.\n\n";
        let number = self.numbers(1, random)?.remove(0);
        let hidden = self.statement("\n\nThe pass key is", &number, ". Remember it.\n\n")?;
        let question = self.question("\n\nWhat is the pass key? The pass key is")?;
        let place = random.draw();
        let prompt = |(depth, at): (usize, f64)| {
            let turns = vec![Turn { depth, question: question.clone(), answer: number.clone() }];
            let hidden = vec![Hidden { depth: at, tokens: hidden.clone() }];
            self.prompt(RecallTask::Passkey, intro, hidden, turns, length, place)
        };
        DEPTHS.into_iter().enumerate().map(prompt).collect()
    }

    fn needles(&self, task: RecallTask, length: usize, random: &mut Random) -> Result<Vec<Prompt>, ModelError> {
        let intro = "Several magic numbers are hidden inside a lot of text. Remember them.\n\n";
        let names = random.some(&NAMES, DEPTHS.len());
        let numbers = self.numbers(names.len(), random)?;
        let opening = |name: &str| format!("\n\nThe special magic number for {name} is");
        let statements =
            names.iter().zip(&numbers).map(|(name, number)| self.statement(&opening(name), number, ".\n\n"));
        let statements: Vec<Vec<u32>> = statements.collect::<Result<_, _>>()?;
        let turns = names.iter().zip(&numbers).enumerate().map(|(depth, (name, number))| {
            Ok(Turn { depth, question: self.question(&opening(name))?, answer: number.clone() })
        });
        let turns: Vec<Turn> = turns.collect::<Result<_, ModelError>>()?;
        let place = random.draw();
        let prompt = |turns: Vec<Turn>| {
            let hidden = DEPTHS.iter().zip(&statements);
            let hidden = hidden.map(|(&depth, tokens)| Hidden { depth, tokens: tokens.clone() }).collect();
            self.prompt(task, intro, hidden, turns, length, place)
        };
        if task == RecallTask::Queries {
            return Ok(vec![prompt(random.some(&turns, turns.len()))?]);
        }
        turns.into_iter().map(|turn| prompt(vec![turn])).collect()
    }

    fn chains(&self, length: usize, random: &mut Random) -> Result<Vec<Prompt>, ModelError> {
        let intro = "Some people have numbers. They are hidden inside a lot of text. Remember them.\n\n";
        let people = random.some(&PEOPLE, 4);
        let numbers = self.numbers(2, random)?;
        let (number, other) = (&numbers[0], &numbers[1]);
        let opening = |name: &str| format!("\n\nThe number of {name} is");
        let given = self.statement(&opening(people[0]), number, ".\n\n")?;
        let decoy = self.statement(&opening(people[3]), other, ".\n\n")?;
        let step = |of: usize| {
            let text = format!("{} the same as the number of {}.\n\n", opening(people[of]), people[of - 1]);
            self.tokenizer.encode_within(&text)
        };
        let (first_step, second_step) = (step(1)?, step(2)?);
        let question = self.question(&opening(people[2]))?;
        let place = random.draw();
        let prompt = |(depth, at): (usize, f64)| {
            let turns = vec![Turn { depth, question: question.clone(), answer: number.clone() }];
            // The steps follow at thirds of what is left, the decoy stands at the mirror image of the number.
            let third = (1.0 - at) / 3.0;
            let mut hidden = vec![
                Hidden { depth: at, tokens: given.clone() },
                Hidden { depth: at + third, tokens: first_step.clone() },
                Hidden { depth: at + 2.0 * third, tokens: second_step.clone() },
                Hidden { depth: 0.92 - at, tokens: decoy.clone() },
            ];
            hidden.sort_by(|a, b| a.depth.total_cmp(&b.depth));
            self.prompt(RecallTask::Chain, intro, hidden, turns, length, place)
        };
        DEPTHS.into_iter().enumerate().map(prompt).collect()
    }

    /// A prompt of exactly `length` tokens: `hidden`, in the order of their depths, in the filler from a place that `place`
    /// chooses.
    fn prompt(
        &self,
        task: RecallTask,
        intro: &str,
        hidden: Vec<Hidden>,
        turns: Vec<Turn>,
        length: usize,
        place: u64,
    ) -> Result<Prompt, ModelError> {
        let mut context = self.prefix.clone();
        context.extend(self.tokenizer.encode_within(intro)?);
        let asked: usize = turns.iter().map(|turn| turn.question.len() + turn.answer.len()).sum();
        let taken = context.len() + hidden.iter().map(|hidden| hidden.tokens.len()).sum::<usize>() + asked;
        let Some(room) = length.checked_sub(taken).filter(|room| *room >= 2 * hidden.len()) else {
            let problem = format!(
                "{length} tokens have no room for a {task:?} prompt, whose words alone are {taken} tokens: choose a longer \
                 --seq-len or other tasks"
            );
            return Err(ModelError::Input(problem));
        };
        if self.filler.len() < length {
            let problem = format!(
                "the text has {} tokens, prompts of {length} need as many: take a longer text or a shorter length",
                self.filler.len()
            );
            return Err(ModelError::Input(problem));
        }
        let start = (place % (self.filler.len() - length + 1) as u64) as usize;
        let filler = &self.filler[start..start + room];
        let spread = (room + asked).saturating_sub(QUESTION_ROOM);
        let mut at = 0;
        for Hidden { depth, tokens } in hidden {
            let end = ((depth * spread as f64) as usize).clamp(at, room);
            context.extend(&filler[at..end]);
            context.extend(tokens);
            at = end;
        }
        context.extend(&filler[at..]);
        Ok(Prompt { task, context, turns })
    }

    /// So many numbers that differ and do not stand in the text already.
    fn numbers(&self, count: usize, random: &mut Random) -> Result<Vec<Vec<u32>>, ModelError> {
        let mut numbers: Vec<Vec<u32>> = Vec::with_capacity(count);
        for _ in 0..MOST_DRAWS {
            if numbers.len() == count {
                return Ok(numbers);
            }
            let number: Vec<u32> = (0..DIGITS).map(|_| self.digits[random.below(10)]).collect();
            if !numbers.contains(&number) && !self.filler.windows(DIGITS).any(|tokens| tokens == number) {
                numbers.push(number);
            }
        }
        Err(ModelError::Input("the text is full of numbers, none can be hidden in it: take another text".into()))
    }

    fn statement(&self, before: &str, number: &[u32], after: &str) -> Result<Vec<u32>, ModelError> {
        let mut tokens = self.question(before)?;
        tokens.extend(number);
        tokens.extend(self.tokenizer.encode_within(after)?);
        Ok(tokens)
    }

    fn question(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut tokens = self.tokenizer.encode_within(text)?;
        tokens.extend(&self.lead);
        Ok(tokens)
    }
}

/// Numbers that are the same everywhere: splitmix64.
struct Random(u64);

impl Random {
    fn new(sample: u64, length: usize, task: RecallTask) -> Self {
        let mut random = Self(sample);
        for part in [length as u64, task as u64] {
            let next = random.draw();
            random.0 = next ^ part;
        }
        random
    }

    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.draw() % bound as u64) as usize
    }

    /// `count` different ones, in any order.
    fn some<T: Clone>(&mut self, of: &[T], count: usize) -> Vec<T> {
        let mut left = of.to_vec();
        (0..count).map(|_| left.swap_remove(self.below(left.len()))).collect()
    }
}
