#!/usr/bin/env python3
# Copyright 2026 The KVLean Authors
# SPDX-License-Identifier: Apache-2.0
"""The methods as their torch implementations compute them, for kvlean-ratio to time beside ours.

kvpress itself where it is installed (PyPI), else its formulas; Ada-KV and eager H2O from their
formulas, in the order and precision in which the authors do the work. kvlean-ratio starts this file with --serve and sends
one JSON object a line: load a form with its arrays, run it once, hand over its result. The clock
runs here, around the form alone. `python3 peers.py --check` computes small cases twice.
"""

import argparse
import json
import math
import os
import sys
import time


def die(line):
    print(f"peers.py: {line}", file=sys.stderr)
    sys.exit(2)


try:
    import numpy
    import torch
    import torch.nn.functional as F
except ImportError as missing:
    die(f"{missing.name} is not installed (pip install torch numpy)")


def repeat_heads(rows, times):
    """[heads, n, d] -> [heads * times, n, d], a copy, as attention modules do it."""
    heads, n, d = rows.shape
    return rows[:, None].expand(heads, times, n, d).reshape(heads * times, n, d)


def causal(scores, first):
    """Adds -inf where key j is newer than query first + i."""
    mask = torch.full_like(scores, float("-inf"))
    return scores + torch.triu(mask, diagonal=first + 1)


