"""Asks a running server for a text and draws how sure the model was of each token (pip install openai matplotlib).

    python plot_logprobs.py http://127.0.0.1:8080 "Once upon a time" answer.svg
"""

import math
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import openai

base, prompt, path = sys.argv[1:4]
client = openai.OpenAI(base_url=base + "/v1", api_key="none")
model = client.models.list().data[0].id
answer = client.completions.create(model=model, prompt=prompt, max_tokens=40, temperature=0.7, seed=1, logprobs=2)
lists = answer.choices[0].logprobs
chosen = [math.exp(value) for value in lists.token_logprobs]
best = [math.exp(max(top.values())) for top in lists.top_logprobs]

places = range(len(chosen))
figure, axes = plt.subplots(figsize=(max(6, 0.28 * len(chosen)), 3.6), layout="constrained")
axes.bar(places, best, color="0.85", label="the best token")
axes.bar(places, chosen, width=0.5, color="tab:blue", label="the token that was taken")
axes.set_xticks(places, [token.replace("$", r"\$").encode("unicode_escape").decode() for token in lists.tokens], rotation=90, family="monospace", fontsize=8)
axes.set(ylim=(0, 1), ylabel="probability", title=f"{model}: {prompt.strip()[:60]} …", xlim=(-1, len(chosen)))
axes.legend(loc="upper right", fontsize=8)
figure.savefig(path)
print(f"{path}: {len(chosen)} tokens, perplexity {math.exp(-sum(lists.token_logprobs) / len(chosen)):.3f}")
