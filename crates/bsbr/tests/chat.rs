//! `chat` and `generate --chat`: what is read, what is printed, what ends an answer.

mod common;

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
};

use common::{Place, Run, bsbr, check_refusal, run};
use serde_json::{Value, json};

/// A template whose borders are borders of tokens.
const TEMPLATE: &str = "{% for m in messages %}{{ '\\n\\n' + m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nassistant:' }}{% endif %}";

/// The built-in model with a chat template.
fn place() -> Place {
    let place = Place::with("builtin");
    place.write("model/tokenizer_config.json", &json!({"chat_template": TEMPLATE}).to_string());
    place
}

/// A conversation typed through a pipe.
fn chat(place: &Place, flags: &str, typed: &str) -> Run {
    let mut command = bsbr();
    command.current_dir(place.path("")).args(format!("chat -m model {flags}").split_whitespace());
    run(command.write_stdin(typed))
}

/// Tokens read and held of every answer, as `-v` tells them.
fn reads(run: &Run) -> Vec<(usize, usize, usize)> {
    let lines = run.stderr.lines().filter(|line| line.contains(" tokens read in "));
    let number = |text: &str| text.trim().trim_matches(',').parse::<usize>().expect("a number");
    lines
        .map(|line| {
            let (read, rest) = line.split_once(" tokens read").expect("a number first");
            let (_, rest) = rest.split_once(" behind ").expect("what was there");
            let (held, rest) = rest.split_once(", ").expect("two numbers");
            (number(read), number(held), number(rest.split(" new").next().expect("a number")))
        })
        .collect()
}

#[test]
fn a_second_question_reads_its_own_tokens_alone_and_is_answered_as_if_all_were_read_anew() {
    let place = place();
    for model in ["model", "converted"] {
        if model == "converted" {
            place.done("convert -m model -o converted");
            std::fs::remove_dir_all(place.path("model")).expect("it is there");
            std::fs::rename(place.path("converted"), place.path("model")).expect("room");
        }
        let run = chat(&place, "-n 12 -v", "And the king said\nWho art thou?\n");
        assert_eq!(run.code, 0, "{}", run.stderr);
        let [(first, 0, 12), (second, held, 12)] = reads(&run)[..] else { panic!("{}", run.stderr) };
        // The last token of an answer is read with what comes next.
        assert_eq!(held, first + 11, "{}", run.stderr);
        assert!(second < first + 12, "{second} tokens");
        assert!(!run.stderr.contains("read again"), "{}", run.stderr);

        let one = chat(&place, "-n 12", "And the king said\n").stdout;
        let answer = one.strip_suffix('\n').expect("a line end");
        let text = format!("\n\nuser: And the king said\n\nassistant:{answer}\n\nuser: Who art thou?\n\nassistant:");
        place.write("whole.txt", &text);
        let whole = place.done("generate -m model -n 12 --prompt-file whole.txt");
        assert_eq!(run.stdout, format!("{one}{whole}"));
    }
}

#[test]
fn a_template_that_rewrites_what_was_said_has_it_read_again() {
    let place = place();
    let counting = format!("{{{{ messages | length }}}}{TEMPLATE}");
    place.write("model/tokenizer_config.json", &json!({"chat_template": counting}).to_string());
    let run = chat(&place, "-n 4 -v", "And\nso\n");
    assert!(run.stderr.contains("the template changed what was said before, so it was read again"), "{}", run.stderr);
    assert_eq!(reads(&run)[1].1, 0, "{}", run.stderr);
}

#[test]
fn a_conversation_begins_anew_and_is_written_as_json() {
    let place = place();
    let typed =
        "one\n/save first.json\n/clear\ntwo \\\nlines\n/save second.json\n//three\n/save third.json\n/exit\nfour\n";
    let run = chat(&place, "-n 3 -v --system Be-brief.", typed);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let said = |name: &str| -> Vec<(String, String)> {
        let json = place.json(name);
        assert!(json["schema"] == "bsbr-chat/1" && json["model"].as_str().is_some_and(|model| model.contains("model")));
        let messages = json["messages"].as_array().expect("a list").iter();
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        messages.map(|message| (text(&message["role"]), text(&message["content"]))).collect()
    };
    let system = ("system".to_owned(), "Be-brief.".to_owned());
    let user = |text: &str| ("user".to_owned(), text.to_owned());
    let (first, second, third) = (said("first.json"), said("second.json"), said("third.json"));
    assert_eq!((first.len(), &first[0], &first[1]), (3, &system, &user("one")));
    assert_eq!((second.len(), &second[0], &second[1]), (3, &system, &user("two \nlines")));
    assert_eq!((third.len(), &third[3]), (5, &user("/three")));
    // The answers are what was printed.
    let answers: Vec<&str> =
        [&first[2].1, &second[2].1, &third[4].1].iter().flat_map(|text| text.split_whitespace()).collect();
    assert_eq!(run.stdout.split_whitespace().collect::<Vec<_>>(), answers);
    // A new conversation reads all of its text.
    assert_eq!(reads(&run)[1].1, 0);
}

