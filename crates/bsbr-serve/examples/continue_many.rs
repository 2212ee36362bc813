//! Continues several texts at once, without HTTP.
//!
//! `cargo run --release --example continue_many [MODEL]`: a Hugging Face directory or a converted model; without one, the small
//! model that the command line carries.

use std::{error::Error, path::PathBuf};

use bsbr_model::{Device, SamplingConfig};
use bsbr_serve::{Engine, EngineConfig, Event, Request, ScoreBias};

#[allow(clippy::print_stdout)]
fn main() -> Result<(), Box<dyn Error>> {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/../bsbr/builtin");
    let model = std::env::args_os().nth(1).map_or_else(|| PathBuf::from(own), PathBuf::from);
    let (decoder, tokenizer) = bsbr_convert::load(&model, &Device::flex())?;
    let stop_tokens = decoder.config().stop_tokens.clone();
    let engine = Engine::start(decoder, EngineConfig::default())?;
    let prompts = ["In the beginning", "And the king said unto", "The LORD is my"];
    let request = |prompt: &&str| {
        Ok::<_, Box<dyn Error>>(Request {
            prompt: tokenizer.encode(prompt)?,
            max_new_tokens: 20,
            stop_tokens: stop_tokens.clone(),
            sampling: SamplingConfig::default(),
            bias: ScoreBias::default(),
            logprobs: None,
            score_prompt: false,
        })
    };
    let all = engine.submit(prompts.iter().map(request).collect::<Result<_, _>>()?)?;
    for (prompt, mut events) in prompts.iter().zip(all) {
        let mut tokens = Vec::new();
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Token(score) => tokens.push(score.token),
                Event::Failed(problem) => return Err(problem.into()),
                Event::Begun { .. } | Event::Prompt(_) | Event::Ended(_) => {}
            }
        }
        println!("{prompt}{}", tokenizer.decode(&tokens)?);
    }
    let counts = engine.counts();
    println!("{} tokens read, {} written in {} steps", counts.read_tokens, counts.new_tokens, counts.steps);
    Ok(())
}
