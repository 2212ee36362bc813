"""The perplexity of a text by `lm-eval` through a running server (pip install lm_eval[api] transformers).

    python perplexity.py http://127.0.0.1:8080 MODEL-DIRECTORY TEXT-FILE [LENGTH]

Beside it, `bsbr eval -m MODEL-DIRECTORY --text TEXT-WITH-PREFIX --seq-len TOKENS --cache-dtype f16` with the files and numbers that it
prints (and the preset or settings that the server runs with): lm-eval reads a text behind the first special token of the model, so that token goes before the text there too.
"""

import json
import math
import pathlib
import sys
import tempfile
import urllib.request

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

base, model, path = sys.argv[1:4]
length = int((sys.argv[4:] or [8192])[0])
tokenizer = AutoTokenizer.from_pretrained(model)
tokens = tokenizer.encode(pathlib.Path(path).read_text(), add_special_tokens=False)[: length - 1]
text = tokenizer.decode(tokens)
assert tokenizer.encode(text, add_special_tokens=False) == tokens, "the text was cut inside a character: take another length"
prefix = tokenizer.bos_token or tokenizer.eos_token

with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "one_text.yaml").write_text(f"""
task: one_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "text.jsonl"}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
process_results: !function functions.counted
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1
""")
    (folder / "functions.py").write_text("""
def counted(doc, results):
    return {"bits_per_byte": (results[0], len(doc["text"].encode()))}
""")
    arguments = {
        "model": json.load(urllib.request.urlopen(base + "/v1/models"))["data"][0]["id"],
        "base_url": base + "/v1/completions", "tokenizer": model, "tokenized_requests": True, "max_length": length + 1,  # One for the token that lm-eval has generated and drops.
        "num_concurrent": 1, "max_retries": 1,
    }
    manager = TaskManager(include_path=str(folder))
    results = simple_evaluate(model="local-completions", model_args=arguments, tasks=["one_text"], task_manager=manager)

bits = results["results"]["one_text"]["bits_per_byte,none"]
perplexity = math.exp(bits * math.log(2) * len(text.encode()) / len(tokens))
with_prefix = pathlib.Path(path).with_suffix(".prefixed.txt")
with_prefix.write_text(prefix + text)
print(f"bits per byte {bits:.6f}, perplexity {perplexity:.4f} of {len(tokens)} tokens through lm-eval")
# The server keeps keys and values in f16 unless it is told otherwise.
print(f"compare: bsbr eval -m {model} --text {with_prefix} --seq-len {len(tokens) + 1} --windows 1 --cache-dtype f16")
