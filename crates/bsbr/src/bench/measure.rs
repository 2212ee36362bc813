//! Timing several arms at one point, in turn: what disturbs the machine disturbs all of them.

use anyhow::Result;

use super::{Phase, Subject, budget::Rounds, gemm::Gemm};

/// Matrix products timed at each point at least.
const LEAST_PRODUCTS: usize = 5;

/// An arm that runs.
pub struct Contender<'a> {
    /// What it is called.
    pub name: &'static str,
    /// What it does.
    pub subject: &'a mut dyn Subject,
    /// How often.
    pub rounds: Rounds,
}

/// Samples of the arms, in their order, and of the yardstick between them.
pub struct Samples {
    /// Seconds of each timed run, or why there are none.
    pub arms: Vec<Result<Vec<f64>>>,
    /// Seconds of each matrix product.
    pub gemm: Vec<f64>,
}

/// Runs the arms in turn, A B C A B C, until each has its rounds. One that fails ends alone.
///
/// # Errors
///
/// If the matrix products between them fail.
pub fn interleaved(contenders: &mut [Contender<'_>], phase: Phase, gemm: Option<&Gemm>) -> Result<Samples> {
    let mut arms: Vec<Result<Vec<f64>>> = contenders.iter().map(|_| Ok(Vec::new())).collect();
    let mut products = Vec::new();
    let most = contenders.iter().map(|contender| contender.rounds.warmup + contender.rounds.runs).max();
    for round in 0..most.unwrap_or(0) {
        if let Some(gemm) = gemm {
            products.push(gemm.run()?);
        }
        for (contender, samples) in contenders.iter_mut().zip(&mut arms) {
            let Rounds { warmup, runs, .. } = contender.rounds;
            let Ok(seconds) = samples else { continue };
            if round >= warmup + runs {
                continue;
            }
            match contender.subject.run(phase) {
                Ok(elapsed) if round >= warmup => seconds.push(elapsed.as_secs_f64()),
                Ok(_) => {}
                Err(error) => *samples = Err(error.context(contender.name)),
            }
        }
    }
    if let Some(gemm) = gemm {
        // Where a few rounds are long ones.
        while products.len() < LEAST_PRODUCTS {
            products.push(gemm.run()?);
        }
    }
    Ok(Samples { arms, gemm: products })
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, time::Duration};

    use super::*;

    /// Writes down that it ran; the n-th run takes n seconds, and run `fails` fails.
    struct Recorded<'a> {
        name: char,
        log: &'a RefCell<String>,
        ran: u64,
        fails: u64,
    }

    impl Subject for Recorded<'_> {
        fn prepare(&mut self, _: Phase) -> Result<()> {
            Ok(())
        }

        fn run(&mut self, _: Phase) -> Result<Duration> {
            self.log.borrow_mut().push(self.name);
            self.ran += 1;
            anyhow::ensure!(self.ran != self.fails, "broken");
            Ok(Duration::from_secs(self.ran))
        }
    }

    #[test]
    fn arms_take_turns_warm_up_is_not_counted_and_a_failure_is_its_own() {
        let log = RefCell::new(String::new());
        let subject = |name, fails| Recorded { name, log: &log, ran: 0, fails };
        let (mut a, mut b, mut c) = (subject('a', 0), subject('b', 0), subject('c', 2));
        let rounds = |warmup, runs| Rounds { warmup, runs, memory: false };
        let mut contenders = [
            Contender { name: "bsbr", subject: &mut a, rounds: rounds(1, 3) },
            Contender { name: "dense", subject: &mut b, rounds: rounds(0, 2) },
            Contender { name: "burn", subject: &mut c, rounds: rounds(1, 3) },
        ];
        let samples = interleaved(&mut contenders, Phase::Prefill, None).unwrap();
        assert_eq!(log.borrow().as_str(), "abcabcaa");
        let [a, b, c] = &samples.arms[..] else { panic!("three arms") };
        assert_eq!(a.as_ref().unwrap(), &[2.0, 3.0, 4.0]);
        assert_eq!(b.as_ref().unwrap(), &[1.0, 2.0]);
        assert_eq!(format!("{:#}", c.as_ref().unwrap_err()), "burn: broken");
    }
}
