"""The other side of `bsbr bench --against pytorch`: one request a line in, one answer a line out, in JSON."""

import inspect
import json
import math
import sys
import time


def answer(**fields):
    print(json.dumps(fields), flush=True)


try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    answer(error=f"{sys.executable} cannot import torch ({error})")
    sys.exit(0)

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
try:
    import transformers

    transformers_version = transformers.__version__
    transformers.utils.logging.disable_progress_bar()
except ImportError:
    transformers, transformers_version = None, None


class Attention:
    """scaled_dot_product_attention, causal; decoding into preallocated keys and values."""

    room = 64

    def __init__(self, batch, heads, kv_heads, head_dim, tokens, chunk_size, dtype):
        make = lambda heads, tokens: torch.randn(batch, heads, tokens, head_dim).to(getattr(torch, dtype))
        self.tokens, self.chunk_size = tokens, chunk_size
        self.q, self.k, self.v = make(heads, tokens), make(kv_heads, tokens), make(kv_heads, tokens)
        self.next = [(make(heads, 1), make(kv_heads, 1), make(kv_heads, 1)) for _ in range(8)]
        self.gqa = {"enable_gqa": True} if heads != kv_heads else {}

    def prefill(self):
        return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, **self.gqa)

    def prepare(self):
        grow = lambda rows: torch.cat([rows, rows.new_zeros(*rows.shape[:2], self.room, rows.shape[3])], 2)
        self.keys, self.values, self.at = grow(self.k), grow(self.v), self.tokens

    def decode(self, step):
        q, k, v = self.next[step % len(self.next)]
        if self.at == self.keys.shape[2]:
            self.at = self.tokens
        self.keys[:, :, self.at : self.at + 1], self.values[:, :, self.at : self.at + 1] = k, v
        self.at += 1
        seen = self.keys[:, :, : self.at], self.values[:, :, : self.at]
        return F.scaled_dot_product_attention(q, *seen, **self.gqa)

    def prepare_training(self):
        # Tensors of the inference mode have no gradients.
        with torch.inference_mode(False):
            self.leaves = [rows.clone().requires_grad_() for rows in (self.q, self.k, self.v)]

    def training(self):
        kept = self.q, self.k, self.v
        try:
            with torch.inference_mode(False), torch.enable_grad():
                self.q, self.k, self.v = self.leaves
                torch.autograd.grad(self.prefill(), self.leaves, self.q.detach())
        finally:
            self.q, self.k, self.v = kept


class Original(Attention):
    """The published formula as the Python original computes it, tokens x tokens scores and all; only the two masks are
    the causal way round. The last query and key of a chunk stand for its meta query and key: same shapes, same cost."""

    def __init__(self, batch, heads, kv_heads, head_dim, tokens, chunk_size, dtype):
        super().__init__(batch, heads, kv_heads, head_dim, tokens, chunk_size, dtype)
        repeat = lambda rows: rows.repeat_interleave(heads // kv_heads, 1)
        self.k, self.v = repeat(self.k), repeat(self.v)

    def prefill(self):
        batch, heads, tokens, width = self.q.shape
        size, chunks = self.chunk_size, -(-tokens // self.chunk_size)
        scale = 1 / math.sqrt(width)

        position = torch.arange(tokens)
        same = position[:, None] // size == position[None, :] // size
        near = same & (position[:, None] >= position[None, :])
        scores = (self.q @ self.k.transpose(2, 3) * scale).masked_fill(~near, float("-inf"))
        local = scores.softmax(-1) @ self.v

        padding = (0, 0, 0, chunks * size - tokens)
        chunked = lambda rows: F.pad(rows, padding).view(batch, heads, chunks, size, width)
        q, k, v = chunked(self.q), chunked(self.k), chunked(self.v)
        states = (k.transpose(3, 4) @ v).flatten(3)
        before = torch.ones(chunks, chunks, dtype=torch.bool).tril(-1)
        scores = (q[..., -1, :] @ k[..., -1, :].transpose(2, 3) * scale).masked_fill(~before, float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)
        retrieved = (weights @ states).view(batch, heads, chunks, width, width)
        return local + (q @ retrieved).view(batch, heads, chunks * size, width)[:, :, :tokens]


class Model:
    """A causal language model of transformers: hidden states of the whole text, scores of the next token."""

    loaded = {}

    def __init__(self, dir, tokens, next):
        if transformers is None:
            raise RuntimeError(f"{sys.executable} cannot import transformers")
        if dir not in Model.loaded:
            options = {"attn_implementation": "sdpa", "local_files_only": True}
            auto = transformers.AutoModelForCausalLM
            try:
                Model.loaded[dir] = auto.from_pretrained(dir, dtype=torch.float32, **options).eval()
            except TypeError:
                Model.loaded[dir] = auto.from_pretrained(dir, torch_dtype=torch.float32, **options).eval()
        self.model = Model.loaded[dir]
        self.text = torch.tensor([tokens])
        self.next = [torch.tensor([[token]]) for token in next]
        takes = inspect.signature(self.model.forward).parameters
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.output = None

    def prefill(self):
        self.output = None
        self.output = self.model(self.text, use_cache=True, **self.last)

    def prepare(self):
        if self.output is None:
            self.prefill()

    def decode(self, step):
        token, past = self.next[step % len(self.next)], self.output.past_key_values
        self.output = self.model(token, past_key_values=past, use_cache=True, **self.last)


def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(run):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    run()
    return {"before": before, "peak": status("VmHWM")}


kinds = {"torch-sdpa": Attention, "torch-original": Original, "transformers": Model}
subjects, made = {}, 0


@torch.inference_mode()
def handle(request):
    global made
    match request["do"]:
        case "make":
            made += 1
            subjects[made] = kinds[request["arm"]](**request["of"])
            return {"id": made}
        case "drop":
            subjects.pop(request["id"], None)
            return {}
        case "prefill":
            return {"seconds": timed(subjects[request["id"]].prefill)}
        case "prepare":
            subjects[request["id"]].prepare()
            return {}
        case "decode":
            subject, steps = subjects[request["id"]], request["steps"]
            return {"seconds": timed(lambda: [subject.decode(step) for step in range(steps)]) / steps}
        case "prepare-training":
            subjects[request["id"]].prepare_training()
            return {}
        case "training":
            return {"seconds": timed(subjects[request["id"]].training)}
        case "peak":
            return peak(getattr(subjects[request["id"]], request["phase"]))


answer(torch=torch.__version__, transformers=transformers_version, threads=torch.get_num_threads())
for line in sys.stdin:
    try:
        answer(**handle(json.loads(line)))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
