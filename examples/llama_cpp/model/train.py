#!/usr/bin/env python3
"""Trains the model of this folder; see README.md for what it is and how it was trained.

    train.py --texts FOLDER --out FOLDER --minutes 11    trains, and goes on from a checkpoint there
    train.py --texts FOLDER --out FOLDER --evaluate      prints the tables of README.md

FOLDER of --texts is what get_texts.sh wrote. OUT/checkpoint.pt holds all that a later run needs.
Learning rate and sequence length follow the time spent out of --minutes, earlier runs included, so
a run that was stopped goes on where it was, and a finished one can be given more minutes.
Batch number n depends on the seed, n and its sequence length alone.
"""

import argparse
import collections
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import tasks

DEFAULT_SHAPE = {"layers": 8, "width": 256, "heads": 4, "kv_heads": 2, "head": 64, "hidden": 512,
                 "vocab": 260, "context": 4096, "theta": 500000.0, "eps": 1e-5}
CLASS_NAMES = ("text", "statement", "query", "answer", "copy", "track")
CLASS_WEIGHTS = (0.2, 0.05, 0.1, 1.0, 1.5, 1.5)  # of the loss, by the classes of tasks.py
# Up to which share of the time: sequence length, share of sequences that are plain text.
PHASES = ((0.04, 256, 0.05), (0.35, 1024, 0.10), (0.80, 4096, 0.20), (1.01, 4096, 0.25))


class Block(nn.Module):
    """A layer of the llama architecture. RoPE turns the pairs (0, 1), (2, 3), ... of a head."""

    def __init__(self, s):
        super().__init__()
        self.shape = s

        def matrix(rows, columns, scale=1.0):
            return nn.Parameter(torch.randn(rows, columns) * scale * columns ** -0.5)

        self.attn_norm = nn.Parameter(torch.ones(s["width"]))
        self.q = matrix(s["heads"] * s["head"], s["width"])
        self.k = matrix(s["kv_heads"] * s["head"], s["width"])
        self.v = matrix(s["kv_heads"] * s["head"], s["width"])
        self.o = matrix(s["width"], s["heads"] * s["head"], 0.1)
        self.ffn_norm = nn.Parameter(torch.ones(s["width"]))
        self.gate = matrix(s["hidden"], s["width"])
        self.up = matrix(s["hidden"], s["width"])
        self.down = matrix(s["width"], s["hidden"], 0.1)

    def forward(self, x, cos, sin):
        s = self.shape
        rows, length, _ = x.shape

        def heads(t, count):
            return t.view(rows, length, count, s["head"]).transpose(1, 2)

        def turn(t):
            even, odd = t.float().unflatten(-1, (-1, 2)).unbind(-1)
            out = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
            return out.flatten(-2).to(t.dtype)

        h = F.rms_norm(x, (s["width"],), self.attn_norm.to(x.dtype), s["eps"])
        kv = s["kv_heads"] * s["head"]
        q, k, v = F.linear(h, torch.cat((self.q, self.k, self.v))).split(
            (s["heads"] * s["head"], kv, kv), -1)
        shared = s["heads"] // s["kv_heads"]
        k = turn(heads(k, s["kv_heads"])).repeat_interleave(shared, 1)
        v = heads(v, s["kv_heads"]).repeat_interleave(shared, 1)
        a = F.scaled_dot_product_attention(turn(heads(q, s["heads"])), k, v, is_causal=True)
        x = x + F.linear(a.transpose(1, 2).flatten(2), self.o)
        h = F.rms_norm(x, (s["width"],), self.ffn_norm.to(x.dtype), s["eps"])
        gate, up = F.linear(h, torch.cat((self.gate, self.up))).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Model(nn.Module):
    """Bytes in, logits out."""

    def __init__(self, s):
        super().__init__()
        self.shape = s
        self.embedding = nn.Parameter(torch.randn(s["vocab"], s["width"]) * 0.5)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s["layers"]))
        self.norm = nn.Parameter(torch.ones(s["width"]))
        self.output = nn.Parameter(torch.randn(s["vocab"], s["width"]) * 0.02)
        pairs = s["head"] // 2
        angles = torch.outer(torch.arange(s["context"]).double(),
                             s["theta"] ** (-torch.arange(pairs).double() / pairs))
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def hidden(self, tokens):
        length = tokens.shape[1]
        x = F.embedding(tokens, self.embedding)
        if torch.is_autocast_enabled(tokens.device.type):
            x = x.to(torch.get_autocast_dtype(tokens.device.type))
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return x

    def head(self, x):
        x = F.rms_norm(x, (self.shape["width"],), self.norm.to(x.dtype), self.shape["eps"])
        return F.linear(x, self.output)

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


