#!/usr/bin/env python3
"""Trains the small built-in GPT-2-layout language model on public-domain text.

    apt-get install bible-kjv bible-kjv-text jargon-text
    python3 -m venv VENV && VENV/bin/pip install numpy torch tokenizers safetensors transformers
    bible -f 'gen1:1-rev22:21' </dev/null >kjv.txt      # one verse a line, "Ge1:1 In the ..."
    zcat /usr/share/doc/jargon-text/jargon.txt.gz >jargon.txt

    VENV/bin/python train.py all OUT [--kjv kjv.txt --jargon jargon.txt] [--minutes 40]

Without --kjv/--jargon the two texts are taken from the installed Debian packages.  `all` is: `data` (text,
held-out split, tokenizer, token files), `train`, `eval` (perplexity by context length, to OUT/eval.json) and
`expected` (logits by Hugging Face transformers, which shares no code with this file); each is also a command
of its own.  Nothing is written outside OUT; the checkpoint is in OUT/model, rewritten every few minutes.

Seeds are fixed, but the schedule follows the used-up share of --minutes or of --tokens, whichever is larger: how
many steps there are depends on the machine, and a second run gives a similar model, not the same bits.
"""
import argparse
import ctypes
import gzip
import itertools
import json
import math
import random
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

VOCAB, N_POS, N_LAYER, N_EMBD, N_HEAD = 2048, 2048, 4, 128, 4
EOT, SEED = "<|endoftext|>", 20231
HELD_BOOKS = ["Numbers", "Daniel", "Esther"]  # whole books that repeat themselves over long distances
HELD_LETTER = "L"  # the lexicon entries of this letter, one contiguous slice
PHASES = [(0.15, 256), (0.50, 1024), (1.00, 2048)]  # (until this share of the schedule, tokens)
WORKERS, MICRO_TOKENS = 2, 2048  # processes of one thread, and what each works off at every step
LR, LR_END, WARMUP_STEPS, DECAY, BETAS, CLIP = 2e-3, 0.04, 100, 0.1, (0.9, 0.98), 1.0
REPEAT_SHARE = 0.2  # of training sequences: passages are copied to a later place in them

BOOKS = [b.strip() for b in """
Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,2 Kings,1 Chronicles,
2 Chronicles,Ezra,Nehemiah,Esther,Job,Psalms,Proverbs,Ecclesiastes,Song of Solomon,Isaiah,Jeremiah,Lamentations,
Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,Zephaniah,Haggai,Zechariah,Malachi,Matthew,
Mark,Luke,John,Acts,Romans,1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,Colossians,
1 Thessalonians,2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,2 Peter,1 John,2 John,
3 John,Jude,Revelation""".split(",")]

def bible_documents(text):
    """One document a book: its title, then chapters of running text in paragraphs of verses."""
    books, last = [], None  # (abbreviation, {chapter: [verse]})
    for line in text.splitlines():
        if m := re.match(r"([0-9]?[A-Za-z]+)(\d+):(\d+) (.*)", line):
            if m[1] != last:
                books, last = books + [{}], m[1]
            books[-1].setdefault(int(m[2]), []).append(re.sub(r" +", " ", m[4]).strip())
    assert len(books) == len(BOOKS) == 66, len(books)
    out = {}
    for name, chapters in zip(BOOKS, books):
        parts = [name]
        for number, verses in chapters.items():
            if len(chapters) > 1:
                parts.append(f"{'Psalm' if name == 'Psalms' else 'Chapter'} {number}")
            paragraph = []
            for verse in verses:
                paragraph.append(verse)
                if sum(map(len, paragraph)) > 700 or verse is verses[-1]:
                    parts.append(" ".join(paragraph))
                    paragraph = []
        out[name] = "\n\n".join(parts) + "\n"
    return out

