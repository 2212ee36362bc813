//! The generators against what the tasks say, read off the tokens alone.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// A text without a pattern that a test would miss, of four characters.
fn text(length: usize) -> String {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ['a', 'b', 'c', 'd'][(state >> 30) as usize]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn generator(task: Task, length: usize) -> Generator {
    Generator::new(task, length, Some(&Corpus::new(&text(50_000)))).expect("a task")
}

fn tokens_of(batch: &Batch, row: usize) -> &[u32] {
    &batch.tokens[row * batch.length..(row + 1) * batch.length]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_question_of_recall_has_one_place_that_answers_it(length in 20_usize..260, seed in 0_u64..1000) {
        let batch = generator(Task::Recall, length).training(seed, 3, 4);
        for row in 0..4 {
            let tokens = tokens_of(&batch, row);
            let questions: Vec<_> = batch.questions.iter().filter(|question| question.row == row).collect();
            let size = questions[0].size;
            prop_assert!(questions.iter().all(|question| question.size == size));
            // Every key stands twice, every value once: nothing else does.
            let said: Vec<u32> = tokens.iter().copied().filter(|&token| token != 0).collect();
            prop_assert_eq!(said.len(), 3 * size);
            prop_assert_eq!(said.iter().collect::<BTreeSet<_>>().len(), 2 * size);
            let positions: BTreeSet<usize> = questions.iter().map(|question| question.position).collect();
            prop_assert_eq!(positions.len(), size);
            for question in questions {
                let first = tokens.iter().position(|&token| token == tokens[question.position]).expect("a key");
                prop_assert!(first + 1 < question.position);
                prop_assert_eq!(tokens[first + 1], question.answer);
                prop_assert_eq!(question.distance, question.position - (first + 1));
                prop_assert!(tokens.get(question.position + 1) != Some(&question.answer));
            }
        }
    }

    #[test]
    fn a_copy_repeats_its_string_behind_the_separator(length in 30_usize..260, seed in 0_u64..1000) {
        let batch = generator(Task::Copy, length).training(seed, 0, 4);
        for row in 0..4 {
            let tokens = tokens_of(&batch, row);
            let separator = tokens.iter().position(|&token| token == 1).expect("a separator");
            let string = &tokens[LEAD..separator];
            prop_assert_eq!(&tokens[separator + 1..separator + 1 + string.len()], string);
            prop_assert!(tokens[separator + 1 + string.len()..].iter().all(|&token| token == 0));
            let questions: Vec<_> = batch.questions.iter().filter(|question| question.row == row).collect();
            prop_assert_eq!(questions.len(), string.len());
            for (question, symbol) in questions.iter().zip(string) {
                prop_assert_eq!(tokens[question.position + 1], question.answer);
                prop_assert_eq!(question.answer, *symbol);
                prop_assert_eq!(tokens[question.position - question.distance], question.answer);
            }
        }
    }

    #[test]
    fn a_passkey_stands_behind_its_mark_and_is_asked_at_the_end(length in 29_usize..260, seed in 0_u64..1000) {
        let batch = generator(Task::Passkey, length).training(seed, 1, 4);
        for row in 0..4 {
            let tokens = tokens_of(&batch, row);
            let mark = tokens.iter().position(|&token| token == 1).expect("a mark");
            let ask = tokens.iter().position(|&token| token == 2).expect("a question");
            prop_assert_eq!(ask, length - 10);
            let key = &tokens[mark + 1..mark + 11];
            prop_assert!(mark + 11 <= ask && key.iter().all(|digit| (3..13).contains(digit)));
            prop_assert_eq!(&tokens[ask + 1..], &key[..9]);
            let digits = tokens[..ask].iter().filter(|&&token| (3..13).contains(&token)).count();
            prop_assert_eq!(digits, 10);
            let asked: Vec<_> = batch.questions.iter().filter(|question| question.row == row).collect();
            prop_assert_eq!(asked.len(), 10);
            for (at, (question, digit)) in asked.iter().zip(key).enumerate() {
                prop_assert_eq!(question.answer, *digit);
                prop_assert_eq!(question.position, ask + at);
                prop_assert_eq!(tokens[question.position - question.distance], *digit);
            }
        }
    }
}

#[test]
fn a_text_asks_for_its_next_characters_and_holds_some_back() {
    let whole = text(50_000);
    let letters: Vec<char> = whole.chars().collect();
    // Which token is which letter shows in the first sequence found; then all must agree.
    let generator = generator(Task::Text, 64);
    let (trained, held_out) = (generator.training(5, 0, 200), generator.evaluation(0, 200));
    let piece = 16 * 64;
    let corpus = Corpus::new(&whole);
    let of_letter = |letter: char| corpus.tokens[letters.iter().position(|&other| other == letter).expect("a letter")];
    let as_tokens: Vec<u32> = letters.iter().map(|&letter| of_letter(letter)).collect();
    for (batch, held) in [(&trained, false), (&held_out, true)] {
        for row in 0..batch.rows() {
            let tokens = tokens_of(batch, row);
            let start = as_tokens.windows(64).position(|window| window == tokens).expect("a piece of the text");
            assert_eq!((start / piece) % 10 == 9, held, "at {start}");
            assert_eq!(start / piece, (start + 64) / piece, "at {start}");
            let answers: Vec<u32> = batch.questions.iter().filter(|q| q.row == row).map(|q| q.answer).collect();
            assert_eq!(answers, &as_tokens[start + 1..start + 65]);
        }
    }
    assert_eq!(held_out.questions[63].distance, 63);
}

#[test]
fn the_rarest_characters_of_a_text_share_a_token() {
    let common: String = (0..63).map(|at| char::from_u32(0x4e00 + at).expect("a character")).collect();
    let corpus = Corpus::new(&format!("{common}{common}xyz"));
    assert_eq!(corpus.vocabulary(), 64);
    assert_eq!(&corpus.tokens[126..], [63, 63, 63]);
    assert_eq!(corpus.tokens[..126].iter().collect::<BTreeSet<_>>().len(), 63);
    assert_eq!(Corpus::new("abca").vocabulary(), 3);
}

#[test]
fn the_same_seed_gives_the_same_sequences_and_another_gives_others() {
    for task in Task::ALL {
        let generator = generator(task, 64);
        let first = generator.training(7, 2, 8);
        assert_eq!(first, generator.training(7, 2, 8));
        assert_eq!((first.rows(), first.tokens.len()), (8, 8 * 64));
        for other in [generator.training(7, 3, 8), generator.training(8, 2, 8)] {
            assert_ne!(first.tokens, other.tokens, "{task}");
        }
        for &size in generator.sizes() {
            let asked = generator.evaluation(size, 8);
            assert_eq!(asked, generator.evaluation(size, 8));
            assert!(asked.questions.iter().all(|question| question.size == size));
            assert!((0..8).all(|row| tokens_of(&asked, row) != tokens_of(&first, row)), "{task}");
        }
        let largest = u32::try_from(generator.vocabulary()).expect("a small number");
        assert!(first.tokens.iter().all(|&token| token < largest));
        assert!(first.questions.iter().all(|question| question.answer < largest));
    }
}

#[test]
fn sizes_are_those_that_fit() {
    assert_eq!(generator(Task::Recall, 256).sizes(), [4, 8, 16, 32, 64]);
    assert_eq!(generator(Task::Recall, 20).sizes(), [4]);
    assert_eq!(generator(Task::Recall, 4096).sizes().last(), Some(&64));
    assert_eq!(generator(Task::Copy, 256).sizes(), [8, 16, 32, 64, 120]);
    assert_eq!(generator(Task::Copy, 25).sizes(), [8]);
}

#[test]
fn shorter_sequences_are_made_of_the_same_tokens() {
    for task in Task::ALL {
        let whole = generator(task, 256);
        let shorter = whole.shortened(64).expect("long enough");
        assert_eq!((shorter.vocabulary(), shorter.chance()), (whole.vocabulary(), whole.chance()));
        assert!(shorter.sizes().len() <= whole.sizes().len());
        let batch = shorter.training(1, 0, 40);
        assert_eq!(batch.tokens.len(), 40 * 64);
        assert!(batch.tokens.iter().all(|&token| (token as usize) < whole.vocabulary()));
    }
    // Keys and values are drawn from all 64, not from those of the shorter sequences.
    let shorter = generator(Task::Recall, 256).shortened(64).expect("long enough");
    assert_eq!(shorter.sizes(), [4, 8, 16]);
    let answers: BTreeSet<u32> = shorter.training(1, 0, 100).questions.iter().map(|question| question.answer).collect();
    assert_eq!(answers, (65..129).collect());
    assert!(generator(Task::Recall, 256).shortened(19).is_err());
}

#[test]
fn the_shortest_sequences_hold_their_task_and_shorter_ones_are_refused() {
    let corpus = Corpus::new(&text(400));
    for (task, least) in [(Task::Recall, 20), (Task::Copy, 25), (Task::Passkey, 29), (Task::Text, 2)] {
        let generator = Generator::new(task, least, Some(&corpus)).expect("long enough");
        assert!(!generator.training(0, 0, 3).questions.is_empty());
        let error = Generator::new(task, least - 1, Some(&corpus)).expect_err("too short");
        assert!(error.to_string().contains(&format!("at least {least} tokens")), "{error}");
    }
    let error = Generator::new(Task::Text, 64, Some(&corpus)).expect_err("too little");
    assert_eq!(error, TaskError::Text { found: 400, needed: 10_240 });
    assert!(Generator::new(Task::Text, 64, None).is_err());
}

#[test]
fn a_name_is_that_of_a_task() {
    for task in Task::ALL {
        assert_eq!(task.name().parse(), Ok(task));
    }
    assert!("recal".parse::<Task>().unwrap_err().to_string().contains("passkey"));
}
