"""Asks a running server through the `openai` package (pip install openai), and checks what comes.

    python clients.py http://127.0.0.1:8080 [KEY]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import openai

base, key = sys.argv[1], (sys.argv[2:] or ["none"])[0]
client = openai.OpenAI(base_url=base + "/v1", api_key=key, max_retries=0)
model = client.models.list().data[0].id
print("model", model)

ask = {
    "model": model,
    "messages": [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Why is the sky blue?"}],
    "max_completion_tokens": 40,
    "temperature": 0.8,
    "seed": 11,
}

# A whole answer and a streamed one are the same.
whole = client.chat.completions.create(**ask)
said = whole.choices[0].message.content
stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
pieces, usage = [], None
for chunk in stream:
    pieces += [choice.delta.content or "" for choice in chunk.choices]
    usage = chunk.usage or usage
assert "".join(pieces) == said, (pieces, said)
assert len(pieces) > 5 and usage == whole.usage, (usage, whole.usage)
print("chat", repr(said))

# So are answers beside fifteen others.
others = [{**ask, "seed": seed, "temperature": 1.0} for seed in range(15)]
with ThreadPoolExecutor(16) as pool:
    answers = list(pool.map(lambda one: client.chat.completions.create(**one), [ask, *others]))
assert answers[0].choices[0].message.content == said
print("beside fifteen others: the same")

# Log-probabilities, of chats and of completions.
scored = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
assert scored.choices[0].message.content == said
content = scored.choices[0].logprobs.content
assert len(content) == scored.usage.completion_tokens
assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in content)
assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace").strip() == said.strip()
text = client.completions.create(model=model, prompt="The sky is blue because", max_tokens=5, echo=True, logprobs=2, temperature=0)
lists = text.choices[0].logprobs
assert text.choices[0].text.startswith("The sky is blue because") and lists.token_logprobs[0] is None
assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset)
print("completion", repr(text.choices[0].text))

# Errors are exceptions of their own kind.
for arguments, kind in [
    ({**ask, "model": "another"}, openai.NotFoundError),
    ({**ask, "temperature": -1}, openai.BadRequestError),
    ({**ask, "max_completion_tokens": 10**9}, openai.APIStatusError),
]:
    try:
        client.chat.completions.create(**arguments)
        raise SystemExit(f"{arguments} was not refused")
    except kind as error:
        print(type(error).__name__, error.status_code, error.body["message"])

# A stream that is left ends on the server too.
for _ in client.chat.completions.create(**{**ask, "max_completion_tokens": 1000}, stream=True):
    break
print("all is well")