def paragraphs(lines):
    """Unwraps the Jargon File's 3-space-indented lines; tables and drawings are left out."""
    out = []
    for text, block in itertools.groupby(lines, lambda line: bool(line.strip())):
        if text and (block := list(block)):
            verbatim = any(re.match(r" {4,}|\S.* {4,}", b) for b in block)
            text = "\n".join(block) if verbatim else " ".join(b.strip() for b in block)
            text = "\n".join(t[3:] if t.startswith("   ") else t for t in text.split("\n"))
            letters = sum(c.isalpha() or c.isspace() for c in text)
            prose = letters >= (0.8 if verbatim else 0.6) * len(text) or re.match(":\\S", text)
            if prose and not re.search("[\u2500-\u257f]", text):
                out.append(text)
    return out

def jargon_documents(text):
    """The introduction, the lexicon (a document a letter) and the appendices."""
    quotes = {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2014": "--", "\u00a0": " ", "\t": "    "}
    lines = text.translate(str.maketrans(quotes)).splitlines()
    marks = "Chapter 1\\.", "Chapter 3\\.", "Chapter 4\\.", " +Part II\\. The", "   :\\(TM\\):", " +Part III", "Appendix A"
    a, b, c, d, lex, e, f = (next(i for i, line in enumerate(lines) if re.match(k, line)) for k in marks)
    out = {"Jargon introduction": ["The Jargon File", "I. Introduction"] + paragraphs(lines[a:b] + lines[c:d])}
    key = "Symbols"  # these entries come first
    for p in paragraphs(lines[lex:e]):
        if m := re.match(r":(.)", p):
            key = m[1].upper() if re.match("[A-Za-z]", m[1]) else key
        if not (len(p) == 1 and p.isalpha()):  # the letter that heads its section
            out.setdefault("Jargon " + key, ["The Jargon Lexicon: " + key]).append(p)
    out["Jargon appendices"] = ["The Jargon File", "III. Appendices"] + paragraphs(lines[f:])
    return {k: "\n\n".join(v) + "\n" for k, v in out.items()}

def command_data(a):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    kjv = a.kjv.read_text() if a.kjv else subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    jargon = a.jargon.read_bytes() if a.jargon else gzip.decompress(
        Path("/usr/share/doc/jargon-text/jargon.txt.gz").read_bytes())
    docs = {**bible_documents(kjv), **jargon_documents(jargon.decode())}
    held_names = HELD_BOOKS + [f"Jargon {HELD_LETTER}"]
    train = [d for k, d in docs.items() if k not in held_names]
    (a.out / "model").mkdir(parents=True, exist_ok=True)
    (a.out / "model/heldout.txt").write_text(EOT.join(docs[k] for k in held_names))
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.train_from_iterator(train, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert tok.get_vocab_size() == VOCAB and tok.token_to_id(EOT) == 0
    tok.save(str(a.out / "model/tokenizer.json"))
    random.Random(SEED).shuffle(order := [tok.encode(d).ids for d in train])
    ids = [i for d in order for i in [0, *d]]
    np.save(a.out / "train.npy", np.array(ids, np.int32))
    held_ids = tok.encode((a.out / "model/heldout.txt").read_text()).ids
    np.save(a.out / "heldout.npy", np.array(held_ids, np.int32))
    for k in held_names:
        print(f"held out: {k}: {len(docs[k].encode())} bytes, {len(tok.encode(docs[k]).ids)} tokens")
    print(f"train: {len(train)} documents, {sum(len(d.encode()) for d in train)} bytes, {len(ids)} tokens; "
          f"held out: {len(held_ids)} tokens", flush=True)

def init_params():
    """Small random weights, but for one thing: heads of the first two layers begin as an induction circuit.

    Of the 128 residual dimensions 0..31 begin as sinusoids of the position, 32..95 as the token, 96..127 empty.
    Layer 0 writes the token one back to 96..127 (head 0) and the token two back over the position (head 1).
    Layer 1 copies from the places whose previous token was the present one (heads 0 and 1) and from those
    whose previous two were the present two (heads 2 and 3; far sharper over long distances).  In a model
    this small such heads do not emerge within minutes; begun this way they are used and refined from the
    first step, and only they make a long context pay.
    """
    g = torch.Generator().manual_seed(SEED)
    d, dh, size, p = N_EMBD, N_EMBD // N_HEAD, 0.1, {}
    normal = lambda *shape, std: torch.randn(*shape, generator=g) * std
    wte, wpe = normal(VOCAB, d, std=0.02 * size), normal(N_POS, d, std=0.02 * size)
    wte[:, 32:96] += normal(VOCAB, 64, std=size)
    rates = 2.5 * 0.64 ** torch.arange(dh // 2)
    angle = torch.arange(N_POS)[:, None] * rates
    wpe[:, :dh] += size * math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], 1)
    p["transformer.wte.weight"], p["transformer.wpe.weight"] = wte, wpe
    for i in range(N_LAYER):
        h = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            p[h + norm + ".weight"], p[h + norm + ".bias"] = torch.ones(d), torch.zeros(d)
        for name, n_in, n_out, std in (("attn.c_attn", d, 3 * d, 0.04), ("attn.c_proj", d, d, 0.002),
                                       ("mlp.c_fc", d, 4 * d, 0.06), ("mlp.c_proj", 4 * d, d, 0.001)):
            p[h + name + ".weight"], p[h + name + ".bias"] = normal(n_in, n_out, std=std), torch.zeros(n_out)
    p["transformer.ln_f.weight"], p["transformer.ln_f.bias"] = torch.full((d,), 0.3), torch.zeros(d)

    eye, n = torch.eye(dh), dh // 2
    mix = torch.linalg.qr(torch.randn(dh, dh, generator=g))[0]  # tells the token before from the present one

    def turn(by):  # position p to p - by
        block, c, s = torch.zeros(dh, dh), torch.diag((by * rates).cos()), torch.diag((by * rates).sin())
        block[:n, :n], block[n:, n:], block[n:, :n], block[:n, n:] = c, c, -s, s
        return block

    def head(layer, head, q_from, k_from, v_from, to, gain):
        w, o = (p[f"transformer.h.{layer}.attn.{m}.weight"] for m in ("c_attn", "c_proj"))
        for part, blocks in enumerate((q_from, k_from, [(v_from, eye)])):
            columns = slice(part * d + head * dh, part * d + head * dh + dh)
            w[:, columns] *= 0.25
            for start, block in blocks:
                w[start:start + dh, columns] += block
        o[head * dh:head * dh + dh, to:to + dh] += gain * eye

    head(0, 0, [(0, 2 * turn(1))], [(0, 2 * eye)], 32, 96, size)
    head(0, 1, [(0, 2 * turn(2))], [(0, 2 * eye)], 32, 0, 1.5 * size)
    for i, dims in enumerate((32, 64)):
        head(1, i, [(32, 1.9 * eye)], [(96, 1.9 * eye)], dims, dims, 2 * size)
        head(1, 2 + i, [(32, 1.9 * eye), (96, 1.9 * mix)], [(96, 1.9 * eye), (0, 1.3 * mix)], dims, dims, 2 * size)
    return p

def forward(p, ids, first_position=0):
    """Logits [batch, tokens, VOCAB]; `first_position` is a number or one a sequence."""
    b, t = ids.shape
    pos = torch.arange(t)[None] + torch.as_tensor(first_position).reshape(-1, 1)
    x = F.embedding(ids, p["transformer.wte.weight"]) + F.embedding(pos, p["transformer.wpe.weight"])
    norm = lambda x, n: F.layer_norm(x, (N_EMBD,), p[n + ".weight"], p[n + ".bias"], 1e-5)
    linear = lambda x, n: F.linear(x, p[n + ".weight"].t(), p[n + ".bias"])
    for i in range(N_LAYER):
        h = f"transformer.h.{i}."
        qkv = linear(norm(x, h + "ln_1"), h + "attn.c_attn").view(b, t, 3, N_HEAD, N_EMBD // N_HEAD)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(b, t, N_EMBD), h + "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh"), h + "mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), p["transformer.wte.weight"])

def export(p, folder):
    arrays = {k: np.ascontiguousarray(v.detach().numpy().astype(np.float16)) for k, v in p.items()}
    save_file(arrays, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "model.safetensors.part").replace(folder / "model.safetensors")
    config = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.0, "bos_token_id": 0,
        "embd_pdrop": 0.0, "eos_token_id": 0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2", "n_ctx": N_POS, "n_embd": N_EMBD, "n_head": N_HEAD, "n_inner": None, "n_layer": N_LAYER,
        "n_positions": N_POS, "reorder_and_upcast_attn": False, "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "summary_activation": None,
        "summary_first_dropout": 0.0, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "tie_word_embeddings": True, "torch_dtype": "float16", "use_cache": True,
        "vocab_size": VOCAB}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

def load(folder):
    """The exported float16 tensors, in float32."""
    return {k: torch.from_numpy(v.astype(np.float32)) for k, v in load_file(folder / "model.safetensors").items()}

def batch(rng, data, count, t):
    """`count` sequences of t + 1 tokens at random places, some with a passage repeated later on."""
    rows = []
    for _ in range(count):
        at = rng.integers(0, len(data) - t - 1)
        row = data[at:at + t + 1].copy()
        if rng.random() < REPEAT_SHARE:
            for _ in range(3):
                n = int(math.exp(rng.uniform(math.log(16), math.log(t // 4))))
                src = int(rng.integers(0, t - 2 * n))
                dst = int(rng.integers(src + n, t + 1 - n))
                row[dst:dst + n] = row[src:src + n]
        rows.append(row)
    start = rng.integers(0, N_POS - t + 1, count) * (rng.random(count) < 0.7)
    return torch.from_numpy(np.stack(rows).astype(np.int64)), start

def work(rank, a):
    """One of the processes that train together: the same weights, other sequences, gradients averaged."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # keep freed memory: page faults cost a quarter of the time
    dist.init_process_group("gloo", init_method=f"file://{a.out.resolve()}/rendezvous", rank=rank, world_size=WORKERS)
    rng = np.random.default_rng([SEED, rank])
    data, held = np.load(a.out / "train.npy"), np.load(a.out / "heldout.npy")
    p = {k: v.requires_grad_() for k, v in init_params().items()}
    scale = lambda k: 0.1 if "wpe" in k else 1.0 if ".h." in k and p[k].dim() == 2 else 0.5  # of LR
    opt = torch.optim.AdamW([{"params": [v], "scale": scale(k), "weight_decay": DECAY if scale(k) == 1 else 0.0}
                             for k, v in p.items()], lr=LR, betas=BETAS, fused=True)
    begin = saved = time.time()
    step, done, log, lengths = 0, 0.0, [], {}
    while done < 1:
        t = next(n for until, n in PHASES if done < until)
        lr = LR * min((step + 1) / WARMUP_STEPS, LR_END + (1 - LR_END) * (1 + math.cos(math.pi * done)) / 2)
        for group in opt.param_groups:
            group["lr"] = lr * group["scale"]
        opt.zero_grad()
        rows, start = batch(rng, data, MICRO_TOKENS // t, t)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(p, rows[:, :-1], start)
        loss = F.cross_entropy(logits.float().reshape(-1, VOCAB), rows[:, 1:].reshape(-1))
        loss.backward()
        step, tokens = step + 1, (step + 1) * WORKERS * MICRO_TOKENS
        lengths[t] = lengths.get(t, 0) + WORKERS * MICRO_TOKENS
        minutes = (time.time() - begin) / 60
        shared = torch.cat([v.grad.reshape(-1) for v in p.values()] + [torch.stack([
            loss.detach(), torch.tensor(max(minutes / a.minutes, tokens / a.tokens))])])
        dist.all_reduce(shared)
        shared /= WORKERS
        for v, gradient in zip(p.values(), shared.split([v.numel() for v in p.values()] + [2])):
            v.grad.copy_(gradient.view_as(v))
        log, done = log + [float(shared[-2])], float(shared[-1])
        torch.nn.utils.clip_grad_norm_(p.values(), CLIP)
        opt.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step} T {t} lr {lr:.2e} loss {np.mean(log[-50:]):.4f} minutes {minutes:.1f}", flush=True)
        if rank == 0 and time.time() - saved > 300:
            export(p, a.out / "model")
            saved = time.time()
            with torch.no_grad():
                few = {n: perplexity(load(a.out / "model"), held[:16384], n)[1] for n in (128, 1024, 2048)}
            print("  held-out, last quarter:", {n: round(v, 2) for n, v in few.items()}, flush=True)
    if rank == 0:
        export(p, a.out / "model")
        summary = {"steps": step, "tokens": tokens, "tokens_by_length": lengths, "epochs": tokens / len(data),
                   "minutes": minutes, "last_loss": float(np.mean(log[-100:]))}
        (a.out / "train.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(summary, flush=True)

def command_train(a):
    (a.out / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(work, (a,), WORKERS)

def losses(p, rows, last=N_POS):
    """The loss of every token, or of the `last` ones, of equally long rows, some 4096 tokens at a time."""
    out = []
    for part in torch.from_numpy(rows.astype(np.int64)).split(max(1, 4096 // rows.shape[1])):
        logits = forward(p, part[:, :-1])[:, -last:]
        out.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:][:, -last:], reduction="none").numpy())
    return np.concatenate(out)

def perplexity(p, ids, n):
    """Windows of n tokens side by side, positions from 0: (overall, last quarter of each window)."""
    each = losses(p, ids[:len(ids) // N_POS * N_POS].reshape(-1, n))  # the same text for every n
    return float(np.exp(each.mean())), float(np.exp(each[:, -(n // 4):].mean()))

def command_eval(a):
    torch.set_num_threads(2)
    p, ids, block = load(a.out / "model"), np.load(a.out / "heldout.npy"), 64
    result = {"same_tokens": {}, "repeated": {}}
    with torch.no_grad():
        result["windows"] = {n: perplexity(p, ids, n) for n in (64, 128, 256, 512, 1024, 2048)}
        # The same tokens every time, every sixth block of 64 of them, after exactly c tokens of context.
        ends = np.arange(N_POS, len(ids) + 1, 6 * block)
        document = np.cumsum(ids == 0)[ends - block]
        groups = {"all": ends > 0, "first 25k": ends < 25600, **{f"document {k}": document == k for k in set(document)}}
        for c in (64, 128, 256, 512, 1024, N_POS - block):
            each = losses(p, np.stack([ids[e - block - c:e] for e in ends]), block).mean(1)
            result["same_tokens"][c] = {k: float(np.exp(each[group].mean())) for k, group in groups.items()}
        # Blocks that stood in the context already, c tokens before: is the long context of use when it must be?
        for c, at in itertools.product((0, 128, 512, 1024, N_POS - block), [np.arange(0, len(ids) - N_POS, 1024)]):
            repeated = np.stack([np.r_[ids[i:i + c], ids[i:i + block]] if c else ids[i:i + block + 1] for i in at])
            result["repeated"][c] = float(np.exp(losses(p, repeated, block).mean()))
    (a.out / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)

def command_expected(a):
    """96 held-out tokens and their logits by transformers, in float64 from the float16 weights."""
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(a.out / "model", dtype=torch.float64, attn_implementation="eager").eval()
    ids = np.load(a.out / "heldout.npy")[1000:1096].astype(np.int64)[None]
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits
        ours = forward(load(a.out / "model"), torch.from_numpy(ids))
    print("dtype", logits.dtype, "largest difference from forward():", float((logits - ours).abs().max()))
    save_file({"input_ids": ids, "logits": logits.float().numpy()}, a.out / "model/expected.safetensors")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"data": command_data, "train": command_train, "eval": command_eval, "expected": command_expected}
    parser.add_argument("command", choices=["all", *commands])
    for path in ("out", "--kjv", "--jargon"):
        parser.add_argument(path, type=Path)
    for budget, default in (("--minutes", 40), ("--tokens", 30e6)):
        parser.add_argument(budget, type=float, default=default)
    args = parser.parse_args()
    for name in commands if args.command == "all" else [args.command]:
        commands[name](args)
