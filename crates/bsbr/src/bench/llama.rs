//! The llama.cpp opponent: a `llama-bench` that the user has, run on a GGUF file of the same model for one sample at a time, so that it
//! takes its turn among the other arms.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{DECODE_TOKENS, Phase, Subject};

/// What it says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct About {
    pub(crate) build: String,
    pub(crate) backends: String,
    /// The model as it names it, its number format included.
    pub(crate) model: String,
    pub(crate) model_bytes: u64,
    pub(crate) cache: String,
    pub(crate) threads: usize,
}

/// A program, a file and a number of threads.
#[derive(Debug)]
pub(crate) struct LlamaBench {
    program: PathBuf,
    model: PathBuf,
    threads: usize,
}

/// One test in the output of `llama-bench -o json`, as far as it is read.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Test {
    build_commit: String,
    backends: String,
    model_type: String,
    model_size: u64,
    n_threads: usize,
    type_k: String,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    samples_ns: Vec<u64>,
}

impl Test {
    fn about(&self) -> About {
        About {
            build: self.build_commit.clone(),
            backends: self.backends.clone(),
            model: self.model_type.clone(),
            model_bytes: self.model_size,
            cache: self.type_k.clone(),
            threads: self.n_threads,
        }
    }

    /// Mean time of a sample: of a whole text, or of one token.
    fn sample(&self) -> Option<Duration> {
        let count = u32::try_from(self.samples_ns.len()).ok().filter(|&count| count > 0)?;
        let tokens = u32::try_from(self.n_gen.max(1)).ok()?;
        Some(Duration::from_nanos(self.samples_ns.iter().sum()) / count / tokens)
    }
}

fn parse(output: &[u8]) -> Result<Vec<Test>> {
    serde_json::from_slice(output).with_context(|| {
        let text = String::from_utf8_lossy(output);
        format!("llama-bench wrote {:?}, expected a list of tests in JSON", text.chars().take(200).collect::<String>())
    })
}

impl LlamaBench {
    /// Finds out that `program` runs `model`, and what it is.
    pub(crate) fn start(program: &Path, model: &Path, threads: usize) -> Result<(Rc<Self>, About)> {
        let bench = Self { program: program.to_owned(), model: model.to_owned(), threads };
        let test = bench.test(1, 0, 0).context("--against llama.cpp")?;
        Ok((Rc::new(bench), test.about()))
    }

    /// One test: `prompt` tokens read or `generated` ones written, behind `depth` others.
    fn test(&self, prompt: usize, generated: usize, depth: usize) -> Result<Test> {
        let shown = self.program.display();
        let numbers = [("-t", self.threads), ("-p", prompt), ("-n", generated), ("-d", depth), ("-r", 1)];
        let numbers = numbers.into_iter().flat_map(|(flag, number)| [flag.to_owned(), number.to_string()]);
        let output = Command::new(&self.program)
            .arg("-m")
            .arg(&self.model)
            .args(numbers)
            .args(["-o", "json"])
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start `{shown}`, name another with --llama-bench"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
            bail!("`{shown}` on {} ended with {}: {last}", self.model.display(), output.status);
        }
        let asked = |test: &Test| [test.n_prompt, test.n_gen, test.n_depth] == [prompt, generated, depth];
        let tests = parse(&output.stdout)?;
        let count = tests.len();
        let found = tests.into_iter().find(|test| asked(test) && test.n_threads == self.threads);
        found.with_context(|| {
            format!(
                "`{shown}` reports {count} tests, none of {prompt} tokens read and {generated} written behind {depth}"
            )
        })
    }
}

/// The arm at one length.
pub(crate) struct LlamaSubject {
    bench: Rc<LlamaBench>,
    tokens: usize,
}

impl LlamaSubject {
    pub(crate) fn new(bench: &Rc<LlamaBench>, tokens: usize) -> Self {
        Self { bench: Rc::clone(bench), tokens }
    }
}

impl Subject for LlamaSubject {
    /// Every run reads the text of its own: nothing is kept from one process to the next.
    fn prepare(&mut self, _: Phase) -> Result<()> {
        Ok(())
    }

    fn run(&mut self, phase: Phase) -> Result<Duration> {
        let test = match phase {
            Phase::Prefill => self.bench.test(self.tokens, 0, 0)?,
            Phase::Decode => self.bench.test(0, DECODE_TOKENS, self.tokens)?,
            Phase::Training => bail!("training is measured on attention alone"),
        };
        test.sample().context("llama-bench reports no sample")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_llama_bench_is_read() {
        let tests = parse(include_bytes!("../../tests/recorded/llama-bench.json")).unwrap();
        let [read, written] = &tests[..] else { panic!("two tests: {tests:?}") };
        assert_eq!([read.n_prompt, read.n_gen, read.n_depth], [16, 0, 8]);
        // Two samples of 16 tokens.
        assert_eq!(read.sample(), Some(Duration::from_nanos(6_107_760_952 + 5_608_016_840) / 2));
        assert_eq!([written.n_prompt, written.n_gen, written.n_depth], [0, 4, 8]);
        assert_eq!(written.sample(), Some(Duration::from_nanos(13_763_667_244 + 9_667_843_043) / 2 / 4));
        let about = read.about();
        assert_eq!((about.model.as_str(), about.model_bytes), ("gemma3 270M Q4_K - Medium", 246_587_904));
        assert_eq!((about.build.as_str(), about.backends.as_str(), about.threads), ("0c1e570", "CPU", 2));
    }

    #[test]
    fn what_is_no_such_output_is_refused() {
        for output in ["", "error: no model", "{}", r#"[{"n_prompt": 1}]"#] {
            let error = format!("{:#}", parse(output.as_bytes()).unwrap_err());
            assert!(error.contains("expected a list of tests in JSON"), "{error}");
        }
        assert_eq!(parse(b"[]").unwrap(), []);
    }
}