def token_losses(model, x, targets):
    logits = model.head(x).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


class Muon:
    """Orthogonalised momentum for the matrices of the blocks, all of one shape at a time."""

    def __init__(self, parameters, rate, momentum=0.95, decay=0.1):
        self.rate, self.momentum, self.decay = rate, momentum, decay
        self.groups = collections.defaultdict(list)
        for p in parameters:
            self.groups[tuple(p.shape)].append(p)
        self.buffers = {shape: torch.zeros(len(group), *shape, device=group[0].device)
                        for shape, group in self.groups.items()}

    @staticmethod
    def orthogonal(g):
        x = g.bfloat16()
        tall = x.shape[-2] > x.shape[-1]
        if tall:
            x = x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if tall else x).float()

    @torch.no_grad()
    def step(self, share):
        for shape, group in self.groups.items():
            g, buffer = torch.stack([p.grad for p in group]), self.buffers[shape]
            buffer.lerp_(g, 1 - self.momentum)
            update = self.orthogonal(g.lerp(buffer, self.momentum))
            rate = self.rate * share
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update.unbind()),
                                alpha=-rate * max(1.0, shape[0] / shape[1]) ** 0.5)


class Optimizer:
    """Muon for the matrices of the blocks (or AdamW), AdamW for everything else."""

    def __init__(self, model, args, device):
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        known = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in known]
        self.muon = Muon(matrices, args.muon_rate) if args.muon_rate > 0 else None
        groups = [{"params": rest, "lr": args.rate, "weight_decay": 0.0}]
        if not self.muon:
            groups.append({"params": matrices, "lr": args.rate, "weight_decay": 0.1})
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10,
                                      fused=device.type == "cuda")
        self.rate = args.rate

    def step(self, share):
        for group in self.adam.param_groups:
            group["lr"] = self.rate * share
        self.adam.step()
        if self.muon:
            self.muon.step(share)

    def state(self):
        buffers = self.muon.buffers if self.muon else {}
        return {"adam": self.adam.state_dict(),
                "muon": {shape: buffer.bfloat16() for shape, buffer in buffers.items()}}

    def load(self, state):
        self.adam.load_state_dict(state["adam"])
        for shape, buffer in state["muon"].items():
            self.muon.buffers[shape].copy_(buffer)


# Worker processes make the batches; the texts are read once in each.
_texts = {}


def start_worker(folder):
    _texts["train"] = tasks.Texts(Path(folder) / "train")
    _texts["heldout"] = tasks.Texts(Path(folder) / "heldout")


def make_batch(seed, index, rows, length, text_share):
    return tasks.batch(seed, index, rows, length, text_share, _texts["train"])


def make_exam(*args):
    return tasks.exam(*args, _texts["heldout"])