def snapkv_scores(keys, queries, window, kernel, **_):
    """SnapKV's window scores as kvpress computes them: [kv_heads, n]."""
    heads, n, d = keys.shape
    group = queries.shape[0] // heads
    window = int(window)
    kernel = int(kernel)
    attention = torch.matmul(queries, repeat_heads(keys, group).transpose(1, 2)) / math.sqrt(d)
    attention = causal(attention, n - window)
    attention = F.softmax(attention, dim=-1, dtype=torch.float32).to(queries.dtype)
    scores = attention[..., :-window].mean(dim=-2)
    scores = F.avg_pool1d(scores[None], kernel_size=kernel, padding=kernel // 2, stride=1)[0]
    scores = scores.view(heads, group, n - window).mean(dim=1)
    return F.pad(scores, (0, window), value=scores.max().item())


def h2o_sums(keys, queries, **_):
    """Attention received from every query of a prefill, through the N x N matrix: [kv_heads, n]."""
    heads, n, d = keys.shape
    group = queries.shape[0] // heads
    attention = torch.matmul(queries, repeat_heads(keys, group).transpose(1, 2)) / math.sqrt(d)
    attention = causal(attention, 0)
    attention = F.softmax(attention, dim=-1, dtype=torch.float32).to(queries.dtype)
    return attention.float().sum(dim=-2).view(heads, group, n).mean(dim=1)


def adakv_choice(scores, keep, floor):
    """Ada-KV's indices, best first, and budgets: all heads sorted, one top-k over the flattened
    scores, budgets blended with their floor."""
    heads, n = scores.shape
    base = int(n * keep)
    ordered, index = scores.sort(dim=-1, descending=True)
    best = torch.topk(ordered.flatten(), base * heads).indices
    counts = torch.zeros(heads, dtype=best.dtype, device=scores.device)
    counts.scatter_add_(0, best // n, torch.ones_like(best))
    return index, torch.round(counts * (1 - floor) + base * floor).int().tolist()


def adakv_selection(scores, keep, floor, **_):
    """Each head's best in order of score, one head after the other."""
    index, lengths = adakv_choice(scores, keep, floor)
    return torch.cat([index[head, :length] for head, length in enumerate(lengths)])


def turn_keys(keys, index, theta):
    """Moves gathered keys to the positions 0, 1, ..: angles, cosines and sines computed anew."""
    heads, kept, d = keys.shape
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    shift = torch.arange(kept)[None] - index
    angles = shift[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    cosine = angles.cos().to(keys.dtype)
    sine = angles.sin().to(keys.dtype)
    half = torch.cat((-keys[..., d // 2 :], keys[..., : d // 2]), dim=-1)
    return keys * cosine + half * sine


def snapkv_layer(keys, values, queries, window, kernel, keep, theta, **_):
    """One layer as a kvpress pipeline compresses it: score, top-k, sort, gather, turn."""
    heads, n, d = keys.shape
    scores = snapkv_scores(keys, queries, window, kernel)
    index = scores.topk(int(n * keep), dim=-1).indices
    index = torch.sort(index, dim=-1).values
    rows = index[..., None].expand(-1, -1, d)
    small_keys = turn_keys(keys.gather(1, rows).contiguous(), index, theta)
    small_values = values.gather(1, rows).contiguous()
    return small_keys, small_values


FORMS = {
    form.__name__: form for form in (snapkv_scores, h2o_sums, adakv_selection, snapkv_layer)
}


def use_kvpress():
    """Puts kvpress' own presses in the place of its formulas; its version, or None."""
    try:
        from importlib.metadata import version
        from types import SimpleNamespace

        from kvpress import KeyRerotationPress, SnapKVPress
    except ImportError:
        return None

    def module(queries, heads, theta=10000.0):
        """What a press asks of an attention layer: here the queries are ready made."""
        count, window, d = queries.shape
        rows = queries.transpose(0, 1).reshape(1, window, count * d)
        layer = SimpleNamespace(
            config=SimpleNamespace(num_attention_heads=count, num_key_value_heads=heads),
            head_dim=d,
            q_proj=lambda hidden: hidden,
            rotary_emb=SimpleNamespace(
                inv_freq=theta ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
            ),
        )
        hidden = torch.cat((rows[:, :1], rows), dim=1)  # longer than the window, as presses ask
        turned = (torch.ones(1, window, d).to(queries), torch.zeros(1, window, d).to(queries))
        return layer, hidden, {"position_embeddings": turned}

    def scores(keys, queries, window, kernel, **_):
        layer, hidden, extra = module(queries, keys.shape[0])
        press = SnapKVPress(window_size=int(window), kernel_size=int(kernel))
        return press.score(layer, hidden, keys[None], None, None, extra)[0]

    def whole_layer(keys, values, queries, window, kernel, keep, theta, **_):
        layer, hidden, extra = module(queries, keys.shape[0], theta)
        press = SnapKVPress(
            compression_ratio=1.0 - keep, window_size=int(window), kernel_size=int(kernel)
        )
        kept = KeyRerotationPress(press).compress(
            layer, hidden, keys[None], values[None], None, extra
        )
        return kept[0][0], kept[1][0]

    FORMS["snapkv_scores"] = scores
    FORMS["snapkv_layer"] = whole_layer
    return version("kvpress")


DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def read_array(entry):
    dtype = DTYPES[entry["dtype"]]
    raw = numpy.fromfile(entry["path"], dtype=numpy.float32 if dtype == torch.float32 else numpy.int16)
    array = torch.from_numpy(raw)
    if dtype != torch.float32:
        array = array.view(dtype)
    return array.reshape(entry["shape"])


class Server:
    def __init__(self, threads):
        # As kvlean-ratio takes it: of one thread its processor time, which nobody else disturbs.
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.form = None
        self.inputs = {}
        self.output = None
        self.kvpress = None

    def run(self):
        self.output = None
        start = self.clock()
        self.output = self.form(**self.inputs)
        return self.clock() - start

    def answer(self, request):
        what = request["do"]
        if what == "hello":
            kvpress = f", kvpress {self.kvpress}" if self.kvpress else ", kvpress' formulas"
            return {"version": torch.__version__ + kvpress}
        if what == "load":
            self.form = FORMS[request["form"]]
            self.inputs = {name: read_array(e) for name, e in request["arrays"].items()}
            self.inputs.update(request.get("numbers") or {})
            self.run()
            return {}
        if what == "run":
            return {"seconds": self.run()}
        if what == "result":
            first = self.output[0] if isinstance(self.output, tuple) else self.output
            first.float().numpy().tofile(request["path"])
            return {}
        if what == "unload":
            self.form, self.inputs, self.output = None, {}, None
            return {}
        return {"error": f"unknown request {what!r}"}

    def serve(self):
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints is not an answer
        self.kvpress = use_kvpress()
        for line in sys.stdin:
            try:
                reply = self.answer(json.loads(line))
            except Exception as error:  # pylint: disable=broad-except
                reply = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")}
            out.write(json.dumps(reply) + "\n")
            out.flush()


def check():
    """The forms against plain loops, on small shapes."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 64, 16), torch.randn(2, 64, 16)
    queries = torch.randn(4, 8, 16)
    scores = snapkv_scores(keys, queries, 8, 5)
    mean = torch.zeros(2, 56)
    for head in range(4):
        for i in range(8):
            logits = keys[head // 2, : 56 + i + 1] @ queries[head, i] / 4.0
            mean[head // 2] += logits.softmax(0)[:56] / 16.0
    padded = F.pad(mean, (2, 2))
    pooled = sum(padded[:, i : i + 56] for i in range(5)) / 5.0
    assert torch.allclose(scores[:, :56], pooled, atol=1e-6)
    sums = h2o_sums(keys, torch.randn(4, 64, 16))
    assert torch.allclose(sums.sum(1), torch.full((2,), 64.0), atol=1e-3)
    chosen = adakv_selection(torch.rand(2, 64), 0.25, 0.2)
    assert chosen.numel() == 32
    small_keys, small_values = snapkv_layer(keys, values, queries, 8, 5, 0.25, 10000.0)
    assert small_keys.shape == small_values.shape == (2, 16, 16)
    lengths = small_keys.norm(dim=-1)
    kept = torch.stack([k[scores[h].topk(16).indices.sort().values] for h, k in enumerate(keys)])
    assert torch.allclose(lengths, kept.norm(dim=-1), atol=1e-4)
    print(f"peers.py: torch {torch.__version__}, forms agree with plain loops")
    kvpress = use_kvpress()
    if kvpress:
        theirs = FORMS["snapkv_scores"](keys, queries, 8, 5)
        assert torch.allclose(theirs[:, :56], scores[:, :56], atol=1e-6)
        their_keys, their_values = FORMS["snapkv_layer"](keys, values, queries, 8, 5, 0.25, 10000.0)
        assert torch.allclose(their_keys, small_keys, atol=1e-5)
        assert torch.equal(their_values, small_values)
        print(f"peers.py: kvpress {kvpress} computes the same")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="answer kvlean-ratio on stdin")
    parser.add_argument("--check", action="store_true", help="test the forms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpus", default="", help="processors to run on, separated by commas")
    arguments = parser.parse_args()
    if arguments.cpus:
        os.sched_setaffinity(0, {int(cpu) for cpu in arguments.cpus.split(",")})
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.check:
        check()
    elif arguments.serve:
        Server(arguments.threads).serve()
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