#[test]
fn commands_explain_themselves() {
    let run = chat(&place(), "-n 3", "/help\n/sav x\n/save\n/save no/such/place.json\n\n");
    assert_eq!((run.code, run.stdout.as_str()), (0, ""));
    for words in ["/clear", "Ctrl-C", "there is no /sav", "/save FILE", "error: cannot write no/such/place.json"] {
        assert!(run.stderr.contains(words), "no {words:?} in {}", run.stderr);
    }
}

#[test]
fn an_end_of_turn_and_a_stop_text_end_an_answer() {
    let place = place();
    let free = chat(&place, "-n 24", "And the king said\n").stdout;
    // A text that begins and ends within tokens.
    let stop = &free[4..7];
    let mut command = bsbr();
    command.current_dir(place.path("")).args(["chat", "-m", "model", "-n", "24", "--stop", stop]);
    let stopped = run(command.write_stdin("And the king said\n"));
    let end = free.find(stop).expect("it is there");
    assert_eq!(stopped.stdout, format!("{}\n", &free[..end]), "{}", stopped.stderr);

    // The token that the template writes behind an answer: here an ordinary letter made special.
    let token = free.trim().chars().rev().find(char::is_ascii_lowercase).expect("a letter").to_string();
    let plain = chat(&place, "-n 24", "x\n").stdout;
    place.edit_json("model/tokenizer.json", |tokenizer| {
        let id = tokenizer["model"]["vocab"][&token].clone();
        let added = json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        tokenizer["added_tokens"].as_array_mut().expect("a list").push(added);
    });
    let template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}@@{% endif %}{% endfor %}";
    let template = template.replace("@@", &token);
    place.write("model/tokenizer_config.json", &json!({"chat_template": template}).to_string());
    let run = chat(&place, "-n 200 -v", "x\n");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(!run.stdout.contains(&token), "{} after {plain}", run.stdout);
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_answer_and_not_the_program() {
    let place = place();
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("bsbr"))
        .current_dir(place.path(""))
        .args(["chat", "-m", "model", "-n", "1500", "-v"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut typed = child.stdin.take().expect("a pipe");
    let mut answers = child.stdout.take().expect("a pipe");
    writeln!(typed, "And the king said").expect("it listens");
    // The answer has begun.
    let mut first = [0; 4];
    answers.read_exact(&mut first).expect("an answer");
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("`kill`");
    assert!(sent.success());
    writeln!(typed, "/clear\nAnd\n/save after.json").expect("it still listens");
    drop(typed);
    // The rest of the answers is short.
    let output = child.wait_with_output().expect("it ends");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{told}");
    let new: Vec<usize> = told
        .lines()
        .filter_map(|line| line.split_once(" behind ")?.1.split_once(", ")?.1.split(' ').next()?.parse().ok())
        .collect();
    assert!(new.len() == 2 && new[0] < 1500, "{told}");
    assert_eq!(place.json("after.json")["messages"][0]["content"], "And");
}

#[test]
fn a_prompt_is_put_into_the_template_where_that_is_asked_for() {
    let place = place();
    let plain = place.run("generate -m model -n 8 --prompt Who");
    assert!(plain.stderr.starts_with("note: the model has a chat template; --chat "), "{}", plain.stderr);
    let chat = place.run("generate -m model -n 8 --prompt Who --chat --system Be-brief.");
    assert_eq!((chat.code, chat.stderr.lines().count()), (0, 1), "{}", chat.stderr);
    place.write("whole.txt", "\n\nsystem: Be-brief.\n\nuser: Who\n\nassistant:");
    assert_eq!(chat.stdout, place.done("generate -m model -n 8 --prompt-file whole.txt"));
    assert_ne!(chat.stdout, plain.stdout);
    place.write("other.jinja", "{{ word }} {{ messages[0].content }}");
    let mut command = bsbr();
    command.current_dir(place.path("")).args(["generate", "-m", "model", "-n", "8", "--chat", "--prompt", "Who"]);
    let run = run(command.args(["--chat-template", "other.jinja", "--chat-template-args", r#"{"word": "So"}"#]));
    assert_eq!(run.code, 0, "{}", run.stderr);
    place.write("whole.txt", "So Who");
    assert_eq!(run.stdout, place.done("generate -m model -n 8 --prompt-file whole.txt"));
}

#[test]
fn what_cannot_be_a_chat_is_refused() {
    let place = place();
    place.refused("generate -m model --prompt x --system y", 2, &["--system belongs to a chat: add --chat"]);
    place.refused("chat -m model -n 0", 2, &["--max-new-tokens is 0"]);
    place.refused("chat -m model --chat-template-args [1]", 2, &["--chat-template-args: expected a JSON object"]);
    let refusing = json!({"chat_template": "{{ raise_exception('Roles must alternate!') }}"});
    place.write("model/tokenizer_config.json", &refusing.to_string());
    check_refusal(&chat(&place, "", "x\n"), 2, &["chat template: Roles must alternate!"]);
    place.write("model/tokenizer_config.json", r#"{"chat_template": "{% if %}"}"#);
    check_refusal(&chat(&place, "", "x\n"), 2, &["chat template", "line 1"]);
    place.write("model/tokenizer_config.json", "{}");
    check_refusal(&chat(&place, "", "x\n"), 2, &["has no chat template", "--chat-template FILE"]);
}