class Batches:
    """Batches in order, made ahead by the workers."""

    def __init__(self, pool, args, step):
        self.pool, self.args, self.step = pool, args, step
        self.queue, self.phase = collections.deque(), None

    def next(self, phase):
        _, length, text_share = phase
        if phase != self.phase:
            self.phase = phase
            self.queue.clear()
        while len(self.queue) < 2 * self.args.workers + 2:
            index = self.step + len(self.queue)
            rows = max(1, self.args.batch_tokens // length)
            self.queue.append(self.pool.apply_async(
                make_batch, (self.args.seed, index, rows, length, text_share)))
        self.step += 1
        return self.queue.popleft().get()


@torch.no_grad()
def examine(model, pool, device, names, lengths, count, fill_kinds, seed, autocast):
    """{(task, length): (exact share, byte accuracy, exact share of the last 64 bytes)}.

    One pass over prompt and answer: greedy decoding gives the whole answer exactly when every byte
    of it is the most likely one after the right bytes before it."""
    jobs = {(name, length): pool.apply_async(make_exam, (seed, name, length, count, fill_kinds))
            for length in lengths for name in names}
    results = {}
    for (name, length), job in jobs.items():
        questions = job.get()
        right = []
        rows = max(1, (1 << 18) // length)
        for first in range(0, count, rows):
            part = questions[first:first + rows]
            tokens = np.zeros((len(part), length), np.int64)
            for row, (prompt, answer) in zip(tokens, part):
                row[0] = tasks.BOS
                data = np.frombuffer(prompt + answer, np.uint8)
                row[1:1 + len(data)] = data
            with torch.autocast(device.type, autocast or torch.bfloat16, autocast is not None):
                guess = model(torch.from_numpy(tokens).to(device)).argmax(-1).cpu().numpy()
            for row, best, (prompt, answer) in zip(tokens, guess, part):
                end = len(prompt) + len(answer)
                right.append(best[len(prompt):end] == row[len(prompt) + 1:end + 1])
        results[name, length] = (float(np.mean([r.all() for r in right])),
                                 float(np.mean(np.concatenate(right))),
                                 float(np.mean([r[-64:].all() for r in right])))
    return results


@torch.no_grad()
def text_loss(model, device, path, length, windows, autocast):
    """Mean loss in bits a byte over windows of a text, each from BOS on."""
    data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    starts = np.linspace(0, len(data) - length, windows).astype(int)
    total = 0.0
    for start in starts:
        tokens = np.concatenate(([tasks.BOS], data[start:start + length - 1].astype(np.int64)))
        tokens = torch.from_numpy(tokens)[None].to(device)
        with torch.autocast(device.type, autocast or torch.bfloat16, autocast is not None):
            logits = model(tokens)[0, :-1].float()
        total += F.cross_entropy(logits, tokens[0, 1:]).item()
    return total / windows / np.log(2)


def save(path, model, optimizer, progress):
    state = {"shape": model.shape, "model": model.state_dict(), "optimizer": optimizer.state(),
             **progress}
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)


def train(args, device, pool):
    torch.manual_seed(args.seed)
    path = Path(args.out) / "checkpoint.pt"
    shape = dict(DEFAULT_SHAPE, **json.loads(args.shape))
    progress = {"step": 0, "seconds": 0.0, "tokens": 0}
    saved = None
    if path.exists():
        saved = torch.load(path, map_location=device)
        shape = saved["shape"]
        progress = {name: saved[name] for name in progress}
    model = Model(shape).to(device)
    optimizer = Optimizer(model, args, device)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load(saved["optimizer"])
        print(f"going on from step {progress['step']}, {progress['seconds']:.0f} s", flush=True)
    del saved
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)

    # Blocks share one piece of compiled code for each sequence length. The exams run uncompiled.
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64
        step_block = torch.compile(Block.forward, dynamic=False)
        step_losses = torch.compile(token_losses, dynamic=False)
    else:
        step_block, step_losses = Block.forward, token_losses
    weights = torch.tensor(CLASS_WEIGHTS, device=device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    batches = Batches(pool, args, progress["step"])
    before = progress["seconds"]
    start = last_exam = last_save = last_line = time.time()
    line_tokens = 0
    sums = torch.zeros(2, len(CLASS_NAMES), device=device)

    while True:
        now = time.time()
        progress["seconds"] = before + now - start
        share = progress["seconds"] / (60 * args.minutes)
        if share >= 1 or progress["step"] >= args.steps:
            break
        phase = next(p for p in PHASES if share < p[0])
        length = min(phase[1], shape["context"], args.longest)
        tokens, kinds = batches.next((phase[0], length, phase[2]))
        tokens = torch.from_numpy(tokens).to(device, non_blocking=True).long()
        kinds = torch.from_numpy(kinds).to(device, non_blocking=True).long()
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

        with torch.autocast(device.type, torch.bfloat16, autocast is not None):
            x = F.embedding(inputs, model.embedding)
            if autocast:
                x = x.to(autocast)
            for block in model.blocks:
                x = step_block(block, x, model.cos[:length], model.sin[:length])
            losses = step_losses(model, x, targets)
        by_class = weights[kinds.flatten()]
        loss = (losses * by_class).sum() / by_class.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = min(1.0, (progress["step"] + 1) / args.warmup)
        optimizer.step(warm * min(1.0, max(0.02, (1 - share) / args.decay)))
        for p in model.parameters():
            p.grad = None
        sums[0].index_add_(0, kinds.flatten(), losses.detach())
        sums[1].index_add_(0, kinds.flatten(), torch.ones_like(losses.detach()))
        progress["step"] += 1
        progress["tokens"] += targets.numel()
        line_tokens += targets.numel()

        if progress["step"] % 50 == 0 and time.time() - last_line > args.print_every:
            means = (sums[0] / sums[1].clamp(min=1)).tolist()
            rate = line_tokens / (time.time() - last_line)
            print(f"{progress['seconds']:6.0f} s  step {progress['step']:6d}  length {length:4d}  "
                  f"{rate / 1e6:5.2f} M tokens/s  " +
                  "  ".join(f"{name} {mean:.3f}" for name, mean in zip(CLASS_NAMES, means)),
                  flush=True)
            last_line, line_tokens = time.time(), 0
            sums.zero_()
        if time.time() - last_exam > args.exam_every:
            results = examine(model, pool, device, tasks.QUESTIONS, args.exam_lengths, 32,
                              ("text", "sentences"), args.seed + 1, autocast)
            for size in args.exam_lengths:
                print(f"       exact at {size}: " + "  ".join(
                    f"{name} {results[name, size][0]:.2f}" for name in tasks.QUESTIONS), flush=True)
            bits = text_loss(model, device, Path(args.texts) / "heldout/kjv.txt",
                             max(args.exam_lengths), 8, autocast)
            print(f"       held-out text: {bits:.3f} bits a byte", flush=True)
            last_exam = time.time()
        if time.time() - last_save > args.save_every:
            save(path, model, optimizer, progress)
            last_save = time.time()
    save(path, model, optimizer, progress)
    print(f"saved {path}: step {progress['step']}, {progress['seconds']:.0f} s, "
          f"{progress['tokens']} tokens", flush=True)


def evaluate(args, device, pool):
    """Prints exact shares of every task with the weights as the GGUF file holds them."""
    saved = torch.load(Path(args.out) / "checkpoint.pt", map_location=device)
    model = Model(saved["shape"]).to(device)
    model.load_state_dict({name: t.half().float() if t.ndim == 2 else t
                           for name, t in saved["model"].items()})
    autocast = torch.float16 if device.type == "cuda" else None  # as llama.cpp multiplies
    print(f"step {saved['step']}, {saved['seconds']:.0f} s, {saved['tokens']} tokens")
    table = {"step": saved["step"], "seconds": saved["seconds"], "tokens": saved["tokens"]}
    for fill_kind in ("text", "sentences", "noise"):
        results = examine(model, pool, device, tasks.QUESTIONS, args.exam_lengths, args.samples,
                          (fill_kind,), args.seed + 2, autocast)
        print(f"\nfiller: {fill_kind}; {args.samples} questions each; % exact (copying: % exact, "
              "% of bytes, % exact over the last 64 bytes)")
        print("| task | " + " | ".join(str(size) for size in args.exam_lengths) + " |")
        print("|---|" + "---|" * len(args.exam_lengths))
        for name in tasks.QUESTIONS:
            cells = []
            for size in args.exam_lengths:
                exact, bytes_right, tail = (100 * value for value in results[name, size])
                table[f"{fill_kind} {name} {size}"] = [exact, bytes_right, tail]
                cells.append(f"{exact:.1f}, {bytes_right:.2f}, {tail:.1f}"
                             if name.startswith("copy") else f"{exact:.1f}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for name in ("heldout/kjv.txt", "heldout/opticks.txt", "train/kjv.txt"):
        bits = text_loss(model, device, Path(args.texts) / name, max(args.exam_lengths), 32,
                         autocast)
        table[name] = bits
        print(f"{name}: {bits:.3f} bits a byte")
    (Path(args.out) / "evaluation.json").write_text(json.dumps(table, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", required=True, help="folder that get_texts.sh wrote")
    parser.add_argument("--out", required=True, help="folder of checkpoint.pt")
    parser.add_argument("--minutes", type=float, default=11, help="of training, with earlier runs")
    parser.add_argument("--steps", type=int, default=10 ** 9, help="stop after so many")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--samples", type=int, default=500, help="of each task in --evaluate")
    parser.add_argument("--exam-lengths", type=lambda s: [int(n) for n in s.split(",")],
                        default=[1024, 2048, 4096])
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--rate", type=float, default=0.004, help="of AdamW")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="0: AdamW for everything")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the time at the end")
    parser.add_argument("--longest", type=int, default=4096, help="sequence")
    parser.add_argument("--shape", default="{}", help="JSON that changes DEFAULT_SHAPE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--print-every", type=float, default=10, help="seconds")
    parser.add_argument("--exam-every", type=float, default=60, help="seconds")
    parser.add_argument("--save-every", type=float, default=90, help="seconds")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()

    Path(args.out).mkdir(parents=True, exist_ok=True)
    pool = multiprocessing.get_context("fork").Pool(args.workers, start_worker, (args.texts,))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    try:
        (evaluate if args.evaluate else train)(args, device, pool)
    finally:
        pool.terminate()


if __name__ == "__main__":
    main()
